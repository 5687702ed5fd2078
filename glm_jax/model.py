"""ChatGLM3: grouped-query attention, half rotary, RMSNorm, SwiGLU, bias on queries, keys and values.

A model is a Flax module that only holds arrays, hence the pytree of its parameters; the functions below apply it.
The layers are stacked [stage, layer, ...]: a scan runs the layers of a stage, `sharding.pipeline` the stages.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from glm_jax.config import GLMConfig
from glm_jax.layers import attention, gated_mlp, rms_norm, rotary_angles, rotate
from sharding.layout import Layout
from sharding.pipeline import layer_slots, run_stages


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
    mlp_norm: jax.Array = nnx.data()  # D
    w_gate: jax.Array = nnx.data()  # D F
    w_up: jax.Array = nnx.data()  # D F
    w_down: jax.Array = nnx.data()  # F D


@nnx.dataclass
class Trunk(nnx.Module):
    """Everything below a head: embedding, layers, final norm."""

    embedding: jax.Array = nnx.data()  # V D
    blocks: Block = nnx.data()
    final_norm: jax.Array = nnx.data()  # D
    config: GLMConfig = nnx.static()


@nnx.dataclass
class CausalLM(nnx.Module):
    """A trunk with an untied language-model head."""

    trunk: Trunk = nnx.data()
    w_head: jax.Array = nnx.data()  # D V


class Cache(NamedTuple):
    """Keys and values of every layer, [layer, B, S, K, H], of which the first `length` columns are filled."""

    keys: Float[Array, "layer B S K H"]
    values: Float[Array, "layer B S K H"]
    length: Int[Array, ""]


def _kv_axis(config: GLMConfig, layout: Layout) -> str | None:
    # fewer groups than tensor shards: keep them whole on every shard, `attention` hands out copies
    return "kv_heads" if config.num_kv_groups % layout.ways("kv_heads") == 0 else None


def init_trunk(config: GLMConfig, layout: Layout, key: jax.Array) -> Trunk:
    """Random float32 weights, born with their sharding: N(0, 0.02), output projections / sqrt(2 * layers).

    The values depend on `key` alone, not on the layout. Raises UserError where the layout does not divide the model.
    """
    config.check(layout)
    D, N, K, H, F = (
        config.hidden_size,
        config.num_heads,
        config.num_kv_groups,
        config.head_dim,
        config.ffn_size,
    )
    keys = iter(jax.random.split(key, 8))
    stack = layer_slots(config.num_layers, layout).shape
    kv = _kv_axis(config, layout)
    into_residual = 0.02 / (2 * config.num_layers) ** 0.5

    def normal(std: float, shape: tuple[int, ...], *logical: str | None) -> jax.Array:
        # drawn [layer, ...] and then cut into stages, so that every layout draws the same numbers
        drawn = layout.spec("stage", *logical)
        flat = jax.random.normal(next(keys), (config.num_layers, *shape), out_sharding=drawn)
        spec = layout.spec("stage", "layer", *logical)
        return std * jnp.reshape(flat, (*stack, *shape), out_sharding=spec)

    def constant(value: float, shape: tuple[int, ...], *logical: str | None) -> jax.Array:
        spec = layout.spec("stage", "layer", *logical)
        return jnp.full((*stack, *shape), value, jnp.float32, out_sharding=spec)

    def bias(heads: int, axis: str | None) -> jax.Array | None:
        return constant(0.0, (heads, H), axis, "head_dim") if config.qkv_bias else None

    blocks = Block(
        attn_norm=constant(1.0, (D,), "norm"),
        w_q=normal(0.02, (D, N, H), "embed_weight", "heads", "head_dim"),
        w_k=normal(0.02, (D, K, H), "embed_weight", kv, "head_dim"),
        w_v=normal(0.02, (D, K, H), "embed_weight", kv, "head_dim"),
        b_q=bias(N, "heads"),
        b_k=bias(K, kv),
        b_v=bias(K, kv),
        w_o=normal(into_residual, (N, H, D), "heads", "head_dim", "embed_weight"),
        mlp_norm=constant(1.0, (D,), "norm"),
        w_gate=normal(0.02, (D, F), "embed_weight", "ffn"),
        w_up=normal(0.02, (D, F), "embed_weight", "ffn"),
        w_down=normal(into_residual, (F, D), "ffn", "embed_weight"),
    )
    table = layout.spec("vocab", "embed_weight")
    embedding = 0.02 * jax.random.normal(next(keys), (config.vocab_size, D), out_sharding=table)
    final_norm = jnp.ones((D,), jnp.float32, out_sharding=layout.spec("norm"))
    return Trunk(embedding=embedding, blocks=blocks, final_norm=final_norm, config=config)


def init_model(config: GLMConfig, layout: Layout, key: jax.Array) -> CausalLM:
    """A CausalLM with random float32 weights; call under jax.jit with the layout's mesh set."""
    trunk_key, head_key = jax.random.split(key)
    spec = layout.spec("embed_weight", "vocab")
    w_head = 0.02 * jax.random.normal(
        head_key, (config.hidden_size, config.vocab_size), out_sharding=spec
    )
    return CausalLM(trunk=init_trunk(config, layout, trunk_key), w_head=w_head)


