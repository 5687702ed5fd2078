"""Pipeline schedules: run a stack of layers whose stages live on different devices.

Stage p holds `repeats` chunks of layers; a batch, cut into M microbatches, goes around the ring of P stages once per
repeat. With one repeat this is GPipe (Huang et al. 2019), with more the circular or interleaved schedule (Narayanan
et al. 2021), whose bubble is smaller. Either is an ordinary scan over ticks: at every tick all stages work, each on a
microbatch of its own, under one vmap, and hand on with a ring permute. A microbatch that is to go around again waits
until all of them have entered. This file receives a callable and pytrees and knows no model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from sharding.layout import Layout
from sharding.remat import rematerialised

Pytree = Any
# (parameters of a chunk of layers, which of them are real or None for all, state, its layout) -> state
Stage = Callable[[Pytree, jax.Array | None, Pytree, Layout], Pytree]

IDLE = -1


def num_repeats(layout: Layout) -> int:
    """Chunks of layers a stage holds; 1 where there is no pipeline."""
    return layout.repeats if layout.ways("stage") > 1 else 1


def layer_slots(num_layers: int, layout: Layout) -> np.ndarray:
    """int [stages, slots]: which layer stands in which slot, chunk by chunk; -1 where the slot does nothing.

    Layers go through chunk 0 of every stage, then through chunk 1, and so on. Chunks are equally long: where the
    number of layers does not divide, the last slots stay empty.
    """
    stages, repeats = layout.ways("stage"), num_repeats(layout)
    chunk = -(-num_layers // (stages * repeats))
    slots = np.full(stages * repeats * chunk, IDLE)
    slots[:num_layers] = np.arange(num_layers)
    return slots.reshape(repeats, stages, chunk).swapaxes(0, 1).reshape(stages, repeats * chunk)


def _period(layout: Layout) -> int:
    """Ticks from one entry of a microbatch into the ring to its next."""
    return max(layout.microbatches, layout.ways("stage"))


def num_ticks(layout: Layout) -> int:
    """Ticks of one pass over a batch."""
    repeats, stages = num_repeats(layout), layout.ways("stage")
    return (repeats - 1) * _period(layout) + layout.microbatches + stages - 1


def schedule(layout: Layout) -> np.ndarray:
    """int [ticks, stages, 2]: microbatch and repeat that a stage works on, -1 where what it computes is not used."""
    stages, period = layout.ways("stage"), _period(layout)
    since = np.arange(num_ticks(layout))[:, None] - np.arange(stages)  # microbatch 0 entered
    repeat, microbatch = since // period, since % period
    used = (since >= 0) & (repeat < num_repeats(layout)) & (microbatch < layout.microbatches)
    return np.where(used[..., None], np.stack([microbatch, repeat], axis=-1), IDLE)


def bubble_fraction(layout: Layout) -> float:
    """Share of all stages' ticks that is not used, counted in the schedule.

    (P - 1) / (v M + P - 1) for v repeats of M >= P microbatches; with fewer microbatches than stages a repeat has
    to wait for the one before it, and the share is 1 - v M / (v P + M - 1).
    """
    return float(np.mean(schedule(layout)[..., 0] == IDLE))


def run_stages(
    stage: Stage, params: Pytree, state: Pytree, num_layers: int, layout: Layout
) -> Pytree:
    """Apply all layers in turn to `state`, through the pipeline where there is more than one stage.

    Args:
        stage: see `Stage`; keeps the shapes of the state.
        params: pytree whose leaves have leading dimensions [stage, slot, ...], filled as `layer_slots` says.
        state: pytree of activations [B, ...], B split over "batch"; all of it travels from stage to stage.
        num_layers: layers that are real.
        layout: its mesh must be set.

    Returns:
        The state after the last layer, shapes and shardings as given.
    """
    slots = layer_slots(num_layers, layout)
    real = None if np.all(slots != IDLE) else slots != IDLE
    if layout.ways("stage") > 1:
        return _run_pipeline(stage, params, real, state, layout)
    assert real is None  # one stage has a slot for every layer
    return stage(jax.tree.map(lambda w: w[0], params), None, state, layout)


def _run_pipeline(
    stage: Stage, params: Pytree, real: np.ndarray | None, state: Pytree, layout: Layout
) -> Pytree:
    stages, micro = layout.ways("stage"), layout.microbatches
    ticks, wait = num_ticks(layout), _period(layout) - stages
    params = jax.tree.map(partial(_copied_chunks, layout=layout), params)
    if real is not None:
        spec = layout.spec("stage", None)
        params = params, _copied_chunks(jax.sharding.reshard(jnp.asarray(real), spec), layout)
    else:
        params = params, None

    def first(like: jax.Array) -> jax.Array:
        stage = jnp.arange(stages, out_sharding=layout.spec("stage"))
        return (stage == 0).reshape(-1, *[1] * (like.ndim - 1))

    def empty(x: jax.Array, *lead: int) -> jax.Array:
        spec = PartitionSpec(*[None] * len(lead), *jax.typeof(x).sharding.spec[1:])
        return jnp.zeros((*lead, *x.shape[1:]), x.dtype, out_sharding=spec)

    def tick(carry: tuple[Pytree, Pytree], now: tuple[jax.Array, Pytree]) -> tuple[Pytree, Pytree]:
        (arrived, waiting), (t, new) = carry, now
        if wait:  # a ring buffer: what arrived `wait` ticks ago enters now
            place = t % wait
            entering = jax.tree.map(
                lambda q: jax.lax.dynamic_index_in_dim(q, place, 0, False), waiting
            )
            waiting = jax.tree.map(
                lambda q, x: jax.lax.dynamic_update_index_in_dim(q, x, place, 0), waiting, arrived
            )
        else:
            entering = arrived

        def enter(new: jax.Array, again: jax.Array, arrived: jax.Array) -> jax.Array:
            head = jnp.where(t < micro, new, again)
            return jnp.where(first(arrived), head, arrived)

        inputs = jax.tree.map(enter, new, entering, arrived)
        outputs = work(params, t, inputs)
        arrived = jax.tree.map(partial(_hand_on, layout=layout), outputs)
        return (arrived, waiting), arrived  # the ring has brought the last stage's output to slot 0

    def work(params: tuple[Pytree, Pytree], t: jax.Array, inputs: Pytree) -> Pytree:
        chunk: tuple[Pytree, Pytree] = jax.tree.map(lambda w: _pick_chunk(w, t, layout), params)
        return _everywhere(stage, chunk, inputs, layout)

    if num_repeats(layout) > 1:  # else every tick would keep the weights that it picks
        work = rematerialised(work, layout.remat)

    def fed(x: jax.Array) -> jax.Array:
        # to every stage its own, of which only the first's counts: so its gradient stays there until the ticks are over
        shards = _by_shards(x, layout)
        lead = layout.spec(None, "stage", "batch")
        spec = PartitionSpec(*lead, *jax.typeof(shards).sharding.spec[2:])
        shape = (micro, stages, *shards.shape[1:])
        own = jnp.broadcast_to(shards[:, None], shape, out_sharding=spec)
        # what enters after the last microbatch is not used
        return jnp.pad(own, [(0, ticks - micro)] + [(0, 0)] * (own.ndim - 1))

    feed = jax.tree.map(fed, layout.pieces(state, micro))
    waiting = jax.tree.map(lambda x: empty(x, wait), feed) if wait else None
    carry = (jax.tree.map(empty, feed), waiting)
    _, outputs = jax.lax.scan(tick, carry, (jnp.arange(ticks), feed))

    def rows(x: jax.Array, like: jax.Array) -> jax.Array:
        # slot 0 of [tick, P, shard, b, ...] for all stages, as a sum since the stage dimension is split
        last = x[ticks - micro :]
        finished = jnp.sum(jnp.where(first(last[0]), last, 0), axis=1, dtype=x.dtype)
        spec = jax.typeof(like).sharding.spec
        return jnp.reshape(jnp.moveaxis(finished, 0, 2), like.shape, out_sharding=spec)

    return jax.tree.map(rows, outputs, state)


def _chunked(w: jax.Array, layout: Layout) -> jax.Array:
    """[stage, slot, ...] -> [stage, repeat, slot of the chunk, ...]."""
    repeats = num_repeats(layout)
    return jnp.reshape(w, (w.shape[0], repeats, w.shape[1] // repeats, *w.shape[2:]))


def _everywhere(
    stage: Stage, chunk: tuple[Pytree, Pytree], inputs: Pytree, layout: Layout
) -> Pytree:
    """Every stage's chunk on every shard of the batch, state [stage, shard, rows, ...]: under one vmap over both."""
    both = layout.axes("stage") + layout.axes("batch")
    count = layout.ways("stage"), layout.ways("batch")

    def merged(x: jax.Array) -> jax.Array:
        spec = PartitionSpec(both, *jax.typeof(x).sharding.spec[2:])
        return jnp.reshape(x, (-1, *x.shape[2:]), out_sharding=spec)

    def parted(x: jax.Array) -> jax.Array:
        spec = PartitionSpec(*layout.spec("stage", "batch"), *jax.typeof(x).sharding.spec[1:])
        return jnp.reshape(x, (*count, *x.shape[1:]), out_sharding=spec)

    own = layout.with_whole("batch")
    work = jax.vmap(lambda params, real, x: stage(params, real, x, own), spmd_axis_name=both)
    return jax.tree.map(parted, work(*jax.tree.map(merged, (*chunk, inputs))))


