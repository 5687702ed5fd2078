"""The command `glm-jax checkpoint`: what a run has saved, and whether it is still whole."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from rlhf.model_cli import Place, screen

if TYPE_CHECKING:  # slow to import, and --help has no use for them
    from rlhf.saves import Save

Job = Callable[[], int | None]


def add_commands(app: tyro.extras.SubcommandApp) -> None:
    """Add `checkpoint` and its commands; the docstrings are what --help prints."""
    checkpoint = tyro.extras.SubcommandApp()
    app.command(checkpoint, name="checkpoint", help="What a run has saved: ls, show, verify, ...")

    @checkpoint.command
    def ls(run: tyro.conf.Positional[Path]) -> Job:
        """List the checkpoints of a run, and the snapshots of its stages.

        Args:
            run: The output_dir of a run.
        """
        return partial(_ls, run)

    @checkpoint.command
    def show(save: tyro.conf.Positional[Path]) -> Job:
        """Tell what is in a checkpoint or a snapshot: every array, its shape, type and bytes.

        Args:
            save: A folder that `ls` lists.
        """
        return partial(_show, save)

    @checkpoint.command
    def verify(run: tyro.conf.Positional[Path]) -> Job:
        """Hash every file of every checkpoint and snapshot, and compare. Exit 1 where one has changed.

        Args:
            run: The output_dir of a run.
        """
        return partial(_verify, run)

    @checkpoint.command
    def prune(run: tyro.conf.Positional[Path], keep_last: int = 1) -> Job:
        """Delete snapshots. Checkpoints, and what `saving.keep_every` and `saving.keep_best` keep, stay.

        Args:
            run: The output_dir of a run, which nobody is at work in.
            keep_last: How many of every stage stay.
        """
        return partial(_prune, run, keep_last)

    @checkpoint.command
    def extract(
        snapshot: tyro.conf.Positional[Path],
        out: tyro.conf.Positional[Path],
        role: Literal["actor", "critic"] = "actor",
    ) -> Job:
        """Make a checkpoint of the model in a snapshot, such as one that `saving.keep_best` has kept.

        Args:
            snapshot: A folder that `ls` lists with a step.
            out: Directory to write, which must not exist.
            role: Which model, of a snapshot of PPO.
        """
        return partial(_extract, snapshot, out, role)

    @checkpoint.command
    def reshard(
        checkpoint: tyro.conf.Positional[Path],
        out: tyro.conf.Positional[Path],
        layout: str,
        devices: int | None = None,
    ) -> Job:
        """Copy a checkpoint, cut into the files that a layout reads fastest. Any layout reads any checkpoint.

        Args:
            checkpoint: A checkpoint, such as checkpoints/ppo of a run.
            out: Directory to write, which must not exist.
            layout: A name, or PIPExDATAxFSDPxTENSOR.
            devices: On a CPU, how many to simulate.
        """
        return partial(_reshard, checkpoint, out, layout, devices)


def _ls(run: Path) -> None:
    from rich.table import Table

    from rlhf.saves import saves

    table = Table("stage", "step", "MB", "path", box=None)
    for save in saves(run):
        step = "done" if save.step is None else str(save.step)
        table.add_row(save.stage, step, f"{save.num_bytes / 1e6:,.1f}", str(save.path))
    console, _ = screen()
    console.print(table)


def _show(save: Path) -> None:
    from rich.table import Table

    from sharding import checkpoint
    from sharding.snapshots import STATE

    arrays = save / ("weights" if (save / "weights").is_dir() else STATE)
    table = Table("array", "shape", "type", "MB", box=None)
    total = 0
    for keys, like in checkpoint.shapes(arrays).items():
        num_bytes = like.size * like.dtype.itemsize
        total += num_bytes
        shape = " x ".join(map(str, like.shape))
        table.add_row(".".join(keys), shape, str(like.dtype), f"{num_bytes / 1e6:,.3f}")
    table.add_row("all", "", "", f"{total / 1e6:,.3f}")
    console, _ = screen()
    console.print(table)


def _verify(run: Path) -> int:
    from rlhf.saves import saves

    _, tell = screen()
    failed = False
    for save in saves(run):
        problems = save.problems()
        tell(f"{_name(save)}: {'; '.join(problems) or 'whole'}")
        failed |= bool(problems)
    return int(failed)


def _prune(run: Path, keep_last: int) -> None:
    from rlhf.saves import prune

    _, tell = screen()
    for save in prune(run, keep_last):
        tell(f"deleted {_name(save)}: {save.path}")


def _extract(snapshot: Path, out: Path, role: str) -> None:
    from rlhf.saves import extract_model

    extract_model(snapshot, role, out)
    _, tell = screen()
    tell(f"wrote {out}")


def _name(save: "Save") -> str:
    return save.stage if save.step is None else f"{save.stage} {save.step}"


def _reshard(directory: Path, out: Path, layout: str, devices: int | None) -> None:
    from glm_jax.checkpoint import resave

    with Place(layout, devices).open() as opened:
        resave(directory, opened, out)
    _, tell = screen()
    tell(f"wrote {out}")
