"""A language model on a trunk of any generation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from glm_jax.config import Config, GLMV1Config
from glm_jax.model_v1 import init_trunk_v1
from glm_jax.model_v2 import init_trunk_v2
from glm_jax.trunk import Segments, Trunk
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
    spec = layout.spec("embed_weight", "vocab")
    w_head = 0.02 * jax.random.normal(head_key, shape, out_sharding=spec)
    return CausalLM(trunk=trunk, w_head=w_head)


def apply_head(
    model: CausalLM, hidden: Float[Array, "B T D"], layout: Layout
) -> Float[Array, "B T V"]:
    """float32 logits, split over "vocab" as the layout says."""
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
    return jnp.reshape(logits, shape, out_sharding=spec).astype(jnp.float32)


def apply_model(
    model: CausalLM, ids: Int[Array, "B T"], segments: Segments, layout: Layout
) -> Float[Array, "B T V"]:
    """float32 logits of the next token at every position of whole sequences; see `Trunk.__call__`."""
    return apply_head(model, model.trunk(ids, segments, layout), layout)


def restack(model: CausalLM, like: CausalLM) -> CausalLM:
    """The same weights with the stages and shards of `like`, a module of arrays or shapes on the same mesh.

    Layers keep their order, so that [stage, layer, ...] is only cut in other places.
    """

    def move(w: jax.Array, target: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
        spec = jax.typeof(target).sharding.spec
        if w.shape == target.shape:
            return jax.sharding.reshard(w, spec)
        return jnp.reshape(w, target.shape, out_sharding=spec)

    moved: CausalLM = jax.tree.map(move, model, like)
    return moved
