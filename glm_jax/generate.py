"""Sampling with a KV cache: one prefill, then one token a step until every row has stopped."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from glm_jax.batch import Prompts, Sequences
from glm_jax.model import Cache, CausalLM, apply_cached, apply_head, empty_cache, positions_of
from sharding.layout import Layout


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How answers are drawn."""

    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 takes the most probable token

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0.0


class Generation(NamedTuple):
    """Prompts with their answers, P + R columns."""

    sequences: Sequences  # target marks the answer, its stop token included
    logp: Float[
        Array, "B T"
    ]  # of the answer's tokens as sampled (at the sampling temperature), 0 elsewhere
    ended: Bool[Array, " B"]  # False where the answer was cut off at max_new_tokens


class _Decoding(NamedTuple):
    """Loop state: R answer columns, of which the first `decided` are known."""

    decided: Array  # int32 scalar
    ids: Array  # int32 [B, R]
    logp: Array  # float32 [B, R]
    mask: Array  # bool [B, R]
    done: Array  # bool [B]
    logits: Array  # float32 [B, V], of the next token
    cache: Cache


def generate(
    model: CausalLM,
    prompts: Prompts,
    key: jax.Array,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    layout: Layout,
) -> Generation:
    """Draw one answer a prompt; a row stops at any of `stop_ids`. The layout must have no pipeline stages.

    Row b draws from its own stream, key folded with b and then with the token's number, so that an answer does not
    depend on the layout or on its neighbours.
    """
    config = model.trunk.config
    batch, prompt_length = prompts.ids.shape
    total = prompt_length + sampling.max_new_tokens
    row = layout.spec("batch")
    grid = layout.spec("batch", None)
    visible = jnp.pad(prompts.valid, ((0, 0), (0, sampling.max_new_tokens)), constant_values=True)
    lengths = jnp.sum(prompts.valid, axis=1)
    row_index = jax.sharding.reshard(jnp.arange(batch), row)
    row_keys = jax.vmap(lambda b: jax.random.fold_in(key, b))(row_index)
    stops = jnp.array(stop_ids, jnp.int32)

    def next_logits(hidden: jax.Array) -> jax.Array:
        logits = apply_head(model, hidden[:, -1:], layout)
        return jax.sharding.reshard(logits[:, 0], grid)

    def step(state: _Decoding) -> _Decoding:
        scaled = state.logits if sampling.greedy else state.logits / sampling.temperature
        if sampling.greedy:
            chosen = jnp.argmax(scaled, axis=-1)
        else:
            keys = jax.vmap(lambda k: jax.random.fold_in(k, state.decided))(row_keys)
            chosen = jax.vmap(jax.random.categorical)(keys, scaled)
        token = jnp.where(state.done, 0, chosen).astype(jnp.int32)
        hit = token[:, None] == jnp.arange(scaled.shape[-1])
        logp = jnp.sum(jnp.where(hit, jax.nn.log_softmax(scaled, axis=-1), 0.0), axis=-1)

        def write(buffer: jax.Array, column: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(
                buffer, column[:, None], state.decided, axis=1
            )

        hidden, cache = apply_cached(
            model.trunk,
            token[:, None],
            (lengths + state.decided)[:, None],
            visible,
            state.cache,
            layout,
        )
        return _Decoding(
            decided=state.decided + 1,
            ids=write(state.ids, token),
            logp=write(state.logp, jnp.where(state.done, 0.0, logp)),
            mask=write(state.mask, ~state.done),
            done=state.done | jnp.any(token[:, None] == stops, axis=1),
            logits=next_logits(hidden),
            cache=cache,
        )

    def unfinished(state: _Decoding) -> jax.Array:
        return (state.decided < sampling.max_new_tokens) & ~jnp.all(state.done)

    cache = empty_cache(config, batch, total, layout)
    hidden, cache = apply_cached(
        model.trunk, prompts.ids, positions_of(prompts.valid), visible, cache, layout
    )
    shape = (batch, sampling.max_new_tokens)
    start = _Decoding(
        decided=jnp.int32(0),
        ids=jnp.zeros(shape, jnp.int32, out_sharding=grid),
        logp=jnp.zeros(shape, jnp.float32, out_sharding=grid),
        mask=jnp.zeros(shape, bool, out_sharding=grid),
        done=jnp.zeros((batch,), bool, out_sharding=row),
        logits=next_logits(hidden),
        cache=cache,
    )
    end = jax.lax.while_loop(unfinished, step, start)
    blank = jnp.zeros_like(prompts.valid)
    sequences = Sequences(
        ids=jnp.concatenate([prompts.ids, end.ids], axis=1),
        valid=jnp.concatenate([prompts.valid, end.mask], axis=1),
        target=jnp.concatenate([blank, end.mask], axis=1),
    )
    logp = jnp.concatenate([blank.astype(jnp.float32), end.logp], axis=1)
    return Generation(sequences, logp, end.done)
