"""Tensor names of Hugging Face checkpoints: one strict two-way table a form, tensor <-> weights of the model.

A tensor is [out, in], as PyTorch keeps it; a weight is [in, out] with heads as dimensions of their own. A row of the
table says which weights a tensor holds; shapes follow from the model. Every tensor of a file must be known and every
weight must be filled, with exactly the expected shape.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding

from glm_jax.config import Config
from glm_jax.hf_config import Form
from glm_jax.layers import rotary_frequencies
from glm_jax.model import CausalLM, init_model
from sharding.disk.manifest import Entry
from sharding.disk.scratch import Scratch
from sharding.disk.stored import Stored
from sharding.errors import UserError
from sharding.layout import Layout

Weights = dict[str, np.ndarray]
Shape = tuple[int, ...]
Index = tuple[slice, ...]

BLOCK = ".trunk.blocks."
TILE = 256  # rows and columns that are transposed at a time


def transposed(matrix: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """A row-major copy of `matrix.T`, or `matrix.T` written into `out`.

    Made in tiles that stay in the processor's cache, each copied to rows of an odd length first: the lines of a column
    would else fall onto the same places of the cache where a row has a power of two of bytes. About four times as fast
    as numpy's own copy.
    """
    bits = matrix.view(f"u{matrix.itemsize}")  # numpy copies bfloat16 one by one
    if out is None:
        out = np.empty(bits.shape[::-1], matrix.dtype)
    into = out.view(bits.dtype)
    buffer = np.empty((TILE, TILE + 40), bits.dtype)
    for i in range(0, bits.shape[0], TILE):
        for j in range(0, bits.shape[1], TILE):
            tile = bits[i : i + TILE, j : j + TILE]
            padded = buffer[: tile.shape[0], : tile.shape[1]]
            padded[...] = tile
            into[j : j + TILE, i : i + TILE] = padded.T
    return out


@dataclasses.dataclass(frozen=True)
class Piece:
    """One weight (of one layer) within a tensor.

    `columns` leading dimensions of the weight lie along the tensor's columns, the others along its rows: the tensor
    is the weight transposed. None: the weight as it is; 0: the weight as a vector.
    """

    path: str
    columns: int | None = None

    def dimensions(self, shape: Shape) -> tuple[Shape, Shape]:
        """The weight's dimensions along the tensor's rows, and those along its columns."""
        if self.columns is None:
            return shape[:1], shape[1:]
        return shape[self.columns :], shape[: self.columns]

    def to_weight(self, rows: np.ndarray, shape: Shape) -> np.ndarray:
        """Tensor rows -> the weight."""
        return (transposed(rows) if self.columns else rows).reshape(shape)

    def put_rows(self, weight: np.ndarray, first: int, rows: np.ndarray) -> None:
        """Tensor rows [rows, columns], `first` of this piece's and those after it -> their place in the weight."""
        last = first + len(rows)
        if self.columns:
            transposed(rows, weight.reshape(rows.shape[1], -1)[:, first:last])
        else:
            weight.reshape(-1, rows.shape[1])[first:last] = rows

    def num_rows(self, shape: Shape) -> int:
        """Rows of the tensor that a weight of this shape takes."""
        return math.prod(self.dimensions(shape)[0])


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of the file ({i}: of every layer) and the weights that stand in it, one after the other."""

    tensor: str
    pieces: tuple[Piece, ...]
    per_head: int = 0  # > 0: the pieces take turns after so many rows, head by head (ChatGLM-6B)
    copy: bool = False  # a second copy of a weight that another row fills

    @property
    def per_layer(self) -> bool:
        """Whether every layer has such a tensor."""
        return "{i}" in self.tensor

    def spans(self, config: Config) -> Iterator[tuple[int, int, int, int]]:
        """(piece, its first row, the tensor's first row, rows) of what lies together, in the tensor's order."""
        shapes = weight_shapes(config)
        counts = [piece.num_rows(shapes[piece.path]) for piece in self.pieces]
        start = 0
        for row in range(0, counts[0], self.per_head or counts[0]):
            for number, count in enumerate(counts):
                length = self.per_head or count
                yield number, row, start, length
                start += length


def _one(tensor: str, path: str, columns: int | None = None) -> Row:
    return Row(tensor, (Piece(path, columns),))


def _qkv(columns: int, kind: str) -> tuple[Piece, ...]:
    return tuple(Piece(f"{BLOCK}{kind}_{name}", columns) for name in "qkv")


def _v1_table(head_dim: int) -> tuple[Row, ...]:
    layer = "transformer.layers.{i}."
    return (
        Row("lm_head.weight", (Piece(".trunk.embedding"),), copy=True),
        _one("transformer.word_embeddings.weight", ".trunk.embedding"),
        _one(layer + "input_layernorm.weight", BLOCK + "attn_norm"),
        _one(layer + "input_layernorm.bias", BLOCK + "attn_norm_bias"),
        Row(layer + "attention.query_key_value.weight", _qkv(1, "w"), per_head=head_dim),
        Row(layer + "attention.query_key_value.bias", _qkv(0, "b"), per_head=head_dim),
        _one(layer + "attention.dense.weight", BLOCK + "w_o", 2),
        _one(layer + "attention.dense.bias", BLOCK + "b_o"),
        _one(layer + "post_attention_layernorm.weight", BLOCK + "mlp_norm"),
        _one(layer + "post_attention_layernorm.bias", BLOCK + "mlp_norm_bias"),
        _one(layer + "mlp.dense_h_to_4h.weight", BLOCK + "w_in", 1),
        _one(layer + "mlp.dense_h_to_4h.bias", BLOCK + "b_in"),
        _one(layer + "mlp.dense_4h_to_h.weight", BLOCK + "w_out", 1),
        _one(layer + "mlp.dense_4h_to_h.bias", BLOCK + "b_out"),
        _one("transformer.final_layernorm.weight", ".trunk.final_norm"),
        _one("transformer.final_layernorm.bias", ".trunk.final_norm_bias"),
    )


def _remote_table() -> tuple[Row, ...]:
    layer = "transformer.encoder.layers.{i}."
    gate_up = (Piece(BLOCK + "w_gate", 1), Piece(BLOCK + "w_up", 1))
    return (
        _one("transformer.embedding.word_embeddings.weight", ".trunk.embedding"),
        _one(layer + "input_layernorm.weight", BLOCK + "attn_norm"),
        Row(layer + "self_attention.query_key_value.weight", _qkv(1, "w")),
        Row(layer + "self_attention.query_key_value.bias", _qkv(0, "b")),
        _one(layer + "self_attention.dense.weight", BLOCK + "w_o", 2),
        _one(layer + "post_attention_layernorm.weight", BLOCK + "mlp_norm"),
        Row(layer + "mlp.dense_h_to_4h.weight", gate_up),
        _one(layer + "mlp.dense_4h_to_h.weight", BLOCK + "w_down", 1),
        _one("transformer.encoder.final_layernorm.weight", ".trunk.final_norm"),
        _one("transformer.output_layer.weight", ".w_head", 1),
    )


def _transformers_table() -> tuple[Row, ...]:
    layer = "model.layers.{i}."
    gate_up = (Piece(BLOCK + "w_gate", 1), Piece(BLOCK + "w_up", 1))
    projections = [
        row
        for name in "qkv"
        for row in (
            _one(f"{layer}self_attn.{name}_proj.weight", f"{BLOCK}w_{name}", 1),
            _one(f"{layer}self_attn.{name}_proj.bias", f"{BLOCK}b_{name}", 0),
        )
    ]
    return (
        _one("model.embed_tokens.weight", ".trunk.embedding"),
        _one(layer + "input_layernorm.weight", BLOCK + "attn_norm"),
        *projections,
        _one(layer + "self_attn.o_proj.weight", BLOCK + "w_o", 2),
        _one(layer + "post_self_attn_layernorm.weight", BLOCK + "attn_out_norm"),
        _one(layer + "post_attention_layernorm.weight", BLOCK + "mlp_norm"),
        Row(layer + "mlp.gate_up_proj.weight", gate_up),
        _one(layer + "mlp.down_proj.weight", BLOCK + "w_down", 1),
        _one(layer + "post_mlp_layernorm.weight", BLOCK + "mlp_out_norm"),
        _one("model.norm.weight", ".trunk.final_norm"),
        _one("lm_head.weight", ".w_head", 1),
    )


# Tensors that are no parameters: they follow from the config, and the original ignores what is stored.
BUFFERS = re.compile(
    r"transformer\.(rotary_pos_emb|layers\.\d+\.attention\.rotary_emb)\.inv_freq"
    r"|model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
)


@cache
def weight_shapes(config: Config) -> Mapping[str, Shape]:
    """Weight path -> shape, of one layer for those of the blocks."""
    layout = Layout()
    with jax.set_mesh(layout.mesh()):
        model = jax.eval_shape(partial(init_model, config, layout), jax.random.key(0))
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = jax.tree_util.keystr(path)
        shapes[name] = leaf.shape[2:] if name.startswith(BLOCK) else leaf.shape
    return shapes


def num_parameters(config: Config) -> int:
    """Parameters of the whole model."""
    return sum(
        math.prod(shape) * (config.num_layers if name.startswith(BLOCK) else 1)
        for name, shape in weight_shapes(config).items()
    )


@cache
def table(config: Config, form: Form) -> tuple[Row, ...]:
    """The rows that a model of this config has in this form. Raises UserError where it has no such form."""
    if form is Form.CHATGLM:
        rows = _v1_table(config.head_dim)
    elif form in (Form.GLM, Form.GLM4):
        rows = _transformers_table()
    else:
        rows = _remote_table()
    shapes = weight_shapes(config)
    rows = tuple(row for row in rows if row.pieces[0].path in shapes)
    lacking = set(shapes) - {piece.path for row in rows for piece in row.pieces}
    if lacking:
        raise UserError(f"a model with {sorted(lacking)[0]} has no form {form.value}")
    return rows


def tensor_shape(row: Row, config: Config) -> Shape:
    """The shape that `row`'s tensor must have."""
    shapes = weight_shapes(config)
    count = sum(piece.num_rows(shapes[piece.path]) for piece in row.pieces)
    column_dims = row.pieces[0].dimensions(shapes[row.pieces[0].path])[1]
    return (count, math.prod(column_dims)) if column_dims else (count,)


def tensor_names(config: Config, form: Form) -> Iterator[tuple[str, Row, int]]:
    """(name, row, layer) of every tensor, layer by layer as the original repositories order them."""
    rows = table(config, form)
    first = next(n for n, row in enumerate(rows) if row.per_layer)
    last = max(n for n, row in enumerate(rows) if row.per_layer)
    for row in rows[:first]:
        yield row.tensor, row, 0
    for i in range(config.num_layers):
        for row in rows[first : last + 1]:
            yield row.tensor.format(i=i), row, i
    for row in rows[last + 1 :]:
        yield row.tensor, row, 0


def check_tensors(config: Config, form: Form, found: Mapping[str, Shape], where: str) -> None:
    """Raise UserError unless `found` (name -> shape) is exactly what the config wants; buffers may be absent."""
    unknown = {name for name in found if not BUFFERS.fullmatch(name)}
    for name, row, _ in tensor_names(config, form):
        if name not in found:
            if row.copy:
                continue
            raise UserError(f"{where}: tensor {name} is missing")
        unknown.discard(name)
        wanted = tensor_shape(row, config)
        if tuple(found[name]) != wanted:
            raise UserError(
                f"{where}: {name} has shape {tuple(found[name])}, config.json wants {wanted}"
            )
    if unknown:
        raise UserError(f"{where}: {len(unknown)} unknown tensors, the first is {min(unknown)}")


# Reading ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the tensors of a checkpoint lie, and what they are."""

    config: Config
    form: Form
    tensors: Mapping[str, Stored]

    def stored(self, path: str, layer: int) -> Stored:
        """The tensor that holds a weight."""
        row, _ = _holders(self.config, self.form)[path]
        return self.tensors[row.tensor.format(i=layer)]

    def read(self, path: str, layer: int, index: Index) -> np.ndarray:
        """`index` of one layer's weight, in its stored dtype; only the bytes of these rows are read."""
        row, number = _holders(self.config, self.form)[path]
        shape = weight_shapes(self.config)[path]
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
        shapes = [weight_shapes(self.config)[piece.path] for piece in row.pieces]
        sizes = [math.prod(shape) for shape in shapes]
        flat = np.split(scratch.empty(sum(sizes), stored.dtype), np.cumsum(sizes)[:-1])
        weights = [part.reshape(shape) for part, shape in zip(flat, shapes, strict=True)]
        digest = hashlib.sha256()
        for number, first, start, count in row.spans(self.config):
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
        shapes = weight_shapes(self.config)
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
    infinity = ((1 << kind.nexp) - 1) << kind.nmant  # exponent all ones; the sign is masked away
    bits = values.reshape(-1).view(f"u{values.itemsize}")
    for start in range(0, bits.size, 1 << 18):  # in the processor's cache
        part = bits[start : start + (1 << 18)]
        if np.any(part & bits.dtype.type(infinity) == infinity):
            raise UserError(
                f"{stored.path}: tensor {stored.name} holds NaN or infinity: the checkpoint is damaged"
            )


def _span(index: Index, dims: Shape) -> slice:
    """Flat range of `index` over `dims`, of which only the first may be cut."""
    start, stop, _ = index[0].indices(dims[0])
    inner = math.prod(dims[1:])
    return slice(start * inner, stop * inner)


@cache
def _holders(config: Config, form: Form) -> Mapping[str, tuple[Row, int]]:
    """Weight path -> the row that fills it, and the number of its piece."""
    return {
        piece.path: (row, number)
        for row in table(config, form)
        if not row.copy
        for number, piece in enumerate(row.pieces)
    }


def read_weight(
    source: Source, path: str, dtype: np.dtype | None, index: Index | None = None
) -> np.ndarray:
    """A weight [layer, ...] (or without the layer dimension, outside the blocks), row-major, `index` of it.

    dtype None keeps the stored one. One layer is read and converted at a time.
    """
    shape = weight_shapes(source.config)[path]
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
    source: Source, name: str, dtype: np.dtype | None, shape: Shape, index: Index
) -> np.ndarray:
    """`index` of a weight that is stacked [stage, layer, ...] if it belongs to the blocks."""
    if not name.startswith(BLOCK):
        return read_weight(source, name, dtype, index)
    stages, slots = (range(*index[axis].indices(shape[axis])) for axis in (0, 1))
    layers = [slice(s * shape[1] + slots.start, s * shape[1] + slots.stop) for s in stages]
    return np.stack([read_weight(source, name, dtype, (part, *index[2:])) for part in layers])


