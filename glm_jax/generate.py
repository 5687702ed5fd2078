"""Sampling with a KV cache: one prefill, then one token a step until every row has stopped."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from glm_jax.batch import Prompts, Sequences
from glm_jax.layers import MASKED
from glm_jax.loss import Support
from glm_jax.model import CausalLM, apply_head, cast_weights
from glm_jax.trunk import Cache
from sharding.errors import UserError
from sharding.layout import Layout


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How answers are drawn."""

    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 takes the most probable token
    top_k: int = 0  # draw from the k most probable tokens; 0: from all
    top_p: float = 1.0  # draw from the most probable tokens that together reach this probability

    def __post_init__(self) -> None:
        for name, fits in (
            ("max_new_tokens", self.max_new_tokens >= 1),
            ("temperature", self.temperature >= 0.0),
            ("top_k", self.top_k >= 0),
            ("top_p", 0.0 < self.top_p <= 1.0),
        ):
            if not fits:
                raise UserError(f"sampling.{name} = {getattr(self, name)} is out of range")

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from a part of the vocabulary."""
        return bool(self.top_k) or self.top_p < 1.0

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0.0


def warp(logits: Float[Array, "*B V"], sampling: SamplingConfig) -> Float[Array, "*B V"]:
    """Logits of the distribution that answers are drawn from: temperature, then top-k, then top-p.

    What is cut off becomes -inf. Ties with the last token kept are kept too. Greedy sampling changes nothing.
    """
    if sampling.greedy:
        return logits
    scaled = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < scaled.shape[-1]:
        least = jax.lax.top_k(scaled, sampling.top_k)[0][..., -1:]
        scaled = jnp.where(scaled < least, -jnp.inf, scaled)
    if sampling.top_p < 1.0:
        ordered = -jnp.sort(-scaled, axis=-1)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # the first token always stays
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1)
        scaled = jnp.where(scaled < least[..., None], -jnp.inf, scaled)
    return scaled


def support_of(
    logits: Float[Array, "B T V"], ids: Int[Array, "B T"], sampling: SamplingConfig, layout: Layout
) -> Support:
    """Which tokens could be drawn at every position of `ids`, split like the logits; None where all could.

    `logits` are those of the model that drew. A token that stands there is in, whatever rounding says: at the edge of
    the nucleus another program may put it out.
    """
    if not sampling.truncates:
        return None
    whole = jax.sharding.reshard(logits, layout.spec("batch", "time", None))
    following = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
    stands = following[..., None] == jnp.arange(logits.shape[-1])
    kept = (warp(whole, sampling) > MASKED) | stands
    return jax.sharding.reshard(kept, jax.typeof(logits).sharding.spec)


def draw(
    logits: Float[Array, "B V"],
    row_keys: jax.Array,
    number: Int[Array, " B"],
    sampling: SamplingConfig,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Token `number` of every row's answer from the row's own random stream, and its log-probability in nats.

    Both are of the distribution that `warp` makes of the logits.
    """
    warped = warp(logits, sampling)
    noisy = warped
    if not sampling.greedy:  # the largest of log p + Gumbel noise is a draw from p
        keys = jax.vmap(jax.random.fold_in)(row_keys, number)
        # of 64 bits: noise of 23, JAX's default, is at most 16, so that no token below e^-16 would be drawn
        noise = partial(jax.random.gumbel, shape=warped.shape[1:], mode="highest")
        noisy += jax.vmap(noise)(keys)
    token = _first_largest(noisy)
    hit = token[:, None] == jnp.arange(warped.shape[-1])
    logp = jnp.sum(jnp.where(hit, jax.nn.log_softmax(warped, axis=-1), 0.0), axis=-1)
    return token.astype(jnp.int32), logp


def _first_largest(x: Float[Array, "B V"]) -> Int[Array, " B"]:
    """`argmax` of every row by simple reductions, of which XLA makes faster programs; V - 1 for a row with NaN."""
    x = jax.lax.optimization_barrier(x)  # both uses are of the same bits
    index, last = jnp.arange(x.shape[-1]), x.shape[-1] - 1
    return jnp.min(jnp.where(x == jnp.max(x, axis=-1, keepdims=True), index, last), axis=-1)


