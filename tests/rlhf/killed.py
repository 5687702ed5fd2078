"""The `glm-jax` command, killed by SIGKILL a little after the n-th time that it comes to a place.

python killed.py PLACE N SECONDS run RECIPE ...
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import rlhf.ppo_loop
import rlhf.progress
import rlhf.run
import rlhf.sft
import sharding.checkpoint
import sharding.snapshots
from glm_jax.sampler import Sampler
from rlhf.cli import main
from sharding.layout import Layout
from sharding.snapshots import Snapshots

PLACES: dict[str, tuple[Any, str]] = {
    "step": (Layout, "put"),  # a batch is brought to the devices, an update follows
    "rollout": (Sampler, "draw"),
    "snapshot": (Snapshots, "save"),
    "commit": (sharding.snapshots, "seal"),  # in the background, before the snapshot has its name
    "checkpoint": (sharding.checkpoint, "save"),
    "journal": (rlhf.progress, "write_json"),
    "export": (rlhf.run, "export_hf"),
    "exported": (
        rlhf.progress.Journal,
        "finish",
    ),  # what is exported has its name, but no stage is done yet
    "evaluate": (rlhf.run, "answer"),
}


def arm(place: str, count: int, seconds: float) -> None:
    """Die `seconds` after the `count`-th call."""
    owner, name = PLACES[place]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return original(*args, **kwargs)

    setattr(owner, name, counted)


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    sys.exit(main(sys.argv[4:]))
