"""The `glm-jax` command."""

import dataclasses
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from rlhf import (
    bench_cli,
    certify_cli,
    checkpoint_cli,
    data_cli,
    layout_cli,
    model_cli,
    plan_cli,
    reward_cli,
)
from rlhf.recipe_file import load_recipe, override, resume_command
from sharding.disk.paths import absolute_paths
from sharding.errors import LostPeers, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from rlhf.outdir import Resume
    from rlhf.progress import Progress
    from rlhf.recipe import Recipe, RewardRecipe
    from rlhf.runlog import RunLog

FINISHED = "the run is finished, nothing is left to do; --restart begins anew"
DESCRIPTION = "Train the ChatGLM family with human feedback on a mesh of TPUs or GPUs, in JAX."

# commands whose options are fields of a recipe -> how many words come before those
WITH_RECIPE = {"run": 1, "doctor": 1, "replay": 2}


def main(args: Sequence[str] | None = None) -> int:
    """Run `glm-jax` with `args` (None: those of the process) and return its exit status.

    0 done; 1 a UserError, told in one line, or a check that failed; 2 a misspelt command line (by tyro, as
    SystemExit); 130 interrupted.
    """
    args = list(sys.argv[1:] if args is None else args)
    logging.getLogger("absl").setLevel(logging.ERROR)  # what Orbax warns of, no user can mend
    # the fields of a recipe are known only once its file is read: what follows the file is parsed then
    own = WITH_RECIPE.get(args[0], 0) if args else 0
    has_recipe = own and len(args) > own and not args[1].startswith("-")
    command, options = (args[: own + 1], args[own + 1 :]) if has_recipe else (args, [])
    try:
        command = [word for word in command if word != "--debug"]
        job = _commands(options).cli(prog="glm-jax", description=DESCRIPTION, args=command)
        # the one place where the paths of commands become those that are opened; `override` does it for recipes
        return job.func(*absolute_paths(job.args), **job.keywords) or 0
    except UserError as error:
        if "--debug" in args:
            traceback.print_exc()
        print("glm-jax: error:", " ".join(str(error).split()), file=sys.stderr)
        if isinstance(error, LostPeers):  # at exit JAX would wait for them, and then abort
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        return 1
    except KeyboardInterrupt:
        print("glm-jax: interrupted; what was written so far is kept", file=sys.stderr)
        return 130


def _commands(options: list[str]) -> tyro.extras.SubcommandApp:
    """The subcommands; each returns the job to do. Their docstrings are what --help prints."""
    app = tyro.extras.SubcommandApp()

    @app.command
    def run(recipe: tyro.conf.Positional[Path]) -> Callable[[], None]:
        """Run a recipe: every stage from data to report.

        Options after the recipe override its fields: glm-jax run configs/demo.py --seed 1 --layout dp.
        All of them are listed by: glm-jax run configs/demo.py --help

        Args:
            recipe: A Python file that ends in `config = Recipe(...)` or `RewardRecipe(...)`, such as configs/demo.py.
        """
        return partial(run_recipe, recipe, options)

    @app.command
    def doctor(recipe: tyro.conf.Positional[Path]) -> Callable[[], int]:
        """Check a recipe's PPO before it runs: two iterations on copies of its models, nothing is kept.

        Each check recomputes something by other means - ratio, KL, rewards, masks, advantages, padding - and says what
        is wrong and which field to change. The models are those of the run in output_dir, as far as it has come.
        Exit 1 where a check fails. Options after the recipe override its fields, as with run.

        Args:
            recipe: A Python file that ends in `config = Recipe(...)`, such as configs/demo.py.
        """
        return partial(examine_recipe, recipe, options)

    @app.command
    def replay(
        recipe: tyro.conf.Positional[Path], fault: tyro.conf.Positional[Path]
    ) -> Callable[[], int]:
        """Make an update again whose gradient was not finite, a row at a time, and name what is to blame.

        Exit 1 where something is. Options after the folder override the recipe's fields, as with run.

        Args:
            recipe: The recipe of the run.
            fault: A folder below faults/ of its output_dir, where the run stopped.
        """
        return partial(replay_fault, recipe, fault, options)

    model_cli.add_commands(app)
    certify_cli.add_commands(app)
    layout_cli.add_commands(app)
    bench_cli.add_commands(app)
    plan_cli.add_commands(app)
    data_cli.add_commands(app)
    reward_cli.add_commands(app)
    checkpoint_cli.add_commands(app)
    return app


def run_recipe(path: Path, options: Sequence[str]) -> None:
    """Run the recipe in the file `path` with its fields overridden by `options`.

    Everything the run leaves behind is in `output_dir`. Raises UserError.
    """
    # here and not above: JAX and matplotlib are slow to import, and --help has no use for them
    from jax.errors import JaxRuntimeError

    from rlhf.outdir import Resume
    from rlhf.recipe import Recipe
    from rlhf.stop import Stopped
    from sharding.processes import is_first, peers_explained

    recipe, how = _started("run", path, options, Resume())
    command = resume_command(path, options)
    try:
        with peers_explained():
            _run(recipe, how) if isinstance(recipe, Recipe) else _run_reward(recipe, how)
    except Stopped as stopped:
        if is_first():
            print(f"glm-jax: stopped {stopped}; everything is saved. Resume with: {command}")
    except JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"a device or its runtime failed ({reason}). Resume from the last snapshot with: {command}"
        ) from error


