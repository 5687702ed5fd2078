"""The `glm-jax` command."""

import dataclasses
import json
import logging
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rlhf import data_cli, layout_cli, model_cli, reward_cli
from sharding.errors import LostPeers, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from rlhf.recipe import Recipe, RewardRecipe
    from rlhf.runlog import RunLog
    from sharding.processes import Processes

DESCRIPTION = "Train the ChatGLM family with human feedback on a mesh of TPUs or GPUs, in JAX."


def main(args: Sequence[str] | None = None) -> int:
    """Run `glm-jax` with `args` (None: those of the process) and return its exit status.

    0 done; 1 a UserError, told in one line, or a check that failed; 2 a misspelt command line (by tyro, as
    SystemExit); 130 interrupted.
    """
    args = list(sys.argv[1:] if args is None else args)
    logging.getLogger("absl").setLevel(logging.ERROR)  # what Orbax warns of, no user can mend
    # the fields of a recipe are known only once its file is read: what follows the file is parsed then
    has_recipe = len(args) > 1 and args[0] in ("run", "doctor") and not args[1].startswith("-")
    command, options = (args[:2], args[2:]) if has_recipe else (args, [])
    try:
        command = [word for word in command if word != "--debug"]
        job = _commands(options).cli(prog="glm-jax", description=DESCRIPTION, args=command)
        return job() or 0
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

    model_cli.add_commands(app)
    layout_cli.add_commands(app)
    data_cli.add_commands(app)
    reward_cli.add_commands(app)
    return app


def run_recipe(path: Path, options: Sequence[str]) -> None:
    """Run the recipe in the file `path` with its fields overridden by `options`.

    Everything the run leaves behind is in `output_dir`. Raises UserError.
    """
    # here and not above: JAX and matplotlib are slow to import, and --help has no use for them
    from rlhf.recipe import Recipe
    from sharding.processes import peers_explained

    recipe = _started("run", path, options)
    with peers_explained():
        _run(recipe) if isinstance(recipe, Recipe) else _run_reward(recipe)


def examine_recipe(path: Path, options: Sequence[str]) -> int:
    """Print what the doctor finds; 1 where a check fails. Raises UserError."""
    from rich.console import Console

    from rlhf.doctor.page import findings_table
    from rlhf.doctor.visit import visit
    from rlhf.recipe import Recipe
    from rlhf.runlog import RunLog
    from sharding.processes import on_first, peers_explained

    recipe = _started("doctor", path, options)
    if not isinstance(recipe, Recipe):
        raise UserError(f"{path}: a recipe of a reward model alone has no PPO to check")
    console = Console()
    with peers_explained(), RunLog(None, console) as log:
        findings = visit(recipe, log)
        on_first(lambda: console.print(findings_table(findings)))
    return int(any(finding.status == "fail" for finding in findings.values()))


def _started(command: str, path: Path, options: Sequence[str]) -> "Recipe | RewardRecipe":
    """The recipe with its fields overridden; devices and processes are there."""
    from rlhf.recipe import Recipe, RewardRecipe
    from sharding.host_memory import keep_freed_memory
    from sharding.layout import use_devices
    from sharding.processes import start

    config, description = load_recipe(path)
    if not isinstance(config, Recipe | RewardRecipe):
        raise UserError(
            f"{path}: config is a {type(config).__name__}: make it a rlhf.recipe.Recipe or RewardRecipe"
        )
    prog = f"glm-jax {command} {path}"
    recipe, processes = override(config, options, prog=prog, description=description)
    keep_freed_memory()
    use_devices(recipe.devices, start(processes))
    found: Recipe | RewardRecipe = recipe
    return found


def _run(recipe: "Recipe") -> None:
    from rlhf.recipe import check
    from rlhf.report import samples_table, summary_table, write_report
    from rlhf.run import run
    from sharding.processes import on_first

    with _logged(recipe, check) as (log, console):
        summary = run(recipe, log)

    def conclude() -> None:
        report = write_report(recipe.output_dir)
        console.print(summary_table(summary))
        samples = recipe.output_dir / "samples.json"
        if samples.exists():
            console.print(samples_table(json.loads(samples.read_text(encoding="utf-8"))))
        _tell(console, f"report: {report}")

    on_first(conclude)


def _run_reward(recipe: "RewardRecipe") -> None:
    from rlhf.card.page import card_table
    from rlhf.recipe import check_reward
    from rlhf.reward_run import run_reward
    from sharding.processes import on_first

    with _logged(recipe, check_reward) as (log, console):
        card = run_reward(recipe, log)

    def conclude() -> None:
        console.print(card_table(card))
        _tell(console, f"report card: {recipe.output_dir / 'card.html'}")

    on_first(conclude)


def _tell(console: "Console", line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def _logged(recipe: Any, check: Callable[[Any], object]) -> "Iterator[tuple[RunLog, Console]]":
    """A log in a fresh output_dir, and the screen; every process of a run does this, only the first writes."""
    from rich.console import Console

    from rlhf.runlog import RunLog, fresh_directory
    from sharding.disk.directory import write_json
    from sharding.processes import check_shared, is_first, on_first, same_everywhere, together

    same_everywhere("the recipe", repr(recipe))
    together(partial(check, recipe))  # before an earlier run is moved aside
    directory, console = recipe.output_dir, Console()
    on_first(partial(fresh_directory, directory, partial(_tell, console)))
    check_shared(directory, "output_dir")
    on_first(lambda: write_json(directory / "recipe.json", dataclasses.asdict(recipe)))
    with RunLog(directory if is_first() else None, console) as log:
        yield log, console


def load_recipe(path: Path) -> tuple[Any, str]:
    """The `config` of a recipe file, and the file's docstring. Raises UserError where there is none."""
    if not path.is_file():
        raise UserError(f"recipe {path}: no such file")
    try:
        names = runpy.run_path(str(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        line = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        where = f"{path}:{line[-1]}" if line else str(path)
        raise UserError(f"{where}: {type(error).__name__}: {error} (--debug shows more)") from error
    if "config" not in names:
        raise UserError(f"{path}: no `config`: a recipe ends in `config = Recipe(...)`")
    return names["config"], names["__doc__"] or ""


def override(
    config: Any, options: Sequence[str], prog: str, description: str
) -> "tuple[Any, Processes]":
    """`config`, a dataclass, with the fields that `options` name (`--ppo.kl.coef 0.1`) replaced.

    The second is what `options` say of the processes of a run: no field, for each process has its own number.
    Prints the help of every field and exits with 0 on --help; a field that does not exist exits with 2 and
    names the nearest ones.
    """
    from sharding.processes import Processes

    debug = tyro.conf.arg(help="Show the traceback of an error.")
    bare = tyro.conf.arg(name="")
    parser = dataclasses.make_dataclass(
        "Options",
        [
            ("config", Annotated[type(config), bare]),
            ("processes", tyro.conf.FlagCreatePairsOff[Annotated[Processes, bare]]),
            ("debug", tyro.conf.FlagCreatePairsOff[Annotated[bool, debug]]),
        ],
    )
    parsed: Any = tyro.cli(
        parser,
        default=parser(config=config, processes=Processes(), debug=False),
        prog=prog,
        description=description,
        args=list(options),
        # a field that may hold one of several dataclasses keeps the one that the recipe chose
        config=(tyro.conf.AvoidSubcommands,),
    )
    return parsed.config, parsed.processes


if __name__ == "__main__":
    sys.exit(main())
