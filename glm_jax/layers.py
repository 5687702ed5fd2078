"""Pure functions on arrays: norms, rotary embeddings, attention, MLPs.

One alphabet: B batch, T query positions, S key positions, D width, N heads, K kv groups, G = N / K, H head
width, F ffn width, R rotary frequencies (rotated dimensions / 2).
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sharding.layout import Layout

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

MASKED = (
    -1e30
)  # finite, so that a row with nothing to attend to stays finite; such rows are padding


def remade(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function`, of which only the inputs wait for the backward pass.

    For elementwise work, whatever the layout's remat: to make it again is cheaper than to move it through memory. A
    product at the end costs nothing twice, since no gradient asks for its result.
    """
    made: Callable[Arguments, Result] = jax.checkpoint(function, prevent_cse=False)
    return made


def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) * scale, in float32 and only then cast (Zhang & Sennrich 2019; ChatGLM2's order)."""

    @remade
    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
        return (normed * scale).astype(x.dtype)

    return norm(x, scale)


def layer_norm(
    x: Float[Array, "... D"], scale: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
    """(x - mean) / sqrt(variance + eps) * scale + bias, in float32 and only then cast (Ba et al. 2016)."""

    @remade
    def norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
        return (normed * scale + bias).astype(x.dtype)

    return norm(x, scale, bias)


def rotary_frequencies(width: int, theta: float) -> np.ndarray:
    """Radians per position of the width / 2 rotated pairs: 1 / theta^(2j / width) (Su et al. 2021). float32 [R]."""
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return 1.0 / np.float32(theta) ** exponents


def rotary_angles(
    positions: Float[Array, "B T"], width: int, theta: float
) -> Float[Array, "B T R"]:
    """Angles in radians of `width` rotated dimensions."""
    return positions[..., None] * rotary_frequencies(width, theta)


def rotate(x: Float[Array, "B T N H"], angles: Float[Array, "B T R"]) -> Float[Array, "B T N H"]:
    """Rotate the interleaved pairs (2j, 2j + 1) of the first half of every head; the second half passes."""
    half = x.shape[-1] // 2
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    even = x[..., 0:half:2].astype(jnp.float32)
    odd = x[..., 1:half:2].astype(jnp.float32)
    pairs = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    rotated = pairs.reshape(*x.shape[:-1], half).astype(x.dtype)
    return jnp.concatenate([rotated, x[..., half:]], axis=-1)


def rotate_halves(
    x: Float[Array, "B T N H"], angles: Float[Array, "B T R"]
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (j, j + H / 2) of every head."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return rotated.astype(x.dtype)


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
    layout: Layout,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention: head n reads kv group n // G (Ainslie et al. 2023). Softmax in float32.

    mask: True where query t may see key s. A row that sees nothing returns the mean of the values.
    """
    num_heads, head_dim = q_BTNH.shape[-2:]
    num_groups = k_BSKH.shape[2]
    if num_groups % layout.ways(
        "kv_heads"
    ):  # fewer groups than shards: every head gets its own copy
        index = jnp.arange(num_heads) // (num_heads // num_groups)
        spread = layout.spec("batch", None, "heads", None)
        k_BSKH = k_BSKH.at[:, :, index].get(out_sharding=spread)
        v_BSKH = v_BSKH.at[:, :, index].get(out_sharding=spread)
        num_groups = num_heads
    spec = layout.spec("batch", "time", "heads", None, "head_dim")
    q_BTKGH = jnp.reshape(
        q_BTNH,
        (*q_BTNH.shape[:2], num_groups, num_heads // num_groups, head_dim),
        out_sharding=spec,
    )
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH).astype(jnp.float32) / head_dim**0.5
    scores = jnp.where(mask_BTS[:, None, None], scores, MASKED)
    weights_BKGTS = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return jnp.reshape(
        out, q_BTNH.shape, out_sharding=layout.spec("batch", "time", "heads", "head_dim")
    )


def gated_mlp(
    x: Float[Array, "B T D"],
    w_gate: Float[Array, "D F"],
    w_up: Float[Array, "D F"],
    w_down: Float[Array, "F D"],
    layout: Layout,
) -> Float[Array, "B T D"]:
    """SwiGLU: (silu(x W_gate) * (x W_up)) W_down (Shazeer 2020).

    On rows [B T, D]: of products with [B, T, D], XLA's CPU backend copies both operands transposed for every weight
    gradient, which takes half of an update's time.
    """
    rows = jnp.reshape(x, (-1, x.shape[-1]), out_sharding=layout.spec("batch", "embed"))
    inner = layout.spec("batch", "ffn")
    gate = jnp.einsum("RD,DF->RF", rows, w_gate, out_sharding=inner)
    up = jnp.einsum("RD,DF->RF", rows, w_up, out_sharding=inner)

    @remade
    def down(gate: jax.Array, up: jax.Array, w: jax.Array) -> jax.Array:
        hidden = jax.nn.silu(gate) * up
        return jnp.einsum("RF,FD->RD", hidden, w, out_sharding=layout.spec("batch", "embed"))

    out = down(gate, up, w_down)
    return jnp.reshape(out, x.shape, out_sharding=layout.spec("batch", "time", "embed"))


def mlp(
    x: Float[Array, "B T D"],
    w_in: Float[Array, "D F"],
    b_in: Float[Array, " F"],
    w_out: Float[Array, "F D"],
    b_out: Float[Array, " D"],
    layout: Layout,
) -> Float[Array, "B T D"]:
    """gelu(x W_in + b_in) W_out + b_out, with the tanh form of GELU (Hendrycks & Gimpel 2016). On rows, as above."""
    rows = jnp.reshape(x, (-1, x.shape[-1]), out_sharding=layout.spec("batch", "embed"))
    inner = jnp.einsum("RD,DF->RF", rows, w_in, out_sharding=layout.spec("batch", "ffn"))

    @remade
    def down(inner: jax.Array, b: jax.Array, w: jax.Array) -> jax.Array:
        hidden = jax.nn.gelu(inner + b, approximate=True)
        return jnp.einsum("RF,FD->RD", hidden, w, out_sharding=layout.spec("batch", "embed"))

    out = down(inner, b_in, w_out)
    return jnp.reshape(out + b_out, x.shape, out_sharding=layout.spec("batch", "time", "embed"))
