"""Trees of host arrays as one NumPy archive, named by their paths."""

import zipfile
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from sharding.disk.directory import new_file
from sharding.errors import UserError

Tree = TypeVar("Tree")


def write_arrays(path: Path, tree: Any) -> None:
    """Write `tree` under a temporary name, then rename. Raises UserError where it cannot be written."""
    arrays = {_name(keys): np.asarray(x) for keys, x in jax.tree_util.tree_leaves_with_path(tree)}
    with new_file(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path, like: Tree) -> Tree:
    """What `write_arrays` wrote of a tree with the structure of `like`. Raises UserError where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            tree: Tree = jax.tree_util.tree_map_with_path(lambda keys, _: arrays[_name(keys)], like)
        return tree
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _name(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys).lstrip(".")