def positions_of(valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that count real tokens from 0, whichever side the padding stands on."""
    return jnp.maximum(jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1, 0)


def embed(trunk: Trunk, ids: Int[Array, "B T"], layout: Layout) -> Float[Array, "B T D"]:
    """Rows of the embedding table, in the compute dtype."""
    rows = trunk.embedding.at[ids].get(out_sharding=layout.spec("batch", "time", "embed"))
    return rows.astype(trunk.config.compute_dtype)


def _projections(
    block: Block, x: jax.Array, angles: jax.Array, config: GLMConfig, layout: Layout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B,T,N,H] and keys (both rotated) and values [B,T,K,H] of normalised activations."""
    kv = _kv_axis(config, layout)

    def project(w: jax.Array, b: jax.Array | None, heads: str | None) -> jax.Array:
        spec = layout.spec("batch", "time", heads, "head_dim")
        y = jnp.einsum("BTD,DNH->BTNH", x, w, out_sharding=spec)
        return y if b is None else y + b

    q = rotate(project(block.w_q, block.b_q, "heads"), angles)
    k = rotate(project(block.w_k, block.b_k, kv), angles)
    return q, k, project(block.w_v, block.b_v, kv)


def _finish_block(
    block: Block, x: jax.Array, heads_BTNH: jax.Array, config: GLMConfig, layout: Layout
) -> jax.Array:
    """What follows attention: output projection, residual, gated MLP, residual."""
    spec = layout.spec("batch", "time", "embed")
    x = x + jnp.einsum("BTNH,NHD->BTD", heads_BTNH, block.w_o, out_sharding=spec)
    normed = rms_norm(x, block.mlp_norm, config.norm_eps)
    return x + gated_mlp(normed, block.w_gate, block.w_up, block.w_down, layout)


def _compute_cast(blocks: Block, config: GLMConfig) -> Block:
    # the one place where weights leave float32; norm scales stay, rms_norm multiplies in float32
    def cast(path: tuple[jax.tree_util.KeyEntry, ...], w: jax.Array) -> jax.Array:
        return w if "norm" in jax.tree_util.keystr(path) else w.astype(config.compute_dtype)

    return jax.tree_util.tree_map_with_path(cast, blocks)


def apply_trunk(
    trunk: Trunk, ids: Int[Array, "B T"], valid: Bool[Array, "B T"], layout: Layout
) -> Float[Array, "B T D"]:
    """Hidden states after the final norm, of whole sequences under a causal mask.

    Padding may stand on either side; what comes out at padding means nothing.
    """
    config = trunk.config

    def stage(blocks: Block, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, positions = state
        angles = rotary_angles(positions, config.head_dim, config.rope_ratio)
        length = positions.shape[1]
        mask = jnp.tril(jnp.ones((length, length), bool)) & (positions >= 0)[:, None, :]

        def layer(x: jax.Array, block: Block) -> tuple[jax.Array, None]:
            normed = rms_norm(x, block.attn_norm, config.norm_eps)
            q, k, v = _projections(block, normed, angles, config, layout)
            return _finish_block(block, x, attention(q, k, v, mask, layout), config, layout), None

        return jax.lax.scan(layer, x, blocks)[0], positions

    # one integer array tells a stage both where a token stands and that it is padding
    state = (embed(trunk, ids, layout), jnp.where(valid, positions_of(valid), -1))
    x, _ = run_stages(stage, _compute_cast(trunk.blocks, config), state, layout)
    return rms_norm(x, trunk.final_norm, config.norm_eps)


def apply_head(
    model: CausalLM, hidden: Float[Array, "B T D"], layout: Layout
) -> Float[Array, "B T V"]:
    """float32 logits, split over "vocab" as the layout says."""
    weights = model.w_head.astype(hidden.dtype)
    rows = jnp.reshape(hidden, (-1, hidden.shape[-1]), out_sharding=layout.spec("batch", "embed"))
    logits = jnp.einsum("RD,DV->RV", rows, weights, out_sharding=layout.spec("batch", "vocab"))
    shape = (*hidden.shape[:2], logits.shape[-1])
    spec = layout.spec("batch", "time", "vocab")
    return jnp.reshape(logits, shape, out_sharding=spec).astype(jnp.float32)


def apply_model(
    model: CausalLM, ids: Int[Array, "B T"], valid: Bool[Array, "B T"], layout: Layout
) -> Float[Array, "B T V"]:
    """float32 logits of the next token at every position of whole sequences."""
    return apply_head(model, apply_trunk(model.trunk, ids, valid, layout), layout)


def empty_cache(config: GLMConfig, batch: int, length: int, layout: Layout) -> Cache:
    """A cache of zeros for `length` columns. The layout must not have pipeline stages."""
    shape = (config.num_layers, batch, length, config.num_kv_groups, config.head_dim)
    spec = layout.spec("layer", "batch", None, _kv_axis(config, layout), "head_dim")
    zeros = jnp.zeros(shape, config.compute_dtype, out_sharding=spec)
    return Cache(keys=zeros, values=zeros, length=jnp.int32(0))


def apply_cached(
    trunk: Trunk,
    ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    visible: Bool[Array, "B S"],
    cache: Cache,
    layout: Layout,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden states of T further tokens, and the cache with them appended.

    `visible` says which columns of the cache hold real tokens, those now written included. The layout must not
    have pipeline stages (`Layout.for_generation`).
    """
    config = trunk.config
    angles = rotary_angles(positions, config.head_dim, config.rope_ratio)
    columns = jnp.arange(visible.shape[1])
    rows = cache.length + jnp.arange(ids.shape[1])
    mask = (columns[None, :] <= rows[:, None]) & visible[:, None, :]

    def layer(
        x: jax.Array, block_and_cache: tuple[Block, jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        block, keys, values = block_and_cache
        normed = rms_norm(x, block.attn_norm, config.norm_eps)
        q, k, v = _projections(block, normed, angles, config, layout)
        keys = jax.lax.dynamic_update_slice_in_dim(keys, k, cache.length, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(values, v, cache.length, axis=1)
        x = _finish_block(block, x, attention(q, keys, values, mask, layout), config, layout)
        return x, (keys, values)

    blocks = jax.tree.map(lambda w: w[0], _compute_cast(trunk.blocks, config))
    x, (keys, values) = jax.lax.scan(
        layer, embed(trunk, ids, layout), (blocks, cache.keys, cache.values)
    )
    hidden = rms_norm(x, trunk.final_norm, config.norm_eps)
    return hidden, Cache(keys, values, cache.length + ids.shape[1])


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
