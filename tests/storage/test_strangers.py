"""Files that are not ours: every place that removes or replaces something, with a stranger in it.

On a disk and on an S3 server. What is in the way is refused before any work and is still there
afterwards, byte for byte; what is only beside our files stays when ours go.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
from conftest import GOLDENS, ROOT
from PIL import Image
from s3_server import S3Server, s3_server

from qure_core import storage
from qure_core.base.config import WorldSettings
from qure_core.base.errors import InputError
from qure_core.data import Split, write_split
from qure_core.data.schema import SPLIT_KIND
from qure_core.data.world import WORLD_KIND, make_world
from qure_core.embeddings.feature_building import prune_store
from qure_core.embeddings.shards import EMBEDDINGS_KIND
from qure_core.evaluation.run_protocol import RESULT_KIND
from qure_core.evaluation.stage import EVALUATION_KIND
from qure_core.features.store import FEATURES_KIND
from qure_core.job.place import check_apart, check_places, claim_run
from qure_core.mining.mined_set import MINED_KIND
from qure_core.mining.stage import SCRATCH_KIND, check_round_place
from qure_core.model import convert
from qure_core.model.checkpoint_files import (
    CHECKPOINT_KIND,
    checkpoint_uri,
    latest_epoch,
    prune_checkpoints,
)
from qure_core.report.inspect import check_picture
from qure_core.runtime.monitor import Monitor
from qure_core.storage import temporary
from qure_core.storage.kinds import listing
from qure_core.storage.lease import hold
from qure_core.training.trainer import _NOTES_KIND, remove_scratch

# A file of each kind, as its stage names it.
FILES = {
    MINED_KIND: "part-00000.parquet",
    EMBEDDINGS_KIND: "images-00000.arrow",
    SCRATCH_KIND: "summary-00000-0-00001.npz",
    EVALUATION_KIND: "part-00001.parquet",
    RESULT_KIND: "recall.json",
    SPLIT_KIND: "triplets.parquet",
    WORLD_KIND: "images/W0000007.png",
    FEATURES_KIND: f"shard-{'0' * 32}.arrow",
    CHECKPOINT_KIND: "model.safetensors",
}
by_kind = pytest.mark.parametrize("kind", FILES, ids=str)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(params=["disk", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "disk":
        return str(tmp_path)
    server: S3Server = request.getfixturevalue("server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # of another module's server
    return f"s3://bucket/{tmp_path.name}"


def put(uri: str, text: str = "mine") -> str:
    storage.write_bytes(uri, text.encode())
    return uri


def untouched(*uris: str, text: str = "mine") -> bool:
    return all(storage.read_bytes(uri) == text.encode() for uri in uris)


def make(uri: str, kind: storage.Kind) -> None:
    with storage.committed_directory(uri, kind) as (folder, _):
        file = folder / FILES[kind]
        file.parent.mkdir(exist_ok=True)
        file.write_text("ours")


@by_kind
def test_a_directory_without_our_mark_is_never_emptied(base: str, kind: storage.Kind) -> None:
    uri = f"{base}/{kind.name.replace(' ', '-')}"
    # Even what is named as ours would be, and whatever is deeper down.
    files = [put(f"{uri}/{name}") for name in (FILES[kind], "photo.jpg", "deep/er/notes.txt")]
    for touch in (
        lambda: storage.check_place(uri, kind),
        lambda: storage.clear(uri, kind),
        lambda: storage.resume(uri, kind, {"checkpoint": "a"}),
        lambda: make(uri, kind),
    ):
        with pytest.raises(InputError, match="Nothing was changed; choose a new or empty"):
            touch()
    storage.discard(uri, kind)
    assert untouched(*files)
    assert len(listing(uri)) == 3


@by_kind
def test_of_a_directory_of_ours_only_our_files_go(
    base: str, kind: storage.Kind, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"{base}/{kind.name.replace(' ', '-')}"
    make(uri, kind)
    stranger = put(f"{uri}/notes.txt")
    deep = put(f"{uri}/more/notes.txt")
    for touch in (lambda: storage.clear(uri, kind), lambda: make(uri, kind)):
        with pytest.raises(InputError, match=r"more/notes\.txt, notes\.txt"):
            touch()
    assert storage.is_committed(uri)
    storage.discard(uri, kind)
    assert "left in" in capsys.readouterr().out
    assert untouched(stranger, deep)
    assert set(listing(uri)) == {"more/notes.txt", "notes.txt"}
    # Another kind's directory is a stranger's too.
    other = f"{base}/other"
    make(other, EMBEDDINGS_KIND if kind is not EMBEDDINGS_KIND else MINED_KIND)
    with pytest.raises(InputError):
        storage.clear(other, kind)
    assert storage.is_committed(other)


@by_kind
def test_what_is_ours_is_replaced_finished_or_not(base: str, kind: storage.Kind) -> None:
    uri = f"{base}/{kind.name.replace(' ', '-')}"
    make(uri, kind)
    make(uri, kind)
    storage.clear(uri, kind)
    assert not listing(uri)
    if kind is not CHECKPOINT_KIND:  # which no plan fills
        storage.resume(uri, kind, {"checkpoint": "a"})
        put(f"{uri}/{FILES[kind]}", "unfinished")
        assert storage.resume(uri, kind, {"checkpoint": "b"}) == set()
        assert set(listing(uri)) == {"_plan.json"}


def test_an_empty_folder_is_somebodys_too(tmp_path: Path) -> None:
    uri = f"{tmp_path}/round"
    make(uri, MINED_KIND)
    (tmp_path / "round/kept/empty").mkdir(parents=True)
    with pytest.raises(InputError, match="kept/empty/"):
        storage.clear(uri, MINED_KIND)
    storage.discard(uri, MINED_KIND)
    assert (tmp_path / "round/kept/empty").is_dir()
    (tmp_path / "room").mkdir()
    make(f"{tmp_path}/room", MINED_KIND)  # an empty directory is free


def test_a_kill_in_the_middle_of_a_removal_leaves_it_ours(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qure_core.storage import kinds

    uri = f"{base}/checkpoint"
    whole = kinds.remove_files
    for at in (1, 2, 3):  # before the manifest, the files, the plan
        make(uri, CHECKPOINT_KIND)
        calls = []

        def killed(where: str, names: set[str], at: int = at, calls: list[Any] = calls) -> None:
            calls.append(names)
            if len(calls) == at:
                raise KeyboardInterrupt
            whole(where, names)

        with monkeypatch.context() as patch:
            patch.setattr(kinds, "remove_files", killed)
            with pytest.raises(KeyboardInterrupt):
                storage.clear(uri, CHECKPOINT_KIND)
        assert storage.is_committed(uri) == (at == 1)
        make(uri, CHECKPOINT_KIND)
        assert storage.is_committed(uri)


def test_a_run_takes_no_directory_with_files_in_its_way(base: str) -> None:
    proj = f"{base}/proj"
    mine = [
        put(f"{proj}/{name}")
        for name in (
            *("data/train/0.png", "data/val/1.png", "tensorboard/events", "ray_train/train-3-0000"),
            *("config.yaml", "metrics.jsonl", "report/index.html", "summary.json"),
        )
    ]
    with pytest.raises(InputError, match=r"would write over .* config\.yaml, data,"):
        claim_run(proj)
    assert untouched(*mine)
    assert not storage.exists(f"{proj}/run.json")
    # A stranger's run.json is no mark.
    put(f"{proj}/run.json", '{"lap": 4}')
    with pytest.raises(InputError, match=r"run\.json"):
        claim_run(proj)
    # What is in nobody's way may stay.
    put(f"{base}/other/notes.txt")
    claim_run(f"{base}/other")
    claim_run(f"{base}/other")
    assert untouched(f"{base}/other/notes.txt")


def test_an_older_run_is_known_by_its_config_and_data(base: str) -> None:
    from qure_core.base.config import Settings

    run = f"{base}/run"
    put(f"{run}/config.yaml", json.dumps(Settings().resolved()))
    write_split(f"{run}/data/train", Split("train", (), {}))
    claim_run(run)
    assert storage.read_json(f"{run}/run.json") == {"kind": "run"}
    # The same config copied beside somebody's data makes no run of it.
    copy = f"{base}/copy"
    put(f"{copy}/config.yaml", json.dumps(Settings().resolved()))
    put(f"{copy}/data/train/0.png")
    with pytest.raises(InputError, match="is no run"):
        claim_run(copy)


@pytest.mark.parametrize("root", ["", "/data", "/data/cirr", "/checkpoints/x"])
def test_data_where_a_run_writes_are_refused(base: str, root: str) -> None:
    with pytest.raises(InputError, match=r"data\.root: .* lies where a run"):
        check_apart(f"{base}/proj", f"{base}/proj{root}")


def test_data_beside_a_run_are_not(base: str, tmp_path: Path) -> None:
    check_apart(f"{base}/proj/runs/a", f"{base}/proj")
    check_apart(f"{base}/proj", f"{base}/proj/mydata")
    check_apart(f"{base}/proj", f"{base}/project/data")
    (tmp_path / "proj/data").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "proj/data")
    with pytest.raises(InputError, match="lies where a run"):
        check_apart(f"{tmp_path}/proj", f"{tmp_path}/link")


def test_a_round_is_made_in_a_place_of_its_own(base: str) -> None:
    for name in ("", "-embeddings", "-scratch"):
        output = f"{base}/out{name or '-self'}"
        stranger = put(f"{output}{name}/photo.jpg")
        with pytest.raises(InputError, match=r"output: .*photo\.jpg"):
            check_round_place(output, "output")
        assert untouched(stranger)


def test_the_world_is_drawn_over_nobodys_data(base: str) -> None:
    root = f"{base}/fashioniq"
    files = [
        put(f"{root}/{name}")
        for name in ("captions/cap.dress.train.json", "descriptions.json", "images/B00.png")
    ]
    with pytest.raises(InputError, match="holds files of another dataset"):
        make_world(root, WorldSettings())
    assert untouched(*files)


def test_converting_writes_over_no_other_checkpoint(base: str) -> None:
    target = f"{base}/target"
    stranger = put(f"{target}/photo.jpg")
    source = str(GOLDENS / "model_tiny.pth")
    with pytest.raises(InputError, match=r"target: .*photo\.jpg"):
        convert.check_target(target, source)
    assert untouched(stranger)
    trained = f"{base}/trained"
    with storage.committed_directory(trained, CHECKPOINT_KIND) as (folder, facts):
        (folder / "model.safetensors").write_text("weeks of work")
        facts |= {"epoch": 30, "origin": "elsewhere"}
    with pytest.raises(InputError, match="holds another checkpoint"):
        convert.check_target(trained, source)
    convert.check_target(f"{base}/new", source)


def test_pruning_checkpoints_takes_only_checkpoints(base: str) -> None:
    run = f"{base}/run"
    for epoch in range(1, 5):
        make(checkpoint_uri(run, "train", epoch), CHECKPOINT_KIND)
    note = put(f"{checkpoint_uri(run, 'train', 1)}/notes.txt")
    other = put(f"{run}/checkpoints/train-0002-best/model.bin")
    mined = f"{run}/checkpoints/train-0000"
    make(mined, MINED_KIND)
    prune_checkpoints(run, "train", keep={3}, newest=1)
    assert untouched(note, other)
    assert storage.is_committed(mined)
    assert latest_epoch(run, "train") == 4
    assert [storage.is_committed(checkpoint_uri(run, "train", e)) for e in range(1, 5)] == [
        *(False, False, True, True)
    ]


def test_notes_of_ray_train_are_known_by_their_mark(base: str) -> None:
    run = f"{base}/run"
    ours = f"{run}/ray_train/train-3-0123abcd"
    storage.begin(ours, _NOTES_KIND)
    put(f"{ours}/checkpoint_manager_snapshot.json")
    put(f"{ours}/.validate_storage_marker")
    strangers = [put(f"{run}/ray_train/{n}") for n in ("train-3-ffffffff/model.json", "a.txt")]
    remove_scratch(run)
    assert untouched(*strangers)
    assert not listing(ours)


def test_pruning_a_store_takes_only_what_it_made(base: str) -> None:
    uri = f"{base}/features/0123456789abcdef"
    with storage.committed_directory(uri, FEATURES_KIND) as (folder, _):
        (folder / f"shard-{'1' * 32}.arrow").write_text("needed")
    ours = put(f"{uri}/shard-{'2' * 32}.arrow")
    strangers = [put(f"{uri}/{name}") for name in ("notes.txt", "shard-mine.arrow", "record.json")]
    assert prune_store(uri) == 1
    assert not storage.exists(ours)
    assert untouched(*strangers)


def test_a_lease_is_a_lease_only_if_a_holder_wrote_it(base: str) -> None:
    for text in ("mine", '["mine"]', '{"lease": "of a house"}', '{"a": 1}\n{"b": 2}\n'):
        file = put(f"{base}/.training.lease", text)
        with pytest.raises(InputError, match="was not written by one"), hold(base, "training"):
            pass
        assert untouched(file, text=text)


def test_an_event_log_goes_on_only_from_an_event_log(base: str) -> None:
    for text in ("mine", '{"event": "birthday"}\n', "[]\n", ""):
        file = put(f"{base}/round.events.jsonl", text)
        with pytest.raises(InputError, match="event log goes there, and this file is none"):
            Monitor(file, "mining")
        assert untouched(file, text=text)


def test_a_picture_is_drawn_over_nobodys_picture(base: str, tmp_path: Path) -> None:
    local, picture = tmp_path / "local.png", f"{base}/curve.png"
    for save in (lambda: local.write_text("mine"), lambda: Image.new("L", (4, 4)).save(local)):
        save()
        storage.write_bytes(picture, local.read_bytes())
        with pytest.raises(InputError, match="exists already"):
            check_picture(picture)
        assert storage.read_bytes(picture) == local.read_bytes()


@by_kind
def test_a_plan_of_somebody_elses_stays(base: str, kind: storage.Kind) -> None:
    uri = f"{base}/{kind.name.replace(' ', '-')}"
    make(uri, kind)
    plan = put(f"{uri}/_plan.json")
    storage.discard(uri, kind)
    assert untouched(plan)
    assert storage.is_committed(uri)  # without a mark of its own a removal could be cut short
    with pytest.raises(InputError, match=r"_plan\.json"):
        storage.clear(uri, kind)


def test_a_resumption_minds_what_lies_beside_it(base: str) -> None:
    uri = f"{base}/round"
    storage.resume(uri, MINED_KIND, {"checkpoint": "a"})
    old = put(f"{uri}/plan.json", '{"holidays": "in May"}')
    with pytest.raises(InputError, match=r"plan\.json"):
        storage.resume(uri, MINED_KIND, {"checkpoint": "a"})
    assert untouched(old, text='{"holidays": "in May"}')
    storage.remove_file(old)
    file = put(f"{uri}/photo.jpg")
    other = json.dumps({"kind": "album", "files": {"photo.jpg": {"bytes": 99, "sha256": ""}}})
    manifest = put(f"{uri}/manifest.json", other)
    with pytest.raises(InputError, match=r"manifest\.json, photo\.jpg"):
        storage.resume(uri, MINED_KIND, {"checkpoint": "a"})
    assert untouched(file)
    assert untouched(manifest, text=other)


def test_what_cannot_be_replaced_whole_is_not_begun(tmp_path: Path) -> None:
    uri = f"{tmp_path}/checkpoint"
    make(uri, CHECKPOINT_KIND)
    lease = put(f"{uri}/.x.lease")
    with pytest.raises(InputError, match=r"holds \.x\.lease, which would be lost"):
        make(uri, CHECKPOINT_KIND)
    assert untouched(lease)
    assert storage.is_committed(uri)
    # A link to a directory: what it names is replaced, and the link stays.
    make(f"{tmp_path}/real", CHECKPOINT_KIND)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    make(f"{tmp_path}/link", CHECKPOINT_KIND)
    assert (tmp_path / "link").is_symlink()
    assert storage.is_committed(f"{tmp_path}/real")
    assert not list(tmp_path.glob(".staging-*"))


def test_a_staging_folder_of_a_killed_process_goes_and_no_other(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from qure_core import storage\n"
        "kind = storage.Kind('checkpoint', '.*')\n"
        "with storage.committed_directory(sys.argv[1], kind) as (folder, _):\n"
        "    (folder / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    uri = f"{tmp_path}/checkpoint"
    subprocess.run([sys.executable, "-c", code, uri], check=False, cwd=ROOT)
    (left,) = tmp_path.glob(".staging-checkpoint-*")
    stranger = tmp_path / ".staging-checkpoint-mine"
    stranger.mkdir()
    make(uri, CHECKPOINT_KIND)
    assert not left.exists()
    assert stranger.is_dir()


def test_what_an_older_run_left_unfinished_is_known_as_its_own(base: str) -> None:
    from qure_core.base.config import Settings

    run = f"{base}/run"
    put(f"{run}/config.yaml", json.dumps(Settings().resolved()))
    write_split(f"{run}/data/train", Split("train", (), {}))
    put(f"{run}/evaluations/epoch-0004/part-00000.parquet")
    put(f"{run}/checkpoints/train-0003/model.safetensors")
    mixed = put(f"{run}/evaluations/epoch-0006/notes.txt")
    claim_run(run)
    storage.clear(f"{run}/evaluations/epoch-0004", EVALUATION_KIND)
    storage.clear(f"{run}/checkpoints/train-0003", CHECKPOINT_KIND)
    with pytest.raises(InputError, match=r"run\.dir: .*epoch-0006 holds .*notes\.txt"):
        check_places(run)
    assert untouched(mixed)


def test_what_is_in_the_way_of_a_later_stage_is_refused_before_a_run_begins(base: str) -> None:
    run = f"{base}/run"
    claim_run(run)
    # Names that no stage has are let be.
    put(f"{run}/rounds/notes/a.txt")
    put(f"{run}/checkpoints/train-0003-best/weights.bin")
    check_places(run)
    for name in (
        "rounds/epoch-0002/part-00000.parquet",
        "rounds/epoch-0002-scratch/anchors-00000.npz",
        "evaluations/epoch-0004-embeddings/notes.txt",
        "checkpoints/train-0001/model.safetensors",
    ):
        mine = put(f"{run}/{name}")
        with pytest.raises(InputError, match=r"run\.dir: .* holds what is not part of a"):
            check_places(run)
        assert untouched(mine)
        storage.remove_file(mine)


def test_a_folder_of_our_name_that_is_not_ours_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temporary.tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"qure-{os.getuid()}"
    (tmp_path / "theirs").mkdir()
    for make_it in (
        lambda: folder.symlink_to(tmp_path / "theirs"),
        lambda: folder.write_text("a file"),
        lambda: (folder.mkdir(), folder.chmod(0o777)),
    ):
        make_it()
        with pytest.raises(PermissionError), storage.temporary_folder("fetched"):
            pass
        if folder.is_dir() and not folder.is_symlink():
            folder.rmdir()
        else:
            folder.unlink()
