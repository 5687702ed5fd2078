"""Norms, rotations, projections and MLPs against NumPy in float64."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from glm_jax.layers import (
    MASKED,
    Rotation,
    from_heads,
    gated_mlp,
    gathered,
    layer_norm,
    mlp,
    remade,
    residual_axes,
    rms_norm,
    rotary_frequencies,
    rotate,
    rotate_halves,
    rotation,
    spread,
    summed,
    to_heads,
)
from sharding.layout import Layout

B, T, D, N, H, F = 2, 3, 8, 2, 8, 16
ONE = Layout()
# half a unit in the last place of bfloat16 is 2^-9 of a value; twice that for what float32 rounds before
BFLOAT16 = 2.0**-8


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _close(found: jax.Array, expected: np.ndarray, dtype: str) -> None:
    """Equal up to one rounding to `dtype`; sums of at most 16 float32 terms cost less than 1e-5."""
    assert found.dtype == dtype
    bound = BFLOAT16 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=bound, atol=1e-5)


# norms


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_are_computed_in_float32(dtype: str) -> None:
    # bfloat16 holds no sum of 256 squares: the mean square would be wrong by more than its last place
    x = jnp.asarray(_normal(B, T, 256) + 3.0, dtype)
    scale, bias = 1 + 0.5 * _normal(256, seed=1), _normal(256, seed=2)
    wide, eps = np.asarray(x, np.float64), 0.1
    rms = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * scale
    _close(rms_norm(x, jnp.asarray(scale), eps), rms, dtype)
    centred = wide - wide.mean(-1, keepdims=True)
    normed = centred / np.sqrt(centred.var(-1, keepdims=True) + eps) * scale + bias
    found = layer_norm(x, jnp.asarray(scale), jnp.asarray(bias), eps)
    assert found.dtype == dtype
    # a value near 0 is the difference of terms near 1
    np.testing.assert_allclose(np.asarray(found, np.float64), normed, rtol=BFLOAT16, atol=1e-5)


@pytest.mark.parametrize("which", ["rms_norm", "layer_norm"])
def test_norms_store_only_their_input_for_the_gradient(which: str) -> None:
    one, zero = jnp.ones(D), jnp.zeros(D)
    norm: Callable[..., jax.Array] = {
        "rms_norm": lambda x: rms_norm(x, one, 1e-5),
        "layer_norm": lambda x: layer_norm(x, one, zero, 1e-5),
    }[which]
    x = jnp.asarray(_normal(B, T, D))
    _, pullback = jax.vjp(norm, x)
    (saved,) = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape == x.shape]
    np.testing.assert_array_equal(saved, x)


def test_remade_stores_inputs_and_recomputes_the_rest() -> None:
    def chain(x: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.sin(jnp.tanh(x)))

    x = jnp.asarray(_normal(D))
    value, pullback = jax.vjp(remade(chain), x)
    plain, plain_pullback = jax.vjp(chain, x)
    assert len(jax.tree.leaves(pullback)) == 1 < len(jax.tree.leaves(plain_pullback))
    np.testing.assert_array_equal(value, plain)
    np.testing.assert_allclose(pullback(x)[0], plain_pullback(x)[0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_masked_logit_is_finite_and_has_probability_0(dtype: str) -> None:
    logits = jnp.asarray([MASKED, -3e4, -3e4], dtype)
    assert jax.nn.softmax(logits).tolist() == [0.0, 0.5, 0.5]
    assert jax.nn.softmax(jnp.full(4, MASKED, dtype)).tolist() == [0.25] * 4


# rotary embeddings


def test_rotary_frequencies_against_a_loop() -> None:
    found = rotary_frequencies(6, 100.0)
    assert found.dtype == np.float32
    expected = [1 / 100 ** (2 * j / 6) for j in range(3)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def _turned(pairs: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Pairs [..., 2] as complex numbers, turned by `angles`."""
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotations_turn_complex_numbers(dtype: str) -> None:
    positions = np.array([[0, 1, 7], [3, 4, 100]], np.float32)
    frequencies = rotary_frequencies(H // 2, 50.0)  # as many as pairs in half a head
    by = rotation(jnp.asarray(positions), frequencies)
    angles = positions[..., None].astype(np.float64) * frequencies
    np.testing.assert_allclose(by.cos, np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(by.sin, np.sin(angles), atol=1e-5)
    x = jnp.asarray(_normal(B, T, N, H), dtype)
    wide, half = np.asarray(x, np.float64), H // 2
    turned = _turned(wide[..., :half].reshape(B, T, N, -1, 2), angles[:, :, None])
    expected = np.concatenate([turned.reshape(B, T, N, half), wide[..., half:]], axis=-1)
    _close(rotate(x, by), expected, dtype)
    by, angles = (
        Rotation(*(jnp.concatenate([x, x[..., ::-1]], -1) for x in by)),
        np.concatenate([angles, angles[..., ::-1]], -1),
    )
    pairs = np.stack([wide[..., :half], wide[..., half:]], axis=-1)
    turned = _turned(pairs, angles[:, :, None])
    _close(rotate_halves(x, by), np.concatenate([turned[..., 0], turned[..., 1]], axis=-1), dtype)


# projections and MLPs


def test_projections_to_heads_and_back_are_sums_over_width() -> None:
    x, w = _normal(B, T, D), _normal(D, N, H, seed=1)
    y, back = _normal(B, T, N, H, seed=2), _normal(N, H, D, seed=3)
    with jax.set_mesh(ONE.mesh()):
        out = to_heads(jnp.asarray(x), jnp.asarray(w), "heads", ONE)
        summed_ = from_heads(jnp.asarray(y), jnp.asarray(back), ONE)
    _close(out, np.einsum("BTD,DNH->BTNH", x.astype(np.float64), w), "float32")
    _close(summed_, np.einsum("BTNH,NHD->BTD", y.astype(np.float64), back), "float32")


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_mlps_against_their_formulas() -> None:
    x, gate, up = _normal(B, T, D), _normal(D, F, seed=1), _normal(D, F, seed=2)
    down, b_in, b_out = _normal(F, D, seed=3), _normal(F, seed=4), _normal(D, seed=5)
    with jax.set_mesh(ONE.mesh()):
        a, *weights = (jnp.asarray(w) for w in (x, gate, up, down, b_in, b_out))
        gated = gated_mlp(a, weights[0], weights[1], weights[2], ONE)
        plain = mlp(a, weights[0], weights[3], weights[2], weights[4], ONE)
    wide = x.astype(np.float64)
    hidden = (wide @ gate) * _sigmoid(wide @ gate) * (wide @ up)
    np.testing.assert_allclose(gated, hidden @ down, rtol=1e-5, atol=1e-4)  # sums of terms near 100
    inner = wide @ gate + b_in
    gelu = inner / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    np.testing.assert_allclose(plain, gelu @ down + b_out, rtol=1e-5, atol=5e-5)


def test_an_mlp_uses_the_tanh_form_of_gelu() -> None:
    """The exact form differs by up to 4.7e-4, near 2."""
    one, zero = jnp.ones((1, 1)), jnp.zeros(1)
    with jax.set_mesh(ONE.mesh()):
        found = float(mlp(jnp.full((1, 1, 1), 2.0), one, zero, one, zero, ONE)[0, 0, 0])
    tanh = 1 + math.tanh(math.sqrt(2 / math.pi) * (2 + 0.044715 * 8))
    assert found == pytest.approx(tanh, abs=1e-6)
    assert abs(found - (1 + math.erf(2 / math.sqrt(2)))) > 1e-5


# tokens split over tensor shards


@pytest.mark.parametrize(
    ("length", "tensor", "axis"), [(8, 2, "sequence"), (7, 2, "time"), (6, 4, "time")]
)
def test_tokens_are_split_only_where_they_divide(length: int, tensor: int, axis: str) -> None:
    layout = Layout(tensor=tensor)
    assert residual_axes(length, layout) == ("batch", axis, "embed")
    with jax.set_mesh(layout.mesh()):
        x = jnp.zeros((2, length, D), out_sharding=layout.spec("batch", "time", "embed"))
        split = spread(x, layout)
        assert jax.typeof(split).sharding.spec == layout.spec("batch", axis, "embed")
        whole = gathered(split, layout)
        assert jax.typeof(whole).sharding.spec == P(None, None, None)


def test_one_shard_splits_no_tokens_and_saves_no_sum() -> None:
    with jax.set_mesh(ONE.mesh()):
        x = jnp.zeros((2, 8, D))
        assert spread(x, ONE) is x and gathered(x, ONE) is x and summed(x, ONE) is x


def _names(function: Callable[[Any], Any], x: Any) -> int:
    return str(jax.make_jaxpr(function)(x)).count("name[")


def test_a_sum_over_split_heads_is_saved_under_remat() -> None:
    layout = Layout(tensor=2)
    with jax.set_mesh(layout.mesh()):
        x = jnp.zeros((2, 8, D))
        assert _names(lambda x: summed(x, layout), x) == 1
        assert _names(lambda x: summed(x, ONE), x) == 0
