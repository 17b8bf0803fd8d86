"""Shared fixtures: one local Ray, a small world, and pipelines run as processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from forked import run_script

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"

# Nothing here may reach a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Each test and pipeline has a Ray of its own, whatever else runs on this machine, but for those
# that use the standing_cluster.
os.environ["RAY_ADDRESS"] = "local"


# Of two test processes, each taking whole files, one makes the finished run in the first file while
# the other needs none of it; the next longest follow, so that none is left alone at the end.
FIRST = [
    *("test_run.py", "test_object_storage.py", "test_whole_job.py", "test_evaluate.py"),
    *("test_walkthrough.py", "test_faults.py", "test_bad_input.py", "test_damage.py"),
]


_JOB = {"run_pipeline", "finished", "finished_run", "small_disk", "standing_cluster"}
_RAY = {"local_ray", "world"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [*FIRST, item.path.name].index(item.path.name))
    for item in items:
        # Each test is in one lane; files that start processes of their own say so themselves.
        if any(item.get_closest_marker(lane) for lane in ("ray", "job", "cluster")):
            continue
        fixtures = set(getattr(item, "fixturenames", ()))
        if item.path.parent.name == "cluster" or "[s3" in item.name:  # a server of its own
            item.add_marker("cluster")
        elif fixtures & _JOB:
            item.add_marker("job")
        elif fixtures & _RAY:
            item.add_marker("ray")


@pytest.fixture(scope="session", autouse=True)
def threads() -> int:
    """Threads of this process's products, as it starts."""
    import torch

    return torch.get_num_threads()


@pytest.fixture(autouse=True)
def as_many_threads(threads: int) -> None:
    """Stages in this process set their own, and products of other threads round otherwise."""
    import torch

    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[str]:
    """This process's own Ray, by its address."""
    import ray

    from qure_core.runtime.resources import connect

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    connect()
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def standing_cluster(local_ray: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines run on this process's Ray: to start one takes longer than a small job does."""
    monkeypatch.setenv("RAY_ADDRESS", local_ray)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, local_ray: str) -> Path:
    """A drawn world of 120 images, 60 train and 24 val triplets."""
    from qure_core.base.config import WorldSettings
    from qure_core.data.world import make_world

    root = tmp_path_factory.mktemp("world") / "data"
    settings = WorldSettings(
        images=180, images_per_combination=3, train_triplets=90, val_triplets=24, image_size=32
    )
    assert make_world(str(root), settings)
    return root


Runner = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run_pipeline() -> Runner:
    """Run ``pipelines/NAME.py`` with arguments, as a user would."""

    def run(name: str, *arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
        return run_script(ROOT / "pipelines" / f"{name}.py", arguments, ROOT, timeout)

    return run


# The smallest job with everything in it: pretraining, a warm-up, a mining, three evaluations.
JOB = [
    "--data.world.images=180",
    "--data.world.images_per_combination=3",
    "--data.world.train_triplets=90",
    "--data.world.val_triplets=24",
    "--data.world.image_size=32",
    "--pretrain.epochs=1",
    "--pretrain.batch_size=32",
    "--train.epochs=3",
    "--train.warmup_epochs=2",
    "--train.mining_definitions=3",
    "--train.lr=1e-3",
    "--train.batch_size=16",
    "--cluster.gpus=none",
    "--report.examples=2",
]


def job(world: Path, run_dir: Path, *more: str) -> list[str]:
    features = [] if any(word.startswith("--features") for word in more) else ["--features=off"]
    return [*JOB, f"--data.root={world}", f"--run.dir={run_dir}", *features, *more]


@pytest.fixture(scope="session")
def finished(
    world: Path, tmp_path_factory: pytest.TempPathFactory, run_pipeline: Runner, local_ray: str
) -> tuple[Path, str]:
    """A whole run's directory and output, made by one of the test processes for all."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    run_dir, output = base / "finished", base / "finished.txt"
    with FileLock(f"{run_dir}.lock"):
        if not output.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("RAY_ADDRESS", local_ray)
                result = run_pipeline("train", *job(world, run_dir))
            assert result.returncode == 0, result.stdout + result.stderr
            output.write_text(result.stdout)
    return run_dir, output.read_text()


@pytest.fixture(scope="session")
def finished_run(finished: tuple[Path, str]) -> Path:
    """The run directory of a whole run."""
    return finished[0]


@pytest.fixture(scope="session")
def annotations() -> Path:
    """The benchmarks' real annotation files, from QURE_ANNOTATIONS or a folder beside the tree."""
    default = ROOT.parent / "shared" / "data" / "annotations"
    folder = Path(os.environ.get("QURE_ANNOTATIONS", default))
    if not folder.is_dir():
        pytest.skip("the real annotation files are not here; set QURE_ANNOTATIONS to their folder")
    return folder


SmallDisk = Callable[[str], tuple[list[str], Path]]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Makes a file system of a size: (a command prefix under which ``tmp_path / "disk"`` is one,
    and the path by which this process sees it)."""
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("needs util-linux")
    holders = []

    def mount(size: str) -> tuple[list[str], Path]:
        disk = tmp_path / "disk"
        disk.mkdir()
        script = f"mount -t tmpfs -o size={size} tmpfs {disk} && echo mounted && exec sleep 900"
        holder = subprocess.Popen(
            ["unshare", "-rm", "sh", "-c", script], stdout=subprocess.PIPE, text=True
        )
        holders.append(holder)
        assert holder.stdout is not None
        if holder.stdout.readline().strip() != "mounted":
            pytest.skip("this machine does not let users mount a file system of their own")
        prefix = ["nsenter", "--preserve-credentials", "-U", "-m", "-t", str(holder.pid)]
        return prefix, Path(f"/proc/{holder.pid}/root{disk}")

    yield mount
    for holder in holders:
        holder.kill()
        holder.wait()


@contextmanager
def recovery(what: str) -> Iterator[None]:
    """Print how long the body took: from a fault to the work going on (see with ``pytest -s``)."""
    began = time.monotonic()
    yield
    print(f"\nrecovery, {what}: {time.monotonic() - began:.1f} s", flush=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real browser, without a screen."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine (apt install chromium)")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu"]
        )
        yield made
        made.close()
