"""Ask an index: an image and a few words, a ranked list.

    python pipelines/search.py --index INDEX --image photo.jpg --text "longer and in red"
    python pipelines/search.py --index INDEX --image IMAGE-ID --html answers.html
    python pipelines/search.py --index INDEX --batch questions.jsonl --output answers.parquet

``--image`` is a file, a URI, or the id of an image of the index; either of image and text may be
left out. Lines of a batch are {"id": ..., "image": ..., "text": ..., "category": ..., "exclude":
[...], "where": {column: value}}, of which all but image or text may be absent; they are answered on
the cluster, by Ray Data.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from qure_core import storage
from qure_core.base.config import DataSettings
from qure_core.base.errors import InputError
from qure_core.data.layout import is_text
from qure_core.runtime.command import run_job, run_main

_FIELDS = {"id", "image", "text", "category", "exclude", "where"}


def read() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pipelines/search.py", description="Ask an index.")
    parser.add_argument("--index", required=True, help="an index: a path or URI")
    parser.add_argument("--checkpoint", help="where the checkpoint it was made with is now")
    parser.add_argument("--image", help="reference image: a file, a URI, or an id of the index")
    parser.add_argument("--text", help="what is to be different, or, without an image, wanted")
    parser.add_argument("--top", type=int, default=20, help="answers (%(default)s)")
    parser.add_argument("--category", help="look among its images alone")
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="ID", help="not to be found; repeatable"
    )
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="look among images whose metadata has this value; repeatable",
    )
    parser.add_argument("--exact", action="store_true", help="score every image")
    parser.add_argument("--cache", default=None, help="directory for copies of a remote index")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", help="write one page with the pictures to this file")
    parser.add_argument("--batch", help="questions, one JSON object a line: a path or URI")
    parser.add_argument("--output", help="of a batch: the Parquet file to write, a path or URI")
    parser.add_argument("--actors", type=int, default=1, help="of a batch (%(default)s)")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs of an actor (%(default)s)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of an actor (%(default)s)")
    chosen = parser.parse_args()
    for name in ("image", "text", "html", "category", "exclude", "json", "where", "exact"):
        if chosen.batch and getattr(chosen, name):
            raise InputError(f"--batch: its lines hold the questions; leave out --{name}")
    if bool(chosen.batch) != bool(chosen.output):
        raise InputError("--batch and --output go together")
    if not (chosen.batch or chosen.image or (chosen.text or "").strip()):
        raise InputError("--image, --text: give one of them, or both")
    return chosen


def questions_of(uri: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Places, ids and fields of a batch's lines."""
    if not storage.exists(uri):
        raise InputError(f"--batch: {uri} does not exist")
    found: list[tuple[str, str, dict[str, Any]]] = []
    ids: dict[str, int] = {}
    for number, line in enumerate(storage.read_bytes(uri).splitlines(), 1):
        if not line.strip():
            continue
        place = f"{uri} [line {number}]"
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{place}: no JSON object")
        if unknown := sorted(set(row) - _FIELDS):
            raise InputError(f"{place}: {unknown[0]!r} is not one of {', '.join(sorted(_FIELDS))}")
        exclude = row.get("exclude", [])
        texts = [row[name] for name in ("id", "image", "text", "category") if name in row]
        where = row.get("where", {})
        listed = isinstance(exclude, list) and isinstance(where, dict)
        if not listed or not all(map(is_text, (*exclude, *texts, *where.values()))):
            raise InputError(
                f"{place}: its fields are texts, exclude a list of them, where an object of them"
            )
        if not row.get("image") and not (row.get("text") or "").strip():
            raise InputError(f"{place}: has neither image nor text")
        name = row.get("id", str(number))
        if name in ids:
            raise InputError(f"{place}: id {name!r} is also that of line {ids[name]}")
        ids[name] = number
        found.append((place, name, row))
    if not found:
        raise InputError(f"--batch: {uri} holds no questions")
    return found


def answer_many(chosen: argparse.Namespace) -> None:
    from qure_core.runtime.resources import connect
    from qure_core.search.batch import answer_batch
    from qure_core.search.index import CACHE

    questions = questions_of(storage.resolve(chosen.batch))
    output = storage.resolve(chosen.output)
    storage.check_writable(output.rsplit("/", 1)[0], "--output")
    connect()
    answer_batch(
        storage.resolve(chosen.index),
        questions,
        output,
        top=chosen.top,
        checkpoint=chosen.checkpoint and storage.resolve(chosen.checkpoint),
        cache=chosen.cache or CACHE,
        actors=chosen.actors,
        resources={"num_cpus": chosen.cpus, "num_gpus": chosen.gpus},
    )
    print(f"answered {len(questions):,} question(s): {output}", flush=True)


def answer_one(chosen: argparse.Namespace) -> None:
    from qure_core.report.answers import answers_page
    from qure_core.search import Retriever
    from qure_core.search.index import CACHE
    from qure_core.search.likely import likely_matches

    if chosen.html:
        storage.check_writable(storage.resolve(chosen.html).rpartition("/")[0] or ".", "--html")
    where = {}
    for text in chosen.where:
        column, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--where: {text!r} is not COLUMN=VALUE")
        where[column] = value
    retriever = Retriever.open(chosen.index, chosen.checkpoint, cache=chosen.cache or CACHE)
    answers = retriever.ask(
        *(chosen.image, chosen.text, chosen.top, chosen.category, chosen.exclude),
        where=where,
        exact=chosen.exact,
    )
    if chosen.json:
        print(json.dumps([answer.__dict__ for answer in answers], indent=2))
    else:
        likely = likely_matches([answer.score for answer in answers])
        print(f"{'':>4}  {'score':>7}  image")
        for answer in answers:
            print(f"{answer.rank:>4}  {answer.score:>7.4f}  {answer.image_id}")
            if answer.rank == likely < len(answers):
                print(f"{'':>4}  {'-' * 7}  likely matches above")
    if chosen.html:
        image = chosen.image and str(retriever.source(chosen.image))
        made = retriever.index.manifest
        data = DataSettings(pixels=made["pixels"], max_image_pixels=made["max_image_pixels"])
        page = answers_page(image, chosen.text, answers, data)
        storage.write_bytes(storage.resolve(chosen.html), page.encode())
        print(f"page: {storage.resolve(chosen.html)}", file=sys.stderr)


def checked() -> argparse.Namespace:
    chosen = read()
    for name in ("html", "output"):
        value = getattr(chosen, name)
        if value and storage.exists(storage.resolve(value)):
            raise InputError(f"--{name}: {value} exists already; choose another name")
    return chosen


def main() -> None:
    if any(word.split("=")[0] == "--batch" for word in sys.argv[1:]):
        run_job("search", checked, answer_many)
    else:
        run_main(lambda: answer_one(checked()))


if __name__ == "__main__":
    main()
