"""Attention: over whole sequences by the fastest kernel of the devices, over a cache in plain operations.

The kernels keep scores in on-chip memory; what they need of a mask is not an array [T, T] but, for every token, its
segment and how far it sees. Which one runs is decided in `over_sequences`, by the devices of the current mesh.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from glm_jax.layers import MASKED
from sharding.devices import mesh_platform
from sharding.layout import Layout

# where two pipelines of a program call one function, as jit makes it, the compiler of TPUs crashes (libtpu 0.0.42): a
# number of its own makes the kernel of each another
_PIPELINES = itertools.count()

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # q_BTNH, k_BSKH, v_BSKH -> BTNH


class Sight(NamedTuple):
    """What the tokens of whole sequences see: of their own segment, all columns up to `reach`."""

    segments: Int[Array, "B T"]  # 0: padding, which nobody sees
    reach: Int[Array, "B T"] | None = None  # a column, not before the token's; None: the token's

    def mask(self) -> Bool[Array, "B T T"]:
        """True where query t may see key s."""
        columns = jnp.arange(self.segments.shape[1])
        reach = columns[None] if self.reach is None else self.reach
        keys = self.segments[:, None, :]
        seen = columns <= reach[:, :, None]
        return seen & (self.segments[:, :, None] == keys) & (keys > 0)


def over_sequences(sight: Sight, layout: Layout) -> Attend:
    """Attention of whole sequences, for every layer: splash on TPUs, cuDNN's on NVIDIA GPUs, else plain operations.

    They agree at real tokens; at padding each gives something finite. cuDNN's takes 16-bit inputs and heads of a
    multiple of 8 up to 128, and JAX cannot map it over pipeline stages with a mask: the rest is left to plain
    operations.
    """
    platform = mesh_platform()
    if platform == "tpu":
        name = f"attention {next(_PIPELINES)}" if layout.ways("stage") > 1 else None
        return lambda q, k, v: splash_attention(q, k, v, sight, layout, name=name)
    mask = sight.mask()  # once, not in every layer

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        fits = q.dtype.itemsize == 2 and q.shape[-1] in range(8, 129, 8)
        if platform == "cuda" and fits and layout.ways("stage") == 1:
            return cudnn_attention(q, k, v, mask, layout, causal=sight.reach is None)
        return attention(q, k, v, mask, layout)

    return attend


def splash_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    sight: Sight,
    layout: Layout,
    interpret: bool = False,
    name: str | None = None,
) -> Float[Array, "B T N H"]:
    """`attention` under the mask of `sight` as JAX's splash kernel (Dao 2023), every device on its rows and heads.

    Where sight is causal, blocks of keys that come after all queries are left out. Rows are lengthened to a multiple
    of 128, which the kernel's blocks divide. `interpret` runs it on any device, slowly; kernels of different `name`
    share no code.
    """
    length = q_BTNH.shape[1]
    scaled = (q_BTNH.astype(jnp.float32) * q_BTNH.shape[-1] ** -0.5).astype(q_BTNH.dtype)
    inputs = (scaled, *own_groups(k_BTKH, v_BTKH, layout), *sight)
    q, k, v, segments, reach = _lengthened(inputs, 128)

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, reach: jax.Array | None
    ) -> jax.Array:
        def row(
            q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array, reach: jax.Array | None
        ) -> jax.Array:
            kernel = _splash_kernel(q.shape[0], q.shape[1], reach, interpret, name)
            out: jax.Array = kernel(q, k, v, splash.SegmentIds(segment, segment))  # type: ignore[assignment]
            return out

        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        return jnp.swapaxes(jax.vmap(row)(q, k, v, segments, reach), 1, 2)

    out = _on_every_device(attend, (q, k, v, segments, reach), layout)
    return out[:, :length]


def _splash_kernel(
    num_heads: int, length: int, reach: jax.Array | None, interpret: bool, name: str | None
) -> splash.SplashAttentionKernel:
    """The kernel for one row of a device's heads."""
    block = next(size for size in (512, 256, 128) if length % size == 0)
    # one kernel for all gradients writes as many copies of the queries' as there are blocks of keys
    fused = length <= 8192
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
    causal = splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * num_heads)
    kernel = splash.make_splash_mha_single_device(
        causal, block_sizes=blocks, interpret=interpret, residual_checkpoint_name=name
    )
    if reach is None:
        return kernel
    # the kernel compares a key's column with a number of the query: its column, or here its reach. No block is left out
    info = MaskInfo(None, None, None, None, reach)  # type: ignore[arg-type]
    every = (info, None if fused else info, info)
    return splash.SplashAttentionKernel(*every, **kernel.kwargs)


