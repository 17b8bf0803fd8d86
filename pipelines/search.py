"""Ask an index: an image and a few words, a ranked list.

    python pipelines/search.py --index INDEX --image photo.jpg --text "longer and in red"
    python pipelines/search.py --index INDEX --image IMAGE-ID --html answers.html
    python pipelines/search.py --index INDEX --batch questions.jsonl --output answers.parquet

``--image`` is a file, a URI, or the id of an image of the index; either of image and text may be
left out. Lines of a batch are {"id": ..., "image": ..., "text": ..., "category": ..., "exclude":
[...]}, of which all but image or text may be absent.
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
from qure_core.runtime.command import run_main

_FIELDS = {"id", "image", "text", "category", "exclude"}


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
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", help="write one page with the pictures to this file")
    parser.add_argument("--batch", help="questions, one JSON object a line: a path or URI")
    parser.add_argument("--output", help="of a batch: the Parquet file to write, a path or URI")
    chosen = parser.parse_args()
    for name in ("image", "text", "html", "category", "exclude", "json"):
        if chosen.batch and getattr(chosen, name):
            raise InputError(f"--batch: its lines hold the questions; leave out --{name}")
    if bool(chosen.batch) != bool(chosen.output):
        raise InputError("--batch and --output go together")
    if not (chosen.batch or chosen.image or (chosen.text or "").strip()):
        raise InputError("--image, --text: give one of them, or both")
    return chosen


def questions_of(uri: str) -> list[tuple[str, dict[str, Any]]]:
    """Ids and fields of a batch's lines."""
    if not storage.exists(uri):
        raise InputError(f"--batch: {uri} does not exist")
    found: list[tuple[str, dict[str, Any]]] = []
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
        if not isinstance(exclude, list) or not all(map(is_text, (*exclude, *texts))):
            raise InputError(f"{place}: its fields are texts, and exclude a list of them")
        if not row.get("image") and not (row.get("text") or "").strip():
            raise InputError(f"{place}: has neither image nor text")
        name = row.get("id", str(number))
        if name in ids:
            raise InputError(f"{place}: id {name!r} is also that of line {ids[name]}")
        ids[name] = number
        found.append((name, row))
    if not found:
        raise InputError(f"--batch: {uri} holds no questions")
    return found


def main() -> None:
    from qure_core.report.answers import answers_page
    from qure_core.search import Retriever
    from qure_core.search.answers import write_answers
    from qure_core.search.retriever import Question

    chosen = read()
    for name in ("html", "output"):
        value = getattr(chosen, name)
        if value and storage.exists(storage.resolve(value)):
            raise InputError(f"--{name}: {value} exists already; choose another name")
    retriever = Retriever.open(chosen.index, chosen.checkpoint)
    if chosen.batch:
        rows = questions_of(storage.resolve(chosen.batch))
        questions = [
            Question(
                row.get("image"),
                row.get("text"),
                row.get("category"),
                tuple(row.get("exclude", ())),
            )
            for _, row in rows
        ]
        output = storage.resolve(chosen.output)
        names = [name for name, _ in rows]
        write_answers(output, names, retriever.ask_all(questions, chosen.top))
        print(f"answered {len(rows):,} question(s): {output}")
        return
    answers = retriever.ask(chosen.image, chosen.text, chosen.top, chosen.category, chosen.exclude)
    if chosen.json:
        print(json.dumps([answer.__dict__ for answer in answers], indent=2))
    else:
        print(f"{'':>4}  {'score':>7}  image")
        for answer in answers:
            print(f"{answer.rank:>4}  {answer.score:>7.4f}  {answer.image_id}")
    if chosen.html:
        image = chosen.image and str(retriever.source(chosen.image))
        made = retriever.index.manifest
        data = DataSettings(pixels=made["pixels"], max_image_pixels=made["max_image_pixels"])
        page = answers_page(image, chosen.text, answers, data)
        storage.write_bytes(storage.resolve(chosen.html), page.encode())
        print(f"page: {storage.resolve(chosen.html)}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
