"""The programs of continuous batching: slots that decode together and are refilled one by one.

`glm_jax.continuous` calls them. Whatever varies - which slots, which prompts, how long - is a value, never a shape; but
for the number of slots, which is halved a few times.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from glm_jax.generate import SamplingConfig, draw, next_logits, row_keys
from glm_jax.model import CausalLM, cast_weights
from glm_jax.trunk import Cache
from sharding.layout import Layout


class Drawn(NamedTuple):
    """The answers of the slots so far."""

    running: Bool[Array, " S"]
    ended: Bool[Array, " S"]  # by a stop token
    length: Int[Array, " S"]
    ids: Int[Array, "S R"]
    logp: Float[Array, "S R"]


class Slots(NamedTuple):
    """S slots, each with a request or idle; P columns for prompts, R tokens an answer at most.

    The cache has P columns for prompts and a ring of R more with one clock: step t of decoding writes column
    P + t mod R of every slot, a single slice of the cache. R columns are enough. A request that is let in after t steps
    draws its first token from its prompt's logits and its last one needs no further step, so it decodes in the R - 1
    steps from t on at most, which are different columns. `cache.real`, cleared when it came, lets it see no other.
    """

    cache: Cache
    steps: Int[Array, ""]  # of decoding so far
    seeds: Int[Array, " S"]
    token: Int[Array, " S"]  # the last one of the answer, not in the cache yet
    drawn: Drawn


class Prefilled(NamedTuple):
    """Prompts that may be let into slots."""

    cache: Cache  # as wide as their bucket
    logits: Float[Array, "B V"]  # of the first token


class Programs:
    """The programs, each compiled once a shape of its arguments; `width` is P. The policy comes first."""

    def __init__(
        self,
        slots: int,
        width: int,
        sampling: SamplingConfig,
        stop_ids: tuple[int, ...],
        layout: Layout,
    ) -> None:
        append = partial(_append, sampling=sampling, stop_ids=stop_ids)
        room = sampling.max_new_tokens
        empty = partial(_empty, slots=slots, width=width, room=room, layout=layout)
        self.empty = jax.jit(empty)
        self.prefill = jax.jit(partial(_prefill, layout=layout))
        self.insert = jax.jit(partial(_insert, append=append), donate_argnames="slots")
        decode = partial(_decode, append=append, width=width, layout=layout)
        self.decode = jax.jit(decode, donate_argnames="slots")
        self.narrow = jax.jit(partial(_narrow, layout=layout))


Append = Callable[[Slots, Bool[Array, " S"], Float[Array, "S V"], jax.Array], Slots]


def _empty(model: CausalLM, slots: int, width: int, room: int, layout: Layout) -> Slots:
    """Idle slots."""
    row, grid = layout.spec("batch"), layout.spec("batch", None)
    blank = jnp.zeros((slots, 1), jnp.int32, out_sharding=grid)
    _, like = jax.eval_shape(
        lambda model: model.trunk.prefill(blank, blank == 1, width + room - 1, layout), model
    )

    def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding)

    number = jnp.zeros((slots,), jnp.int32, out_sharding=row)
    no = jnp.zeros((slots,), bool, out_sharding=row)
    ids = jnp.zeros((slots, room), jnp.int32, out_sharding=grid)
    drawn = Drawn(no, no, number, ids, ids.astype(jnp.float32))
    return Slots(jax.tree.map(zeros, like), jnp.int32(0), number, number, drawn)


def _prefill(
    model: CausalLM, ids: Int[Array, "B T"], real: Bool[Array, "B T"], layout: Layout
) -> Prefilled:
    """Left-padded prompts, computed."""
    hidden, cache = model.trunk.prefill(ids, real, 0, layout)
    return Prefilled(cache, next_logits(model, hidden[:, -1], layout))


def _insert(
    slots: Slots,
    prompts: Prefilled,
    source: Int[Array, " S"],
    seeds: Int[Array, " S"],
    key: jax.Array,
    append: Append,
) -> Slots:
    """Slots with a new request where `source` names a row of `prompts`, not -1; its first token is drawn."""
    fresh = source >= 0
    cache, new = slots.cache, prompts.cache
    room = cache.real.shape[1] - new.real.shape[1]

    def filled(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        """The first columns, those of the bucket, of keys or values; the others stay in place."""
        keep = jax.lax.slice_in_dim(old, 0, new.shape[axis], axis=axis)
        columns = jnp.where(fresh[:, None, None, None], _taken(new, source, axis=1), keep)
        return jax.lax.dynamic_update_slice_in_dim(old, columns, 0, axis=axis)

    real = jnp.pad(_taken(new.real, source), ((0, 0), (0, room)))
    cache = Cache(
        keys=filled(cache.keys, new.keys, axis=4),
        values=filled(cache.values, new.values, axis=3),
        real=jnp.where(fresh[:, None], real, cache.real),
        position=jnp.where(fresh[:, None], _taken(new.position, source), cache.position),
    )
    slots = slots._replace(
        cache=cache,
        seeds=jnp.where(fresh, seeds, slots.seeds),
        drawn=slots.drawn._replace(
            ended=slots.drawn.ended & ~fresh, length=jnp.where(fresh, 0, slots.drawn.length)
        ),
    )
    return append(slots, fresh, _taken(prompts.logits, source), key)


def _narrow(slots: Slots, source: Int[Array, " fewer"], layout: Layout) -> Slots:
    """As many slots as `source` has entries: each names an old slot, or is -1 for an idle one.

    Old slots are counted from the first one of their own batch shard, so that nothing leaves its device.
    """

    def kept(x: jax.Array, axis: int = 0) -> jax.Array:
        spec = jax.typeof(x).sharding.spec
        take = jax.shard_map(
            lambda x, source: jnp.take(x, source, axis=axis, mode="clip"),
            in_specs=(spec, layout.spec("batch")),
            out_specs=spec,
        )
        rows: jax.Array = take(x, source)
        return rows

    cache = Cache(
        keys=kept(slots.cache.keys, axis=1),
        values=kept(slots.cache.values, axis=1),
        real=kept(slots.cache.real),
        position=kept(slots.cache.position),
    )
    drawn = jax.tree.map(kept, slots.drawn)
    return Slots(
        cache=cache,
        steps=slots.steps,
        seeds=kept(slots.seeds),
        token=kept(slots.token),
        drawn=drawn._replace(running=drawn.running & (source >= 0)),
    )


def _taken(x: jax.Array, source: Int[Array, " S"], axis: int = 0) -> jax.Array:
    """Entry source[s] of the batch axis for every slot s; whichever row where that is -1.

    A slot may need a row of any device, hence all rows come to all of them first.
    """
    spec = jax.typeof(x).sharding.spec
    everywhere = PartitionSpec(*spec[:axis], None, *spec[axis + 1 :])
    whole = jax.sharding.reshard(x, everywhere)
    return whole.at[(slice(None),) * axis + (source,)].get(out_sharding=spec)


def _decode(
    model: CausalLM,
    slots: Slots,
    key: jax.Array,
    most: Int[Array, ""],
    most_of_a_shard: Int[Array, ""],
    append: Append,
    width: int,
    layout: Layout,
) -> Slots:
    """Slots after as many steps as it takes until no more of them are running, in all and in every batch shard."""
    model = cast_weights(model)
    room = slots.drawn.ids.shape[1]
    by_shard = (layout.ways("batch"), -1)

    def go_on(slots: Slots) -> jax.Array:
        running = slots.drawn.running
        shards = jnp.reshape(running, by_shard, out_sharding=layout.spec("batch", None))
        too_many = jnp.max(jnp.sum(shards, axis=1)) > most_of_a_shard
        return (jnp.sum(running) > most) | too_many

    def step(slots: Slots) -> Slots:
        column = width + slots.steps % room
        hidden, cache = model.trunk.decode(slots.token, slots.cache, column, layout)
        slots = slots._replace(cache=cache, steps=slots.steps + 1)
        return append(slots, slots.drawn.running, next_logits(model, hidden, layout), key)

    return jax.lax.while_loop(go_on, step, slots)


def _append(
    slots: Slots,
    rows: Bool[Array, " S"],
    logits: Float[Array, "S V"],
    key: jax.Array,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
) -> Slots:
    """Slots with one more token drawn where `rows` says so; they run on unless it ends their answer."""
    old = slots.drawn
    token, logp = draw(logits, row_keys(key, slots.seeds), old.length, sampling)
    room = old.ids.shape[1]
    here = rows[:, None] & (jnp.arange(room) == old.length[:, None])
    length = old.length + rows
    stopped = jnp.any(token[:, None] == jnp.array(stop_ids, jnp.int32), axis=1)
    drawn = Drawn(
        running=jnp.where(rows, ~stopped & (length < room), old.running),
        ended=old.ended | (rows & stopped),
        length=length,
        ids=jnp.where(here, token[:, None], old.ids),
        logp=jnp.where(here, logp[:, None], old.logp),
    )
    return slots._replace(token=jnp.where(rows, token, slots.token), drawn=drawn)
