"""Several processes that train one model: how they find each other, share results and fail together.

Every process runs the same program and takes the same decisions; each holds the shards of its own devices. What
only one of them may do - print, write a file - the first one does while the others wait.
"""

import contextlib
import dataclasses
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

from sharding.disk.directory import new_directory
from sharding.disk.paths import absolute
from sharding.errors import LostPeers, UserError

T = TypeVar("T")

HEARTBEAT_SECONDS = 100  # without a sign of life from a process the others end
SHUTDOWN_SECONDS = 30  # that a process which is done, or failed, waits for the others
SEEN_SECONDS = 10  # after which a file must be visible on other hosts
STATUS = re.compile(
    "(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): "
)
ALONE = "--num-processes 1 runs alone"


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run. TPU pods, SLURM, Open MPI and Kubernetes tell JAX; elsewhere give the first three."""

    coordinator: str | None = None  # HOST:PORT on which process 0 listens and all others find it
    num_processes: int | None = None  # of the run; 1: alone, whatever the cluster says
    process_id: int | None = None  # of this one, from 0
    distributed: bool = (
        False  # end with an error where no cluster is found, instead of running alone
    )
    start_timeout: int = 300  # seconds to wait for the other processes at the start

    def __post_init__(self) -> None:
        named = {
            "--coordinator": self.coordinator,
            "--num-processes": self.num_processes,
            "--process-id": self.process_id,
        }
        missing = [flag for flag, value in named.items() if value is None]
        for flag, number in (
            ("--start-timeout", self.start_timeout),
            ("--num-processes", 1 if self.num_processes is None else self.num_processes),
        ):
            if number < 1:
                raise UserError(f"{flag} {number}: give a positive number")
        if self.num_processes == 1:
            return
        if missing and len(missing) < 3:
            raise UserError(
                f"{' and '.join(missing)} missing: give all of {', '.join(named)}, or none where JAX detects a cluster"
            )
        if missing:
            return
        assert self.coordinator and self.num_processes and self.process_id is not None
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"--process-id {self.process_id} is out of range: {self.num_processes} processes count from 0 to "
                f"{self.num_processes - 1}"
            )
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"--coordinator {self.coordinator}: give HOST:PORT of process 0")

    @property
    def explicit(self) -> bool:
        """Whether the flags say all, and no cluster need be detected."""
        return self.num_processes is not None


def start(processes: Processes, preemptible: bool = False) -> int:
    """Join the processes of a run, before JAX counts its devices; returns how many they are.

    `preemptible`: the program asks at every step whether to stop (`multihost_utils.reached_preemption_sync_point`), and
    SIGTERM, which JAX then carries to all processes, does not end it.

    A process that no flag and no cluster says belongs to others runs alone. Raises UserError where they do not all
    come within `start_timeout`.
    """
    count = processes.num_processes or cluster_size()
    if count == 1:
        if processes.distributed:
            raise UserError(
                "--distributed: JAX finds no cluster of more than one process here: give --coordinator, "
                "--num-processes and --process-id"
            )
        return 1
    arguments: dict[str, Any] = {}
    if processes.explicit:
        arguments = {
            "coordinator_address": processes.coordinator,
            "num_processes": processes.num_processes,
            "process_id": processes.process_id,
            "cluster_detection_method": "deactivate",
        }
    failure: list[Exception] = []
    # it catches SIGTERM: where nobody asks it, a process told to end would not
    jax.config.update("jax_enable_preemption_service", preemptible)
    _run_collectives_in_order()

    def connect() -> None:
        try:
            jax.distributed.initialize(
                **arguments,
                # longer than ours, for at its end JAX aborts the process
                initialization_timeout=processes.start_timeout + 3600,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(processes.start_timeout)
    if thread.is_alive():
        raise UserError(_late(processes, count))
    if failure:
        reason = " ".join(str(failure[0]).split())[:300]
        raise UserError(
            f"cannot join the other processes: {reason}; where process 0 cannot listen, another program may hold the "
            f"port of --coordinator: choose another"
        ) from failure[0]
    return count


def _run_collectives_in_order() -> None:
    """Let XLA's CPU backend run a program in one order, the same in every process.

    By default it runs at once what does not depend on each other - the backward passes of two losses, say - and the
    collectives of one process then meet others of another one ("received data size doesn't match"). What XLA_FLAGS
    says already counts for more.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_cpu_enable_concurrency_optimized_scheduler=false {flags}"


