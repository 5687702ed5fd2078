"""A GLM trunk with a scalar head: reward models and critics."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from glm_jax.batch import Sequences
from glm_jax.config import Config, Head
from glm_jax.model import CausalLM, init_model, init_trunk
from glm_jax.trunk import Segments, Trunk
from sharding.layout import Layout


@nnx.dataclass
class ScalarModel(nnx.Module):
    """A trunk and one linear unit without bias, read after the final norm."""

    trunk: Trunk = nnx.data()
    w_scalar: jax.Array = nnx.data()  # D


def scalar_model(trunk: Trunk, layout: Layout, key: jax.Array) -> ScalarModel:
    """A scalar head on `trunk` with weights N(0, 1 / (D + 1)) (Stiennon et al. 2020; the paper's later code)."""
    width = trunk.config.hidden_size
    w = jax.random.normal(key, (width,), out_sharding=layout.spec("norm")) / (width + 1)
    return ScalarModel(trunk=trunk, w_scalar=w)


def init_scalar(config: Config, layout: Layout, key: jax.Array) -> ScalarModel:
    """A ScalarModel with random float32 weights; call under jax.jit with the layout's mesh set."""
    trunk_key, head_key = jax.random.split(key)
    return scalar_model(init_trunk(config, layout, trunk_key), layout, head_key)


INIT: Mapping[Head, Callable[[Config, Layout, jax.Array], CausalLM | ScalarModel]] = {
    Head.VOCABULARY: init_model,
    Head.SCALAR: init_scalar,
}


def head_of(model: CausalLM | ScalarModel) -> Head:
    """Which head a model has."""
    return Head.SCALAR if isinstance(model, ScalarModel) else Head.VOCABULARY


def apply_scalar(
    model: ScalarModel, ids: Int[Array, "B T"], segments: Segments, layout: Layout
) -> Float[Array, "B T"]:
    """The head's float32 value at every position, having seen that token and what precedes it."""
    hidden = model.trunk(ids, segments, layout)
    return jnp.einsum("BTD,D->BT", hidden.astype(jnp.float32), model.w_scalar)


def last_token(valid: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at the last real token of every row, wherever the padding stands."""
    after = jnp.cumsum(valid[:, ::-1].astype(jnp.int32), axis=1)[:, ::-1]
    return valid & (after == 1)


def sequence_scores(model: ScalarModel, sequences: Sequences, layout: Layout) -> Float[Array, " B"]:
    """One score a sequence, read at its last real token."""
    values = apply_scalar(model, sequences.ids, sequences.valid, layout)
    return jnp.sum(jnp.where(last_token(sequences.valid), values, 0.0), axis=1)
