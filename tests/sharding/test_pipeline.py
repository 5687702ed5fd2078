"""The pipeline computes what the plain stack of layers does, and communicates only what it must."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from sharding.collectives import collectives
from sharding.hlo import read
from sharding.layout import Layout, Remat
from sharding.pipeline import bubble_fraction, layer_slots, run_stages, schedule

LAYERS, WIDTH, ROWS = 5, 8, 24


def _stage(
    weights: Array, real: Array | None, state: tuple[Array, Array], layout: Layout
) -> tuple[Array, Array]:
    def layer(x: Array, now: tuple[Array, Array | None]) -> tuple[Array, None]:
        w, is_real = now
        y = jnp.tanh(x @ w) + state[1][:, None]
        return y if is_real is None else jnp.where(is_real, y, x), None

    return jax.lax.scan(layer, state[0], (weights, real))[0], state[1]


def _inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(LAYERS, WIDTH, WIDTH)).astype(np.float32)
    rows = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    return weights, rows, np.arange(ROWS, dtype=np.float32) / ROWS


def _stacked(weights: np.ndarray, layout: Layout) -> Array:
    slots = layer_slots(LAYERS, layout)
    empty = np.zeros_like(weights[:1])
    filled = np.concatenate([weights, empty])[slots]  # slot -1 is the last
    spec = layout.spec("stage", "layer", "embed_weight", None)
    return jax.device_put(filled, spec)


@functools.cache
def _run(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Gradients [layer, ...] and outputs."""
    weights, x, shift = _inputs()

    def f(w: Array, x: Array, shift: Array) -> tuple[Array, Array]:
        out, unchanged = run_stages(_stage, w, (x, shift), LAYERS, layout)
        return jnp.sum(out * out * unchanged[:, None]), out

    with jax.set_mesh(layout.mesh()):
        args = (_stacked(weights, layout), *layout.put((x, shift)))
        grads, out = jax.jit(jax.grad(f, has_aux=True))(*args)
        slots = layer_slots(LAYERS, layout)
        grads = np.asarray(grads)
        assert not np.any(grads[slots == -1])  # what does nothing learns nothing
        return grads[slots >= 0][np.argsort(slots[slots >= 0])], np.asarray(out)


