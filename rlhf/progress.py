"""How far a run is, on disk: the stages behind it, and snapshots of the one that it is in.

    state/journal.json           stages that are done, with what they found; how much of the log belongs to them
    state/STAGE/STEP/            a training on its way: arrays, iterators of data, how much of the log belongs to it;
                                 of a stage that is done those that are kept for good
    faults/STAGE-STEP[-ROLE]/    model and batch of an update whose gradient was not finite

Whatever is not in there is computed again from the recipe, its seed and the checkpoints, to the same bits.
"""

import dataclasses
import functools
import importlib.metadata
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glm_jax.keeper import NOTHING_KEPT, Keeper
from rlhf.runlog import METRICS_FILE, Position
from rlhf.stage_keeper import StageKeeper, Training
from rlhf.stop import Stop, Stopped
from sharding.disk.directory import write_json
from sharding.errors import UserError
from sharding.layout import Layout
from sharding.processes import on_first
from sharding.retention import Retention
from sharding.snapshots import Snapshots, prune

FOLDER = "state"
JOURNAL = "journal.json"
KEEP_NONE = Retention(last=0)
LIBRARIES = ("glm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(frozen=True)
class SavingConfig:
    """When a run saves what it would need to go on, and how much of that it keeps. Not in the paper."""

    every: int = 200  # updates of SFT, reward model and DPO from one save to the next; 0: none
    every_iterations: int = 10  # iterations of PPO
    keep_last: int = 2  # saves of a stage that stay until it is done, at least 2
    keep_every: int | None = None  # updates, or iterations: saves at multiples of it stay for good
    # saves that stay for good, the best by held-out accuracy of the reward model and by reward of PPO
    keep_best: int = 0

    def __post_init__(self) -> None:
        for name in ("every", "every_iterations"):
            if (count := getattr(self, name)) < 0:
                raise UserError(f"saving.{name} = {count}: give 0 for never, or more")
        if self.keep_last < 2:
            raise UserError(
                f"saving.keep_last = {self.keep_last}: give 2 or more, in case that the last one is damaged"
            )
        if self.keep_every is not None and self.keep_every < 1:
            raise UserError(f"saving.keep_every = {self.keep_every}: give a positive number")
        if self.keep_best < 0:
            raise UserError(f"saving.keep_best = {self.keep_best}: give 0 or more")


class Progress:
    """How far a run is; this one keeps nothing, so that every stage begins at its beginning."""

    def done(self, stage: str) -> Mapping[str, Any] | None:
        """What a stage found that is done; None where it is yet to do."""
        return None

    def history(self, stage: str) -> list[dict[str, float]]:
        """The metrics of a stage's steps before the run went on from there, each with its "step"."""
        return []

    def keeper(self, training: Training, layout: Layout) -> Keeper:
        """What saves a stage on its way; use it in `with`."""
        return NOTHING_KEPT

    def finish(self, stage: str, found: Mapping[str, Any] | None = None) -> None:
        """A stage is done; `found`, which JSON can hold, is what `done` says from now on."""

    def require_same(self, what: str, digest: str) -> None:
        """Raise UserError where `what`, a field of the recipe, had other contents when the run began."""

    def pause(self, stage: str) -> None:
        """A moment at which the run may stop, and do `stage` again later. Raises Stopped."""


NOT_KEPT = Progress()


@dataclasses.dataclass(frozen=True)
class Found:
    """What a directory tells of a run: where it goes on."""

    stages: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    stage: str | None = None  # that has a snapshot
    step: int = 0  # of it
    position: Position = Position()
    finished: Position = Position()  # at the end of the last stage that is done
    history: Mapping[str, list[dict[str, float]]] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of what it is made of
    kept: Mapping[str, Retention] = dataclasses.field(
        default_factory=dict
    )  # for good, of every stage

    @property
    def welcome(self) -> str:
        """One line on where the run goes on, and on libraries that are others than before."""
        if self.stage is not None:
            where = f"{self.stage} {self.position.counts.get(self.stage, 0)}"
        else:
            where = f"the end of {list(self.stages)[-1]}" if self.stages else "the beginning"
        now = versions()
        others = [
            f"{name} is {now.get(name)}, was {before}"
            for name, before in self.versions.items()
            if now.get(name) != before
        ]
        bits = f"; bits may differ, for {', '.join(others)}" if others else ""
        return f"going on from {where}{bits}; --restart begins anew"


def find(directory: Path, tell: Callable[[str], None]) -> Found:
    """Where the run in `directory` goes on; `tell` hears of snapshots that are damaged. Every process must call it.

    Raises UserError where the journal or the log is damaged.
    """
    journal = _read(directory / FOLDER / JOURNAL)
    stages = journal.get("stages", {})
    finished = position = Position(**journal.get("log", {}))
    stage, step = None, 0
    for folder in sorted((directory / FOLDER).glob("*/")):
        if folder.name in stages:
            continue
        with Snapshots(folder) as snapshots:
            newest = snapshots.newest(tell)
            if newest is not None:
                stage, step = folder.name, newest
                position = Position(**snapshots.facts(newest)["log"])
    history = _history(directory / METRICS_FILE, position.metrics_bytes)
    return Found(
        stages,
        stage,
        step,
        position,
        finished,
        history,
        journal.get("versions", {}),
        journal.get("digests", {}),
        kept_for_good(directory),
    )


def kept_for_good(directory: Path) -> dict[str, Retention]:
    """What of every stage's snapshots stays when it is done. Raises UserError where the journal is damaged."""
    kept = _read(directory / FOLDER / JOURNAL).get("kept", {})
    return {stage: Retention(**retention) for stage, retention in kept.items()}


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): --restart begins anew") from None
    return found