def cluster_size() -> int:
    """Processes of the cluster that JAX detects around this one; 1 where there is none. Raises UserError."""
    # JAX has no public way to ask without joining; joining ends in an error or an abort where nobody else comes
    from jax._src.clusters import ClusterEnv, K8sCluster

    for cluster in ClusterEnv._cluster_types:
        # every pod looks like Kubernetes; one of an indexed job may have companions
        alone = cluster is K8sCluster and "JOB_COMPLETION_INDEX" not in os.environ
        if cluster.opt_in_only_method or alone:
            continue
        try:
            if cluster.is_env_present():
                return cluster.get_process_count()
        except Exception as error:
            raise UserError(
                f"{cluster.__name__} is detected but does not tell its processes "
                f"({' '.join(str(error).split())[:300]}): give --coordinator, --num-processes and --process-id; {ALONE}"
            ) from error
    return 1


def _late(processes: Processes, count: int) -> str:
    """Why the start took too long."""
    where = f" at {processes.coordinator}" if processes.coordinator else ""
    if processes.process_id and processes.coordinator:
        host, _, port = processes.coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            return (
                f"process 0 does not answer{where} after {processes.start_timeout} s ({error.strerror or error}): "
                f"start it there and let the port through, or raise --start-timeout"
            )
    return (
        f"not all of the {count} processes have come{where} within {processes.start_timeout} s: start every one "
        f"with the same --coordinator and --num-processes, or raise --start-timeout; {ALONE}"
    )


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def together(work: Callable[[], T]) -> T:
    """Do `work` on every process; where one of them fails, all fail, and none waits for it in vain.

    Raises UserError on the processes that did not fail themselves.
    """
    if jax.process_count() == 1:
        return work()
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    told = "" if failure is None else f"{type(failure).__name__}: {failure}"
    told = told.removeprefix("UserError: ")
    all_told = _exchange(told)
    if failure is not None:
        raise failure
    for process, message in enumerate(all_told):
        if message:
            raise UserError(f"process {process}: {message}")
    return result


def on_first(work: Callable[[], T]) -> T | None:
    """The first process does `work` while the others wait; its error is raised on all. None on the others."""
    return together(lambda: work() if is_first() else None)


def told_by_first(work: Callable[[], str]) -> str:
    """What `work` says on the first process, on all of them; its error is raised on all."""
    return _exchange(on_first(work) or "")[0]


def same_everywhere(what: str, text: str) -> None:
    """Raise UserError on all processes unless `text` is the same on each."""
    for process, other in enumerate(texts := _exchange(text)):
        if other != texts[0]:
            raise UserError(f"{what} differs between processes 0 and {process}: start all alike")


def check_shared(directory: Path, name: str) -> None:
    """Raise UserError on all processes unless each sees what the first one writes into `directory`."""
    if jax.process_count() == 1:
        return

    def write() -> str:
        with tempfile.NamedTemporaryFile(prefix=".shared-", dir=directory, delete=False) as file:
            return Path(file.name).name

    def see() -> None:
        deadline = time.monotonic() + SEEN_SECONDS
        while not file.exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{name} {directory} is not the folder of that name that process 0 sees: give one on a file "
                    f"system that all processes share"
                )
            time.sleep(0.1)

    file = directory / told_by_first(write)
    try:
        together(see)
    finally:
        on_first(file.unlink)


def _exchange(text: str) -> list[str]:
    """The texts of all processes, by process, on every one of them."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(data)))
    if not lengths.any():
        return [""] * len(lengths)
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [
        bytes(row[:length]).decode()
        for row, length in zip(rows, lengths.reshape(-1).tolist(), strict=True)
    ]


def fetch(tree: Any) -> Any:
    """Whole arrays on the host of every process, of arrays split over the devices of all of them.

    Every process must call it.
    """
    leaves = jax.tree.leaves(tree)
    if not all(x.is_fully_addressable or x.is_fully_replicated for x in leaves):
        tree = _gathered(tree)
    return jax.device_get(tree)


@jax.jit
def _gathered(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.sharding.reshard(x, PartitionSpec()), tree)


@contextlib.contextmanager
def shared_directory(path: Path, replace: bool = False) -> Iterator[Path]:
    """`new_directory` for all processes: made by the first, filled by any, named once all are done.

    It vanishes where one of them fails. Raises UserError on every process.
    """
    with contextlib.ExitStack() as stack:
        name = told_by_first(lambda: stack.enter_context(new_directory(path, replace)).name)
        partial_directory = absolute(path).with_name(name)
        failure: Exception | None = None
        try:
            yield partial_directory
        except Exception as error:
            failure = error
        together(partial(_reraise, failure))
        on_first(stack.close)


def _reraise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


@contextlib.contextmanager
def peers_explained() -> Iterator[None]:
    """An error of the runtime among several processes becomes LostPeers: mostly another one has ended."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # a program that fails while it is being dispatched raises the status as a ValueError
        status = isinstance(error, jax.errors.JaxRuntimeError) or STATUS.match(str(error))
        if jax.process_count() == 1 or not status:
            raise
        raise LostPeers(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on "
            f"({' '.join(str(error).split())[:300]}): where another process has ended, its output says why"
        ) from error