@pytest.mark.parametrize("microbatches", [1, 2, 3, 6])
@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize(
    ("pipe", "data", "fsdp", "remat"), [(2, 2, 1, "none"), (4, 1, 2, "none"), (2, 2, 2, "full")]
)
def test_values_and_gradients_equal_the_plain_stack(
    pipe: int, data: int, fsdp: int, remat: Remat, repeats: int, microbatches: int
) -> None:
    layout = Layout(pipe, data, fsdp, microbatches=microbatches, repeats=repeats, remat=remat)
    for ours, plain in zip(_run(layout), _run(Layout()), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_loop_passes_on_activations_and_gathers_no_weight(repeats: int) -> None:
    layout = Layout(pipe=2, data=2, microbatches=4, repeats=repeats)
    weights, x, shift = _inputs()
    with jax.set_mesh(layout.mesh()):
        program = jax.jit(lambda w, s: run_stages(_stage, w, s, LAYERS, layout))
        args = _stacked(weights, layout), layout.put((x, shift))
        text = program.lower(*args).compile().as_text()
    assert text is not None
    assert text.count(" collective-permute(") + text.count(" collective-permute-start(") == 2
    assert "all-gather" not in text
    assert "all-to-all" not in text


def test_fsdp_gathers_the_weights_of_a_stage_once_and_not_at_every_tick() -> None:
    layout = Layout(pipe=2, fsdp=2, microbatches=4)
    weights, x, shift = _inputs()
    with jax.set_mesh(layout.mesh()):
        program = jax.jit(lambda w, s: run_stages(_stage, w, s, LAYERS, layout))
        args = _stacked(weights, layout), layout.put((x, shift))
        text = program.lower(*args).compile().as_text()
    assert text is not None
    entry = text[text.index("ENTRY") :]
    assert text.count(" all-gather(") == entry.count(" all-gather(") == 1


@pytest.mark.parametrize("repeats", [1, 2])
def test_gradients_of_weights_are_reduced_once_and_not_at_every_tick(repeats: int) -> None:
    layout = Layout(pipe=2, data=2, fsdp=2, microbatches=3, repeats=repeats, remat="full")
    weights, x, shift = _inputs()

    def loss(w: Array, state: tuple[Array, Array]) -> Array:
        return jnp.sum(run_stages(_stage, w, state, LAYERS, layout)[0])

    with jax.set_mesh(layout.mesh()):
        args = _stacked(weights, layout), layout.put((x, shift))
        module = read(jax.jit(jax.grad(loss)).lower(*args).compile())
    assert {x.kind for x in collectives(module) if x.times > 1} == {"collective-permute"}


def test_what_a_tick_picks_is_not_kept_for_the_gradient() -> None:
    """Where a batch goes around several times, each tick works with a chunk of its own of the stage's weights."""

    def kept(remat: Remat) -> int:
        layout = Layout(pipe=2, microbatches=8, repeats=4, remat=remat)
        w = jnp.zeros((2, 4, 64, 64), out_sharding=layout.spec("stage", None, None, None))
        state = layout.put((np.zeros((8, 64), np.float32), np.zeros(8, np.float32)))

        def loss(w: Array) -> Array:
            return jnp.sum(run_stages(_stage, w, state, 8, layout)[0])

        memory: Any = jax.jit(jax.grad(loss)).lower(w).compile().memory_analysis()
        return int(memory.temp_size_in_bytes)

    with jax.set_mesh(Layout(pipe=2).mesh()):
        ticks = 33
        assert kept("full") < kept("none") - ticks * 64 * 64 * 4 // 2


@pytest.mark.parametrize("microbatches", [1, 2, 4, 7, 16])
@pytest.mark.parametrize("repeats", [1, 2, 5])
@pytest.mark.parametrize("pipe", [2, 4, 8])
def test_the_schedule(pipe: int, repeats: int, microbatches: int) -> None:
    """Every stage meets every microbatch once a repeat, after the stage before it and in the order of repeats."""
    layout = Layout(pipe=pipe, microbatches=microbatches, repeats=repeats)
    table = schedule(layout)
    when = {
        (int(r), stage, int(m)): tick
        for tick, row in enumerate(table)
        for stage, (m, r) in enumerate(row)
        if m != -1
    }
    assert len(when) == repeats * pipe * microbatches == np.sum(table[..., 0] != -1)
    for (r, stage, m), tick in when.items():
        if stage:
            assert tick == when[r, stage - 1, m] + 1
        elif r:
            assert tick > when[r - 1, pipe - 1, m]
    if microbatches >= pipe:
        formula = (pipe - 1) / (repeats * microbatches + pipe - 1)
    else:
        formula = 1 - repeats * microbatches / (repeats * pipe + microbatches - 1)
    assert bubble_fraction(layout) == pytest.approx(formula)


def test_no_pipeline_has_no_bubble() -> None:
    assert bubble_fraction(Layout(data=4)) == 0


@pytest.mark.parametrize(
    ("num_layers", "pipe", "repeats", "slots"),
    [
        (4, 2, 1, [[0, 1], [2, 3]]),
        (4, 2, 2, [[0, 2], [1, 3]]),
        (8, 2, 2, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (5, 2, 1, [[0, 1, 2], [3, 4, -1]]),
        (3, 4, 1, [[0], [1], [2], [-1]]),
    ],
)
def test_which_layer_stands_where(
    num_layers: int, pipe: int, repeats: int, slots: list[list[int]]
) -> None:
    assert layer_slots(num_layers, Layout(pipe=pipe, repeats=repeats)).tolist() == slots


@pytest.mark.parametrize(("num_layers", "pipe"), [(28, 8), (61, 4), (40, 16)])
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_every_layer_has_one_slot(num_layers: int, pipe: int, repeats: int) -> None:
    slots = layer_slots(num_layers, Layout(pipe=pipe, repeats=repeats))
    assert sorted(slots[slots >= 0].tolist()) == list(range(num_layers))
    assert slots.size < num_layers + pipe * repeats
