"""Hugging Face files in and out: one strict two-way table, tensor name <-> weight <-> transform.

Every tensor of a file must be known and every weight must be filled, with exactly the expected shape.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from glm_jax.config import GLMConfig, read_config, to_hf
from glm_jax.model import CausalLM, init_model
from sharding.errors import UserError
from sharding.layout import Layout
from sharding.pipeline import layer_slots

Weights = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of the file and the weights it holds.

    `read` turns the tensor into the weights named by `names` (of one layer, where the tensor's name has an {i});
    `write` is its exact inverse.
    """

    tensor: str
    names: tuple[str, ...]
    shape: Callable[[GLMConfig], tuple[int, ...]]
    read: Callable[[GLMConfig, np.ndarray], tuple[np.ndarray, ...]]
    write: Callable[[GLMConfig, tuple[np.ndarray, ...]], np.ndarray]


def _plain(tensor: str, name: str, shape: Callable[[GLMConfig], tuple[int, ...]]) -> Row:
    return Row(tensor, (name,), shape, lambda c, w: (w,), lambda c, parts: parts[0])


def _transposed(tensor: str, name: str, shape: Callable[[GLMConfig], tuple[int, ...]]) -> Row:
    return Row(tensor, (name,), shape, lambda c, w: (w.T,), lambda c, parts: parts[0].T)


def _qkv_width(c: GLMConfig) -> int:
    return (c.num_heads + 2 * c.num_kv_groups) * c.head_dim


def _split_qkv(c: GLMConfig, rows: np.ndarray) -> list[np.ndarray]:
    """[all Q | all K | all V] rows -> three arrays [heads, H, ...]."""
    sizes = np.cumsum([c.num_heads, c.num_kv_groups]) * c.head_dim
    return [part.reshape(-1, c.head_dim, *part.shape[1:]) for part in np.split(rows, sizes)]


def _read_qkv(c: GLMConfig, w: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.moveaxis(part, -1, 0) for part in _split_qkv(c, w))  # [D, heads, H]


