"""How a process finds out whether it is alone, and the one line where it cannot join the others."""

import os
import time

import jax
import jax.numpy as jnp
import pytest

from sharding.errors import LostPeers, UserError
from sharding.layout import use_devices
from sharding.processes import (
    Processes,
    cluster_size,
    fetch,
    on_first,
    peers_explained,
    start,
    together,
)

CLUSTER = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION_INDEX")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tests run on."""
    for name in list(os.environ):
        if name.startswith(CLUSTER):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"coordinator": "a:1"}, "--num-processes and --process-id missing: give all of"),
        ({"num_processes": 2, "process_id": 0}, "--coordinator missing"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process-id 2 is out of"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": -1}, "2 processes count from 0"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "--coordinator a: give HOST"),
        ({"coordinator": "a:0", "num_processes": 2, "process_id": 0}, "--coordinator a:0: give"),
        ({"coordinator": ":1", "num_processes": 2, "process_id": 0}, "--coordinator :1: give"),
        ({"num_processes": 0}, "--num-processes 0: give a positive number"),
        ({"start_timeout": 0}, "--start-timeout 0: give a positive number"),
    ],
)
def test_flags_that_do_not_go_together(flags: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Processes(**flags)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_laptop_runs_alone_and_at_once() -> None:
    begin = time.monotonic()
    assert start(Processes()) == 1
    assert start(Processes(num_processes=1)) == 1
    assert start(Processes("a:1", 1, 0)) == 1
    assert time.monotonic() - begin < 5
    with pytest.raises(UserError, match="--distributed: JAX finds no cluster"):
        start(Processes(distributed=True))


def test_clusters_are_known_by_what_they_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "gpu[01-02]",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "3",
    }.items():
        monkeypatch.setenv(name, value)
    assert cluster_size() == 16
    assert start(Processes(num_processes=1)) == 1  # the flag wins
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert start(Processes()) == 1
    monkeypatch.setenv("SLURM_NTASKS", "many")
    with pytest.raises(UserError, match="SlurmCluster is detected but does not tell"):
        cluster_size()


def test_a_pod_that_is_of_no_indexed_job_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src.clusters import K8sCluster

    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr(K8sCluster, "is_env_present", lambda: pytest.fail("asked the API server"))
    assert cluster_size() == 1
    monkeypatch.setattr(K8sCluster, "is_env_present", lambda: True)
    monkeypatch.setattr(K8sCluster, "get_process_count", lambda: 4)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    assert cluster_size() == 4


def test_devices_divide_over_processes() -> None:
    with pytest.raises(UserError, match="--devices 6 does not divide over 4 processes"):
        use_devices(6, processes=4)


def test_one_process_does_everything_itself() -> None:
    def refuse() -> None:
        raise UserError("no")

    assert on_first(lambda: 3) == 3
    with pytest.raises(UserError, match=r"^no$"):
        together(refuse)
    assert fetch({"a": jnp.arange(3)})["a"].tolist() == [0, 1, 2]


def test_errors_of_the_runtime_are_told_from_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")
    with pytest.raises(ValueError, match="Gloo"), peers_explained():
        raise lost  # alone it is what it is
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for error in (lost, jax.errors.JaxRuntimeError("INTERNAL: NCCL")):
        with pytest.raises(LostPeers, match="process 0 of 2 cannot go on"), peers_explained():
            raise error
    with pytest.raises(ValueError, match="unknown logical axis"), peers_explained():
        raise ValueError("unknown logical axis 'head'")
