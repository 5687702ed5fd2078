"""A language model on a trunk of any generation."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from glm_jax.config import Config, GLMV1Config
from glm_jax.layers import MASKED
from glm_jax.model_v1 import init_trunk_v1
from glm_jax.model_v2 import init_trunk_v2
from glm_jax.trunk import Segments, Trunk
from glm_jax.weights import draw_table
from sharding.layout import Layout


@nnx.dataclass
class CausalLM(nnx.Module):
    """A trunk with a language-model head."""

    trunk: Trunk = nnx.data()
    w_head: jax.Array | None = nnx.data()  # D V; None: the embedding table serves (ChatGLM-6B)


def init_trunk(config: Config, layout: Layout, key: jax.Array) -> Trunk:
    """A trunk with random float32 weights; call under jax.jit with the layout's mesh set.

    The values depend on `key` alone, not on the layout. Raises UserError where the layout does not divide the model.
    """
    config.check(layout)
    if isinstance(config, GLMV1Config):
        return init_trunk_v1(config, layout, key)
    return init_trunk_v2(config, layout, key)


def init_model(config: Config, layout: Layout, key: jax.Array) -> CausalLM:
    """A CausalLM with random float32 weights; call under jax.jit with the layout's mesh set."""
    trunk_key, head_key = jax.random.split(key)
    trunk = init_trunk(config, layout, trunk_key)
    if isinstance(config, GLMV1Config):
        return CausalLM(trunk=trunk, w_head=None)
    shape = (config.hidden_size, config.vocab_size)
    w_head = draw_table("w_head", 0.02, shape, head_key, config, layout)
    return CausalLM(trunk=trunk, w_head=w_head)


def cast_weights(model: CausalLM) -> CausalLM:
    """The model with its layers and head in the compute dtype: not every compiler casts before a loop.

    A table of which rows alone are read stays.
    """
    dtype, trunk, w_head = model.trunk.config.compute_dtype, model.trunk, model.w_head
    changes = {"blocks": trunk.compute_blocks()}
    if w_head is None:
        changes["embedding"] = trunk.embedding.astype(dtype)
    else:
        w_head = w_head.astype(dtype)
    return CausalLM(trunk=dataclasses.replace(trunk, **changes), w_head=w_head)


def apply_head(
    model: CausalLM, hidden: Float[Array, "B T D"], layout: Layout
) -> Float[Array, "B T V"]:
    """float32 logits, split over "vocab" as the layout says.

    Where the vocabulary does not divide, V is padded and the logits of tokens that do not exist are `MASKED`: no
    softmax gives them any weight.
    """
    rows = jnp.reshape(hidden, (-1, hidden.shape[-1]), out_sharding=layout.spec("batch", "embed"))
    split = layout.spec("batch", "vocab")
    if model.w_head is None:
        table = model.trunk.embedding.astype(hidden.dtype)
        logits = jnp.einsum("RD,VD->RV", rows, table, out_sharding=split)
    else:
        weights = model.w_head.astype(hidden.dtype)
        logits = jnp.einsum("RD,DV->RV", rows, weights, out_sharding=split)
    shape = (*hidden.shape[:2], logits.shape[-1])
    spec = layout.spec("batch", "time", "vocab")
    logits = jnp.reshape(logits, shape, out_sharding=spec).astype(jnp.float32)
    size = model.trunk.config.vocab_size
    if logits.shape[-1] == size:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < size, logits, MASKED)


def apply_model(
    model: CausalLM, ids: Int[Array, "B T"], segments: Segments, layout: Layout
) -> Float[Array, "B T V"]:
    """float32 logits of the next token at every position of whole sequences; see `Trunk.__call__`."""
    return apply_head(model, model.trunk(ids, segments, layout), layout)
