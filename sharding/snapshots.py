"""Numbered states of one training in a folder, written by Orbax in the background while the training goes on."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from sharding import checkpoint
from sharding.background import give_way, writers_give_way_while
from sharding.disk.paths import absolute
from sharding.disk.seal import broken, is_sealed, seal
from sharding.errors import UserError
from sharding.processes import on_first, told_by_first
from sharding.retention import Retention

PARTIAL = ".orbax-checkpoint-tmp"  # in the name of what Orbax has not finished
STATE, FACTS = "state", "facts"  # what a snapshot consists of: arrays, and what JSON can hold


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # whoever asks JAX must do so with numbers of one series, and those of snapshots are not the run's
        return False


class _Policy(managers.PreservationPolicy):
    """Orbax asks which of the snapshots there are stay."""

    def __init__(self, staying: Callable[[Sequence[int]], set[int]]) -> None:
        self._staying = staying

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """In order of their steps."""
        staying = self._staying([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in staying for checkpoint in checkpoints]


class Snapshots:
    """The snapshots of one training. Use it in `with`: what is being written is finished at the end.

    A snapshot appears whole, with a hash of every file in it (`sharding.disk.seal`), or not at all. Those stay of
    which `retention` says so; it had better keep the last two, in case that one is damaged. Every process of a run
    must call every method, with a directory that all share.
    """

    def __init__(self, directory: Path, retention: Retention = Retention()) -> None:
        self.directory = absolute(directory)
        self._retention = retention
        self._step = 0  # being written
        on_first(self._clear)
        self._worths = _worths(self.directory)
        with checkpoint.writing(self.directory):
            self._manager = _Manager(
                self.directory,
                item_names=(STATE, FACTS),
                item_handlers={STATE: checkpoint.handler(), FACTS: ocp.JsonCheckpointHandler()},
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_Policy(self._staying),
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
                ),
            )

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(self, *_: object) -> None:
        with checkpoint.writing(self.directory):
            self._manager.close()

    def save(
        self, step: int, tree: Any, facts: Mapping[str, Any], worth: float | None = None
    ) -> None:
        """Copy `tree` and `facts` and return; the copy is written in the background, after the one before it.

        `worth` says how good it is, for the `retention` of the best, where that is known.
        Nobody else may change or donate the arrays of `tree`: on a CPU the copy is the array itself. Raises UserError
        where this snapshot, or the one before, cannot be written.
        """
        with checkpoint.writing(self.directory):
            self._manager.wait_until_finished()
            on_first(partial(self._require_room, tree))
            self._step = step
            state = checkpoint.save_args(tree)
            self._worths[step] = worth
            noted = ocp.args.JsonSave({"worth": worth, "facts": dict(facts)})
            self._manager.save(step, args=ocp.args.Composite(state=state, facts=noted), force=True)
            writers_give_way_while(lambda: self._step == step and self.is_saving())

    def wait(self) -> None:
        """Until everything is on disk. Raises UserError where it cannot be written."""
        with checkpoint.writing(self.directory):
            self._manager.wait_until_finished()

    def is_saving(self) -> bool:
        """Whether one is being written."""
        return self._manager.is_saving_in_progress()

    def newest(self, tell: Callable[[str], None]) -> int | None:
        """The last snapshot that is as it was written, None where there is none; `tell` hears of those that are not."""

        def find() -> str:
            for step in sorted(self._manager.all_steps(), reverse=True):
                directory = self.path(step)
                if not is_sealed(directory):
                    tell(f"{directory} was never finished and is not used: it has no seal")
                elif problems := broken(directory):
                    tell(f"{directory} is damaged and is not used: {problems[0]}")
                else:
                    return str(step)
            return ""

        found = told_by_first(find)
        return int(found) if found else None

    def drop_after(self, step: int) -> None:
        """Delete the snapshots after `step`: a training that went back to it will make them again."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def facts(self, step: int) -> dict[str, Any]:
        """What was said at `step`. Raises UserError where it cannot be read."""
        facts, _ = _noted(self.path(step))
        return facts

    def state(self, step: int) -> Path:
        """The arrays of `step`: what `sharding.checkpoint.restore` and `shapes` read."""
        return self.path(step) / STATE

    def path(self, step: int) -> Path:
        """The folder of `step`."""
        return self.directory / str(step)

    def _staying(self, steps: Sequence[int]) -> set[int]:
        return self._retention.staying({step: self._worths.get(step) for step in steps})

    def _clear(self) -> None:
        # Orbax's own clearing goes on in the background
        for unfinished in self.directory.glob(f"*{PARTIAL}*"):
            shutil.rmtree(unfinished)

    def _require_room(self, tree: Any) -> None:
        # one line beforehand instead of what threads say that find the disk full; it may still become full meanwhile
        wanted = sum(x.nbytes for x in jax.tree.leaves(tree))
        if shutil.disk_usage(self.directory).free < wanted:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _seal(self) -> None:
        # all is written, by every process, under a temporary name that Orbax replaces next; in a thread of this save
        give_way()
        (partial,) = self.directory.glob(f"{self._step}{PARTIAL}*")
        seal(partial)


def prune(directory: Path, retention: Retention) -> None:
    """Delete the snapshots in `directory`, where nobody is at work, that do not stay; also the folder if none does."""
    worths = _worths(directory)
    staying = retention.staying(worths)
    if not staying:
        shutil.rmtree(directory, ignore_errors=True)
    for step in worths.keys() - staying:
        shutil.rmtree(directory / str(step), ignore_errors=True)


def _worths(directory: Path) -> dict[int, float | None]:
    """Of every snapshot; None where it cannot be read."""
    found: dict[int, float | None] = {}
    for path in directory.glob("*/"):
        if path.name.isdecimal():
            try:
                _, found[int(path.name)] = _noted(path)
            except UserError:
                found[int(path.name)] = None
    return found


def _noted(directory: Path) -> tuple[dict[str, Any], float | None]:
    """Facts and worth of a snapshot. Raises UserError where they cannot be read."""
    path = directory / FACTS / "metadata"
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        worth = noted["worth"]
        return dict(noted["facts"]), None if worth is None else float(worth)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
