"""The learning rate, and AdamW with clip and decay mask, against plain loops."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glm_jax.optim import OptimConfig, decayed, learning_rate, make_optimizer
from glm_jax.train import init_state, make_update
from glm_jax.weights import WEIGHT_AXES
from sharding.errors import UserError
from sharding.layout import Layout

# a dozen float32 operations round by 6e-8 each
ROUNDING = 2e-6
fractions = st.floats(0.0, 1.0)


def _by_hand(config: OptimConfig, n: int) -> list[float]:
    """The learning rate of updates 1 to n."""
    w = round(config.warmup_fraction * n)
    peak, final = config.learning_rate, config.final_fraction * config.learning_rate
    rates = []
    for k in range(1, n + 1):
        if k <= w:
            rates.append(peak * k / w)
        else:
            top = max(w, 1)  # the update that has the peak
            share = (k - top) / (n - top) if n > top else 0.0
            rates.append(final + (peak - final) * (1 + math.cos(math.pi * share)) / 2)
    return rates


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), fractions, fractions)
@example(1, 0.0, 0.1)
@example(1, 1.0, 0.1)
@example(2, 0.0, 0.0)
@example(2, 0.5, 0.0)
@example(2, 1.0, 0.0)
@example(100, 1.0, 0.1)
def test_every_learning_rate_against_a_loop(n: int, warmup: float, final: float) -> None:
    config = OptimConfig(learning_rate=3e-4, warmup_fraction=warmup, final_fraction=final)
    rates = np.asarray(learning_rate(config, n)(jnp.arange(200)))[:n]  # one shape, compiled once
    np.testing.assert_allclose(rates, _by_hand(config, n), rtol=ROUNDING, atol=ROUNDING * 3e-4)


@settings(max_examples=60, deadline=None)
# no smaller: the CPU takes subnormal numbers of float32 for 0
@given(st.integers(2, 1000), fractions, st.just(0.0) | st.floats(1e-30, 1.0))
def test_the_ends_of_the_schedule_are_exact(n: int, warmup: float, final: float) -> None:
    config = OptimConfig(warmup_fraction=warmup, final_fraction=final)
    schedule = learning_rate(config, n)
    w = round(warmup * n)
    peak = float(np.float32(config.learning_rate))
    assert float(schedule(max(w, 1) - 1)) == peak
    assert float(schedule(0)) > 0.0
    last = peak if w == n else float(np.float32(config.learning_rate) * np.float32(final))
    for done in (n - 1, n, 5 * n):  # later updates are like the last
        assert float(schedule(done)) == last


def test_without_warmup_the_first_update_has_the_peak() -> None:
    for n in (1, 2, 700):
        assert float(learning_rate(OptimConfig(warmup_fraction=0.0), n)(0)) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field, values in {
            "learning_rate": (-1e-3, math.inf, math.nan),
            "warmup_fraction": (-0.1, 1.1, 3.0, math.nan),
            "final_fraction": (-0.1, 1.1, math.nan),
            "weight_decay": (-0.1, math.inf, math.nan),
            "beta1": (-0.1, 1.0, math.nan),
            "beta2": (-0.1, 1.0, math.nan),
            "eps": (0.0, -1e-8, math.nan),
            "clip_norm": (0.0, -1.0, math.nan),
        }.items()
        for value in values
    ],
)
def test_settings_out_of_range_are_named(field: str, value: float) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(UserError, match=f"optimizer: {field} = .* is out of range: give "):
        OptimConfig(**settings)


def test_settings_at_the_edge_of_their_range_are_taken() -> None:
    OptimConfig(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1e-30, math.inf)
    OptimConfig(1.0, 1.0, 1.0, 10.0, 0.999999, 0.999999, 1.0, 1e-30)


class Weights(nnx.Module):
    """A weight of every kind: a matrix, the table, a norm, a bias."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.w_up = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
        self.embedding = jnp.asarray(rng.normal(size=(5, 2)), jnp.float32)
        self.mlp_norm = jnp.asarray(1 + rng.normal(size=6), jnp.float32)
        self.b_q = jnp.asarray(rng.normal(size=(2, 2)), jnp.float32)


