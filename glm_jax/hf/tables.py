"""Tensor names of Hugging Face checkpoints: one strict two-way table a form, tensor <-> weights of the model.

A tensor is [out, in], as PyTorch keeps it; a weight is [in, out] with heads as dimensions of their own. A row of the
table says which weights a tensor holds; shapes follow from the model. Every tensor of a file must be known and every
weight must be filled, with exactly the expected shape.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache, partial

import jax
import numpy as np

from glm_jax.config import Config, Head
from glm_jax.hf.config import Form
from glm_jax.scalar import INIT
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
    bias: bool = False  # the original's bias beside this weight, which the model does not have: 0

    @property
    def per_layer(self) -> bool:
        """Whether every layer has such a tensor."""
        return "{i}" in self.tensor

    def spans(self, config: Config, head: Head) -> Iterator[tuple[int, int, int, int]]:
        """(piece, its first row, the tensor's first row, rows) of what lies together, in the tensor's order."""
        shapes = weight_shapes(config, head)
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
        _one("classifier_head.weight", ".w_scalar", 1),
        Row("classifier_head.bias", (Piece(".w_scalar", 1),), bias=True),
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
        _one("score.weight", ".w_scalar", 1),
    )


# Tensors that are no parameters: they follow from the config, and the original ignores what is stored.
BUFFERS = re.compile(
    r"transformer\.(rotary_pos_emb|layers\.\d+\.attention\.rotary_emb)\.inv_freq"
    r"|model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
)


@cache
def weight_shapes(config: Config, head: Head) -> Mapping[str, Shape]:
    """Weight path -> shape, of one layer for those of the blocks."""
    layout = Layout()
    with jax.set_mesh(layout.mesh(jax.local_devices())):  # one process may ask alone
        model = jax.eval_shape(partial(INIT[head], config, layout), jax.random.key(0))
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = jax.tree_util.keystr(path)
        shapes[name] = leaf.shape[2:] if name.startswith(BLOCK) else leaf.shape
    return shapes


def num_parameters(config: Config, head: Head) -> int:
    """Parameters of the whole model."""
    return sum(
        math.prod(shape) * (config.num_layers if name.startswith(BLOCK) else 1)
        for name, shape in weight_shapes(config, head).items()
    )


@cache
def table(config: Config, form: Form, head: Head) -> tuple[Row, ...]:
    """The rows that a model of this config has in this form. Raises UserError where it has no such form."""
    if form is Form.CHATGLM and head is Head.SCALAR:
        raise UserError(
            f"{form.value} has no class with a scalar head, so none can read such a directory: keep the checkpoint"
        )
    if form is Form.CHATGLM:
        rows = _v1_table(config.head_dim)
    elif form in (Form.GLM, Form.GLM4):
        rows = _transformers_table()
    else:
        rows = _remote_table()
    shapes = weight_shapes(config, head)
    rows = tuple(row for row in rows if row.pieces[0].path in shapes)
    lacking = set(shapes) - {piece.path for row in rows for piece in row.pieces}
    if lacking:
        raise UserError(f"a model with {sorted(lacking)[0]} has no form {form.value}")
    return rows


def tensor_shape(row: Row, config: Config, head: Head) -> Shape:
    """The shape that `row`'s tensor must have."""
    shapes = weight_shapes(config, head)
    count = sum(piece.num_rows(shapes[piece.path]) for piece in row.pieces)
    column_dims = row.pieces[0].dimensions(shapes[row.pieces[0].path])[1]
    return (count, math.prod(column_dims)) if column_dims and not row.bias else (count,)


def tensor_names(config: Config, form: Form, head: Head) -> Iterator[tuple[str, Row, int]]:
    """(name, row, layer) of every tensor, layer by layer as the original repositories order them."""
    rows = table(config, form, head)
    first = next(n for n, row in enumerate(rows) if row.per_layer)
    last = max(n for n, row in enumerate(rows) if row.per_layer)
    for row in rows[:first]:
        yield row.tensor, row, 0
    for i in range(config.num_layers):
        for row in rows[first : last + 1]:
            yield row.tensor.format(i=i), row, i
    for row in rows[last + 1 :]:
        yield row.tensor, row, 0


def check_tensors(
    config: Config, form: Form, head: Head, found: Mapping[str, Shape], where: str
) -> None:
    """Raise UserError unless `found` (name -> shape) is exactly what the config wants; buffers may be absent."""
    unknown = {name for name in found if not BUFFERS.fullmatch(name)}
    for name, row, _ in tensor_names(config, form, head):
        if name not in found:
            if row.copy:
                continue
            raise UserError(f"{where}: tensor {name} is missing")
        unknown.discard(name)
        wanted = tensor_shape(row, config, head)
        if tuple(found[name]) != wanted:
            raise UserError(
                f"{where}: {name} has shape {tuple(found[name])}, config.json wants {wanted}"
            )
    if unknown:
        raise UserError(f"{where}: {len(unknown)} unknown tensors, the first is {min(unknown)}")
