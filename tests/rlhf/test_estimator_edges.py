"""Estimators off the responses and near zero variance; KL settings at the edge of their range."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.advantages import on_tokens, shaped_rewards, whitened
from rlhf.kl import KLConfig, adapted
from sharding.errors import UserError

MASK = np.array([[False, True, True, False], [False, True, False, False]])


def test_off_the_response_rewards_and_advantages_are_0() -> None:
    logp, mask = jnp.where(MASK, -1.0, -5.0), jnp.asarray(MASK)
    scores = jnp.array([2.0, 3.0])
    shaped = shaped_rewards(scores, logp, jnp.zeros((2, 4)), mask, 0.1)
    np.testing.assert_allclose(shaped, [[0, 0.1, 2.1, 0], [0, 3.1, 0, 0]], rtol=1e-6)
    assert on_tokens(scores, mask).tolist() == [[0, 2, 2, 0], [0, 3, 0, 0]]


def test_whitening_adds_1e_8_to_the_variance() -> None:
    """Gaps of 1e-4 have variance 1e-8."""
    advantages = jnp.array([[9.0, 1e-4, -1e-4, 9.0]])
    found = whitened(advantages, jnp.asarray(MASK[:1]))
    expected = 1e-4 / math.sqrt(1e-8 + 1e-8)
    np.testing.assert_allclose(found, [[0, expected, -expected, 0]], rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"coef": 0.0},
        {"target": 1e-9},
        {"target": 0.1, "horizon": 1},
        {"log_ratio_clip": 1e-9},
        {"place": "loss"},
    ],
)
def test_kl_settings_at_the_edge_are_accepted(settings: dict[str, Any]) -> None:
    KLConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"coef": -1e-9}, "coef"),
        ({"target": 0.0}, "target"),
        ({"horizon": 0}, "horizon"),
        ({"log_ratio_clip": 0.0}, "log_ratio_clip"),
    ],
)
def test_kl_settings_beyond_the_edge_are_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=f"kl.{name} = .* is out of range"):
        KLConfig(**settings)


def test_a_horizon_of_one_answer_adapts_at_once() -> None:
    config = KLConfig(coef=0.1, target=1.0, horizon=1)
    assert adapted(0.1, 1.1, config, 5) == pytest.approx(0.11)
