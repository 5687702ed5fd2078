"""Paths as users write them, in the one spelling in which files are opened."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from sharding.errors import UserError


def absolute(path: Path) -> Path:
    """The absolute path of the same file without `~` and `..`.

    `..` behind a symbolic link is the parent of what the link points to, as for the operating system. Links that no
    `..` follows keep their names. Raises UserError where there is no such path.
    """
    try:
        str(path).encode()  # Tensorstore takes UTF-8 alone
        path = path.expanduser().absolute()
        return Path(os.path.realpath(path)) if ".." in path.parts else path
    except UnicodeEncodeError:
        raise UserError(f"{path!r}: the name is not UTF-8: rename it") from None
    except (OSError, RuntimeError) as error:  # the current folder is gone; no such user
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: no such path can be opened: {reason}") from None


def same(path: Path, other: Path) -> bool:
    """Tell whether two spellings of a path, which need not exist, resolve to one place."""
    return os.path.realpath(absolute(path)) == os.path.realpath(absolute(other))


def absolute_paths(value: Any) -> Any:
    """`value` with every path in it made `absolute`, in dataclasses and tuples at any depth."""
    if isinstance(value, Path):
        return absolute(value)
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(map(absolute_paths, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        changed = {name: absolute_paths(field) for name, field in fields.items()}
        if changed != fields:
            return dataclasses.replace(value, **changed)
    return value
