"""Orbax checkpoints of any pytree of arrays, on any layout; whole trees, or one array after the other."""

import contextlib
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from sharding.disk.directory import explained
from sharding.disk.paths import absolute
from sharding.errors import UserError

Keys = tuple[str, ...]  # of nested dictionaries or modules, from the root to an array
CHUNK = 1 << 24  # bytes of a file at most: with larger buffers writing is slower
COPY = "take another copy of the checkpoint"


def handler() -> ocp.PyTreeCheckpointHandler:
    """Of one zarr array a leaf, uncompressed (weights do not compress): what Tensorstore can open by itself."""
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)


def save_args(tree: Any) -> ocp.args.PyTreeSave:
    """What Orbax is given to save `tree`, so that `restore` and `shapes` read it."""
    return ocp.args.PyTreeSave(_nested(_flat(tree)))


def _orbax() -> ocp.Checkpointer:
    return ocp.Checkpointer(handler())


def _flat(tree: Any) -> dict[Keys, Any]:
    """The arrays of a tree, which is what is stored of it: neither its kinds of nodes nor what is None."""
    return {
        tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _nested(arrays: Mapping[Keys, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for keys, leaf in arrays.items():
        branch = tree
        for key in keys[:-1]:
            branch = branch.setdefault(key, {})
        branch[keys[-1]] = leaf
    return tree


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What Tensorstore could not write becomes a UserError; its ValueError hides the number of the OSError."""
    with explained(path):
        try:
            yield
        except ValueError as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def save(path: Path, tree: Any) -> None:
    """Write `tree` to the folder `path`; the folder appears whole or not at all.

    Raises UserError where it cannot be written.
    """
    with writing(path), _orbax() as checkpointer:
        checkpointer.save(absolute(path), _nested(_flat(tree)), force=True)


def restore(path: Path, like: Any) -> Any:
    """The tree saved in `path`, with the structure, shapes, dtypes and shardings of `like` (arrays or shapes).

    Every device reads its own shards. Raises UserError where the folder is missing or does not hold such a tree.
    """
    wanted = {
        keys: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x))
        for keys, x in _flat(like).items()
    }
    _check_shapes(path, wanted)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            restored = _flat(checkpointer.restore(absolute(path), _nested(wanted)))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot restore a checkpoint from {path}: {_reason(error)}") from error
    return jax.tree.unflatten(jax.tree.structure(like), [restored[keys] for keys in wanted])


def _reason(error: Exception) -> str:
    """Message of Orbax or Tensorstore in one line, without the places in its own source."""
    told = re.sub(r" \[source locations=.*", "", " ".join(str(error).split()))
    return told[:300]


def _sharding(x: Any) -> jax.sharding.NamedSharding:
    sharding = jax.typeof(x).sharding if isinstance(x, jax.Array) else x.sharding
    # what jax.eval_shape finds for a number has none
    spec = jax.sharding.PartitionSpec() if sharding is None else sharding.spec
    return jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)


def _check_shapes(path: Path, wanted: Mapping[Keys, jax.ShapeDtypeStruct]) -> None:
    # Orbax cuts or pads an array of another shape, and says so in a warning at most
    stored = {keys: leaf.shape for keys, leaf in shapes(path).items()}
    needed = {keys: leaf.shape for keys, leaf in wanted.items()}
    for keys in sorted(needed.keys() | stored.keys()):
        if stored.get(keys) != needed.get(keys):
            there, here = stored.get(keys, "none"), needed.get(keys, "none")
            raise UserError(
                f"cannot restore a checkpoint from {path}: the shape of {'.'.join(keys)} is {there} there and "
                f"{here} here: give the checkpoint of this very model"
            )


def shapes(path: Path) -> dict[Keys, jax.ShapeDtypeStruct]:
    """Keys -> shape and dtype of every array saved in `path`, read without its values.

    Raises UserError where it is no checkpoint, or one of its files is missing or cut short.
    """
    listing = path / "_METADATA"
    if not listing.is_file():
        raise UserError(f"{path} is no checkpoint: it has no _METADATA")
    try:  # Orbax's own reading of it leaves errors of arrays to its log
        entries = json.loads(listing.read_text(encoding="utf-8"))["tree_metadata"].values()
        names = [tuple(str(key["key"]) for key in entry["key_metadata"]) for entry in entries]
    except OSError as error:
        raise UserError(f"cannot read {listing}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{listing} is no listing of arrays ({reason}): {COPY}") from error
    found = {}
    for keys in names:
        leaf = open_leaf(path, keys)
        leaf.check_files()
        found[keys] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return found


class Leaf:
    """One array of a checkpoint, read or written a piece at a time through Tensorstore, Orbax's own engine."""

    def __init__(self, path: Path, array: tensorstore.TensorStore) -> None:
        self._path = path
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
        """The entries at `index` of the leading dimensions, in memory of their own.

        Raises UserError where a file is missing or cut short.
        """
        future = self._at(index).read()
        try:
            return future.result()
        except ValueError as error:
            raise UserError(f"cannot read {self._path}: {_reason(error)}") from error

    def read_chunks(self, *index: int) -> Iterator[np.ndarray]:
        """The entries at `index`, as many of their first dimension at a time as lie in one file. Raises as `read`."""
        axis = len(index)
        if axis == len(self.shape):
            yield self.read(*index)
            return
        height = self._chunk()[axis]
        for start in range(0, self.shape[axis], height):
            yield self.read(*index, slice(start, min(start + height, self.shape[axis])))

    def write(self, values: np.ndarray, *index: int | slice) -> None:
        """Set the entries at `index`; whole chunks (`chunks_of`) are written without reading.

        Raises UserError where the disk does not take them.
        """
        with writing(self._path):
            self._at(index).write(values).result()

    def _chunk(self) -> list[int]:
        """Shape of the part of the array that lies in one file."""
        chunk: list[int] = self._array.spec().to_json()["metadata"]["chunks"]
        return chunk

    def _at(self, index: tuple[int | slice, ...]) -> tensorstore.TensorStore:
        return self._array[index] if index else self._array

    def check_files(self) -> None:
        """Raise UserError where the file of a chunk is missing or cut short."""
        chunk = self._chunk()
        size = math.prod(chunk) * self.dtype.itemsize  # at the array's edges too
        counts = (-(-whole // part) for whole, part in zip(self.shape, chunk, strict=True))
        for index in np.ndindex(*counts):
            file = self._path / (".".join(map(str, index)) or "0")
            if not file.is_file():
                raise UserError(f"{file} is missing: {COPY}")
            if (found := file.stat().st_size) != size:
                raise UserError(f"{file} has {found:,} bytes instead of {size:,}: {COPY}")


def _open(path: Path, keys: Keys, **create: Any) -> Leaf:
    folder = absolute(path) / ".".join(keys)
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(folder)},
        "fill_missing_data_reads": False,  # a file that is missing is an error, not zeros
    }
    # no fsync after every chunk
    context = tensorstore.Context({"file_io_sync": False, "cache_pool": {"total_bytes_limit": 0}})
    new = bool(create)
    opened = tensorstore.open(
        spec | create, context=context, open=not new, create=new, delete_existing=new
    )
    return Leaf(folder, opened.result())


def open_leaf(path: Path, keys: Keys) -> Leaf:
    """The array at `keys` of the checkpoint in `path`. Raises UserError where there is none."""
    try:
        return _open(path, keys)
    except ValueError as error:
        raise UserError(
            f"{path}: cannot open the array {'.'.join(keys)}: {_reason(error)}"
        ) from error


def chunks_of(shape: tuple[int, ...], dtype: np.dtype, stacked: bool) -> tuple[int, ...]:
    """Shape of the pieces an array is stored in: rows of at most 16 MiB, of one layer where it is [1, layer, ...].

    There are 2^n of them in an array or layer, so that the shards of most layouts are whole pieces.
    """
    lead, rest = ((1, 1), shape[2:]) if stacked else ((), shape)
    if not rest:
        return lead
    pieces = 1
    while pieces < rest[0] and math.prod(rest) * dtype.itemsize > pieces * CHUNK:
        pieces *= 2
    return (*lead, -(-rest[0] // pieces), *rest[1:])


def create(
    path: Path, arrays: Mapping[Keys, jax.ShapeDtypeStruct], stacked: Collection[Keys]
) -> Mapping[Keys, Leaf]:
    """A checkpoint whose arrays are yet to be filled, piece by piece, so that no whole array need be in memory.

    Orbax writes the tree with a placeholder for every array, Tensorstore puts the arrays in their places. `stacked`
    names those with leading dimensions [1, layer]. The caller gives a temporary directory, renamed when all is full;
    until then `restore` and `shapes` refuse it. Raises UserError where it cannot be written.
    """
    # whose metadata Orbax reads from the arrays themselves
    placeholders = {
        keys: np.zeros((1,) * len(like.shape), like.dtype) for keys, like in arrays.items()
    }
    leaves = {}
    with writing(path):
        with _orbax() as checkpointer:
            checkpointer.save(absolute(path), _nested(placeholders))
        for keys, like in arrays.items():
            dtype = np.dtype(like.dtype)
            metadata = {
                "compressor": None,
                "chunks": list(chunks_of(like.shape, dtype, keys in stacked)),
                "shape": list(like.shape),
                "dtype": dtype.name if dtype.name == "bfloat16" else dtype.str,
            }
            leaves[keys] = _open(path, keys, metadata=metadata)
    return leaves
