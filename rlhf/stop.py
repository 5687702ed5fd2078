"""Being asked to stop: SIGTERM, SIGINT, or a notice that the machines are about to be taken away."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A run that was asked to stop has saved what it needs to go on; the message says where it is."""


class Stop:
    """Whether somebody asks this run to stop. A second signal ends a process that runs alone at once."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._points = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Hear signals while the block goes on."""
        # several processes have to stop at the same point: JAX carries a SIGTERM to all of them, and hears of
        # preemption where the cluster tells
        several = jax.process_count() > 1
        heard = SIGNALS[1:] if several else SIGNALS
        before = {number: signal.signal(number, self._hear) for number in heard}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether to stop here: the same answer in every process, each of which must ask at the same points."""
        self._points += 1
        if jax.process_count() == 1:
            return self._signal is not None
        return bool(multihost_utils.reached_preemption_sync_point(self._points))

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        for heard in SIGNALS if jax.process_count() == 1 else SIGNALS[1:]:
            signal.signal(heard, signal.SIG_DFL if heard == signal.SIGTERM else _interrupt)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