def _write_qkv(c: GLMConfig, parts: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.concatenate([np.moveaxis(p, 0, -1).reshape(-1, c.hidden_size) for p in parts])


_LAYER = "transformer.encoder.layers.{i}."
_BLOCK = ".trunk.blocks."

CHATGLM3 = (
    _plain(
        "transformer.embedding.word_embeddings.weight",
        ".trunk.embedding",
        lambda c: (c.vocab_size, c.hidden_size),
    ),
    _plain(_LAYER + "input_layernorm.weight", _BLOCK + "attn_norm", lambda c: (c.hidden_size,)),
    Row(
        _LAYER + "self_attention.query_key_value.weight",
        (_BLOCK + "w_q", _BLOCK + "w_k", _BLOCK + "w_v"),
        lambda c: (_qkv_width(c), c.hidden_size),
        _read_qkv,
        _write_qkv,
    ),
    Row(
        _LAYER + "self_attention.query_key_value.bias",
        (_BLOCK + "b_q", _BLOCK + "b_k", _BLOCK + "b_v"),
        lambda c: (_qkv_width(c),),
        lambda c, w: tuple(_split_qkv(c, w)),
        lambda c, parts: np.concatenate([p.reshape(-1) for p in parts]),
    ),
    Row(
        _LAYER + "self_attention.dense.weight",
        (_BLOCK + "w_o",),
        lambda c: (c.hidden_size, c.num_heads * c.head_dim),
        lambda c, w: (w.T.reshape(c.num_heads, c.head_dim, c.hidden_size),),
        lambda c, parts: parts[0].reshape(-1, c.hidden_size).T,
    ),
    _plain(
        _LAYER + "post_attention_layernorm.weight", _BLOCK + "mlp_norm", lambda c: (c.hidden_size,)
    ),
    Row(
        _LAYER + "mlp.dense_h_to_4h.weight",
        (_BLOCK + "w_gate", _BLOCK + "w_up"),
        lambda c: (2 * c.ffn_size, c.hidden_size),
        lambda c, w: tuple(half.T for half in np.split(w, 2)),
        lambda c, parts: np.concatenate([p.T for p in parts]),
    ),
    _transposed(
        _LAYER + "mlp.dense_4h_to_h.weight",
        _BLOCK + "w_down",
        lambda c: (c.hidden_size, c.ffn_size),
    ),
    _plain(
        "transformer.encoder.final_layernorm.weight",
        ".trunk.final_norm",
        lambda c: (c.hidden_size,),
    ),
    _transposed(
        "transformer.output_layer.weight", ".w_head", lambda c: (c.vocab_size, c.hidden_size)
    ),
)
INV_FREQ = (
    "transformer.rotary_pos_emb.inv_freq"  # a buffer of the original, follows from the config
)


def table(config: GLMConfig) -> list[Row]:
    """The rows that a model of this config has."""
    return [row for row in CHATGLM3 if config.qkv_bias or not row.tensor.endswith(".bias")]


def read_tensors(directory: Path) -> Weights:
    """All tensors of the *.safetensors files of a directory, in their stored dtype. Raises UserError."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"no *.safetensors file in {directory}: expected a Hugging Face checkpoint")
    tensors: Weights = {}
    for path in files:
        try:
            with safe_open(path, framework="np") as file:
                names = file.keys()
                tensors |= {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
    return tensors


def from_tensors(config: GLMConfig, tensors: Mapping[str, np.ndarray], where: str) -> Weights:
    """File tensors -> float32 weights by path, layers stacked [layer, ...]. Raises UserError on any mismatch."""
    rest = dict(tensors)
    rest.pop(INV_FREQ, None)
    weights: dict[str, list[np.ndarray]] = {}
    for row in table(config):
        per_layer = "{i}" in row.tensor
        for i in range(config.num_layers if per_layer else 1):
            name = row.tensor.format(i=i)
            if name not in rest:
                raise UserError(f"{where}: tensor {name} is missing")
            tensor = rest.pop(name)
            if tensor.shape != row.shape(config):
                raise UserError(
                    f"{where}: {name} has shape {tensor.shape}, config.json wants {row.shape(config)}"
                )
            for path, weight in zip(
                row.names, row.read(config, tensor.astype(np.float32)), strict=True
            ):
                weights.setdefault(path, []).append(weight)
    if rest:
        raise UserError(f"{where}: {len(rest)} unknown tensors, the first is {sorted(rest)[0]}")
    return {
        path: np.stack(parts) if path.startswith(_BLOCK) else parts[0]
        for path, parts in weights.items()
    }


def to_tensors(config: GLMConfig, weights: Mapping[str, np.ndarray]) -> Weights:
    """The inverse of `from_tensors`, with the rotary buffer that the original repositories carry."""
    tensors: Weights = {}
    for row in table(config):
        parts = tuple(weights[path] for path in row.names)
        if "{i}" not in row.tensor:
            tensors[row.tensor] = row.write(config, parts)
            continue
        for i in range(config.num_layers):
            tensors[row.tensor.format(i=i)] = row.write(config, tuple(part[i] for part in parts))
    rotated = config.head_dim // 2
    base = 10_000.0 * config.rope_ratio
    tensors[INV_FREQ] = 1.0 / base ** (np.arange(0, rotated, 2, dtype=np.float32) / rotated)
    return {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}


def load_model(directory: Path, layout: Layout, compute_dtype: str = "float32") -> CausalLM:
    """The model of a Hugging Face ChatGLM3 directory, split as `layout` says on the current mesh."""
    config = dataclasses.replace(read_config(directory), compute_dtype=compute_dtype)
    weights = from_tensors(config, read_tensors(directory), str(directory))
    shapes = jax.eval_shape(lambda key: init_model(config, layout, key), jax.random.key(0))
    slots = layer_slots(config.num_layers, layout)
    mesh = jax.sharding.get_mesh()

    def place(path: tuple[jax.tree_util.KeyEntry, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        weight = weights[name][slots] if name.startswith(_BLOCK) else weights[name]
        return jax.device_put(weight, NamedSharding(mesh, shape.sharding.spec))

    return jax.tree_util.tree_map_with_path(place, shapes)


def host_weights(model: CausalLM) -> Weights:
    """float32 weights by path on the host, layers stacked [layer, ...]."""
    weights: Weights = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = jax.tree_util.keystr(path)
        host = np.asarray(leaf, np.float32)
        weights[name] = host.reshape(-1, *host.shape[2:]) if name.startswith(_BLOCK) else host
    return weights


def save_model(model: CausalLM, directory: Path, save_tokenizer: Callable[[Path], Any]) -> None:
    """Write config.json, model.safetensors (float32) and the tokenizer's files; whole or not at all."""
    config = model.trunk.config
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = to_tensors(config, host_weights(model))
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    fields = json.dumps(to_hf(config, "float32"), indent=2, ensure_ascii=False)
    (partial / "config.json").write_text(fields + "\n", encoding="utf-8")
    save_tokenizer(partial)
    if directory.exists():
        shutil.rmtree(directory)
    os.replace(partial, directory)
