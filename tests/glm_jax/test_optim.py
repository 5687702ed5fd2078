"""The learning rate, and AdamW with clip and decay mask, against plain loops."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glm_jax.optim import OptimConfig, learning_rate
from sharding.errors import UserError

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
@given(st.integers(2, 1000), fractions, st.floats(0.0, 1.0))
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
