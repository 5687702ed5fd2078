"""Recipes as Python files, and options that override their fields."""

import dataclasses
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sharding.errors import UserError

if TYPE_CHECKING:
    from rlhf.outdir import Resume
    from sharding.processes import Processes


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
    config: Any, options: Sequence[str], prog: str, description: str, goes_on: bool = True
) -> "tuple[Any, Processes, Resume]":
    """`config`, a dataclass, with the fields that `options` name (`--ppo.kl.coef 0.1`) replaced.

    The others are what `options` say of the processes of a run - no field, for each process has its own number - and of
    a run that is there already; nothing of the latter where a command does not go on with one.
    Prints the help of every field and exits with 0 on --help; a field that does not exist exits with 2 and
    names the nearest ones.
    """
    from rlhf.outdir import Resume
    from sharding.processes import Processes

    debug = tyro.conf.arg(help="Show the traceback of an error.")
    bare = tyro.conf.arg(name="")
    resume = Annotated[Resume, bare if goes_on else tyro.conf.Fixed]
    parser = dataclasses.make_dataclass(
        "Options",
        [
            ("config", Annotated[type(config), bare]),
            ("processes", tyro.conf.FlagCreatePairsOff[Annotated[Processes, bare]]),
            ("resume", tyro.conf.FlagCreatePairsOff[resume]),
            ("debug", tyro.conf.FlagCreatePairsOff[Annotated[bool, debug]]),
        ],
    )
    parsed: Any = tyro.cli(
        parser,
        default=parser(config=config, processes=Processes(), resume=Resume(), debug=False),
        prog=prog,
        description=description,
        args=list(options),
        # a field that may hold one of several dataclasses keeps the one that the recipe chose
        config=(tyro.conf.AvoidSubcommands, tyro.conf.SuppressFixed),
    )
    return parsed.config, parsed.processes, parsed.resume
