"""ChatGLM2, ChatGLM3, GLM-4 and GLM-4-0414: grouped-query attention, half rotary, RMSNorm, SwiGLU.

The generations differ in shape, in the rotary base, and in where norms stand (`GLMConfig`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from glm_jax.attention import Attend, Sight
from glm_jax.config import GLMConfig
from glm_jax.layers import (
    Rotation,
    from_heads,
    gated_mlp,
    gathered,
    rms_norm,
    rotary_frequencies,
    rotate,
    rotation,
    spread,
    summed,
    to_heads,
)
from glm_jax.trunk import Places, Rotations, Trunk, running_sum
from glm_jax.weights import Draw, kv_axis
from sharding.layout import Layout
from sharding.remat import kept


@nnx.dataclass
class Block(nnx.Module):
    """Weights of one transformer layer, or of a stack of them with leading dimensions [stage, layer]."""

    attn_norm: jax.Array = nnx.data()  # D
    w_q: jax.Array = nnx.data()  # D N H
    w_k: jax.Array = nnx.data()  # D K H
    w_v: jax.Array = nnx.data()  # D K H
    b_q: jax.Array | None = nnx.data()  # N H, None without qkv_bias
    b_k: jax.Array | None = nnx.data()  # K H
    b_v: jax.Array | None = nnx.data()  # K H
    w_o: jax.Array = nnx.data()  # N H D
    attn_out_norm: jax.Array | None = nnx.data()  # D, None without sandwich_norms
    mlp_norm: jax.Array = nnx.data()  # D
    w_gate: jax.Array = nnx.data()  # D F
    w_up: jax.Array = nnx.data()  # D F
    w_down: jax.Array = nnx.data()  # F D
    mlp_out_norm: jax.Array | None = nnx.data()  # D, None without sandwich_norms


@nnx.dataclass
class TrunkV2(Trunk):
    """Pre-norm with plain residuals; GLM-4-0414 also norms what a branch adds to the residual."""

    def places(self, ids: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Places:
        """Positions count the real tokens of a segment from 0, whichever side the padding stands on."""
        count = running_sum(jnp.ones_like(segments), segments)
        return Places(Sight(segments), count[..., None] - 1)

    def rotations(self, positions: Int[Array, "B T 1"]) -> Rotations:
        """Of the first half of every head."""
        config = self.config
        assert isinstance(config, GLMConfig)
        frequencies = rotary_frequencies(config.head_dim // 2, config.rope_theta)
        return (rotation(positions[..., 0] / config.position_scale, frequencies),)

    def layer(
        self, block: Block, x: jax.Array, rotations: Rotations, attend: Attend, layout: Layout
    ) -> jax.Array:
        """x + attention(norm(x)), then x + mlp(norm(x))."""
        config = self.config
        assert isinstance(config, GLMConfig)
        eps, (by,) = config.norm_eps, rotations
        normed = gathered(rms_norm(x, block.attn_norm, eps), layout)
        q, k, v = _projections(block, normed, by, config, layout)
        attended = spread(from_heads(attend(q, k, v), block.w_o, layout), layout)
        if block.attn_out_norm is not None:
            x = x + rms_norm(summed(attended, layout), block.attn_out_norm, eps)
        else:
            x = summed(x + attended, layout)
        normed = gathered(rms_norm(x, block.mlp_norm, eps), layout)
        out = spread(gated_mlp(normed, block.w_gate, block.w_up, block.w_down, layout), layout)
        if block.mlp_out_norm is not None:
            # without a norm behind it, nobody asks for the widest product again
            out = rms_norm(kept(out), block.mlp_out_norm, eps)
        return x + out

    def finish(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """RMSNorm."""
        return rms_norm(x, self.final_norm, self.config.norm_eps)


def _projections(
    block: Block, x: jax.Array, by: Rotation, config: GLMConfig, layout: Layout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B,T,N,H] and keys (both rotated) and values [B,T,K,H] of normalised activations."""
    kv = kv_axis(config, layout)

    def project(w: jax.Array, b: jax.Array | None, heads: str | None) -> jax.Array:
        y = to_heads(x, w, heads, layout)
        return y if b is None else y + b

    q = rotate(project(block.w_q, block.b_q, "heads"), by)
    k = rotate(project(block.w_k, block.b_k, kv), by)
    return q, k, project(block.w_v, block.b_v, kv)


def init_trunk_v2(config: GLMConfig, layout: Layout, key: jax.Array) -> TrunkV2:
    """Random float32 weights, born with their sharding: N(0, 0.02), output projections / sqrt(2 * layers)."""
    D, N, K, H, F = (
        config.hidden_size,
        config.num_heads,
        config.num_kv_groups,
        config.head_dim,
        config.ffn_size,
    )
    draw = Draw(config, layout, key)
    into_residual = 0.02 / (2 * config.num_layers) ** 0.5

    def bias(name: str, heads: int) -> jax.Array | None:
        return draw.constant(name, 0.0, (heads, H)) if config.qkv_bias else None

    def out_norm(name: str) -> jax.Array | None:
        return draw.constant(name, 1.0, (D,)) if config.sandwich_norms else None

    blocks = Block(
        attn_norm=draw.constant("attn_norm", 1.0, (D,)),
        w_q=draw.normal("w_q", 0.02, (D, N, H)),
        w_k=draw.normal("w_k", 0.02, (D, K, H)),
        w_v=draw.normal("w_v", 0.02, (D, K, H)),
        b_q=bias("b_q", N),
        b_k=bias("b_k", K),
        b_v=bias("b_v", K),
        w_o=draw.normal("w_o", into_residual, (N, H, D)),
        attn_out_norm=out_norm("attn_out_norm"),
        mlp_norm=draw.constant("mlp_norm", 1.0, (D,)),
        w_gate=draw.normal("w_gate", 0.02, (D, F)),
        w_up=draw.normal("w_up", 0.02, (D, F)),
        w_down=draw.normal("w_down", into_residual, (F, D)),
        mlp_out_norm=out_norm("mlp_out_norm"),
    )
    embedding = draw.table("embedding", 0.02, (config.vocab_size, D))
    final_norm = jnp.ones((D,), jnp.float32, out_sharding=layout.spec("norm"))
    return TrunkV2(embedding=embedding, blocks=blocks, final_norm=final_norm, config=config)
