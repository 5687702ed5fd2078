"""Tiny models and ragged batches from NumPy by name, so that nothing of what is compared depends on the layout.

Sizes are odd on purpose: layers, vocabulary and kv groups divide over few meshes; rows are ragged and padded on either
side.
"""

import dataclasses
import zlib
from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding

from glm_jax.batch import Prompts, Sequences
from glm_jax.config import Config, GLMV1Config
from glm_jax.model import CausalLM, init_model
from glm_jax.scalar import ScalarModel
from glm_jax.weights import kept_layout, named_weights, restack
from sharding.layout import Layout

VOCAB, LENGTH, PROMPT, ANSWER = 61, 12, 6, 6
STOP_IDS = (2, 7)


def tiny(config: Config) -> Config:
    """A model of this architecture with few and odd sizes; rotary base, norms and biases stay."""
    if isinstance(config, GLMV1Config):
        return GLMV1Config(
            vocab_size=VOCAB,
            hidden_size=64,
            num_layers=5,
            num_heads=8,
            ffn_size=64,
            max_length=64,
            mask_id=VOCAB - 3,
            gmask_id=VOCAB - 2,
            sop_id=VOCAB - 1,
        )
    return dataclasses.replace(
        config,
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=5,
        num_heads=8,
        num_kv_groups=2,
        head_dim=8,
        ffn_size=64,
        max_length=64,
    )


def rng(name: str) -> np.random.Generator:
    """A stream of its own for each name."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def _value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights whose activations are about 1 in every layer; norms and biases that are not 1 and 0."""
    noise = rng(name).normal(size=shape).astype(np.float32)
    last = name.rsplit(".", 1)[-1]
    if last.startswith("w_") or last == "embedding":
        return 0.2 * noise
    return 0.1 * noise + np.float32("norm" in last and "bias" not in last)


def place_model(config: Config, layout: Layout) -> CausalLM:
    """A model whose weights depend on their names and shapes alone."""
    kept = kept_layout(layout, config)
    mesh = jax.sharding.get_mesh()
    shapes = jax.eval_shape(partial(init_model, config, kept), jax.random.key(0))
    host = [
        jax.device_put(_value(name, x.shape), NamedSharding(mesh, x.sharding.spec))
        for name, x in named_weights(shapes).items()
    ]
    model: CausalLM = jax.tree.unflatten(jax.tree.structure(shapes), host)
    return jax.jit(partial(restack, source=kept, target=layout))(model)


def place_scorer(config: Config, layout: Layout) -> ScalarModel:
    """A scalar head on the same trunk."""
    head = _value("w_scalar", (config.hidden_size,))
    spec = NamedSharding(jax.sharding.get_mesh(), layout.spec("norm"))
    return ScalarModel(trunk=place_model(config, layout).trunk, w_scalar=jax.device_put(head, spec))


def sequences(config: Config, name: str, rows: int) -> Sequences:
    """Ragged rows, padded right and left in turn, so that a mean of means is not the mean."""
    draw = rng(name)
    ids = draw.integers(3, VOCAB - 3, (rows, LENGTH)).astype(np.int32)
    lengths = draw.integers(4, LENGTH + 1, rows)[:, None]
    column = np.arange(LENGTH)
    left = np.arange(rows)[:, None] % 2 == 1
    start = np.where(left, LENGTH - lengths, 0)
    valid = (column >= start) & (column < start + lengths)
    if isinstance(config, GLMV1Config):
        ids = np.where(column == start + 1, config.gmask_id, ids)
        ids = np.where(column == start + 2, config.sop_id, ids)
    ids = np.where(valid, ids, 0).astype(np.int32)
    return Sequences(ids, valid, valid & (column >= start + 3))


def prompts(config: Config, name: str, rows: int) -> Prompts:
    """Left-padded prompts of 2 tokens and more."""
    draw = rng(name)
    ids = draw.integers(3, VOCAB - 3, (rows, PROMPT)).astype(np.int32)
    valid = np.arange(PROMPT) >= draw.integers(0, PROMPT - 2, rows)[:, None]
    if isinstance(config, GLMV1Config):
        ids[:, -2:] = config.gmask_id, config.sop_id
    return Prompts(np.where(valid, ids, 0), valid, np.arange(rows, dtype=np.int32))
