"""People's judgements of what was retrieved: collect or import them, count them, hand them on.

    python pipelines/preferences.py collect --indexes A B --queries queries.jsonl --output STUDY
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


def read_collect(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pipelines/preferences.py collect")
    parser.add_argument("--indexes", nargs=2, required=True, metavar=("A", "B"), help="two indexes")
    parser.add_argument("--names", nargs=2, help="what to call their models (default: the indexes)")
    parser.add_argument("--queries", required=True, help='JSON lines {"image": ID, "text": ...}')
    parser.add_argument("--output", required=True, help="the study: a path or URI")
    parser.add_argument("--top", type=int, default=5, help="results of a side (%(default)s)")
    parser.add_argument("--people", type=int, default=3, help="who judge a query (%(default)s)")
    parser.add_argument("--questions", type=int, default=50, help="of a participant (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="asked again (%(default)s)")
    parser.add_argument("--obvious", type=int, default=3, help="obvious ones (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (%(default)s)")
    parser.add_argument("--port", type=int, default=8001, help="0 takes a free one (%(default)s)")
    parser.add_argument("--token-file", help="file with a token that participants have to know")
    chosen = parser.parse_args(words)
    for name in ("top", "people", "questions"):
        if getattr(chosen, name) < 1:
            raise InputError(f"--{name}: {getattr(chosen, name)} is less than 1")
    for name in ("repeats", "obvious"):
        if getattr(chosen, name) < 0:
            raise InputError(f"--{name}: {getattr(chosen, name)} is less than 0")
    chosen.names = tuple(chosen.names or chosen.indexes)
    if chosen.names[0] == chosen.names[1]:
        raise InputError(f"--names: both are {chosen.names[0]!r}; give each model its own")
    return chosen


def collect() -> None:
    """Ask people on a page, until it is interrupted. What a study asks is settled when it begins:
    the same command goes on with it, and further ones beside it serve the same study."""
    import uvicorn

    from qure_core.preferences.judgements import Study
    from qure_core.preferences.preparing import make_pairs, read_queries
    from qure_core.preferences.questions import Asking, Pairs
    from qure_core.runtime.network import free_port
    from qure_core.search.retriever import Retriever
    from qure_core.serve.judging import make_judging
    from qure_core.serve.options import LOOPBACK, Options, token_of

    chosen = read_collect(sys.argv[2:])
    token = token_of(chosen.token_file)
    uri = storage.resolve(chosen.output).rstrip("/")
    study = Study.planned(uri)
    if storage.exists(storage.join(uri, "pairs.json")):
        pairs = Pairs.read(study)
        print(f"the study {uri} goes on as it was begun", flush=True)
    else:
        queries = read_queries(storage.resolve(chosen.queries))
        one, other = (Retriever.open(index) for index in chosen.indexes)
        asking = Asking(chosen.people, chosen.questions, chosen.repeats, chosen.obvious)
        pairs, same = make_pairs(
            (one, other), chosen.names, queries, chosen.top, asking, chosen.seed
        )
        if same:
            print(f"{same:,} of {len(queries):,} queries left out: both find the same", flush=True)
        if not pairs.pairs:
            raise InputError("--indexes: both find the same for every query; nothing to judge")
        study = study.begin({"models": list(chosen.names)})
        pairs = pairs.write(study)
    local = chosen.host in LOOPBACK
    options = Options(index=uri, token=token, hosts=LOOPBACK if local else None, upload_mb=1)
    if not local and token is None:
        print(f"anyone who reaches {chosen.host} can take part; --token-file limits it", flush=True)
    port = chosen.port or free_port()
    shown = "127.0.0.1" if chosen.host in ("0.0.0.0", "::") else chosen.host
    print(
        f"asking about {len(pairs.pairs):,} queries: http://{shown}:{port}/\n"
        f"judgements go to {uri}; Ctrl-C ends it, and the same command goes on",
        flush=True,
    )
    uvicorn.run(
        make_judging(study, pairs, options),
        host=chosen.host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )


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
    "collect": collect,
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
