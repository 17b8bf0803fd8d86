"""Evaluate a checkpoint under a benchmark's protocol, or write its submission files.

    python pipelines/evaluate.py --protocol own --checkpoint DIR --config CONFIG --output OUT
    python pipelines/evaluate.py --protocol fashioniq --checkpoint DIR --data.root DATA --output OUT

Protocols: own (any layout's val split, or --split: recalls per category and, where the data say
which images are relevant, R-precision), fashioniq (val, both galleries), cirr (val), cirr-test,
circo (val), circo-test, hp-fashioniq (with --judged hpfiq.json). The result is kept under a digest
of the weights, the annotations and the images' bytes: the same question is not computed twice, a
changed one always is.
"""

from __future__ import annotations

import argparse
import sys

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.evaluation.protocols import PROTOCOLS
from qure_core.runtime.command import run_job
from qure_core.runtime.settings import load_settings

RESULT = ("protocol", "checkpoint", "data", "result", "uri")


def check_result_file(output: str, protocol: str) -> None:
    """Raise `InputError` if another file than an earlier result has the name of this one's."""
    file = storage.join(output, f"{protocol}.json")
    if not storage.exists(file):
        return
    found = storage.read_json(file)
    if not isinstance(found, dict) or set(found) != set(RESULT):
        raise InputError(
            f"output: {file} is no result of this project, and the result would take its place; "
            "choose another directory"
        )


def read() -> tuple[Settings, argparse.Namespace]:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--checkpoint", required=True, help="checkpoint directory: a path or URI")
    options.add_argument("--protocol", required=True, choices=PROTOCOLS, help="what to evaluate")
    options.add_argument("--output", required=True, help="where results are kept: a path or URI")
    options.add_argument("--judged", help="hp-fashioniq: path of hpfiq.json")
    options.add_argument("--split", default="val", help="own: the split (default: %(default)s)")
    settings, chosen = load_settings(
        sys.argv[1:], "pipelines/evaluate.py", "Evaluate a checkpoint under a protocol.", options
    )
    chosen.output = storage.resolve(chosen.output)
    check_result_file(chosen.output, chosen.protocol)
    storage.check_writable(chosen.output, "output")
    return settings, chosen


def work(arguments: tuple[Settings, argparse.Namespace]) -> None:
    from qure_core.evaluation.run_protocol import evaluate_protocol, measured_by
    from qure_core.runtime.resources import connect, plan_resources

    settings, chosen = arguments
    connect()
    manifest = evaluate_protocol(
        settings,
        plan_resources(settings.cluster),
        storage.resolve(chosen.checkpoint),
        chosen.protocol,
        chosen.output,
        storage.resolve(chosen.judged) if chosen.judged else None,
        chosen.split,
    )
    file = storage.join(chosen.output, f"{chosen.protocol}.json")
    storage.write_json(file, {name: manifest[name] for name in RESULT})
    protocol = measured_by(chosen.protocol, settings)
    print("\n".join(protocol.lines(manifest["result"], manifest["dataset"])))
    for name in manifest["files"]:
        print(f"file:   {storage.join(manifest['uri'], name)}")
    print(f"result: {file}", flush=True)


if __name__ == "__main__":
    run_job("evaluate", read, work)
