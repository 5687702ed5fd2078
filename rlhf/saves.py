"""What the folder of a run has saved: checkpoints of its models, and snapshots of its stages."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from glm_jax.checkpoint import extract
from glm_jax.config import Head
from rlhf.progress import FOLDER, kept_for_good
from sharding import snapshots
from sharding.disk.lock import locked
from sharding.disk.paths import absolute
from sharding.disk.seal import broken, is_sealed
from sharding.errors import UserError
from sharding.retention import Retention


@dataclasses.dataclass(frozen=True)
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
    """Delete all but the last snapshots of every stage and those that are kept for good; returns those that are gone.

    Raises UserError where a process is at work in the run, or nothing is saved there.
    """
    if keep_last < 1:
        raise UserError(f"--keep-last {keep_last}: give 1 or more, or delete the folder of the run")
    with locked(directory, "stop it first"):
        found, kept = saves(directory), kept_for_good(directory)
        for stage in {save.stage for save in found if save.step is not None}:
            retention = dataclasses.replace(kept.get(stage, Retention()), last=keep_last)
            snapshots.prune(directory / FOLDER / stage, retention)
    return [save for save in found if not save.path.exists()]


def extract_model(save: Path, role: str, out: Path) -> None:
    """The model of a snapshot as the checkpoint `out`; `role` says which, of a snapshot of PPO.

    Raises UserError where `save` is no whole snapshot of a run, holds no such model, or `out` exists.
    """
    save = absolute(save)
    if not save.name.isdecimal() or save.parent.parent.name != FOLDER:
        raise UserError(f"{save} is no snapshot: give a folder that `ls` lists with a step")
    stage, run = save.parent.name, save.parents[2]
    if role == "critic" and stage != "ppo":
        raise UserError(f"{save} holds no critic: leave --role out, or give a snapshot of PPO")
    if problems := Save(stage, int(save.name), save).problems():
        raise UserError(problems[0])
    likes = [run / "checkpoints" / name for name in (stage, "sft", "reward")]
    like = next((path for path in likes if path.is_dir()), None)
    if like is None:
        raise UserError(
            f"{run} holds no checkpoint yet, whose tokenizer the model could take: wait until a stage is done"
        )
    prefix = (role, "model") if stage == "ppo" else ("model",)
    head = Head.SCALAR if "critic" in prefix or stage == "reward" else Head.VOCABULARY
    extract(save / snapshots.STATE, prefix, like, head, out)


def _folders(directory: Path) -> Iterator[Path]:
    if directory.is_dir():
        yield from (x for x in sorted(directory.iterdir()) if x.is_dir() and x.name[0] != ".")
