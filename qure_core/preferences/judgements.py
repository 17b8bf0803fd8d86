"""Judgements as objects below a study's URI, on a disk or an object store.

    study.json                              what the study is, and the salt of its names
    judgements/PARTICIPANT/QUESTION.json    one judgement, written whole or not at all
    judgements-DIGEST.parquet               all of them, as of the last `compacted`
    manifest.json                           says which that is

A participant's question has one object: what is sent twice, or taken back and answered anew,
counts once. Whoever writes needs no other writer's leave.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import pyarrow as pa

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.storage.parquet import parquet_bytes

Choice = Literal["left", "right", "both", "neither", "skip"]
Role = Literal["plain", "repeat", "obvious"]
CHOICES, ROLES = get_args(Choice), get_args(Role)
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
STUDY_KIND = storage.Kind(
    "preference study",
    r"study\.json|judgements-[0-9a-f]{16}\.parquet|"
    r"judgements/[A-Za-z0-9_-]{1,64}/[A-Za-z0-9_-]{1,64}\.json|"
    r"pairs\.json|plans/[A-Za-z0-9_-]{1,64}\.json",
)
_THREADS = 16  # an object store answers many at once


@dataclass(frozen=True)
class Judgement:
    """Which of two results of a query a participant found better.

    ``left_ids`` and ``right_ids`` are what was shown, best first: lists, or one image each.
    ``left_model`` and ``right_model`` say whose they are, and are empty where nobody knows.
    ``participant`` is a hashed name (`Study.participant`), ``question`` names what was asked of
    it. ``role`` "repeat" asks the question ``repeats`` again; "obvious" has one side that is
    right, ``expected``. ``seconds`` is how long the answer took, ``time`` when it was given (ISO).
    """

    participant: str
    question: str
    query_id: str
    reference_id: str
    text: str
    left_ids: tuple[str, ...]
    right_ids: tuple[str, ...]
    choice: Choice
    left_model: str = ""
    right_model: str = ""
    role: Role = "plain"
    repeats: str = ""
    expected: str = ""
    seconds: float | None = None
    time: str = ""

    @property
    def decided(self) -> bool:
        """Whether one side was chosen."""
        return self.choice in ("left", "right")

    @property
    def winner(self) -> tuple[str, ...] | None:
        """What was chosen, whichever side it was on; None without a choice of one."""
        return {"left": self.left_ids, "right": self.right_ids}.get(self.choice)


_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("participant", "question", "query_id", "reference_id")),
        ("text", pa.string()),
        ("left_ids", pa.list_(pa.string())),
        ("right_ids", pa.list_(pa.string())),
        *((name, pa.string()) for name in ("choice", "left_model", "right_model", "role")),
        *((name, pa.string()) for name in ("repeats", "expected")),
        ("seconds", pa.float64()),
        ("time", pa.string()),
    ]
)
assert _SCHEMA.names == [field.name for field in fields(Judgement)]


def judgement_of(value: Any, where: str) -> Judgement:
    """A judgement from plain data; `InputError` naming ``where`` it is and what is wrong."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: a judgement is an object of {', '.join(_SCHEMA.names)}")
    given = {name: item for name, item in value.items() if item is not None}
    if unknown := sorted(set(given) - set(_SCHEMA.names)):
        raise InputError(f"{where}: {unknown[0]!r} is no part of a judgement")
    for name in ("left_ids", "right_ids"):
        ids = given.get(name)
        if (
            not isinstance(ids, (list, tuple))
            or not ids
            or not all(isinstance(i, str) for i in ids)
        ):
            raise InputError(f"{where}: {name} has to be a list of image ids")
        given[name] = tuple(ids)
    seconds = given.pop("seconds", None)
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, (int, float))):
        raise InputError(f"{where}: seconds has to be a number")
    for name, item in given.items():
        if name not in ("left_ids", "right_ids") and not isinstance(item, str):
            raise InputError(f"{where}: {name} has to be text")
    try:
        found = Judgement(**given, seconds=None if seconds is None else float(seconds))
    except TypeError as error:
        raise InputError(f"{where}: {str(error).removeprefix('Judgement.__init__() ')}") from None
    for name, allowed in (("choice", CHOICES), ("role", ROLES)):
        if getattr(found, name) not in allowed:
            raise InputError(
                f"{where}: {name} {getattr(found, name)!r} is not one of {', '.join(allowed)}"
            )
    for name in ("participant", "question"):
        if not _NAME.fullmatch(getattr(found, name)):
            raise InputError(
                f"{where}: {name} {getattr(found, name)!r} has to be 1 to 64 letters, "
                "digits, _ and -"
            )
    if found.role == "obvious" and found.expected not in ("left", "right"):
        raise InputError(f"{where}: an obvious question says which side is expected")
    return found


