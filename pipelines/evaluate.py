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
from typing import Any

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.runtime.command import run_job
from qure_core.runtime.settings import load_settings

PROTOCOLS = ("own", "fashioniq", "cirr", "cirr-test", "circo", "circo-test", "hp-fashioniq")
RESULT = ("protocol", "checkpoint", "data", "result", "uri")


def _recalls(recall: dict[str, dict[str, float]]) -> list[str]:
    lines = []
    for category, row in recall.items():
        cells = "  ".join(f"{name} {value:6.2f}" for name, value in row.items())
        lines.append(f"  {category:<12} {cells}")
    return lines


def tables(protocol: str, manifest: dict[str, Any]) -> list[str]:
    """The result as text, its figures beside published ones where the data are the benchmark's."""
    from qure_core.evaluation.published import comparison_table

    result, dataset = manifest["result"], manifest.get("dataset")
    if protocol == "own":
        lines = [
            f"split {result['split']}: {result['queries']:,} queries; "
            f"{result['tied']} have a tied target",
            *_recalls(result["recall"]),
        ]
        if relevance := result.get("relevance"):
            cells = "  ".join(
                f"{name} {value:.2f}" for name, value in relevance.items() if name != "queries"
            )
            lines.append(f"  relevance    {cells}  ({relevance['queries']:,} queries)")
        return lines
    if protocol == "fashioniq":
        lines = []
        for gallery, part in result.items():
            lines.append(f"gallery: {gallery}; {part['tied']} queries have a tied target")
            lines += _recalls(part["recall"])
            average = part["recall"]["average"]
            lines.append(comparison_table(dataset, average, f"{gallery} gallery"))
        return lines
    if protocol in ("cirr", "circo"):
        figures = result.get("recall") or result["map"]
        return [comparison_table(dataset, figures, "val"), f"{result['tied']} tied targets"]
    if protocol == "hp-fashioniq":
        return [
            f"{name:<10} {part['value']:.4f}  95% interval {part['interval_95'][0]:.4f} to "
            f"{part['interval_95'][1]:.4f}  ({part['pairs']:,} pairs)"
            for name, part in (("ratio", result["ratio"]), ("symmetric", result["symmetric"]))
        ] + [f"{result['ties']} ties; intervals resample {result['participants']} participants"]
    return [f"submission for {result['queries']:,} queries, checked against the server's rules"]


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
    from qure_core.evaluation.run_protocol import evaluate_protocol
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
    print("\n".join(tables(chosen.protocol, manifest)))
    for name in manifest["files"]:
        print(f"file:   {storage.join(manifest['uri'], name)}")
    print(f"result: {file}", flush=True)


if __name__ == "__main__":
    run_job("evaluate", read, work)
