"""The pipeline computes what the plain stack of layers does, and communicates only what it must."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from sharding.layout import Layout
from sharding.pipeline import bubble_fraction, layer_slots, run_stages


def _stage(weights: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
    def layer(x: Array, w: Array) -> tuple[Array, None]:
        return jnp.tanh(x @ w) + state[1][:, None], None

    return jax.lax.scan(layer, state[0], weights)[0], state[1]


def _inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(4, 8, 8)).astype(np.float32)
    return weights, rng.normal(size=(16, 8)).astype(np.float32), np.arange(16, dtype=np.float32)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize(("pipe", "data"), [(2, 2), (4, 2)])
def test_values_and_gradients_equal_the_plain_stack(
    pipe: int, data: int, microbatches: int
) -> None:
    weights, x, shift = _inputs()

    def loss(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        def f(w: Array, x: Array, shift: Array) -> tuple[Array, Array]:
            out, unchanged = run_stages(_stage, w, (x, shift), layout)
            return jnp.sum(out * out * unchanged[:, None]), out

        with jax.set_mesh(layout.mesh()):
            stacked = jnp.reshape(weights, (layout.ways("stage"), -1, 8, 8))
            stacked = jax.device_put(stacked, layout.spec("stage", "layer", None, None))
            grads, out = jax.jit(jax.grad(f, has_aux=True))(stacked, *layout.put((x, shift)))
            return np.asarray(grads).reshape(4, 8, 8), np.asarray(out)

    layout = Layout(pipe=pipe, data=data, microbatches=microbatches)
    for ours, plain in zip(loss(layout), loss(Layout()), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4)


def test_the_loop_passes_on_activations_and_gathers_no_weight() -> None:
    layout = Layout(pipe=2, data=2, microbatches=4)
    weights, x, shift = _inputs()
    with jax.set_mesh(layout.mesh()):
        stacked = jax.device_put(
            weights.reshape(2, 2, 8, 8), layout.spec("stage", "layer", None, None)
        )
        program = jax.jit(lambda w, s: run_stages(_stage, w, s, layout))
        text = program.lower(stacked, layout.put((x, shift))).compile().as_text()
    assert text is not None
    assert text.count(" collective-permute(") + text.count(" collective-permute-start(") == 2
    assert "all-gather" not in text
    assert "all-to-all" not in text


def test_bubble_fraction_of_gpipe() -> None:
    assert bubble_fraction(Layout(pipe=4, microbatches=8)) == pytest.approx(3 / 11)
    assert bubble_fraction(Layout(data=4, microbatches=8)) == 0


def test_layers_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="5 layers do not divide into 2 pipeline stages"):
        layer_slots(5, Layout(pipe=2))