def _history(path: Path, num_bytes: int) -> dict[str, list[dict[str, float]]]:
    """Metrics by stage, of the first bytes of a log. Raises UserError where it has lost some of them."""
    history: dict[str, list[dict[str, float]]] = {}
    if not num_bytes:
        return history
    try:
        content = path.read_bytes()[:num_bytes]
        if len(content) < num_bytes:
            raise ValueError(f"{len(content):,} bytes instead of {num_bytes:,}")
        for line in content.decode().split("\n")[:-1]:
            values = json.loads(line)
            del values["wall_s"]
            history.setdefault(values.pop("stage"), []).append(values)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"cannot go on with {path} ({error}): put it back, or --restart begins anew"
        ) from None
    return history


class Journal(Progress):
    """How far a run is, kept in its directory."""

    def __init__(
        self,
        directory: Path,
        found: Found,
        saving: SavingConfig,
        position: Callable[[], Position],
        stop: Stop,
        max_skipped: int = 0,
    ) -> None:
        """`position` says how much of the log there is at the moment; `max_skipped` is the recipe's."""
        self._folder = directory / FOLDER
        self._found = found
        self._stages = dict(found.stages)
        self._saving = saving
        self._position = position
        self._stop = stop
        self._max_skipped = max_skipped
        self._finished = found.finished
        self._digests = dict(found.digests)
        self._kept = dict(found.kept)
        on_first(self._tidy)

    def done(self, stage: str) -> Mapping[str, Any] | None:
        """See `Progress`."""
        return self._stages.get(stage)

    def history(self, stage: str) -> list[dict[str, float]]:
        """See `Progress`."""
        return list(self._found.history.get(stage, ()))

    def keeper(self, training: Training, layout: Layout) -> StageKeeper:
        """See `Progress`."""
        saving, stage = self._saving, training.name
        every = math.lcm(saving.keep_every or 0, training.every) * training.stride
        self._kept[stage] = Retention(0, every or None, saving.keep_best)
        on_first(self._write)
        retention = dataclasses.replace(self._kept[stage], last=saving.keep_last)
        return StageKeeper(
            training,
            Snapshots(self._folder / stage, retention),
            self._found.step if stage == self._found.stage else None,
            layout,
            self._position,
            self._stop,
            self._max_skipped,
        )

    def finish(self, stage: str, found: Mapping[str, Any] | None = None) -> None:
        """See `Progress`. Raises Stopped where somebody asks for it."""
        self._stages[stage] = dict(found or {})
        self._finished = self._position()

        def conclude() -> None:
            self._write()
            prune(self._folder / stage, self._kept.get(stage, KEEP_NONE))

        on_first(conclude)
        if self._stop.asked():
            raise Stopped(f"after {stage}")

    def require_same(self, what: str, digest: str) -> None:
        """See `Progress`."""
        if self._digests.setdefault(what, digest) != digest:
            raise UserError(
                f"{what} holds other contents than when the run began: put them back, or --restart begins anew"
            )
        on_first(self._write)

    def pause(self, stage: str) -> None:
        """See `Progress`."""
        if self._stop.asked():
            raise Stopped(f"in {stage}, which begins anew")

    def _tidy(self) -> None:
        self._write()
        for stage in self._stages:  # where a run was killed before it could
            prune(self._folder / stage, self._kept.get(stage, KEEP_NONE))

    def _write(self) -> None:
        self._folder.mkdir(exist_ok=True)
        write_json(
            self._folder / JOURNAL,
            {
                "stages": self._stages,
                "log": dataclasses.asdict(self._finished),
                "versions": versions(),
                "digests": self._digests,
                "kept": {stage: dataclasses.asdict(kept) for stage, kept in self._kept.items()},
            },
        )


@functools.cache
def versions() -> dict[str, str]:
    """What a run's bits depend on beside its recipe."""
    found = {"python": sys.version.split()[0]}
    found |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    revision = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found | {"git": revision.stdout.strip() or "unknown"}
