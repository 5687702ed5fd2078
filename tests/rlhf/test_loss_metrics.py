"""Metrics that losses report, and their edges: ties, clips, masked infinities, counts of whole batches."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.metrics import finished
from rlhf.losses import dpo_loss, ipo_loss, policy_loss, value_loss

LOGP = np.array([[-3.0, -5.0], [-2.0, -1.5], [-4.0, -4.0], [-1.0, -6.0]], np.float32)
REF_LOGP = np.array([[-3.5, -4.0], [-2.5, -2.5], [-4.5, -4.5], [-2.0, -1.0]], np.float32)
BETA = 0.3


@pytest.mark.parametrize("count", [None, 4, 9])
def test_preference_metrics_are_shares_of_the_batch(count: int | None) -> None:
    chosen, rejected = (LOGP.astype(np.float64) - REF_LOGP).T
    gaps, whole = chosen - rejected, count or len(LOGP)
    assert (gaps == 0).sum() == 1 and (gaps < 0).sum() == 1  # a tie, a wrong one
    arrays = jnp.asarray(LOGP), jnp.asarray(REF_LOGP), BETA, count
    dpo, of_dpo = dpo_loss(*arrays)
    ipo, of_ipo = ipo_loss(*arrays)
    # float32 rounding of a sum of four terms below 30
    assert float(dpo) == pytest.approx(np.log1p(np.exp(-BETA * gaps)).sum() / whole, abs=1e-5)
    assert float(ipo) == pytest.approx(((gaps - 0.5 / BETA) ** 2).sum() / whole, abs=2e-5)
    for shares in (of_dpo, of_ipo):
        found = {name: float(value) for name, value in finished(shares).items()}
        assert found["accuracy"] == pytest.approx((gaps > 0).sum() / whole)
        assert found["margin"] == pytest.approx(BETA * gaps.sum() / whole, abs=1e-5)
        assert found["chosen_logratio"] == pytest.approx(chosen.sum() / whole, abs=1e-5)


def test_dpo_keeps_its_label_without_smoothing() -> None:
    logp, zero = jnp.array([[8.0, 0.0]]), jnp.zeros((1, 2))
    assert float(dpo_loss(logp, zero, 1.0)[0]) == pytest.approx(math.log1p(math.exp(-8)), rel=1e-5)


def test_infinities_off_the_response_do_not_reach_the_loss() -> None:
    mask = jnp.array([[False, True, True, False]])
    outside = jnp.where(mask, -1.0, -jnp.inf)  # a token outside the support of both policies
    loss, shares = policy_loss(outside, outside, jnp.ones((1, 4)), mask, 0.2)
    assert float(loss) == -1.0
    found = {name: float(value) for name, value in finished(shares).items()}
    assert found["ratio_mean"] == found["ratio_max"] == 1.0
    assert found["approx_kl"] == found["clip_fraction"] == 0.0


def test_a_ratio_at_the_edge_of_the_clip_is_not_clipped() -> None:
    mask, one = jnp.ones((1, 2), bool), jnp.ones((1, 2))
    _, shares = policy_loss(one, one, one, mask, 0.0)  # |ratio - 1| = 0 is no more than 0
    assert float(finished(shares)["clip_fraction"]) == 0.0


def test_every_metric_of_a_piece_is_its_share_of_the_batch() -> None:
    rng = np.random.default_rng(0)
    logp, old, advantages = (jnp.asarray(rng.normal(size=(2, 3)), jnp.float32) for _ in range(3))
    mask = jnp.ones((2, 3), bool)
    alone = finished(policy_loss(logp, old, advantages, mask, 0.2)[1])
    piece = finished(policy_loss(logp, old, advantages, mask, 0.2, 24)[1])
    for name in ("ratio_mean", "clip_fraction", "approx_kl"):
        assert float(piece[name]) == pytest.approx(float(alone[name]) / 4, rel=1e-6)
    assert float(piece["ratio_max"]) == float(alone["ratio_max"])
    whole = float(value_loss(logp, old, advantages, mask, 0.2))
    assert float(value_loss(logp, old, advantages, mask, 0.2, 24)) == pytest.approx(whole / 4)
