"""Orbax checkpoints of any pytree of arrays, on any layout; whole trees, or one array after the other."""

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from sharding.errors import UserError

Keys = tuple[str, ...]  # of nested dictionaries or modules, from the root to an array
CHUNK = 1 << 26  # bytes of a file, where an array has no layers to be cut into


def _orbax() -> ocp.Checkpointer:
    # one zarr array a leaf, uncompressed (weights do not compress): what Tensorstore can open by itself
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False))


def save(path: Path, tree: Any) -> None:
    """Write `tree` to the folder `path`; the folder appears whole or not at all."""
    with _orbax() as checkpointer:
        checkpointer.save(path.absolute(), tree, force=True)


def restore(path: Path, like: Any) -> Any:
    """The tree saved in `path`, with the structure, shapes, dtypes and shardings of `like` (arrays or shapes).

    Every device reads its own shards. Raises UserError where the folder is missing or does not hold such a tree.
    """
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x)), like
    )
    _check_shapes(path, wanted)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path.absolute(), wanted)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot restore a checkpoint from {path}: {reason}") from error


def _check_shapes(path: Path, like: Any) -> None:
    # Orbax cuts or pads an array of another shape, and says so in a warning at most
    stored = shapes(path)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(like):
        name = tuple(str(getattr(k, "key", getattr(k, "name", k))) for k in keys)
        if name in stored and stored[name].shape != leaf.shape:
            raise UserError(
                f"cannot restore a checkpoint from {path}: {'.'.join(name)} has shape {stored[name].shape}, "
                f"not {leaf.shape}: it is of another model or layout"
            )


def _sharding(x: Any) -> jax.sharding.NamedSharding:
    spec = jax.typeof(x).sharding.spec if isinstance(x, jax.Array) else x.sharding.spec
    return jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)


def shapes(path: Path) -> dict[Keys, jax.ShapeDtypeStruct]:
    """Keys -> shape and dtype of every array saved in `path`. Raises UserError where it is no checkpoint."""
    if not (path / "_METADATA").is_file():
        raise UserError(f"{path} is no checkpoint: it has no _METADATA")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path.absolute()).item_metadata
        return dict(_flatten(metadata.tree, ()))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None


def _flatten(tree: Any, keys: Keys) -> Iterator[tuple[Keys, jax.ShapeDtypeStruct]]:
    if isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from _flatten(child, (*keys, str(key)))
    elif tree is not None:
        yield keys, jax.ShapeDtypeStruct(tree.shape, tree.dtype)


class Leaf:
    """One array of a checkpoint, read or written a piece at a time through Tensorstore, Orbax's own engine."""

    def __init__(self, array: tensorstore.TensorStore) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        return tuple(self._array.shape)

    @property
    def dtype(self) -> np.dtype:
        """As stored."""
        return self._array.dtype.numpy_dtype

    def read(self, *index: int | slice) -> np.ndarray:
        """The entries at `index` of the leading dimensions, in memory of their own."""
        return self._array[index].read().result() if index else self._array.read().result()

    def write(self, values: np.ndarray, *index: int | slice) -> None:
        """Set the entries at `index`; whole chunks (`chunks_of`) are written without reading."""
        target = self._array[index] if index else self._array
        target.write(values).result()


def _open(path: Path, keys: Keys, **create: Any) -> Leaf:
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(path / ".".join(keys))}}
    # no fsync after every chunk
    context = tensorstore.Context({"file_io_sync": False, "cache_pool": {"total_bytes_limit": 0}})
    new = bool(create)
    opened = tensorstore.open(
        spec | create, context=context, open=not new, create=new, delete_existing=new
    )
    return Leaf(opened.result())


def open_leaf(path: Path, keys: Keys) -> Leaf:
    """The array at `keys` of the checkpoint in `path`. Raises UserError where there is none."""
    try:
        return _open(path.absolute(), keys)
    except ValueError:
        raise UserError(f"{path}: holds no array {'.'.join(keys)}") from None


def chunks_of(shape: tuple[int, ...], dtype: np.dtype, stacked: bool) -> tuple[int, ...]:
    """Shape of the pieces an array is stored in: one layer of [1, layer, ...], else rows of about 64 MiB."""
    if stacked:
        return (1, 1, *shape[2:])
    row = math.prod(shape[1:]) * dtype.itemsize
    return (max(1, min(shape[0], CHUNK // max(row, 1))), *shape[1:])


def create(
    path: Path, arrays: Mapping[Keys, jax.ShapeDtypeStruct], stacked: Collection[Keys]
) -> Mapping[Keys, Leaf]:
    """A checkpoint whose arrays are yet to be filled, piece by piece, so that no whole array need be in memory.

    Orbax writes the tree with a placeholder for every array, Tensorstore puts the arrays in their places. `stacked`
    names those with leading dimensions [1, layer]. The caller gives a temporary directory, renamed when all is full.
    """
    tree: dict[str, Any] = {}
    for keys, like in arrays.items():
        branch = tree
        for key in keys[:-1]:
            branch = branch.setdefault(key, {})
        branch[keys[-1]] = np.zeros((1,) * len(like.shape), like.dtype)
    with _orbax() as checkpointer:
        checkpointer.save(path.absolute(), tree)
    leaves = {}
    for keys, like in arrays.items():
        dtype = np.dtype(like.dtype)
        metadata = {
            "compressor": None,
            "chunks": list(chunks_of(like.shape, dtype, keys in stacked)),
            "shape": list(like.shape),
            "dtype": dtype.name if dtype.name == "bfloat16" else dtype.str,
        }
        leaves[keys] = _open(path.absolute(), keys, metadata=metadata)
    return leaves
