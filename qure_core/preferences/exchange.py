"""Judgements from and to files: JSON lines, and the form in which HP-FashionIQ was released."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.evaluation.protocols.hp_fashioniq import parse_hp_fashioniq
from qure_core.preferences.judgements import Judgement, Study, judgement_of


def read_judgements(uri: str, study: Study) -> list[Judgement]:
    """Judgements of a file of either form, told apart by its name (.json or .jsonl).

    Participants of the released form, whose names are no hashes, get the study's. Raises
    `InputError` naming the line that is wrong.
    """
    if uri.endswith(".json"):
        return _of_released(uri, study)
    if not uri.endswith(".jsonl"):
        raise InputError(f"{uri}: its name has to end in .json (as HP-FashionIQ) or .jsonl")
    found = [judgement_of(value, where) for where, value in json_lines(uri)]
    return _each_once(found, uri)


def json_lines(uri: str) -> Iterator[tuple[str, Any]]:
    """Where each line of a file is, for people, and its value; `InputError` naming one that is no
    JSON."""
    try:
        lines = storage.read_bytes(uri).decode().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{uri}: is not UTF-8 ({error})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{uri}, line {number}"
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise InputError(f"{where}: is no JSON ({error})") from None


def _each_once(found: Sequence[Judgement], uri: str) -> list[Judgement]:
    by_question: dict[tuple[str, str], Judgement] = {}
    for judgement in found:
        key = (judgement.participant, judgement.question)
        if by_question.setdefault(key, judgement) != judgement:
            raise InputError(
                f"{uri}: participant {key[0]} answers question {key[1]} twice, and not alike"
            )
    return list(by_question.values())


def _of_released(uri: str, study: Study) -> list[Judgement]:
    pairs = parse_hp_fashioniq(storage.read_json(uri), uri)
    hashed = {name: study.participant(name) for name in {pair.participant for pair in pairs}}
    count: dict[str, int] = {}
    found = []
    for pair in pairs:
        number = count[pair.participant] = count.get(pair.participant, 0) + 1
        found.append(
            Judgement(
                participant=hashed[pair.participant],
                question=f"q{number:05d}",
                query_id=f"{pair.reference_id}: {pair.text}",
                reference_id=pair.reference_id,
                text=pair.text,
                left_ids=pair.set1,
                right_ids=pair.set2,
                choice="left" if pair.preferred == 1 else "right",
            )
        )
    return found


def to_jsonl(judgements: Sequence[Judgement]) -> bytes:
    """Judgements as JSON lines, which `read_judgements` takes."""
    return b"".join(storage.compact_json(asdict(one)) + b"\n" for one in judgements)


def to_released(judgements: Sequence[Judgement]) -> tuple[bytes, int]:
    """Judgements in HP-FashionIQ's form, and how many it has no room for: ties and skips."""
    people: dict[str, list[Judgement]] = {}
    left = 0
    for judgement in judgements:
        if judgement.decided:
            people.setdefault(judgement.participant, []).append(judgement)
        else:
            left += 1

    def path(image_id: str) -> str:
        return f"/-/image_data/all/{image_id}.jpg"

    def shown(ids: Sequence[str]) -> dict[str, Any]:
        return {"img_path": [path(name) for name in ids]}

    whole = {
        participant: {
            "question_set_1": {
                "ref_img_paths": [path(one.reference_id) for one in own],
                "sentences": [one.text for one in own],
                "retrieved_set1": [shown(one.left_ids) for one in own],
                "retrieved_set2": [shown(one.right_ids) for one in own],
                "preferred set": [1 if one.choice == "left" else 2 for one in own],
            }
        }
        for participant, own in people.items()
    }
    return json.dumps(whole, indent=1).encode(), left
