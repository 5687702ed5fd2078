"""Reward and DPO losses against plain loops; heads and measures."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.batch import Judged, Pairs, Sequences
from glm_jax.config import GLMConfig
from glm_jax.loss import token_kl, token_logprobs
from glm_jax.metrics import finished
from glm_jax.model import init_trunk
from glm_jax.scalar import apply_scalar, last_token, scalar_model, sequence_scores
from rlhf.dpo import DPOConfig, best_and_worst, dpo_loss
from rlhf.evaluate import distinct_n, win_tie_lose
from rlhf.reward import interleave, pair_scores, reward_loss, total_weight
from sharding.layout import Layout

LAYOUT = Layout()


def _pairs(rows: int, seed: int = 0) -> Pairs:
    rng = np.random.default_rng(seed)

    def side() -> Sequences:
        ids = rng.integers(3, 64, (rows, 10)).astype(np.int32)
        valid = np.arange(10) < rng.integers(4, 11, rows)[:, None]
        return Sequences(np.where(valid, ids, 0), valid, valid & (np.arange(10) >= 3))

    return Pairs(side(), side())


@pytest.mark.isa
def test_token_logprobs_and_kl_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    logits, ref = (rng.normal(size=(2, 4, 7)).astype(np.float32) for _ in range(2))
    ids = rng.integers(0, 7, (2, 4)).astype(np.int32)
    logp = token_logprobs(jnp.asarray(logits), jnp.asarray(ids), 0.7)
    kl = token_kl(jnp.asarray(logits), jnp.asarray(ref), 0.7)

    def distribution(row: np.ndarray) -> list[float]:
        weights = [math.exp(x / 0.7) for x in row]
        return [w / sum(weights) for w in weights]

    for b in range(2):
        assert float(logp[b, 0]) == float(kl[b, 0]) == 0.0
        for t in range(1, 4):
            p, q = distribution(logits[b, t - 1]), distribution(ref[b, t - 1])
            assert float(logp[b, t]) == pytest.approx(math.log(p[ids[b, t]]), abs=1e-5)
            expected = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
            assert float(kl[b, t]) == pytest.approx(expected, abs=1e-5)


def test_reward_loss_against_a_loop(small: GLMConfig) -> None:
    with jax.set_mesh(LAYOUT.mesh()):
        trunk = jax.jit(partial(init_trunk, small, LAYOUT))(jax.random.key(0))
        model = scalar_model(trunk, LAYOUT, jax.random.key(1))
        weights = [1.0, 0.5, 0.5, 2.0, 0.1, 0.0]  # the last row is padding
        judged = LAYOUT.put(Judged(_pairs(6), np.array(weights, np.float32)))
        chosen, rejected = pair_scores(model, judged, LAYOUT)
        loss, shares = reward_loss(model, judged, total_weight(judged), LAYOUT, 0.3)
        apart = sequence_scores(model, judged.pairs.rejected, LAYOUT)
    np.testing.assert_allclose(rejected, apart, atol=1e-6)
    rows = list(zip(chosen.tolist(), rejected.tolist(), weights, strict=True))
    expected = wins = total = squares = 0.0
    for better, worse, weight in rows:
        prior = better**2 + worse**2
        expected += weight * (math.log(1 + math.exp(worse - better)) + 0.3 * prior)
        wins += weight * (better > worse)
        total += weight * (better + worse) / 2
        squares += weight * prior / 2
    whole = sum(weights)
    metrics = {name: float(value) for name, value in finished(shares).items()}
    assert float(loss) == pytest.approx(expected / whole, rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(wins / whole)
    assert metrics["score_mean"] == pytest.approx(total / whole, rel=1e-5)
    spread = math.sqrt(squares / whole - (total / whole) ** 2)
    assert metrics["score_std"] == pytest.approx(spread, rel=1e-4)


def test_a_score_is_read_at_the_last_real_token_on_either_side_of_padding(small: GLMConfig) -> None:
    valid = jnp.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    assert jnp.argmax(last_token(valid), axis=1)[:3].tolist() == [2, 4, 2]
    assert last_token(valid).sum(axis=1).tolist() == [1, 1, 1, 0]
    with jax.set_mesh(LAYOUT.mesh()):
        trunk = jax.jit(partial(init_trunk, small, LAYOUT))(jax.random.key(0))
        model = scalar_model(trunk, LAYOUT, jax.random.key(1))
        ids, every = LAYOUT.put((np.arange(3, 9, dtype=np.int32)[None], np.ones((1, 6), bool)))
        plain = sequence_scores(model, Sequences(ids, every, every), LAYOUT)
        assert float(plain[0]) == pytest.approx(
            float(apply_scalar(model, ids, every, LAYOUT)[0, 5]), abs=1e-6
        )
        for pad in ((4, 0), (0, 4), (2, 3)):
            wide, valid = (jnp.pad(x, ((0, 0), pad)) for x in (ids, every))
            moved = sequence_scores(model, Sequences(wide, valid, valid), LAYOUT)
            assert float(moved[0]) == pytest.approx(float(plain[0]), abs=1e-5)


def test_interleaving_keeps_pairs_side_by_side() -> None:
    pairs = _pairs(3)
    with jax.set_mesh(LAYOUT.mesh()):
        both = interleave(LAYOUT.put(pairs))
    for row in range(3):
        np.testing.assert_array_equal(both.ids[2 * row], pairs.chosen.ids[row])
        np.testing.assert_array_equal(both.ids[2 * row + 1], pairs.rejected.ids[row])


@pytest.mark.isa
def test_dpo_loss_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    logp, ref_logp = (rng.normal(size=(5, 2)).astype(np.float32) for _ in range(2))
    loss, shares = dpo_loss(jnp.asarray(logp), jnp.asarray(ref_logp), 0.3)
    expected, right = 0.0, 0
    for (w, l), (rw, rl) in zip(logp.tolist(), ref_logp.tolist(), strict=True):  # noqa: E741
        margin = 0.3 * (w - rw) - 0.3 * (l - rl)
        expected += math.log(1 + math.exp(-margin)) / 5
        right += margin > 0
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(finished(shares)["accuracy"]) == pytest.approx(right / 5)
    at_start, _ = dpo_loss(jnp.asarray(logp), jnp.asarray(logp), 0.3)
    assert float(at_start) == pytest.approx(math.log(2), abs=1e-6)


def test_best_and_worst_answers_become_a_pair() -> None:
    sample, prompt = np.arange(4, dtype=np.int32), np.arange(3, dtype=np.int32)[:, None]
    ids = np.repeat((10 * sample + prompt).reshape(-1, 1), 5, axis=1)
    answers = Sequences(ids, np.ones((12, 5), bool), np.ones((12, 5), bool))
    scores = np.array([[0.1, 0.9, -0.2, 0.0], [0.5, 0.5, 0.5, 0.5], [0.2, -0.3, 0.0, 0.1]])
    labelled = best_and_worst(answers, scores, scores < 1, 100 * scores, DPOConfig())
    assert labelled.pairs.chosen.ids[:, 0].tolist() == [10, 2]  # row 1 says nothing and drops out
    assert labelled.pairs.rejected.ids[:, 0].tolist() == [20, 12]
    np.testing.assert_allclose(labelled.ref_logp, [[90, -20], [20, -30]])


def test_distinct_and_win_rates() -> None:
    assert distinct_n(["abab", "ab"], 2) == pytest.approx(2 / 4)
    assert distinct_n(["a", ""], 2) == 0.0
    rates = win_tie_lose([0.9, 0.5, 0.1, 0.55], [0.1, 0.5, 0.9, 0.5], 0.1)
    assert rates == {"win_rate": 0.25, "tie_rate": 0.5, "lose_rate": 0.25}
