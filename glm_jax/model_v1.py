"""ChatGLM-6B: a prefix decoder with two-dimensional rotary positions (Du et al. 2022; Zeng et al. 2023).

What differs from its successors, after the released code:
* Residual branches start from the *normalised* input, scaled: h = LN(x) * alpha + attention(LN(x)), then
  LN(h) * alpha + mlp(LN(h)), with alpha = sqrt(2 * 28) whatever the number of layers is.
* Everything before `<sop>` (the context) is seen by every token of its sequence; from `<sop>` on it is causal.
* Every token has two positions: where it stands in the context, which stays at the mask token from `<sop>` on; and
  how far it stands behind the context, 0 within it. One half of each head is rotated by each.
* The frequencies were rounded to float16 when the model was built, in float32 runs too.

The original divides queries by the layer's number and multiplies the scores by it again: it cancels but for
float16's range, and is left out here.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from glm_jax.attention import Attend, Sight
from glm_jax.config import GLMV1Config
from glm_jax.layers import (
    from_heads,
    gathered,
    layer_norm,
    mlp,
    rotary_frequencies,
    rotate_halves,
    rotation,
    spread,
    summed,
    to_heads,
)
from glm_jax.trunk import Places, Rotations, Trunk, running_sum
from glm_jax.weights import Draw
from sharding.layout import Layout

ALPHA = (
    2 * 28
) ** 0.5  # a block's default number of layers, which the released model never overrides


@nnx.dataclass
class BlockV1(nnx.Module):
    """Weights of one transformer layer, or of a stack of them with leading dimensions [stage, layer]."""

    attn_norm: jax.Array = nnx.data()  # D
    attn_norm_bias: jax.Array = nnx.data()  # D
    w_q: jax.Array = nnx.data()  # D N H
    w_k: jax.Array = nnx.data()  # D N H
    w_v: jax.Array = nnx.data()  # D N H
    b_q: jax.Array = nnx.data()  # N H
    b_k: jax.Array = nnx.data()  # N H
    b_v: jax.Array = nnx.data()  # N H
    w_o: jax.Array = nnx.data()  # N H D
    b_o: jax.Array = nnx.data()  # D
    mlp_norm: jax.Array = nnx.data()  # D
    mlp_norm_bias: jax.Array = nnx.data()  # D
    w_in: jax.Array = nnx.data()  # D F
    b_in: jax.Array = nnx.data()  # F
    w_out: jax.Array = nnx.data()  # F D
    b_out: jax.Array = nnx.data()  # D


@nnx.dataclass
class TrunkV1(Trunk):
    """The trunk of ChatGLM-6B."""

    final_norm_bias: jax.Array = nnx.data()  # D

    position_step: ClassVar[tuple[int, ...]] = (0, 1)

    def places(self, ids: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Places:
        """Positions and how far tokens see, read off the special tokens of each segment.

        The mask token is the first [gMASK] up to the token, else the first [MASK]. The original fails on a sequence
        without `<sop>`; here all of it is context.
        """
        config = self.config
        assert isinstance(config, GLMV1Config)
        index = running_sum(jnp.ones_like(segments), segments) - 1
        started = (running_sum((ids == config.sop_id).astype(jnp.int32), segments) > 0).astype(
            jnp.int32
        )

        def first(token: int) -> Int[Array, "B T"]:
            """1 + index of the first `token` so far, 0 where there is none."""
            here = (ids == token).astype(jnp.int32)
            is_first = here * (running_sum(here, segments) == 1)
            return running_sum(is_first * (index + 1), segments)

        gmask, mask = first(config.gmask_id), first(config.mask_id)
        anchor = jnp.maximum(jnp.where(gmask > 0, gmask, mask) - 1, 0)
        in_context = jnp.where(started == 1, anchor, index)
        positions = jnp.stack([in_context, running_sum(started, segments)], axis=-1)
        # the context is what a segment begins with: a token of it sees as many columns further as there are of it
        context = 1 - started
        further = running_sum(context[:, ::-1], segments[:, ::-1])[:, ::-1] - context
        reach = jnp.arange(segments.shape[1]) + further
        return Places(Sight(segments, reach), positions)

    def rotations(self, positions: Int[Array, "B T 2"]) -> Rotations:
        """Of the first half of every head by the position in the context, of the second by that behind it."""
        half = self.config.head_dim // 2
        frequencies = rotary_frequencies(half, 10_000.0).astype(np.float16).astype(np.float32)
        wide = positions.astype(jnp.float32)
        return rotation(wide[..., 0], frequencies), rotation(wide[..., 1], frequencies)

    def layer(
        self, block: BlockV1, x: jax.Array, rotations: Rotations, attend: Attend, layout: Layout
    ) -> jax.Array:
        """Attention and MLP on normalised input, each added to alpha times that input."""
        eps = self.config.norm_eps
        x = layer_norm(x, block.attn_norm, block.attn_norm_bias, eps)
        q, k, v = _projections(block, gathered(x, layout), rotations, layout)
        attended = spread(from_heads(attend(q, k, v), block.w_o, layout), layout)
        x = summed(x * jnp.asarray(ALPHA, x.dtype) + attended + block.b_o, layout)
        x = layer_norm(x, block.mlp_norm, block.mlp_norm_bias, eps)
        whole = gathered(x, layout)
        out = mlp(whole, block.w_in, block.b_in, block.w_out, block.b_out, layout)
        return x * jnp.asarray(ALPHA, x.dtype) + spread(out, layout)

    def finish(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """LayerNorm."""
        return layer_norm(x, self.final_norm, self.final_norm_bias, self.config.norm_eps)


def _projections(
    block: BlockV1, x: jax.Array, rotations: Rotations, layout: Layout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys (both rotated) and values [B,T,N,H] of normalised activations."""

    def project(w: jax.Array, b: jax.Array) -> jax.Array:
        return to_heads(x, w, "heads", layout) + b

    def rotated(y: jax.Array) -> jax.Array:
        halves = jnp.split(y, 2, axis=-1)
        turned = [rotate_halves(half, by) for half, by in zip(halves, rotations, strict=True)]
        return jnp.concatenate(turned, axis=-1)

    q, k = rotated(project(block.w_q, block.b_q)), rotated(project(block.w_k, block.b_k))
    return q, k, project(block.w_v, block.b_v)


