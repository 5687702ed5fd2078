"""Pipeline schedules: run a stack of layers whose stages live on different devices.

The schedule is an ordinary scan over ticks. Every stage works at every tick under one vmap over stages, and the
hand-off to the next stage is a ring permute. It receives a callable and pytrees and knows no model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding.layout import Layout

Pytree = Any


def layer_slots(num_layers: int, layout: Layout) -> np.ndarray:
    """int [stages, layers per stage]: which layer stands in which slot. Raises ValueError if it does not divide."""
    stages = layout.ways("stage")
    if num_layers % stages:
        raise ValueError(f"{num_layers} layers do not divide into {stages} pipeline stages")
    return np.arange(num_layers).reshape(stages, num_layers // stages)


def bubble_fraction(layout: Layout) -> float:
    """Share of the ticks in which a stage has nothing to do: (P - 1) / (M + P - 1) (GPipe, Huang et al. 2019)."""
    stages = layout.ways("stage")
    return (stages - 1) / (layout.microbatches + stages - 1)


def run_stages(
    stage: Callable[[Pytree, Pytree], Pytree], params: Pytree, state: Pytree, layout: Layout
) -> Pytree:
    """Apply all stages in turn to `state`; GPipe over `layout.microbatches` where there is more than one stage.

    Args:
        stage: (parameters of one stage, state) -> state, shapes kept.
        params: pytree whose leaves have a leading stage dimension [P, ...].
        state: pytree of activations [B, ...], B split over "batch"; all of it travels from stage to stage.

    Returns:
        The state after the last stage, shapes and shardings as given.
    """
    if layout.ways("stage") == 1:
        return stage(jax.tree.map(lambda w: w[0], params), state)
    return _gpipe(stage, params, state, layout)


def _gpipe(
    stage: Callable[[Pytree, Pytree], Pytree], params: Pytree, state: Pytree, layout: Layout
) -> Pytree:
    num_stages, num_micro = layout.ways("stage"), layout.microbatches

    def microbatches(x: jax.Array) -> jax.Array:
        # (b, M) and not (M, b): rows stay on their device, no all-to-all
        batch = x.shape[0] // num_micro
        spec = layout.spec("batch", *[None] * x.ndim)
        split = jnp.reshape(x, (batch, num_micro, *x.shape[1:]), out_sharding=spec)
        # idle ticks at the end feed microbatch 0 again; nobody reads what comes of it
        padding = [(0, 0), (0, num_stages - 1)] + [(0, 0)] * (x.ndim - 1)
        return jnp.moveaxis(jnp.pad(split, padding), 1, 0)

    def empty(x: jax.Array) -> jax.Array:
        shape = (num_stages, x.shape[1], *x.shape[2:])
        spec = layout.spec("stage", "batch", *[None] * (x.ndim - 2))
        return jnp.zeros(shape, x.dtype, out_sharding=spec)

    def enter(held: jax.Array, new: jax.Array) -> jax.Array:
        first = jnp.arange(num_stages) == 0
        return jnp.where(first.reshape(-1, *[1] * new.ndim), new[None], held)

    def tick(held: Pytree, new: Pytree) -> tuple[Pytree, Pytree]:
        held = jax.tree.map(enter, held, new)
        held = jax.vmap(stage, spmd_axis_name=layout.axes("stage"))(params, held)
        held = jax.tree.map(partial(_hand_on, layout=layout), held)
        return held, held  # the ring has brought the last stage's output to slot 0

    feed = jax.tree.map(microbatches, state)
    _, outputs = jax.lax.scan(tick, jax.tree.map(empty, feed), feed)

    def rows(x: jax.Array, like: jax.Array) -> jax.Array:
        # slot 0 of [tick, P, b, ...] for all stages, as a sum since the stage dimension is split
        first = (jnp.arange(num_stages) == 0).reshape(-1, *[1] * (x.ndim - 2))
        finished = jnp.sum(jnp.where(first, x[num_stages - 1 :], 0), axis=1, dtype=x.dtype)
        spec = layout.spec("batch", *[None] * (like.ndim - 1))
        return jnp.reshape(jnp.moveaxis(finished, 0, 1), like.shape, out_sharding=spec)

    return jax.tree.map(rows, outputs, state)


def _hand_on(x: jax.Array, layout: Layout) -> jax.Array:
    """Stage p's array [P, ...] goes to stage p + 1, the last one's to stage 0."""
    (axis,) = layout.axes("stage")
    stages = layout.ways("stage")
    spec = jax.typeof(x).sharding.spec
    ring = [(p, (p + 1) % stages) for p in range(stages)]
    return jax.shard_map(lambda y: jax.lax.ppermute(y, axis, ring), in_specs=spec, out_specs=spec)(
        x
    )
