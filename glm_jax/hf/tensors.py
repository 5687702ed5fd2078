"""Weights of the model read out of the tensors of a Hugging Face repository, and put together into them."""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from functools import cache, partial

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding

from glm_jax.config import Config, Head
from glm_jax.hf.config import Form
from glm_jax.hf.tables import (
    BLOCK,
    TILE,
    Index,
    Row,
    Shape,
    Weights,
    table,
    tensor_names,
    tensor_shape,
    transposed,
    weight_shapes,
)
from glm_jax.layers import rotary_frequencies
from glm_jax.model import CausalLM
from glm_jax.scalar import INIT, ScalarModel
from sharding.disk.manifest import Entry
from sharding.disk.scratch import Scratch
from sharding.disk.stored import Stored
from sharding.errors import UserError
from sharding.layout import Layout
from sharding.pipeline import IDLE, layer_slots


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the tensors of a checkpoint lie, and what they are."""

    config: Config
    form: Form
    head: Head
    tensors: Mapping[str, Stored]

    def stored(self, path: str, layer: int) -> Stored:
        """The tensor that holds a weight."""
        row, _ = _holders(self.config, self.form, self.head)[path]
        return self.tensors[row.tensor.format(i=layer)]

    def read(self, path: str, layer: int, index: Index) -> np.ndarray:
        """`index` of one layer's weight, in its stored dtype; only the bytes of these rows are read."""
        row, number = _holders(self.config, self.form, self.head)[path]
        shape = weight_shapes(self.config, self.head)[path]
        piece, stored = row.pieces[number], self.tensors[row.tensor.format(i=layer)]
        row_dims, column_dims = piece.dimensions(shape)
        columns_first = bool(piece.columns)
        row_index = index[len(column_dims) :] if columns_first else index[: len(row_dims)]
        column_index = index[: len(column_dims)] if columns_first else index[len(row_dims) :]
        rows = _span(row_index, row_dims)
        columns = _span(column_index, column_dims) if column_dims else None
        block = self._block(stored, row, number, rows, columns)
        local = tuple(
            len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)
        )
        check_finite(block, stored)
        return piece.to_weight(block, local)

    def split(self, row: Row, layer: int, scratch: Scratch) -> tuple[list[np.ndarray], Entry]:
        """All weights of a tensor in their stored dtype, and the tensor's hash, in one pass over its bytes.

        A strip of rows is hashed, checked and turned while it is in the processor's cache. The weights stand in
        `scratch`, until the next call of this thread.
        """
        stored = self.tensors[row.tensor.format(i=layer)]
        shapes = [weight_shapes(self.config, self.head)[piece.path] for piece in row.pieces]
        sizes = [math.prod(shape) for shape in shapes]
        flat = np.split(scratch.empty(sum(sizes), stored.dtype), np.cumsum(sizes)[:-1])
        weights = [part.reshape(shape) for part, shape in zip(flat, shapes, strict=True)]
        digest = hashlib.sha256()
        for number, first, start, count in row.spans(self.config, self.head):
            for strip in stored.strips(start, start + count, TILE):
                digest.update(strip.reshape(-1).view(np.uint8).data)
                check_finite(strip, stored)
                row.pieces[number].put_rows(weights[number], first, strip)
                first += len(strip)
        return weights, Entry(stored.path.name, stored.dtype.name, stored.shape, digest.hexdigest())

    def _block(
        self, stored: Stored, row: Row, number: int, rows: slice, columns: slice | None
    ) -> np.ndarray:
        """Rows of a tensor's piece `number`."""
        shapes = weight_shapes(self.config, self.head)
        if row.per_head:
            unit, turns = row.per_head, len(row.pieces)
            block = stored.read(slice(rows.start * turns, rows.stop * turns), columns)
            heads = block.reshape(-1, turns, unit, *block.shape[1:])
            return heads[:, number].reshape(-1, *block.shape[1:])
        before = sum(piece.num_rows(shapes[piece.path]) for piece in row.pieces[:number])
        return stored.read(slice(before + rows.start, before + rows.stop), columns)


