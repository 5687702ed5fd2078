"""What is written in the background leaves the processors to what computes."""

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import sharding.snapshots
from sharding.background import LOWEST, WRITERS, give_way
from sharding.layout import Layout
from sharding.snapshots import Snapshots

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have one priority there")


def priority(thread: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread)


def test_a_thread_that_gives_way_does_so_alone() -> None:
    before, found = priority(0), list[int]()

    def work() -> None:
        give_way()
        found.append(priority(threading.get_native_id()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [LOWEST]
    assert priority(0) == before


def test_those_that_write_a_snapshot_give_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal, written, seen = sharding.snapshots.seal, threading.Event(), threading.Event()
    sealing: list[int] = []

    def wait(directory: Path) -> None:
        sealing.append(priority(threading.get_native_id()))
        written.set()
        assert seen.wait(60)
        seal(directory)

    def writers() -> set[int]:
        found = set()
        for path in Path("/proc/self/task").glob("*/comm"):
            with contextlib.suppress(OSError):  # it has ended
                if path.read_text().strip() == WRITERS:
                    found.add(priority(int(path.parent.name)))
        return found

    monkeypatch.setattr(sharding.snapshots, "seal", wait)
    with jax.set_mesh(Layout().mesh()), Snapshots(tmp_path) as snapshots:
        snapshots.save(1, {str(i): jnp.zeros((1000, 1000)) for i in range(8)}, {})
        assert written.wait(60)
        deadline = time.monotonic() + 60
        while writers() != {LOWEST} and time.monotonic() < deadline:
            time.sleep(0.01)
        assert writers() == {LOWEST}
        (usher,) = (thread for thread in threading.enumerate() if thread.name == "usher")
        assert not usher.daemon  # Python waits for it before it ends
        seen.set()
    usher.join(60)
    assert not usher.is_alive()
    assert sealing == [LOWEST]
    assert priority(0) < LOWEST