def examine_recipe(path: Path, options: Sequence[str]) -> int:
    """Print what the doctor finds; 1 where a check fails. Raises UserError."""
    from rich.console import Console

    from rlhf.doctor.page import findings_table
    from rlhf.doctor.visit import visit
    from rlhf.recipe import Recipe
    from rlhf.runlog import RunLog
    from sharding.processes import on_first, peers_explained

    (recipe,) = _started("doctor", path, options)
    if not isinstance(recipe, Recipe):
        raise UserError(f"{path}: a recipe of a reward model alone has no PPO to check")
    console = Console()
    with peers_explained(), RunLog(None, console) as log:
        findings = visit(recipe, log)
        on_first(lambda: console.print(findings_table(findings)))
    return int(any(finding.status == "fail" for finding in findings.values()))


def replay_fault(path: Path, fault: Path, options: Sequence[str]) -> int:
    """Print what in a kept update is not finite; 1 where something is. Raises UserError."""
    from rlhf.replay import replay

    (recipe,) = _started("replay", path, options)
    found = replay(recipe, fault)
    for name in found.weights:
        print(f"weights: {name} holds what is no number")
    for kind, number, loss, norm in found.rows:
        print(f"{kind} {number}: loss {loss:g}, gradient norm {norm:g}")
    if not found.weights and not found.rows:
        print("every row by itself has a finite gradient: it is their sum, or another device")
    return int(bool(found.weights or found.rows))


def _started(command: str, path: Path, options: Sequence[str], *others: Any) -> tuple[Any, ...]:
    """The recipe and `others` with their fields overridden; devices and processes are there."""
    from rlhf.recipe import Recipe, RewardRecipe
    from sharding.host_memory import keep_freed_memory
    from sharding.layout import use_devices
    from sharding.processes import Processes, start

    config, description = load_recipe(path)
    if not isinstance(config, Recipe | RewardRecipe):
        raise UserError(
            f"{path}: config is a {type(config).__name__}: make it a rlhf.recipe.Recipe or RewardRecipe"
        )
    prog = f"glm-jax {command} {path}"
    recipe, processes, *found = override(config, options, prog, description, Processes(), *others)
    keep_freed_memory()
    use_devices(recipe.devices, start(processes, preemptible=command == "run"))
    return recipe, *found


def _run(recipe: "Recipe", how: "Resume") -> None:
    from rlhf.recipe import check
    from rlhf.report import samples_table, summary_table, write_report
    from rlhf.run import run
    from sharding.processes import on_first

    with _logged(recipe, check, how, "evaluate") as (log, progress, console):
        if progress.done("evaluate") is None:
            summary = run(recipe, log, progress)
        else:
            path = recipe.output_dir / "summary.json"
            summary = json.loads(path.read_text(encoding="utf-8"))

    def conclude() -> None:
        report = write_report(recipe.output_dir)
        console.print(summary_table(summary))
        samples = recipe.output_dir / "samples.json"
        if samples.exists():
            console.print(samples_table(json.loads(samples.read_text(encoding="utf-8"))))
        _tell(console, f"report: {report}")

    on_first(conclude)


def _run_reward(recipe: "RewardRecipe", how: "Resume") -> None:
    from rlhf.card.page import card_table
    from rlhf.recipe import check_reward
    from rlhf.reward_run import run_reward
    from sharding.processes import on_first

    card = None
    with _logged(recipe, check_reward, how, "reward") as (log, progress, console):
        if progress.done("reward") is None:
            card = run_reward(recipe, log, progress)

    def conclude() -> None:
        if card is not None:
            console.print(card_table(card))
        _tell(console, f"report card: {recipe.output_dir / 'card.html'}")

    on_first(conclude)


def _tell(console: "Console", line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def _logged(
    recipe: Any, check: Callable[[Any], object], how: "Resume", last: str
) -> "Iterator[tuple[RunLog, Progress, Console]]":
    """The log of a run in its output_dir, how far it is, and the screen; `last` is its last stage.

    Every process of a run does this, only the first writes.
    """
    from rich.console import Console

    from rlhf.outdir import RECIPE_FILE, run_directory
    from rlhf.progress import Journal, find
    from rlhf.runlog import RunLog
    from rlhf.stop import Stop
    from sharding.disk.directory import write_json
    from sharding.processes import check_shared, is_first, on_first, same_everywhere, together

    # first by its own name: a relative one differs between working directories
    same_everywhere("output_dir", str(recipe.output_dir))
    same_everywhere("the recipe", repr(recipe))
    together(partial(check, recipe))  # before an earlier run is touched
    directory, console = recipe.output_dir, Console()
    tell = partial(_tell, console)
    fields = dataclasses.asdict(recipe)
    with ExitStack() as held:
        stop = held.enter_context(Stop().listening())
        opened = run_directory(directory, fields, how, tell)
        resumed = on_first(lambda: held.enter_context(opened))
        check_shared(directory, "output_dir")
        found = find(directory, tell if is_first() else lambda _: None)
        if how.resume_with_changes:
            found = dataclasses.replace(found, digests={})
        on_first(lambda: write_json(directory / RECIPE_FILE, fields))
        if resumed:
            tell(FINISHED if last in found.stages else found.welcome)
        log = RunLog(directory if is_first() else None, console, found.position)
        held.enter_context(log)
        yield (
            log,
            Journal(directory, found, recipe.saving, log.position, stop, recipe.max_skipped),
            console,
        )


if __name__ == "__main__":
    sys.exit(main())