@dataclass(frozen=True)
class Study:
    """A study's place, and what it hashes names with."""

    uri: str
    salt: str

    @classmethod
    def planned(cls, uri: str) -> Study:
        """The study at ``uri``, or one that could begin there: nothing is written. Raises
        `InputError` if something else is there."""
        storage.check_place(uri, STUDY_KIND, "study")
        begun = storage.exists(storage.join(uri, "study.json"))
        return cls.open(uri) if begun else cls(uri, secrets.token_hex(16))

    def begin(self, about: dict[str, Any]) -> Study:
        """Begin it, if it is not there yet; return the one that is: of several who begin a study
        at once, one does."""
        storage.begin(self.uri, STUDY_KIND)
        place = storage.join(self.uri, "study.json")
        storage.create(place, storage.compact_json({"salt": self.salt, **about}))
        return self.open(self.uri)

    @classmethod
    def open(cls, uri: str) -> Study:
        """The study at ``uri``; `InputError` if there is none."""
        place = storage.join(uri, "study.json")
        if not storage.exists(place):
            raise InputError(f"{uri}: no study.json, so this is no preference study")
        return cls(uri, storage.read_json(place)["salt"])

    def participant(self, name: str) -> str:
        """What a participant is called in the store: their name, hashed slowly with the salt."""
        hashed = hashlib.scrypt(
            name.strip().encode(), salt=bytes.fromhex(self.salt), n=2**12, r=8, p=1, dklen=8
        )
        return hashed.hex()

    def _place(self, participant: str, question: str) -> str:
        return storage.join(self.uri, "judgements", participant, f"{question}.json")

    def write(self, judgement: Judgement) -> None:
        """Keep a judgement, in place of an earlier one of the same question."""
        place = self._place(judgement.participant, judgement.question)
        storage.write_json(place, asdict(judgement))

    def take_back(self, participant: str, question: str) -> None:
        """Forget a judgement, if it is there."""
        storage.remove_file(self._place(participant, question))

    def forget(self, participant: str) -> int:
        """Remove everything of a participant, from the last `compacted` too; return how many
        judgements it were. Killed, the same call goes on. Raises `InputError` naming an object
        among theirs that is no judgement."""
        folder = storage.join(self.uri, "judgements", participant)
        names = [f"{one.question}.json" for one in self.answered(participant)]
        storage.remove_files(folder, names)
        storage.remove_empty_folder(folder)
        storage.remove_file(storage.join(self.uri, "plans", f"{participant}.json"))
        if storage.is_committed(self.uri):
            self.compacted()
        return len(names)

    def answered(self, participant: str) -> list[Judgement]:
        """What a participant has judged, by question."""
        return self._read([participant])

    def read(self) -> list[Judgement]:
        """Every judgement, by participant and question. Raises `InputError` naming an object that
        is none."""
        return self._read(sorted(storage.list_names(storage.join(self.uri, "judgements"))))

    def _read(self, participants: Sequence[str]) -> list[Judgement]:
        with ThreadPoolExecutor(_THREADS) as pool:
            folders = [storage.join(self.uri, "judgements", name) for name in participants]
            listed = pool.map(storage.list_names, folders)
            places = [
                storage.join(folder, name)
                for folder, names in zip(folders, listed, strict=True)
                for name in sorted(names)
                if name.endswith(".json")
            ]
            values = pool.map(storage.read_json, places)
            return [judgement_of(v, place) for v, place in zip(values, places, strict=True)]

    def compacted(self) -> tuple[str, int]:
        """Write all judgements as one Parquet file, which the manifest names; return its URI and
        how many they are. The same judgements give the same file."""
        rows = [asdict(judgement) for judgement in self.read()]
        data = parquet_bytes(pa.Table.from_pylist(rows, _SCHEMA))
        name = f"judgements-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
        storage.write_bytes(storage.join(self.uri, name), data)
        about = {"judgements": len(rows), "file": name}
        storage.commit(self.uri, STUDY_KIND, about, {name: storage.file_facts(data)})
        for other in storage.list_names(self.uri):
            if other != name and re.fullmatch(r"judgements-[0-9a-f]{16}\.parquet", other):
                storage.remove_file(storage.join(self.uri, other))
        return storage.join(self.uri, name), len(rows)


def write_all(study: Study, judgements: Iterable[Judgement]) -> int:
    """Keep many; return how many."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return len(list(pool.map(study.write, judgements)))
