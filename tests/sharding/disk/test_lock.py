"""A folder has one user at a time, and none that is dead."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sharding.disk.lock import locked
from sharding.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from sharding.disk.lock import locked
with locked(Path(sys.argv[1]), ""):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_keeps_others_out_until_it_is_left(tmp_path: Path) -> None:
    with (
        locked(tmp_path, "wait"),
        pytest.raises(UserError, match=f"is in use by process {os.getpid()}: wait"),
        locked(tmp_path, "wait"),
    ):
        pass
    with locked(tmp_path, "wait"):
        pass


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    repository = Path(__file__).parents[3]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(repository)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=f"is in use by process {holder.pid}: go"),
            locked(tmp_path, "go"),
        ):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with locked(tmp_path, "go"):
        pass


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"), locked(tmp_path / "missing", "go"):
        pass
