"""Finding the cluster, and refusing plans that it could never start."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qure_core.base.config import ClusterSettings
from qure_core.base.errors import InputError
from qure_core.runtime import resources
from qure_core.runtime.resources import plan_resources
from qure_core.storage import temporary


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(temporary.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    return tmp_path


@contextmanager
def listener() -> Iterator[str]:
    """A server that takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.ray
def test_a_cluster_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "ANSWER_SECONDS", 2.0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(InputError, match=f"RAY_ADDRESS: no Ray cluster at {nobody} in 2 s"):
        resources._check_answers(nobody)
    with listener() as mute, pytest.raises(InputError, match="it is not Ray that answers"):
        resources._check_answers(mute)
    with pytest.raises(InputError, match="'here' is not HOST:PORT"):
        resources._check_answers("here")


def test_a_cluster_that_answers_is_found(local_ray: str) -> None:
    resources._check_answers(local_ray)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", "is where jobs are submitted to"),
        ("ray://127.0.0.1:10001", "is of Ray's client"),
        ("auto", "'auto', but no Ray runs on this machine"),
    ],
)
def test_addresses_that_are_none_say_so(
    temp: Path, monkeypatch: pytest.MonkeyPatch, address: str, message: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=f"RAY_ADDRESS: .*{message}"):
        resources._address()


@pytest.mark.usefixtures("local_ray")
def test_a_plan_says_what_each_stage_asks_for() -> None:
    plan = plan_resources(ClusterSettings(train_workers=2, gpus="none"))
    assert (plan.gpus, plan.slots) == (0, 2)
    assert plan.train == {"CPU": 1, "GPU": 0}
    assert plan.embed == {"num_cpus": 1, "num_gpus": 0}
    assert plan.score == {"num_cpus": 1, "num_gpus": 0}


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"train_workers": 3}, "cluster.train_workers=3 with 1 CPU(s) each, but the nodes have"),
        ({"cpus_per_embed_actor": 3}, "cluster.embed_actors=1 with 3 CPU(s) each, but the nodes"),
        ({"gpus": 1}, "cluster.train_workers=1 with 1 CPU(s) and 1 GPU(s) each, but the nodes"),
    ],
)
def test_a_plan_that_no_node_can_hold_is_refused(asked: dict[str, int], message: str) -> None:
    with pytest.raises(InputError) as found:
        plan_resources(ClusterSettings(**({"gpus": "none"} | asked)))
    assert message in str(found.value)
    assert str(found.value).endswith("lower these settings, or add nodes, or larger ones")