def cudnn_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    mask_BTT: Bool[Array, "B T T"],
    layout: Layout,
    causal: bool,
) -> Float[Array, "B T N H"]:
    """`attention` as cuDNN's fused kernel, every device on its rows and heads; lengths are made a multiple of 8.

    Of a `causal` mask the kernel leaves out what comes after the queries.
    """
    length = q_BTNH.shape[1]
    inputs = (q_BTNH, *own_groups(k_BTKH, v_BTKH, layout), mask_BTT)
    q, k, v, mask = _lengthened(inputs, 8)
    mask = jnp.pad(mask, [(0, 0), (0, 0), (0, q.shape[1] - length)])

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask[:, None], is_causal=causal, implementation="cudnn"
        )

    return _on_every_device(attend, (q, k, v, mask), layout)[:, :length]


def _lengthened(inputs: tuple[Any, ...], multiple: int) -> tuple[Any, ...]:
    """Arrays [B, T, ...] padded with zeros until T is a multiple; a token of padding is one of segment 0."""

    def lengthened(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))

    return tuple(jax.tree.map(lengthened, inputs))


def _on_every_device(
    attend: Callable[..., jax.Array], inputs: tuple[Any, ...], layout: Layout
) -> jax.Array:
    """`attend` of a device's rows and heads: a kernel is one to the compiler, which cannot split it."""
    heads = layout.spec("batch", "time", "heads", "head_dim")

    def spec(x: jax.Array) -> PartitionSpec:
        return heads if x.ndim == 4 else layout.spec("batch", *[None] * (x.ndim - 1))

    specs = jax.tree.map(spec, inputs)
    # the kernels do not say over which axes their results differ
    return jax.shard_map(attend, in_specs=specs, out_specs=heads, check_vma=False)(*inputs)


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
    k_BSKH, v_BSKH = own_groups(k_BSKH, v_BSKH, layout)
    num_heads, head_dim = q_BTNH.shape[-2:]
    num_groups = k_BSKH.shape[2]
    q_BTKGH = jnp.reshape(
        q_BTNH,
        (*q_BTNH.shape[:2], num_groups, num_heads // num_groups, head_dim),
        out_sharding=layout.spec("batch", "time", "heads", None, "head_dim"),
    )
    out = _attend(q_BTKGH, k_BSKH, v_BSKH, mask_BTS)
    return jnp.reshape(
        out, q_BTNH.shape, out_sharding=layout.spec("batch", "time", "heads", "head_dim")
    )


def own_groups(
    k_BSKH: Float[Array, "B S K H"], v_BSKH: Float[Array, "B S K H"], layout: Layout
) -> tuple[Float[Array, "B S C H"], Float[Array, "B S C H"]]:
    """Keys and values of which every shard of heads has those it reads: as few copies as do, where groups are few."""
    num_groups = k_BSKH.shape[2]
    number = math.lcm(num_groups, layout.ways("kv_heads"))  # which divides the heads, as both do
    if number == num_groups:
        return k_BSKH, v_BSKH
    index = jnp.arange(number) // (number // num_groups)
    spread = layout.spec("batch", None, "kv_heads", None)
    k, v = (x.at[:, :, index].get(out_sharding=spread) for x in (k_BSKH, v_BSKH))
    return k, v


@jax.custom_vjp
def _attend(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T K G H"]:
    """softmax(q k / sqrt(H)) v; nothing [T, S] waits for the backward pass, which makes it again (Dao et al. 2022).

    Products are of [rows, columns] with B and K before them, which is the order XLA's CPU backend multiplies in, and
    what softmax divides by is divided out of [T, H], not of [T, S].
    """
    return _attend_forward(q, k, v, mask)[0]


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    q, k, v = jnp.moveaxis(q, 1, 3), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    scores = _scores(q, k, mask)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v)
    out = (out / total).astype(v.dtype)
    return jnp.moveaxis(out, 3, 1), (q, k, v, mask, out, highest, total)


def _attend_backward(
    saved: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, mask, out, highest, total = saved
    scale = q.shape[-1] ** 0.5
    weights = jnp.exp(_scores(q, k, mask) - highest)  # times 1 / total, which d_out carries
    d_out = (jnp.moveaxis(d_out, 1, 3) / total).astype(v.dtype)
    d_weights = jnp.einsum("BKGTH,BKSH->BKGTS", d_out, v).astype(jnp.float32)
    # the sum of weights * d_weights over S, which softmax's derivative subtracts
    mean = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)
    d_scores = jnp.where(mask[:, None, None], weights * (d_weights - mean), 0.0).astype(q.dtype)
    d_q = jnp.moveaxis(jnp.einsum("BKGTS,BKSH->BKGTH", d_scores, k), 3, 1) / scale
    d_k = jnp.einsum("BKGTS,BKGTH->BSKH", d_scores, q) / scale
    d_v = jnp.einsum("BKGTS,BKGTH->BSKH", weights.astype(v.dtype), d_out)
    return d_q, d_k, d_v, None


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """q k / sqrt(H) where the mask allows: float32 [B,K,G,T,S]."""
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k).astype(jnp.float32) / q.shape[-1] ** 0.5
    return jnp.where(mask[:, None, None], scores, MASKED)


_attend.defvjp(_attend_forward, _attend_backward)
