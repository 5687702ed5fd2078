"""A stage of a run on its way, saved in a form that knows no layout (`glm_jax.weights.kept_layout`)."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp

from glm_jax.keeper import NO_FACTS, NO_METRICS, Facts, Keeper
from glm_jax.weights import from_kept, to_kept
from rlhf.runlog import Position
from rlhf.stop import Stop, Stopped
from sharding import checkpoint
from sharding.disk.arrays import write_arrays
from sharding.disk.directory import write_json
from sharding.errors import UserError
from sharding.layout import Layout
from sharding.processes import fetch, is_first, on_first, shared_directory
from sharding.snapshots import Snapshots

Tree = TypeVar("Tree")
FAULTS = "faults"  # folder beside that of the snapshots


@runtime_checkable
class Iterates(Protocol):
    """An iterator that can say where it is, and go there."""

    def get_state(self) -> Any:
        """What JSON can hold."""

    def set_state(self, state: Any) -> None:
        """Go there."""


@dataclasses.dataclass(frozen=True)
class Training:
    """A stage that is saved on its way."""

    name: str
    iterators: Mapping[str, Iterates]  # of its data
    every: int  # updates or iterations from one save to the next; 0: none
    stride: int = 1  # numbers of snapshots to an update or iteration
    best: str = ""  # the metric, the higher the better, by which saves are compared


class StageKeeper(Keeper):
    """Snapshots of one stage, and where it goes on.

    Attributes:
        snapshots: what is written, in the background.
    """

    def __init__(
        self,
        training: Training,
        snapshots: Snapshots,
        step: int | None,
        layout: Layout,
        position: Callable[[], Position],
        stop: Stop,
        max_skipped: int,
    ) -> None:
        self._training = training
        self.snapshots = snapshots
        self._step = step
        self._layout = layout
        self._position = position
        self._stop = stop
        self._max_skipped = max_skipped
        self._skipped = 0
        self._copied = jax.jit(partial(_copied, layout=layout))
        snapshots.drop_after(-1 if step is None else step)
        if step is not None:
            saved = snapshots.facts(step)
            self.facts, self.count = saved["facts"], saved["count"]
            self._skipped = saved["skipped"]
            for name, iterator in training.iterators.items():
                iterator.set_state(saved["iterators"][name])

    def __exit__(self, *_: object) -> None:
        self.snapshots.__exit__()

    def restore(self, make: Callable[[], Tree]) -> Tree:
        """See `Keeper`. Every device reads its own shards. Raises UserError where those of `make` are others."""
        if self._step is None:
            return make()
        like = jax.eval_shape(lambda: to_kept(make(), self._layout))
        saved = checkpoint.restore(self.snapshots.state(self._step), like)
        restored: Tree = jax.jit(partial(from_kept, layout=self._layout), donate_argnums=0)(saved)
        return restored

    def keep(
        self,
        tree: Any,
        count: int,
        facts: Facts | Callable[[], Facts] = NO_FACTS,
        within: int = 0,
        metrics: Mapping[str, float] = NO_METRICS,
    ) -> None:
        """See `Keeper`. Raises Stopped, after it has saved, where somebody asks for it."""
        asked = self._stop.asked()
        training = self._training
        due = not within and training.every > 0 and count % training.every == 0
        if not asked and not due:
            return
        saved = {
            "facts": facts() if callable(facts) else facts,
            "count": count,
            "skipped": self._skipped,
            "iterators": {name: x.get_state() for name, x in training.iterators.items()},
            "log": dataclasses.asdict(self._position()),
        }
        number = count * training.stride + within
        # what is saved because somebody stopped the run is not what an undisturbed one would compare
        worth = metrics.get(training.best) if due else None
        self.snapshots.save(number, self._copied(tree), saved, worth)
        if asked:
            self.snapshots.wait()
            raise Stopped(f"at {training.name} {count}")

    def skip(self, step: int, model: Any, batch: Any, role: str = "") -> bool:
        """See `Keeper`. Raises UserError, after it has kept model and batch, where too many were skipped."""
        stage = self._training.name
        self._skipped += 1
        if self._skipped <= self._max_skipped:
            return True
        name = "-".join(filter(None, (stage, str(step), role)))
        fault = self.snapshots.directory.parents[1] / FAULTS / name
        on_first(lambda: fault.parent.mkdir(exist_ok=True))
        with shared_directory(fault, replace=True) as partial_directory:
            checkpoint.save(partial_directory / "weights", self._copied(model))
            rows = fetch(batch)
            if is_first():
                write_arrays(partial_directory / "batch.npz", rows)
                skipped = self._skipped - 1
                about = {"stage": stage, "step": step, "role": role, "skipped": skipped}
                write_json(partial_directory / "fault.json", about)
        whose = f" of the {role}" if role else ""
        raise UserError(
            f"{stage}: the gradient of update {step}{whose} is not finite, after max_skipped = {self._max_skipped} "
            f"such updates were left out; the weights are still those before it. Model and batch are in {fault}: "
            f"glm-jax replay RECIPE {fault} names the rows"
        )


def _copied(tree: Any, layout: Layout) -> Any:
    # copies: the next update donates the arrays of `tree` while these are being written
    return jax.tree.map(jnp.copy, to_kept(tree, layout))
