"""A lock on a directory that dies with the process that holds it."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from sharding.disk.directory import explained
from sharding.errors import UserError

NAME = ".lock"


@contextlib.contextmanager
def locked(directory: Path, advice: str) -> Iterator[None]:
    """Keep other processes that ask out of `directory`, which exists. Raises UserError where one is in it already.

    The operating system drops the lock (flock) when the process ends, however it ends.
    """
    path = directory / NAME
    with explained(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 32).decode(errors="replace").strip()
            raise UserError(f"{directory} is in use by process {holder or '?'}: {advice}") from None
        os.ftruncate(file, 0)
        os.write(file, str(os.getpid()).encode())
        yield
    finally:
        os.close(file)
