"""People's judgements of what was retrieved: bring them in, count them, hand them on.

    python pipelines/preferences.py import STUDY hpfiq.json|judgements.jsonl
    python pipelines/preferences.py report STUDY [--json]
    python pipelines/preferences.py compact STUDY
    python pipelines/preferences.py export STUDY OUTPUT.json|OUTPUT.jsonl
    python pipelines/preferences.py forget STUDY NAME

STUDY is a path or URI. Exit status: 0 done; 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.runtime.command import run_main


def _arguments(verb: str, *names: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"pipelines/preferences.py {verb}")
    for name in ("study", *names):
        parser.add_argument(name)
    if verb == "report":
        parser.add_argument("--json", action="store_true", help="print plain data")
    chosen = parser.parse_args(sys.argv[2:])
    chosen.study = storage.resolve(chosen.study).rstrip("/")
    return chosen


def bring_in() -> None:
    from qure_core.preferences.exchange import read_judgements
    from qure_core.preferences.judgements import Study, write_all

    chosen = _arguments("import", "file")
    file = storage.resolve(chosen.file)
    if not storage.is_file(file):
        raise InputError(f"file: {file} is not there")
    planned = Study.planned(chosen.study)
    judgements = read_judgements(file, planned)  # before anything is written
    study = planned.begin({})
    if study.salt != planned.salt:  # somebody else began it meanwhile
        judgements = read_judgements(file, study)
    count = write_all(study, judgements)
    print(f"{count:,} judgements are in {study.uri}")


def report() -> None:
    from qure_core.preferences.judgements import Study
    from qure_core.preferences.said import told, what_they_say

    chosen = _arguments("report")
    judgements = Study.open(chosen.study).read()
    if not judgements:
        raise InputError(f"{chosen.study}: holds no judgement yet")
    said = what_they_say(judgements)
    print(json.dumps(said, indent=1) if chosen.json else told(said))


def compact() -> None:
    from qure_core.preferences.judgements import Study

    uri, count = Study.open(_arguments("compact").study).compacted()
    print(f"{count:,} judgements are in {uri}")


def export() -> None:
    from qure_core.preferences.exchange import to_jsonl, to_released
    from qure_core.preferences.judgements import Study

    chosen = _arguments("export", "output")
    output, judgements = storage.resolve(chosen.output), Study.open(chosen.study).read()
    if not output.endswith((".json", ".jsonl")):
        raise InputError(f"output: {output} has to end in .json (as HP-FashionIQ) or .jsonl")
    left = 0
    data = to_jsonl(judgements)
    if output.endswith(".json"):
        data, left = to_released(judgements)
    if not storage.create(output, data):
        raise InputError(f"output: {output} exists already; choose another place")
    said = f", {left:,} ties and skips left out, for which it has no room" if left else ""
    print(f"{len(judgements) - left:,} judgements are in {output}{said}")


def forget() -> None:
    from qure_core.preferences.judgements import Study

    chosen = _arguments("forget", "name")
    study = Study.open(chosen.study)
    count = study.forget(study.participant(chosen.name))
    if not count:
        raise InputError(f"name: {study.uri} has nothing of {chosen.name!r}")
    print(f"{count:,} judgements of {chosen.name} were removed")


VERBS: dict[str, Callable[[], None]] = {
    "import": bring_in,
    "report": report,
    "compact": compact,
    "export": export,
    "forget": forget,
}


def main() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb in VERBS:
        run_main(VERBS[verb])
    print(__doc__)
    sys.exit(0 if verb in ("-h", "--help") else 2)


if __name__ == "__main__":
    main()