def check_finite(values: np.ndarray, stored: Stored) -> None:
    """Raise UserError, naming file and tensor, where a weight is infinite or not a number."""
    kind = ml_dtypes.finfo(values.dtype)
    infinity = ((1 << kind.nexp) - 1) << kind.nmant  # exponent all ones: this and what lies above
    bits = values.reshape(-1).view(f"u{values.itemsize}")
    sign = 1 << (8 * values.itemsize - 1)
    # as unsigned numbers the negative values are the largest, as signed ones the positive
    worst_negative, worst_positive = bits.max(), bits.view(f"i{values.itemsize}").max()
    if worst_negative >= sign + infinity or worst_positive >= infinity:
        raise UserError(
            f"{stored.path}: tensor {stored.name} holds NaN or infinity: give weights that are finite"
        )


def check_biases(source: Source) -> None:
    """Raise UserError where a bias that the model does not have is anything but 0."""
    for row in table(source.config, source.form, source.head):
        if row.bias and source.tensors[row.tensor].read().any():
            raise UserError(
                f"{source.tensors[row.tensor].path}: {row.tensor} is not 0: a scalar head here has no bias, which "
                f"shifts every score alike; set it to 0 if only their differences matter"
            )


def _span(index: Index, dims: Shape) -> slice:
    """Flat range of `index` over `dims`, of which only the first may be cut; no dims are one row."""
    if not dims:
        return slice(0, 1)
    start, stop, _ = index[0].indices(dims[0])
    inner = math.prod(dims[1:])
    return slice(start * inner, stop * inner)


@cache
def _holders(config: Config, form: Form, head: Head) -> Mapping[str, tuple[Row, int]]:
    """Weight path -> the row that fills it, and the number of its piece."""
    return {
        piece.path: (row, number)
        for row in table(config, form, head)
        if not (row.copy or row.bias)
        for number, piece in enumerate(row.pieces)
    }


def read_weight(
    source: Source, path: str, dtype: np.dtype | None, index: Index | None = None
) -> np.ndarray:
    """A weight [layer, ...] (or without the layer dimension, outside the blocks), row-major, `index` of it.

    dtype None keeps the stored one. One layer is read and converted at a time.
    """
    shape = weight_shapes(source.config, source.head)[path]
    full = (source.config.num_layers, *shape) if path.startswith(BLOCK) else shape
    index = index or tuple(slice(None) for _ in full)
    local = tuple(len(range(*part.indices(size))) for part, size in zip(index, full, strict=True))
    if not path.startswith(BLOCK):
        return np.ascontiguousarray(source.read(path, 0, index), dtype)
    out: np.ndarray | None = None
    for slot, layer in enumerate(range(*index[0].indices(full[0]))):
        weight = source.read(path, layer, index[1:])
        if out is None:
            out = np.empty(local, dtype or weight.dtype)
        out[slot] = weight
    assert out is not None
    return out


