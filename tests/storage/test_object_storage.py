"""Storage on a real S3 server: commits, leases, bad days, and errors a person can act on."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
import torch
from conftest import GOLDENS, ROOT
from flaky_storage import DENIED, NOT_DELETED, FlakyStorage, flaky_storage
from PIL import Image
from s3_server import S3Server, s3_server

from qure_core import storage
from qure_core.base.errors import BusyError, InputError
from qure_core.model import learn_tokenizer, load_lavis_checkpoint, load_model
from qure_core.storage import lease as lease_module
from qure_core.storage import s3 as object_storage
from qure_core.storage.lease import hold

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    s3fs.S3FileSystem.clear_instance_cache()  # of another module's server
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def flaky(server: S3Server) -> Iterator[FlakyStorage]:
    with flaky_storage(server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def base(
    flaky: FlakyStorage,
    server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> str:
    for name, value in (server.environment | {"AWS_ENDPOINT_URL": flaky.endpoint}).items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{request.node.name}"


LETTER = storage.Kind("letter", r"\d+\.txt")
ROUND = storage.Kind("round", r"part-\d+\.parquet")


def commit(uri: str, text: str, files: int = 3) -> None:
    with storage.committed_directory(uri, LETTER) as (directory, description):
        for number in range(files):
            (directory / f"{number}.txt").write_text(text)
        description["text"] = text


def test_commits_appear_whole_and_are_replaced(base: str, server: S3Server) -> None:
    uri = f"{base}/letter"
    commit(uri, "first")
    commit(uri, "second", files=2)
    manifest = storage.read_manifest(uri, LETTER)
    assert manifest["text"] == "second"
    assert sorted(manifest["files"]) == ["0.txt", "1.txt"]
    with storage.local_copy(uri) as directory:
        assert (Path(directory) / "1.txt").read_text() == "second"
    with storage.local_copy(uri, leave_out={"0.txt"}) as directory:
        assert os.listdir(directory) == ["1.txt"]
    assert not Path(directory).exists()  # disks of long-lived nodes would fill
    # Another client changes a byte: its size is the same, so only the digest tells.
    server.files().pipe_file(f"{uri[5:]}/1.txt", b"secont")
    with pytest.raises(InputError, match=r"1\.txt: content differs"), storage.local_copy(uri):
        pass
    server.files().pipe_file(f"{uri[5:]}/1.txt", b"sec")
    with pytest.raises(InputError, match="3 bytes, but its manifest says 6"):
        storage.read_manifest(uri, LETTER)


def test_an_image_is_read_by_one_request(base: str, flaky: FlakyStorage, server: S3Server) -> None:
    for name, data in (("letters", b"abcdef"), ("empty", b"")):
        server.files().pipe_file(f"{base[5:]}/{name}", data)
    storage.read_bytes(f"{base}/letters")
    before = flaky.requests
    assert storage.read_bytes(f"{base}/letters", 4) == b"abcd"
    assert flaky.requests == before + 1
    assert storage.read_bytes(f"{base}/letters", 40) == b"abcdef"
    assert storage.read_bytes(f"{base}/empty", 4) == b""
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{base}/nothing", 4)


def test_of_many_that_create_a_file_one_does(base: str) -> None:
    made: list[int] = []
    threads = [
        threading.Thread(
            target=lambda i=i: made.append(i) if storage.create(f"{base}/lock", b"%d" % i) else None
        )
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert storage.read_bytes(f"{base}/lock") == b"%d" % made[0]


def test_a_lease_keeps_a_second_process_out(base: str) -> None:
    with hold(base, "mining"):
        code = (
            "import sys; from qure_core.storage.lease import hold\n"
            "from qure_core.base.errors import BusyError\n"
            "try:\n    with hold(sys.argv[1], 'mining'): print('in')\n"
            "except BusyError as error: print('busy', error)"
        )
        second = subprocess.run(
            [sys.executable, "-c", code, base], capture_output=True, text=True, cwd=ROOT, check=True
        )
        assert second.stdout.startswith("busy"), second.stdout + second.stderr
    with hold(base, "mining"):
        pass


def test_weights_come_from_the_store_and_go_there(base: str, server: S3Server) -> None:
    """Conversion and loading, with every path a URI."""
    place, model = base[5:], GOLDENS / "model_tiny.pth"
    server.files().put_file(str(model), f"{place}/model.pth")
    with tempfile.TemporaryDirectory() as folder:
        learn_tokenizer(["a red dress"], 80).save_pretrained(folder)
        server.files().put(f"{folder}/", f"{place}/tokenizer/", recursive=True)
    command = [sys.executable, "-m", "qure_core.model.convert", f"{base}/model.pth", f"{base}/out"]
    command += ["--tokenizer", f"{base}/tokenizer", "--vision-heads=4", "--qformer-heads=4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    ours, _ = load_model(f"{base}/out")
    theirs = load_lavis_checkpoint(model, vision_heads=4, qformer_heads=4).state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    weights = f"{place}/out/model.safetensors"
    data = server.files().cat_file(weights)
    server.files().pipe_file(weights, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match=r"s3://.*model\.safetensors: content differs"):
        load_model(f"{base}/out")
    with pytest.raises(InputError, match=f"{base}/nothing: no such file"):
        load_model(f"{base}/nothing")


def test_credentials_of_aws_own_files_are_used(base: str, server: S3Server, tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(
        f"[default]\naws_access_key_id = {server.key}\naws_secret_access_key = {server.secret}\n"
    )
    (tmp_path / ".aws/config").write_text(
        f"[default]\nregion = us-east-1\nendpoint_url = {server.endpoint}\n"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    code = (
        "import sys; from qure_core import storage; storage.write_bytes(sys.argv[1], b'here')\n"
        "fs, path = storage.arrow_filesystem(sys.argv[1] + '-arrow')\n"
        "with fs.open_output_stream(path) as file: file.write(b'there')"
    )
    command = [sys.executable, "-c", code, f"{base}/note"]
    subprocess.run(command, cwd=ROOT, env=own | {"HOME": str(tmp_path)}, check=True)
    assert storage.read_bytes(f"{base}/note") == b"here"
    assert storage.read_bytes(f"{base}/note-arrow") == b"there"


@pytest.mark.parametrize("trouble", ["busy", "slow", "away"])
def test_work_goes_on_after_bad_moments(
    base: str, flaky: FlakyStorage, trouble: str, capfd: pytest.CaptureFixture[str]
) -> None:
    failed = flaky.failed
    if trouble == "busy":
        flaky.fail_every = 2
    elif trouble == "slow":
        flaky.delay = 0.5
    else:
        flaky.away()
        threading.Timer(20, flaky.back).start()
    started = time.monotonic()
    try:
        commit(f"{base}/letter", "text")
        assert storage.read_manifest(f"{base}/letter", LETTER)["text"] == "text"
    finally:
        flaky.fail_every, flaky.delay = 0, 0.0
    elapsed = time.monotonic() - started
    if trouble == "away":
        assert elapsed >= 19
        assert "[storage] waiting, the store does not answer" in capfd.readouterr().out
    elif trouble == "busy":
        assert flaky.failed > failed + 3
    else:
        assert elapsed >= 2


def test_what_is_not_deleted_is_not_taken_for_gone(base: str, flaky: FlakyStorage) -> None:
    storage.resume(f"{base}/round", ROUND, {"by": "old settings"})
    storage.write_bytes(f"{base}/round/part-00000.parquet", b"of old settings")
    flaky.answers["POST /bucket?delete"] = NOT_DELETED
    try:
        with pytest.raises(OSError, match=f"did not remove all of it.*{base}/round"):
            storage.resume(f"{base}/round", ROUND, {"by": "new settings"})
    finally:
        flaky.answers.clear()
    assert storage.resume(f"{base}/round", ROUND, {"by": "new settings"}) == set()
    assert storage.list_names(f"{base}/round") == ["_plan.json"]


def test_a_lost_answer_is_no_other_holder(base: str, flaky: FlakyStorage) -> None:
    dropped, flaky.lose = flaky.dropped, f"PUT /{base[5:]}/.mining.lease"
    with hold(base, "mining") as lease:
        lease.check()
    assert flaky.dropped > dropped
    assert not storage.exists(f"{base}/.mining.lease")


def test_a_store_that_refuses_a_task_on_a_node_ends_the_job_as_the_store(
    base: str, flaky: FlakyStorage, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("a", "b"):
        storage.write_bytes(f"{base}/images/{name}.png", (tmp_path / "a.png").read_bytes())
    row = b'{"reference": "a", "text": "in red", "target": "b", "split": "train"}\n'
    storage.write_bytes(f"{base}/triplets.jsonl", row)
    flaky.answers[f"GET /{base[5:]}/images/"] = DENIED
    command = [sys.executable, str(ROOT / "pipelines/prepare.py"), "validate"]
    command += ["--data.format=jsonl", f"--data.root={base}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    finally:
        flaky.answers.clear()
    assert result.returncode == 74, result.stdout + result.stderr
    assert "error: storage: " in result.stderr
    assert "Traceback" not in result.stderr.split("error: storage: ")[1]


def test_a_lease_outlives_a_storage_that_was_away(
    base: str, flaky: FlakyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A holder that could not beat for longer than PATIENCE is not taken for dead."""
    # As on another machine: the other's process cannot be seen.
    monkeypatch.setattr(lease_module, "lives", lambda holder: None)
    monkeypatch.setattr(lease_module, "PATIENCE", 4.0)
    monkeypatch.setattr(lease_module, "BEAT", 1.0)
    with hold(base, "mining") as lease:
        flaky.away()
        threading.Timer(6, flaky.back).start()
        with pytest.raises(BusyError), hold(base, "mining"):
            pass
        time.sleep(1)
        lease.check()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "Forbidden"),
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
            "no credentials for S3; set AWS_ACCESS_KEY_ID",
        ),
    ],
)
def test_errors_say_what_to_do(
    base: str, environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    own = {name: value for name, value in (os.environ | environment).items() if value}
    own |= {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    command = [sys.executable, str(ROOT / "pipelines/prepare.py"), "validate"]
    command += ["--data.format=cirr", f"--data.root={base}"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=own, check=False)
    assert result.returncode == 74, result.stdout + result.stderr
    assert "error: storage: " in result.stderr
    assert message in result.stderr
    assert "wrong" not in result.stderr
    assert "Traceback" not in result.stderr


def test_a_storage_that_stays_away_ends_with_its_name(
    base: str, flaky: FlakyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_storage, "ATTEMPTS", 3)
    flaky.away()
    try:
        with pytest.raises(InputError, match=f"cannot write to {base}.*127.0.0.1"):
            storage.check_writable(base, "run.dir")
    finally:
        flaky.back()