NAMES = ("w_up", "embedding", "mlp_norm", "b_q")
DECAYED = {"w_up", "embedding"}


def _values(weights: Weights) -> dict[str, np.ndarray]:
    return {name: np.asarray(getattr(weights, name), np.float64) for name in NAMES}


class AdamW:
    """In float64, one weight after another (Loshchilov & Hutter 2019, algorithm 2)."""

    def __init__(self, config: OptimConfig, weights: dict[str, np.ndarray]) -> None:
        self.config, self.weights, self.count = config, weights, 0
        self.first = {name: np.zeros_like(x) for name, x in weights.items()}
        self.second = {name: np.zeros_like(x) for name, x in weights.items()}

    def update(self, grads: dict[str, np.ndarray], rate: float) -> None:
        config = self.config
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        self.count += 1
        for name, gradient in grads.items():
            g = gradient * min(1.0, config.clip_norm / norm)
            first = self.first[name] = config.beta1 * self.first[name] + (1 - config.beta1) * g
            second = self.second[name] = (
                config.beta2 * self.second[name] + (1 - config.beta2) * g**2
            )
            mean = first / (1 - config.beta1**self.count)
            square = second / (1 - config.beta2**self.count)
            decay = config.weight_decay * self.weights[name] if name in DECAYED else 0.0
            step = mean / (np.sqrt(square) + config.eps) + decay
            self.weights[name] = self.weights[name] - rate * step


@pytest.mark.parametrize(
    "config",
    [
        OptimConfig(learning_rate=0.05, weight_decay=0.3, clip_norm=3.0, warmup_fraction=0.3),
        # an eps as large as the gradients: within the root it would do something else
        OptimConfig(learning_rate=0.05, beta1=0.7, beta2=0.8, eps=0.3, clip_norm=math.inf),
        OptimConfig(learning_rate=0.05, weight_decay=0.0, clip_norm=0.1, warmup_fraction=1.0),
    ],
    ids=["decay", "eps", "clip"],
)
def test_updates_are_adamws(config: OptimConfig) -> None:
    """Gradients above and below the clip; one is left out because it is not finite."""
    rng = np.random.default_rng(0)
    weights, n, ill = Weights(rng), 8, 4
    optimizer = make_optimizer(config, n)

    def loss(model: Any, rows: Any, _: Any) -> tuple[jax.Array, dict[str, Any]]:
        return jnp.sum(jnp.stack([jnp.vdot(getattr(model, x), rows[x]) for x in NAMES])), {}

    update = make_update(loss, lambda _: None, optimizer, Layout())
    state, reference = init_state(weights, optimizer), AdamW(config, _values(weights))
    for number, rate in enumerate(_by_hand(config, n), 1):
        scale = 10.0 if number % 3 == 0 else 0.3
        grads = {name: scale * rng.normal(size=x.shape) for name, x in _values(weights).items()}
        given = {name: jnp.asarray(x, jnp.float32) for name, x in grads.items()}
        if number == ill:
            given["b_q"] = given["b_q"].at[0, 0].set(jnp.nan)
        else:
            reference.update(grads, rate)
        state, _ = update(state, given)
        for name, found in _values(state.model).items():
            # 8 updates of numbers near 1, each rounded by 6e-8 some ten times
            np.testing.assert_allclose(found, reference.weights[name], atol=2e-5, err_msg=name)
    assert int(state.step) == n


@pytest.mark.parametrize("name", sorted(WEIGHT_AXES))
def test_matrices_and_tables_decay_norms_and_biases_do_not(name: str) -> None:
    model = nnx.Module()
    setattr(model, name, jnp.zeros(1))
    found = getattr(decayed(model), name)
    dimensions = [axis for axis in WEIGHT_AXES[name] if axis != "head_dim"]
    # the scalar head is a matrix of one column
    assert found == (name == "w_scalar" or (not name.startswith("b_") and len(dimensions) > 1))