def _by_shards(x: jax.Array, layout: Layout) -> jax.Array:
    """[M, B, ...] -> [M, shard of the batch, rows of it, ...]."""
    shards = layout.ways("batch")
    shape = (len(x), shards, x.shape[1] // shards, *x.shape[2:])
    rest = jax.typeof(x).sharding.spec[2:]
    spec = PartitionSpec(*layout.spec(None, "batch", None), *rest)
    return jnp.reshape(x, shape, out_sharding=spec)


def _copied_chunks(w: jax.Array, layout: Layout) -> jax.Array:
    """[stage, slot, ...] -> [stage, repeat, shard of the batch, slot of the chunk, ...]: whole weights for every shard.

    So they are gathered once, ahead of the ticks, and the gradients of a shard's copy add up on its device and are
    reduced once, behind them: left to the compiler either happens again at every tick.
    """
    storage = set(layout.axes("embed_weight"))
    chunked = _chunked(w, layout)
    spec = jax.typeof(chunked).sharding.spec

    def gathered(w: jax.Array) -> jax.Array:
        for dim, part in enumerate(spec):
            axes = tuple(a for a in (part if isinstance(part, tuple) else (part,)) if a in storage)
            if axes:
                w = jax.lax.all_gather(w, axes, axis=dim, tiled=True)
        return w[:, :, None]

    def kept(part: Any) -> Any:
        axes = tuple(a for a in (part if isinstance(part, tuple) else (part,)) if a not in storage)
        return axes[0] if len(axes) == 1 else axes or None

    stage, repeat, *rest = (kept(part) for part in spec)
    out = PartitionSpec(stage, repeat, *layout.spec("batch"), *rest)
    return jax.shard_map(gathered, in_specs=spec, out_specs=out)(chunked)


def _pick_chunk(w: jax.Array, t: jax.Array, layout: Layout) -> jax.Array:
    """[stage, repeat, ...] -> [stage, ...]: the chunk that each stage works with at tick t."""
    repeats = num_repeats(layout)
    if repeats == 1:
        return w[:, 0]
    (axis,) = layout.axes("stage")
    spec = jax.typeof(w).sharding.spec

    def pick(w: jax.Array, t: jax.Array) -> jax.Array:
        repeat = jnp.clip((t - jax.lax.axis_index(axis)) // _period(layout), 0, repeats - 1)
        return jax.lax.dynamic_index_in_dim(w, repeat, 1, keepdims=False)

    out = PartitionSpec(spec[0], *spec[2:])
    return jax.shard_map(pick, in_specs=(spec, PartitionSpec()), out_specs=out)(w, t)


def _hand_on(x: jax.Array, layout: Layout) -> jax.Array:
    """Stage p's array [P, ...] goes to stage p + 1, the last one's to stage 0."""
    (axis,) = layout.axes("stage")
    stages = layout.ways("stage")
    spec = jax.typeof(x).sharding.spec
    ring = [(p, (p + 1) % stages) for p in range(stages)]
    return jax.shard_map(lambda y: jax.lax.ppermute(y, axis, ring), in_specs=spec, out_specs=spec)(
        x
    )
