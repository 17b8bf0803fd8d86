"""What a person sees of a job, and what goes to the log."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from qure_core.runtime.console import Console
from qure_core.storage import temporary

JOB = r"""
import os, subprocess, sys, warnings
from qure_core.runtime.command import run_job
from qure_core.base.errors import InputError

def work(what):
    print("[train] epoch 1/2")
    print("(RayTrainWorker pid=12) [train] step of a worker")
    print("\x1b[36m(RayTrainWorker pid=12, ip=10.0.0.2)\x1b[0m [train] step of another")
    print("(TrainController pid=3) TrainingReport(checkpoint=None)")
    print("\x1b[33m(raylet)\x1b[0m E core_worker.cc:2465: the actor restart will fail")
    print("warning: of ours")
    print("chatter of a library", file=sys.stderr)
    warnings.warn("a library's warning")
    subprocess.run(["sh", "-c", "echo of a child; echo of a child too >&2"])
    os.write(2, b"of C++\n")
    if what == "bad":
        raise InputError("x.json [3]: wrong; correct it")
    if what == "long":
        raise InputError("\n".join(map(str, range(400))))
    if what == "fault":
        raise KeyError("surprise")
    return 65 if what == "problems" else None

run_job("train", lambda: sys.argv[1], work)
"""

LATE = r"""
import atexit, threading
def late():
    threading.main_thread().join()
    print("(RayTrainWorker pid=1) of a worker, late", flush=True)
LATE = threading.Thread(target=late)
"""

pytestmark = pytest.mark.job


def process(what: str, tmp_path: Path, code: str = JOB) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, what],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )


def run(what: str, tmp_path: Path, code: str = JOB) -> tuple[subprocess.CompletedProcess[str], str]:
    """The job's process and its log."""
    done = process(what, tmp_path, code)
    (log,) = tmp_path.glob("qure-*/logs/train-*.log")
    return done, log.read_text()


def test_the_jobs_own_lines_are_shown_and_the_rest_is_filed(tmp_path: Path) -> None:
    done, log = run("well", tmp_path)
    first, *lines = done.stdout.splitlines()
    assert first.startswith("[train] starting; what Ray and the libraries say goes to ")
    assert Path(first.rsplit(" ", 1)[1]).is_file()
    assert lines == [
        "[train] epoch 1/2",
        "[train] step of a worker",
        "[train] step of another",
        "warning: of ours",
    ]
    assert done.stderr == ""
    assert done.returncode == 0
    for text in ("TrainingReport", "core_worker", "chatter", "library's", "of a child", "of C++"):
        assert text in log


def test_nothing_of_ray_is_shown_after_the_end(tmp_path: Path) -> None:
    """Whose thread prints until the process is gone."""
    code = JOB.replace("def work(what):", "def work(what):\n    LATE.start()").replace(
        "from qure_core.base.errors", LATE + "from qure_core.base.errors"
    )
    done, log = run("well", tmp_path, code)
    assert done.returncode == 0
    assert "of a worker, late" not in done.stdout + done.stderr
    assert "of a worker, late" in log


@pytest.mark.parametrize(
    ("what", "status", "message"),
    [
        ("bad", 2, "error: x.json [3]: wrong; correct it\n"),
        ("problems", 65, ""),
        ("fault", 1, "error: unexpected KeyError: 'surprise'\nthe whole story is in "),
    ],
)
def test_whatever_goes_wrong_is_one_message(
    tmp_path: Path, what: str, status: int, message: str
) -> None:
    done, log = run(what, tmp_path)
    assert done.returncode == status
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) <= 2
    assert ("Traceback" in log) == (status in (1, 2))


def test_a_long_message_is_cut(tmp_path: Path) -> None:
    done, _ = run("long", tmp_path)
    lines = done.stderr.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "  ... and 390 more lines"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_takes_the_place_of_progress_on_a_terminal() -> None:
    lines = [
        "[embed] 0/10 images",
        "[embed] 4/10 images, 2.0 images/s, 0:03 left",
        "[embed] 8/10 images, 2.0 images/s, 0:01 left",
        "[embed] 10/10 images, 2.0 images/s, in 0:05",
        "[train] epoch 1/2, step 20/75, 9 samples/s, 0:10 left to epoch 2",
        "[train] epoch 1/2: loss 0.1",
    ]
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        console = Console(stream)
        for line in lines:
            print(line, file=console)
        console.end()
    assert file.getvalue().splitlines() == lines
    back = "\r\x1b[K"
    assert terminal.getvalue() == (
        f"{lines[0]}{back}{lines[1]}{back}{lines[2]}{back}{lines[3]}\n{lines[4]}{back}{lines[5]}\n"
    )


def test_a_log_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / f"qure-{os.getuid()}").write_text("in the way")
    done = process("well", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[train] epoch 1/2" in done.stdout


def test_logs_of_last_week_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qure_core.runtime import console

    monkeypatch.setattr(temporary.tempfile, "tempdir", str(tmp_path))
    folder = temporary.own_folder() / "logs"
    folder.mkdir(parents=True)
    for name, days in (("old.log", 8), ("new.log", 6), ("notes.txt", 80)):
        (folder / name).touch()
        then = time.time() - days * 86400
        os.utime(folder / name, (then, then))
    console._log_file("train")
    assert {path.name for path in folder.iterdir()} == {"new.log", "notes.txt"}