def init_trunk_v1(config: GLMV1Config, layout: Layout, key: jax.Array) -> TrunkV1:
    """Random float32 weights, born with their sharding: N(0, 0.02), output projections / sqrt(2 * layers)."""
    D, N, H, F = config.hidden_size, config.num_heads, config.head_dim, config.ffn_size
    draw = Draw(config, layout, key)
    into_residual = 0.02 / (2 * config.num_layers) ** 0.5
    blocks = BlockV1(
        attn_norm=draw.constant("attn_norm", 1.0, (D,)),
        attn_norm_bias=draw.constant("attn_norm_bias", 0.0, (D,)),
        w_q=draw.normal("w_q", 0.02, (D, N, H)),
        w_k=draw.normal("w_k", 0.02, (D, N, H)),
        w_v=draw.normal("w_v", 0.02, (D, N, H)),
        b_q=draw.constant("b_q", 0.0, (N, H)),
        b_k=draw.constant("b_k", 0.0, (N, H)),
        b_v=draw.constant("b_v", 0.0, (N, H)),
        w_o=draw.normal("w_o", into_residual, (N, H, D)),
        b_o=draw.constant("b_o", 0.0, (D,)),
        mlp_norm=draw.constant("mlp_norm", 1.0, (D,)),
        mlp_norm_bias=draw.constant("mlp_norm_bias", 0.0, (D,)),
        w_in=draw.normal("w_in", 0.02, (D, F)),
        b_in=draw.constant("b_in", 0.0, (F,)),
        w_out=draw.normal("w_out", into_residual, (F, D)),
        b_out=draw.constant("b_out", 0.0, (D,)),
    )
    spec = layout.spec("norm")
    return TrunkV1(
        embedding=draw.table("embedding", 0.02, (config.vocab_size, D)),
        blocks=blocks,
        final_norm=jnp.ones((D,), jnp.float32, out_sharding=spec),
        final_norm_bias=jnp.zeros((D,), jnp.float32, out_sharding=spec),
        config=config,
    )
