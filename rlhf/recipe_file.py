"""Recipes as Python files, and options that override their fields."""

import dataclasses
import runpy
import shlex
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from sharding.disk.paths import absolute_paths
from sharding.errors import UserError


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
    config: Any, options: Sequence[str], prog: str, description: str, *others: Any
) -> tuple[Any, ...]:
    """`config`, a dataclass, with the fields that `options` name (`--ppo.kl.coef 0.1`) replaced; and `others`.

    Those are dataclasses too, of what is no field of a recipe, such as the number of a process among several.
    Prints the help of every field and exits with 0 on --help; a field that does not exist exits with 2 and
    names the nearest ones.
    """
    debug = tyro.conf.arg(help="Show the traceback of an error.")
    bare = tyro.conf.arg(name="")
    groups = {type(other).__name__.lower(): other for other in others}
    fields: list[tuple[str, Any]] = [("config", Annotated[type(config), bare])]
    for name, other in groups.items():
        fields.append((name, Annotated[type(other), bare, tyro.conf.FlagCreatePairsOff]))
    fields.append(("debug", Annotated[bool, debug, tyro.conf.FlagCreatePairsOff]))
    parser = dataclasses.make_dataclass("Options", fields)
    parsed: Any = tyro.cli(
        parser,
        default=parser(config=config, **groups, debug=False),
        prog=prog,
        description=description,
        args=list(options),
        # a field that may hold one of several dataclasses keeps the one that the recipe chose
        config=(tyro.conf.AvoidSubcommands,),
    )
    return absolute_paths(parsed.config), *(getattr(parsed, name) for name in groups)


def resume_command(path: Path, options: Sequence[str]) -> str:
    """The command that resumes `glm-jax run` with these options: without those that begin anew or accept changes."""
    spent = {"--restart", "--resume-with-changes"}
    words = [word for word in options if word.replace("_", "-") not in spent]
    return shlex.join(["glm-jax", "run", str(path), *words])
