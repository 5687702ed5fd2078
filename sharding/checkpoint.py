"""Orbax checkpoints of any pytree of arrays, on any layout."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sharding.errors import UserError


def save(path: Path, tree: Any) -> None:
    """Write `tree` to the folder `path`; the folder appears whole or not at all."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree, force=True)


def restore(path: Path, like: Any) -> Any:
    """The tree saved in `path`, with the structure, shapes and shardings of `like` (arrays or shapes).

    Every device reads its own shards. Raises UserError where the folder is missing or does not hold such a tree.
    """
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x)), like
    )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path.absolute(), shapes)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot restore a checkpoint from {path}: {reason}") from error


def _sharding(x: Any) -> jax.sharding.NamedSharding:
    spec = jax.typeof(x).sharding.spec if isinstance(x, jax.Array) else x.sharding.spec
    return jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)
