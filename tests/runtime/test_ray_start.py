"""Starting Ray on this machine: what it needs, what is cleared away, and whom it waits for."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SmallDisk

from qure_core.base.errors import InputError
from qure_core.runtime import ray_start
from qure_core.storage import clean_temporary, temporary, temporary_folder
from qure_core.storage.owner import lives, this_process

sys.path.insert(0, str(ROOT / "cluster"))
import local

DRAW = ["prepare.py", "world", "--data.world.images=180", "--data.world.image_size=16"]
DRAW += ["--data.world.images_per_combination=3", "--data.world.train_triplets=9"]

pytestmark = pytest.mark.job


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(temporary.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    return tmp_path


def gone() -> dict[str, Any]:
    """A note of a process that has ended."""
    code = "import json; from qure_core.storage.owner import this_process as me; "
    code += "print(json.dumps(me()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    note: dict[str, Any] = json.loads(done.stdout)
    assert lives(note) is False
    return note


def test_folders_of_killed_processes_go_and_no_others(temp: Path) -> None:
    code = (
        "import os, signal; from qure_core.storage import temporary_folder\n"
        "with temporary_folder('fetched') as folder:\n"
        "    open(folder + '/weights', 'w').write('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"TMPDIR": str(temp)}
    subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, env=environment)
    own = temporary.own_folder()
    (left,) = own.iterdir()
    assert (left / "fetched/weights").exists()
    strangers = [own / "mine", temp / "qure-fetched-abc", own / "no-owner"]
    for stranger in strangers:
        stranger.mkdir()
    (own / "mine/owner.json").write_text("not ours")
    elsewhere = own / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "owner.json").write_text(json.dumps(gone() | {"place": "another boot"}))
    with temporary_folder("fetched") as alive:
        assert clean_temporary() == 1
        assert Path(alive).is_dir()
    assert not left.exists()
    assert all(path.is_dir() for path in [*strangers, elsewhere])


def test_sessions_of_ours_that_are_over_go_and_no_others(temp: Path) -> None:
    ray = temp / "ray"
    ours, running, theirs = (
        ray / f"session_2026-01-0{day}_10-00-00_123456_{day}" for day in (1, 2, 3)
    )
    for session in (ours, running, theirs):
        (session / "logs").mkdir(parents=True)
    (ray / "session_latest").symlink_to(ours)
    (ray / "ray_current_cluster").write_text("10.0.0.1:6379")
    notes = temporary.own_folder() / "ray"
    notes.mkdir(parents=True)
    for name, owner, session in (
        ("a", gone(), ours),
        ("b", this_process(), running),
        ("c", gone(), temp),  # a note that names what is no session
    ):
        note = owner | {"session": str(session), "address": "127.0.0.1:6379"}
        (notes / f"{name}.json").write_text(json.dumps(note))
    ray_start.clean_up()
    assert not ours.exists()
    assert not (ray / "session_latest").is_symlink()
    assert not (ray / "ray_current_cluster").exists()
    assert running.is_dir()
    assert theirs.is_dir()
    assert temp.is_dir()


def test_a_session_whose_servers_still_run_stays(temp: Path) -> None:
    session = temp / "ray/session_2026-01-01_10-00-00_123456_9"
    session.mkdir(parents=True)
    notes = temporary.own_folder() / "ray"
    notes.mkdir(parents=True)
    note = gone() | {"session": str(session), "address": "127.0.0.1:6379"}
    (notes / "a.json").write_text(json.dumps(note))
    server = subprocess.Popen(
        [sys.executable, "-c", "input()", str(session)], stdin=subprocess.PIPE
    )
    try:
        while session.name not in " ".join(c for _, c in ray_start._commands()):
            time.sleep(0.05)
        ray_start.clean_up()
        assert session.is_dir()
    finally:
        server.kill()
        server.wait()
    ray_start.clean_up()
    assert not session.exists()


def test_a_small_or_long_temporary_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_disk: SmallDisk
) -> None:
    ray_start.check_room()
    monkeypatch.setenv("RAY_TMPDIR", f"{tmp_path}/{'long' * 20}")
    with pytest.raises(InputError, match=r"TMPDIR: the path .* is too long for Ray's sockets"):
        ray_start.check_room()
    # A process whose whole temporary directory is 1 MB, by a short name.
    prefix, _ = small_disk("1m")
    with tempfile.TemporaryDirectory(prefix="q") as short:
        (Path(short) / "t").symlink_to(tmp_path / "disk")
        environment = os.environ | {"TMPDIR": f"{short}/t"}
        environment.pop("RAY_TMPDIR")
        command = [*prefix, sys.executable, str(ROOT / "pipelines" / DRAW[0]), *DRAW[1:]]
        command.append(f"--data.root={tmp_path}/world")
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
        )
    assert done.returncode == 2, done.stderr
    assert "TMPDIR: " in done.stderr
    assert "Ray's session needs 256" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("status", "text", "is_ray"),
    [
        (200, '{"version": "4", "ray_version": "2.60.0", "session_name": "x"}', True),
        (401, "Unauthorized: Missing authentication token", True),
        (200, '{"hello": "world"}', False),
        (200, "<html>a notebook</html>", False),
        (401, "who are you", False),
        (500, "broken", False),
    ],
)
def test_another_server_on_rays_port_is_no_ray(status: int, text: str, is_ray: bool) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert local._answers(f"http://127.0.0.1:{server.server_port}") is is_ray
    finally:
        server.shutdown()
        server.server_close()