class Generation(NamedTuple):
    """Prompts with their answers, P + R columns; on the host or on the mesh."""

    sequences: Sequences  # target marks the answer, its stop token included
    # float32 [B, T], of the answer's tokens in the distribution they were drawn from (`warp`), 0 elsewhere
    logp: Any
    ended: Any  # bool [B], False where the answer was cut off at max_new_tokens


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
    seeds: Int[Array, "B samples"],
    key: jax.Array,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    layout: Layout,
) -> Generation:
    """Draw one answer a prompt and seed, all of the first prompt before those of the next.

    A row stops at any of `stop_ids`. The layout must be as `Layout.for_generation` gives it. An answer has its own
    random stream, the key folded with the seed and then with the token's number, so that it does not depend on the
    layout or on its neighbours.
    """
    batch, samples = seeds.shape
    row = layout.spec("batch")
    grid = layout.spec("batch", None)
    seeds = jnp.reshape(seeds, -1, out_sharding=row)
    keys = row_keys(key, seeds)
    stops = jnp.array(stop_ids, jnp.int32)
    width = prompts.ids.shape[1]

    def step(state: _Decoding) -> _Decoding:
        number = jnp.full_like(seeds, state.decided)
        token, logp = draw(state.logits, keys, number, sampling)
        token = jnp.where(state.done, 0, token)

        def write(buffer: jax.Array, column: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(
                buffer, column[:, None], state.decided, axis=1
            )

        column = width + state.decided
        hidden, cache = model.trunk.decode(token, state.cache, column, layout)
        return _Decoding(
            decided=state.decided + 1,
            ids=write(state.ids, token),
            logp=write(state.logp, jnp.where(state.done, 0.0, logp)),
            mask=write(state.mask, ~state.done),
            done=state.done | jnp.any(token[:, None] == stops, axis=1),
            logits=next_logits(model, hidden, layout),
            cache=cache,
        )

    def unfinished(state: _Decoding) -> jax.Array:
        return (state.decided < sampling.max_new_tokens) & ~jnp.all(state.done)

    model = cast_weights(model)
    hidden, cache = model.trunk.prefill(prompts.ids, prompts.valid, sampling.max_new_tokens, layout)
    logits = next_logits(model, hidden[:, -1], layout)
    repeat = partial(_repeated, times=samples)
    shape = (batch * samples, sampling.max_new_tokens)
    start = _Decoding(
        decided=jnp.int32(0),
        ids=jnp.zeros(shape, jnp.int32, out_sharding=grid),
        logp=jnp.zeros(shape, jnp.float32, out_sharding=grid),
        mask=jnp.zeros(shape, bool, out_sharding=grid),
        done=jnp.zeros(shape[:1], bool, out_sharding=row),
        logits=repeat(logits),
        cache=Cache(
            keys=repeat(cache.keys, axis=1),
            values=repeat(cache.values, axis=1),
            real=repeat(cache.real),
            position=repeat(cache.position),
        ),
    )
    end = jax.lax.while_loop(unfinished, step, start)
    ids, valid = repeat(prompts.ids), repeat(prompts.valid)
    blank = jnp.zeros_like(valid)
    sequences = Sequences(
        ids=jnp.concatenate([ids, end.ids], axis=1),
        valid=jnp.concatenate([valid, end.mask], axis=1),
        target=jnp.concatenate([blank, end.mask], axis=1),
    )
    logp = jnp.concatenate([blank.astype(jnp.float32), end.logp], axis=1)
    return Generation(sequences, logp, end.done)


def _repeated(x: jax.Array, times: int, axis: int = 0) -> jax.Array:
    """Every entry of the batch axis `times` times in a row, on the device where it is."""
    shape = (*x.shape[: axis + 1], times, *x.shape[axis + 1 :])
    wide = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape)
    rows = (*x.shape[:axis], x.shape[axis] * times, *x.shape[axis + 1 :])
    return jnp.reshape(wide, rows, out_sharding=jax.typeof(x).sharding)


def stream(
    model: CausalLM,
    prompt: Sequence[int],
    key: jax.Array,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    layout: Layout,
) -> Iterator[int]:
    """The tokens of one answer as they are drawn, the stop token included: those of `generate`.

    Prompts are left-padded to a power of two, so that few lengths are ever compiled. The layout must have no
    pipeline stages.
    """
    width = 1 << max(5, (len(prompt) - 1).bit_length())
    ids = np.zeros((layout.ways("batch"), width), np.int32)
    real = np.zeros(ids.shape, bool)
    ids[:, width - len(prompt) :] = prompt
    real[:, width - len(prompt) :] = True
    ids, real, seeds = layout.put((ids, real, np.arange(len(ids), dtype=np.int32)))
    logits, cache = _prefill(model, ids, real, sampling.max_new_tokens, layout)
    for decided in range(sampling.max_new_tokens):
        drawn, logits, cache = _decode(
            model, logits, cache, seeds, key, jnp.int32(decided), width, sampling, layout
        )
        token = int(drawn[0])
        yield token
        if token in stop_ids:
            return


@partial(jax.jit, static_argnames=("room", "layout"))
def _prefill(
    model: CausalLM, ids: jax.Array, real: jax.Array, room: int, layout: Layout
) -> tuple[jax.Array, Cache]:
    hidden, cache = model.trunk.prefill(ids, real, room, layout)
    return next_logits(model, hidden[:, -1], layout), cache


@partial(jax.jit, static_argnames=("width", "sampling", "layout"), donate_argnames="cache")
def _decode(
    model: CausalLM,
    logits: jax.Array,
    cache: Cache,
    seeds: jax.Array,
    key: jax.Array,
    decided: jax.Array,
    width: int,
    sampling: SamplingConfig,
    layout: Layout,
) -> tuple[jax.Array, jax.Array, Cache]:
    number = jnp.full_like(seeds, decided)
    token, _ = draw(logits, row_keys(key, seeds), number, sampling)
    hidden, cache = model.trunk.decode(token, cache, width + decided, layout)
    return token, next_logits(model, hidden, layout), cache


def next_logits(model: CausalLM, hidden: Float[Array, "B D"], layout: Layout) -> jax.Array:
    """float32 [B, V], whole on every device of a row and without the vocabulary's padding.

    So the random numbers of a draw, which depend on V, are those of every layout.
    """
    logits = apply_head(model, hidden[:, None], layout)[:, 0]
    whole = jax.sharding.reshard(logits, layout.spec("batch", None))
    return whole[:, : model.trunk.config.vocab_size]


def row_keys(key: jax.Array, seeds: Int[Array, " B"]) -> jax.Array:
    """The random stream of every row's answer."""
    return jax.vmap(lambda seed: jax.random.fold_in(key, seed))(seeds)
