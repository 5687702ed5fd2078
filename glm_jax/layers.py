"""Pure functions on arrays: norms, rotary embeddings, projections to heads and back, MLPs.

One alphabet: B batch, T query positions, S key positions, D width, N heads, K kv groups, G = N / K, H head
width, F ffn width, R rotary frequencies (rotated dimensions / 2).
"""

from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sharding.layout import Layout
from sharding.remat import kept

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


class Rotation(NamedTuple):
    """By how much tokens are rotated, the same in every layer: made once, since a cosine costs many products."""

    cos: Float[Array, "B T R"]
    sin: Float[Array, "B T R"]


def rotation(positions: Float[Array, "B T"], frequencies: np.ndarray) -> Rotation:
    """The rotation at these positions by `frequencies` [R], in radians a position."""
    angles = positions[..., None] * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Rotate the interleaved pairs (2j, 2j + 1) of the first half of every head; the second half passes."""
    half = x.shape[-1] // 2
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]
    even = x[..., 0:half:2].astype(jnp.float32)
    odd = x[..., 1:half:2].astype(jnp.float32)
    pairs = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    rotated = pairs.reshape(*x.shape[:-1], half).astype(x.dtype)
    return jnp.concatenate([rotated, x[..., half:]], axis=-1)


def rotate_halves(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Rotate the pairs (j, j + H / 2) of every head."""
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return rotated.astype(x.dtype)


def to_heads(
    x: Float[Array, "B T D"], w: Float[Array, "D N H"], heads: str | None, layout: Layout
) -> Float[Array, "B T N H"]:
    """x W for every head, `heads` the logical axis of N; on rows, as in `gated_mlp`."""

    @remade
    def project(x: jax.Array, w: jax.Array) -> jax.Array:
        rows = jnp.reshape(x, (-1, x.shape[-1]), out_sharding=layout.spec("batch", "embed"))
        matrix = jnp.reshape(w, (w.shape[0], -1))
        y = jnp.einsum("RD,DM->RM", rows, matrix, out_sharding=layout.spec("batch", heads))
        spec = layout.spec("batch", "time", heads, "head_dim")
        return jnp.reshape(y, (*x.shape[:2], *w.shape[1:]), out_sharding=spec)

    return project(x, w)


def from_heads(
    x: Float[Array, "B T N H"], w: Float[Array, "N H D"], layout: Layout
) -> Float[Array, "B T D"]:
    """The sum of x W over heads; on rows, as in `gated_mlp`."""

    @remade
    def project(x: jax.Array, w: jax.Array) -> jax.Array:
        matrix = jnp.reshape(w, (-1, w.shape[-1]))
        flat = layout.spec("batch", "heads")
        rows = jnp.reshape(x, (-1, matrix.shape[0]), out_sharding=flat)
        out = jnp.einsum("RM,MD->RD", rows, matrix, out_sharding=layout.spec("batch", "embed"))
        spec = layout.spec("batch", "time", "embed")
        return jnp.reshape(out, (*x.shape[:2], out.shape[-1]), out_sharding=spec)

    return project(x, w)


def residual_axes(length: int, layout: Layout) -> tuple[str, str, str]:
    """Logical axes of what passes from one branch of a layer to the next, [B, length, D].

    Split over tokens too where they divide (sequence parallelism, Korthikanti et al. 2022, section 4.2.2): a branch
    then begins with a gather and ends with a scattered sum, which together send what one sum for all would; the gather
    is made again for the gradient where `remat` asks for it. In a pipeline the compiler of TPUs scatters no sum.
    """
    tokens = "time" if length % layout.ways("sequence") else "sequence"
    return "batch", tokens, "embed"


def spread(x: Float[Array, "B T D"], layout: Layout) -> Float[Array, "B T D"]:
    """`x`, which a branch gives, as `residual_axes` says."""
    if layout.ways("sequence") == 1:
        return x
    return jax.sharding.reshard(x, layout.spec(*residual_axes(x.shape[1], layout)))


def gathered(x: Float[Array, "B T D"], layout: Layout) -> Float[Array, "B T D"]:
    """`x`, which a branch takes, with all tokens of its rows."""
    if layout.ways("sequence") == 1:
        return x
    return jax.sharding.reshard(x, layout.spec("batch", "time", "embed"))


def summed(x: Float[Array, "B T D"], layout: Layout) -> Float[Array, "B T D"]:
    """`x`, which holds a sum over heads: to make it again where they are split is to wait for other devices."""
    return kept(x) if layout.ways("heads") > 1 else x


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
