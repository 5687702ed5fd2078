"""What the folder of a run has saved: checkpoints of its models, and snapshots of the stage that it is in."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf.progress import FOLDER
from sharding.disk.lock import locked
from sharding.disk.seal import broken, is_sealed
from sharding.errors import UserError


@dataclass(frozen=True)
class Save:
    """A checkpoint or a snapshot."""

    stage: str
    step: int | None  # None: a checkpoint, of a stage that is done
    path: Path

    @property
    def num_bytes(self) -> int:
        """On disk."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def problems(self) -> list[str]:
        """What is wrong with it, a line each; reads every byte."""
        if not is_sealed(self.path):
            return [
                f"{self.path} has no seal.json: it was not finished, or is of an earlier version"
            ]
        return broken(self.path)


def saves(directory: Path) -> list[Save]:
    """All of a run, in order. Raises UserError where `directory` holds none."""
    found = [Save(path.name, None, path) for path in _folders(directory / "checkpoints")]
    for stage in _folders(directory / FOLDER):
        numbered = sorted(
            (int(path.name), path) for path in _folders(stage) if path.name.isdecimal()
        )
        found += [Save(stage.name, step, path) for step, path in numbered]
    if not found:
        raise UserError(
            f"{directory} holds no checkpoints/ and no {FOLDER}/: give the folder of a run"
        )
    return found


def prune(directory: Path, keep_last: int) -> list[Save]:
    """Delete all but the last snapshots of every stage; returns those that are gone.

    Raises UserError where a process is at work in the run, or nothing is saved there.
    """
    if keep_last < 1:
        raise UserError(f"--keep-last {keep_last}: give 1 or more, or delete the folder of the run")
    with locked(directory, "stop it first"):
        by_stage: dict[str, list[Save]] = {}
        for save in saves(directory):
            if save.step is not None:
                by_stage.setdefault(save.stage, []).append(save)
        gone = [save for stage in by_stage.values() for save in stage[:-keep_last]]
        for save in gone:
            shutil.rmtree(save.path)
    return gone


def _folders(directory: Path) -> Iterator[Path]:
    if directory.is_dir():
        yield from (x for x in sorted(directory.iterdir()) if x.is_dir() and x.name[0] != ".")
