"""Threads that write in the background give way to those that compute.

On Linux alone a thread has a priority of its own; elsewhere nothing happens.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

LOWEST = 19  # as `nice` counts
WRITERS = "ts_pool_worker"  # what Tensorstore calls the threads that copy and write
PAUSE_SECONDS = 0.05


def give_way() -> None:
    """The calling thread gets little of a processor that another thread wants (nice 19), for good."""
    _lower(threading.get_native_id())


def writers_give_way_while(writing: Callable[[], bool]) -> None:
    """The same for Tensorstore's threads, which come as they are needed, as long as `writing` says; returns at once."""

    def usher() -> None:
        give_way()
        while writing():
            for thread in Path("/proc/self/task").glob("*"):
                with contextlib.suppress(OSError):  # it has ended
                    if (thread / "comm").read_text().strip() == WRITERS:
                        _lower(int(thread.name))
            time.sleep(PAUSE_SECONDS)

    if sys.platform == "linux":
        # no daemon: one that wakes up while Python ends would take the process with it
        threading.Thread(target=usher, name="usher").start()


def _lower(thread: int) -> None:
    if sys.platform == "linux":  # elsewhere the number may be that of a process
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, LOWEST)
