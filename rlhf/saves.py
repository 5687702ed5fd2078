"""What the folder of a run has saved: checkpoints of its models, and snapshots of the stage that it is in."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glm_jax.checkpoint import extract
from glm_jax.config import Head
from rlhf.progress import FOLDER
from sharding.disk.lock import locked
from sharding.disk.seal import broken, is_sealed
from sharding.errors import UserError
from sharding.snapshots import STATE


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


def extract_model(save: Path, role: str, out: Path) -> None:
    """The model of a snapshot as the checkpoint `out`; `role` says which, where there are several.

    Raises UserError where `save` is no whole snapshot of a run, holds no such model, or `out` exists.
    """
    stage, run = save.parent.name, save.absolute().parents[2]
    if problems := Save(stage, None, save).problems():
        raise UserError(problems[0])
    likes = [run / "checkpoints" / name for name in (stage, "sft", "reward")]
    like = next((path for path in likes if path.is_dir()), None)
    if like is None:
        raise UserError(
            f"{run} holds no checkpoint yet, whose tokenizer the model could take: wait until a stage is done"
        )
    prefix = (role, "model") if stage == "ppo" else ("model",)
    scalar = stage == "reward" or role == "critic"
    extract(save / STATE, prefix, like, Head.SCALAR if scalar else Head.VOCABULARY, out)


def _folders(directory: Path) -> Iterator[Path]:
    if directory.is_dir():
        yield from (x for x in sorted(directory.iterdir()) if x.is_dir() and x.name[0] != ".")