def load_weights(
    source: Source, layout: Layout, dtype: np.dtype | None = np.dtype(np.float32)
) -> CausalLM:
    """Weights on the current mesh, split as `layout` says; every process reads the bytes of its own shards.

    dtype None keeps the stored one.
    """
    config = source.config
    shapes = jax.eval_shape(lambda key: init_model(config, layout, key), jax.random.key(0))
    mesh = jax.sharding.get_mesh()

    def place(path: tuple[jax.tree_util.KeyEntry, ...], like: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        seen: dict[str, np.ndarray] = {}  # replicas ask for the same piece

        def shard(index: Index | None) -> np.ndarray:
            assert index is not None
            if str(index) not in seen:
                seen[str(index)] = read_shard(source, name, dtype, like.shape, index)
            return seen[str(index)]

        sharding = NamedSharding(mesh, like.sharding.spec)
        return jax.make_array_from_callback(like.shape, sharding, shard)

    model: CausalLM = jax.tree_util.tree_map_with_path(place, shapes)
    return model


# Writing ----------------------------------------------------------------------------------------------------------


def join(
    row: Row,
    config: Config,
    parts: Iterable[Iterable[np.ndarray]],
    dtype: np.dtype,
    scratch: Scratch | None = None,
) -> np.ndarray:
    """The tensor made of a row's weights (of one layer), row-major.

    `parts` gives every weight whole or cut along its first dimension, in `dtype`. With `scratch` the tensor stands
    there, until the next call of this thread.
    """
    shape = tensor_shape(row, config)
    size = math.prod(shape)
    tensor = scratch.empty(size, dtype) if scratch else np.empty(size, dtype)
    tensor = tensor.reshape(shape[0], -1)
    spans = list(row.spans(config))
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


def to_tensors(config: Config, form: Form, weights: Mapping[str, np.ndarray]) -> Weights:
    """All tensors, from weights by path with their layers stacked [layer, ...]."""
    tensors: Weights = {}
    for name, row, i in tensor_names(config, form):
        parts = [weights[piece.path] for piece in row.pieces]
        whole = [[part[i]] if row.per_layer else [part] for part in parts]
        tensors[name] = join(row, config, whole, parts[0].dtype)
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


def host_weights(model: CausalLM) -> Weights:
    """float32 weights by path on the host, layers stacked [layer, ...]."""
    weights: Weights = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = jax.tree_util.keystr(path)
        host = np.asarray(leaf, np.float32)
        weights[name] = host.reshape(-1, *host.shape[2:]) if name.startswith(BLOCK) else host
    return weights
