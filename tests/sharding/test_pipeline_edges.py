"""Pipelines at the edge: none at all, one microbatch, fewer microbatches than stages."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding.pipeline
from sharding.layout import Layout
from sharding.pipeline import (
    IDLE,
    bubble_fraction,
    layer_slots,
    num_repeats,
    num_ticks,
    run_stages,
    schedule,
)


def test_without_a_pipeline_layers_stand_in_order_once() -> None:
    layout = Layout(data=2, repeats=3)
    assert num_repeats(layout) == 1
    assert layer_slots(5, layout).tolist() == [[0, 1, 2, 3, 4]]
    assert num_repeats(Layout(pipe=2, repeats=3)) == 3


@pytest.mark.parametrize("microbatches", [1, 3, 5])
@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("pipe", [2, 4])
def test_the_schedule_is_that_of_a_simulated_ring(
    pipe: int, repeats: int, microbatches: int
) -> None:
    """Every microbatch moves one stage a tick; stage 0 takes one up again once all have entered."""
    layout = Layout(pipe=pipe, microbatches=microbatches, repeats=repeats)
    table = schedule(layout)
    expected = np.full((num_ticks(layout), pipe, 2), IDLE)
    round_ = max(microbatches, pipe)  # a repeat begins when all have entered and the first is back
    for repeat in range(repeats):
        for microbatch in range(microbatches):
            for stage in range(pipe):
                expected[repeat * round_ + microbatch + stage, stage] = microbatch, repeat
    np.testing.assert_array_equal(table, expected)
    assert (table[-1] != IDLE).any()  # no tick is left over
    assert bubble_fraction(layout) == pytest.approx((expected[..., 0] == IDLE).mean())


@pytest.mark.parametrize(("repeats", "remats"), [(1, 0), (2, 1), (3, 1)])
def test_ticks_are_rematerialised_only_where_they_pick_weights(
    repeats: int, remats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def record(work: Callable[..., Any], remat: str) -> Callable[..., Any]:
        calls.append(remat)
        return work

    monkeypatch.setattr(sharding.pipeline, "rematerialised", record)
    layout = Layout(pipe=2, microbatches=2, repeats=repeats, remat="full")
    with jax.set_mesh(layout.mesh()):
        slots = layer_slots(2 * repeats, layout).shape[1]
        w = jnp.ones((2, slots, 3), out_sharding=layout.spec("stage", None, None))
        jax.make_jaxpr(
            lambda w, x: run_stages(
                lambda w, real, x, layout: x * jnp.prod(w, axis=0), w, x, 2 * repeats, layout
            )
        )(w, layout.put(np.ones((4, 3), np.float32)))
    assert calls == ["full"] * remats


def test_weights_split_over_two_mesh_axes_are_gathered_whole() -> None:
    """Rows times the product of all layers' weights; flags travel along."""

    def stage(w: Any, real: Any, state: Any, layout: Layout) -> Any:
        rows, flags = state
        return rows * jnp.prod(w, axis=0), flags

    rules = tuple(
        (name, ("data", "fsdp") if name == "embed_weight" else axes)
        for name, axes in Layout().rules
    )
    layout = Layout(pipe=2, data=2, fsdp=2, microbatches=2, rules=rules)
    rng = np.random.default_rng(0)
    w = (1 + 0.3 * rng.normal(size=(2, 2, 4))).astype(np.float32)
    x = rng.normal(size=(8, 4)).astype(np.float32)
    with jax.set_mesh(layout.mesh()):
        split = jax.device_put(w, layout.spec("stage", "layer", "embed_weight"))
        state = layout.put((x, x[:, 0] > 0))
        rows, flags = jax.jit(lambda w, state: run_stages(stage, w, state, 4, layout))(split, state)
    np.testing.assert_allclose(rows, x * w.astype(np.float64).prod(axis=(0, 1)), rtol=1e-5)
    assert flags.dtype == bool
    np.testing.assert_array_equal(flags, x[:, 0] > 0)