def read_shard(
    source: Source, name: str, dtype: np.dtype | None, shape: Shape, slots: np.ndarray, index: Index
) -> np.ndarray:
    """`index` of a weight of this (padded) shape, [stage, slot, ...] as `slots` says if it belongs to the blocks.

    What no tensor holds, empty slots and a vocabulary's padding, is 0.
    """
    kind = dtype or source.stored(name, 0).dtype
    local = tuple(len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True))
    out = np.zeros(local, kind)
    if name.startswith(BLOCK):
        for place, layer in np.ndenumerate(slots[index[:2]]):
            if layer != IDLE:
                own = (slice(layer, layer + 1), *index[2:])
                out[place] = read_weight(source, name, dtype, own)[0]
        return out
    real = weight_shapes(source.config, source.head)[name]
    there = [slice(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    cut = tuple(
        slice(min(part.start, end), min(part.stop, end))
        for part, end in zip(there, real, strict=True)
    )
    if all(part.stop > part.start for part in cut):
        found = read_weight(source, name, dtype, cut)
        out[tuple(slice(size) for size in found.shape)] = found
    return out


def load_weights(
    source: Source, layout: Layout, dtype: np.dtype | None = np.dtype(np.float32)
) -> CausalLM | ScalarModel:
    """Weights on the current mesh, split as `layout` says; every process reads the bytes of its own shards.

    dtype None keeps the stored one.
    """
    config = source.config
    shapes = jax.eval_shape(partial(INIT[source.head], config, layout), jax.random.key(0))
    mesh = jax.sharding.get_mesh()
    slots = layer_slots(config.num_layers, layout)

    def place(path: tuple[jax.tree_util.KeyEntry, ...], like: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        seen: dict[str, np.ndarray] = {}  # replicas ask for the same piece

        def shard(index: Index | None) -> np.ndarray:
            assert index is not None
            if str(index) not in seen:
                seen[str(index)] = read_shard(source, name, dtype, like.shape, slots, index)
            return seen[str(index)]

        sharding = NamedSharding(mesh, like.sharding.spec)
        return jax.make_array_from_callback(like.shape, sharding, shard)

    model: CausalLM | ScalarModel = jax.tree_util.tree_map_with_path(place, shapes)
    return model


def join(
    row: Row,
    config: Config,
    head: Head,
    parts: Iterable[Iterable[np.ndarray]],
    dtype: np.dtype,
    scratch: Scratch | None = None,
) -> np.ndarray:
    """The tensor made of a row's weights (of one layer), row-major.

    `parts` gives every weight whole or cut along its first dimension, in `dtype`. With `scratch` the tensor stands
    there, until the next call of this thread.
    """
    shape = tensor_shape(row, config, head)
    if row.bias:
        return np.zeros(shape, dtype)
    size = math.prod(shape)
    tensor = scratch.empty(size, dtype) if scratch else np.empty(size, dtype)
    tensor = tensor.reshape(shape[0], -1)
    spans = list(row.spans(config, head))
    for number, (piece, weight) in enumerate(zip(row.pieces, parts, strict=True)):
        mine = [span[1:] for span in spans if span[0] == number]
        count = sum(length for *_, length in mine)
        done = 0  # columns of the tensor where the weight is turned, else rows of the piece
        for part in weight:
            flat = part.reshape(-1, count if piece.columns else tensor.shape[1])
            end = done + len(flat)
            for first, start, length in mine:
                if piece.columns:
                    into = tensor[start : start + length, done:end]
                    transposed(flat[:, first : first + length], into)
                    continue
                low, high = max(first, done), min(first + length, end)
                if low < high:
                    shift = start - first
                    tensor[low + shift : high + shift] = flat[low - done : high - done]
            done = end
    return tensor.reshape(shape)


def to_tensors(source: Source, weights: Mapping[str, np.ndarray]) -> Weights:
    """Tensors named as in `source`, from weights by path with their layers stacked [layer, ...]."""
    tensors: Weights = {}
    for name, row, i in tensor_names(source.config, source.form, source.head):
        parts = [weights[piece.path] for piece in row.pieces]
        whole = [[part[i]] if row.per_layer else [part] for part in parts]
        tensors[name] = join(row, source.config, source.head, whole, parts[0].dtype)
    return tensors


def make_buffers(config: Config, form: Form, dtype: np.dtype) -> Weights:
    """The tensors that are no parameters, for a model that came without: rotary frequencies of base 10,000."""
    if form in (Form.GLM, Form.GLM4):
        return {}
    frequencies = rotary_frequencies(config.head_dim // 2, 10_000.0).astype(dtype)
    if form is not Form.CHATGLM:
        return {"transformer.rotary_pos_emb.inv_freq": frequencies}
    return {
        f"transformer.layers.{i}.attention.rotary_emb.inv_freq": frequencies
        for i in range(config.num_layers)
    }
