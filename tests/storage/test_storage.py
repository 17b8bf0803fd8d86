from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from qure_core import storage
from qure_core.base.errors import InputError

THING = storage.Kind("thing", r"[ab]\.txt")


@pytest.fixture(params=["local", "memory"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "s") if request.param == "local" else f"memory://{tmp_path.name}"


def make(uri: str, text: str = "one") -> None:
    with storage.committed_directory(uri, THING) as (directory, description):
        (directory / "a.txt").write_text(text)
        description["answer"] = 42


def test_commit_and_read_back(base: str) -> None:
    uri = storage.join(base, "thing")
    make(uri)
    assert storage.read_manifest(uri, THING)["answer"] == 42
    with storage.local_copy(uri) as directory:
        assert (Path(directory) / "a.txt").read_text() == "one"
    make(uri, "two")
    with storage.local_copy(uri) as directory:
        assert (Path(directory) / "a.txt").read_text() == "two"
    assert storage.list_names(base) == ["thing"]


def test_a_failed_body_leaves_nothing(base: str) -> None:
    uri = storage.join(base, "thing")

    def fail() -> None:
        with storage.committed_directory(uri, THING) as (directory, _):
            (directory / "a.txt").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not storage.exists(uri)
    assert storage.list_names(base) == []


def test_uncommitted_wrong_and_damaged_directories_are_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "thing")
    os.makedirs(uri)
    with pytest.raises(InputError, match="not a finished thing"):
        storage.read_manifest(uri, THING)
    make(uri)
    with pytest.raises(InputError, match="holds a 'thing', where a 'mined set'"):
        storage.read_manifest(uri, storage.Kind("mined set", ""))
    (tmp_path / "thing" / "a.txt").write_text("two")
    with pytest.raises(InputError, match=r"a\.txt: content differs"), storage.local_copy(uri):
        pass
    (tmp_path / "thing" / "a.txt").write_text("longer than before")
    with pytest.raises(InputError, match=r"a\.txt: 18 bytes, but its manifest says 3"):
        storage.read_manifest(uri, THING)
    (tmp_path / "thing" / "a.txt").unlink()
    with pytest.raises(InputError, match=r"a\.txt: missing"):
        storage.read_manifest(uri, THING)


def test_files_told_by_their_writers_are_not_read_but_must_be_there(base: str) -> None:
    uri = storage.join(base, "thing")
    facts = {"bytes": 3, "sha256": "as told"}
    storage.write_bytes(storage.join(uri, "a.txt"), b"one")
    storage.write_bytes(storage.join(uri, "b.txt"), b"two")
    storage.write_manifest(uri, THING, {}, ["a.txt", "b.txt"], {"a.txt": facts, "old": facts})
    files = storage.read_manifest(uri, THING)["files"]
    assert files == {
        "a.txt": facts,
        "b.txt": {"bytes": 3, "sha256": hashlib.sha256(b"two").hexdigest()},
    }
    storage.discard(uri, THING)
    storage.write_bytes(storage.join(uri, "a.txt"), b"on")
    with pytest.raises(OSError, match=r"2 bytes, where 3 bytes were written: 'a\.txt'"):
        storage.write_manifest(uri, THING, {}, ["a.txt"], {"a.txt": facts})
    assert not storage.is_committed(uri)


def test_unwritable_directory_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"run\.dir: cannot write to"):
        storage.check_writable(str(tmp_path / "file" / "run"), "run.dir")


def test_write_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    storage.write_json(str(file), {"a": 1})

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        storage.write_json(str(file), {"a": 2})
    assert storage.read_json(str(file)) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_later_versions_directory_is_refused_and_an_older_ones_read(tmp_path: Path) -> None:
    old, new = (storage.Kind("thing", r".*\.txt", version=version) for version in (1, 2))
    for name, kind in (("old", old), ("new", new)):
        with storage.committed_directory(str(tmp_path / name), kind) as (folder, _):
            (folder / "a.txt").write_text("a")
    assert "kind_version" not in storage.read_manifest(str(tmp_path / "old"), new)
    assert storage.read_manifest(str(tmp_path / "new"), new)["kind_version"] == 2
    with pytest.raises(InputError, match="a thing of version 2, where this program reads up to 1"):
        storage.read_manifest(str(tmp_path / "new"), old)
