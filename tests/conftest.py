"""Shared fixtures: one local Ray, a small world, and pipelines run as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"

# Nothing here may reach a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    import ray

    from qure_core.resources import connect

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """A drawn world of 120 images, 60 train and 24 val triplets."""
    from qure_core.config import WorldSettings
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
        return subprocess.run(
            [sys.executable, str(ROOT / "pipelines" / f"{name}.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=ROOT,
            check=False,
        )

    return run
