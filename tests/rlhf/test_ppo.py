"""The estimators against plain loops, and what must hold before the first update."""

import math
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.batch import Prompts, Sequences
from glm_jax.config import GLMConfig
from glm_jax.generate import Generation, SamplingConfig
from glm_jax.metrics import Metrics, finished
from glm_jax.model import CausalLM, init_model
from glm_jax.sampler import Sampler
from glm_jax.scalar import ScalarModel, apply_scalar, scalar_model
from rlhf.estimators import gae, policy_loss, shaped_rewards, value_loss
from rlhf.ppo import (
    Experience,
    Models,
    PPOConfig,
    actor_counts,
    actor_loss,
    make_experience,
    take_rows,
)
from rlhf.rollout import with_stop
from sharding.errors import UserError
from sharding.layout import Layout

LAYOUT = Layout()
STOP = 2
MASK = np.array([[0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0, 0]], bool)


def _random(*names: str) -> list[jax.Array]:
    rng = np.random.default_rng(len(names))
    return [jnp.asarray(rng.normal(size=MASK.shape), jnp.float32) for _ in names]


def test_sum_of_shaped_rewards_is_score_minus_beta_kl() -> None:
    logp, ref_logp = _random("logp", "ref_logp")
    scores = jnp.array([0.3, -0.4, 0.002])  # all of them below 1: none may become 0
    shaped = shaped_rewards(scores, logp, ref_logp, jnp.asarray(MASK), 0.05)
    for row in range(3):
        kl = sum(float(logp[row, t] - ref_logp[row, t]) for t in range(7) if MASK[row, t])
        assert float(shaped[row].sum()) == pytest.approx(float(scores[row]) - 0.05 * kl, abs=1e-6)
    assert not np.any(np.asarray(shaped)[~MASK])


def test_score_stands_on_the_last_token_of_the_answer() -> None:
    zeros = jnp.zeros(MASK.shape)
    shaped = shaped_rewards(jnp.array([0.3, -0.4, 0.002]), zeros, zeros, jnp.asarray(MASK), 0.05)
    expected = np.zeros(MASK.shape, np.float32)
    expected[0, 4], expected[1, 6], expected[2, 2] = 0.3, -0.4, 0.002
    np.testing.assert_array_equal(np.asarray(shaped), expected)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (1.0, 0.0)])
def test_gae_against_the_double_sum(gamma: float, lam: float) -> None:
    rewards, values = _random("rewards", "values")
    advantages, returns = gae(rewards, values, jnp.asarray(MASK), gamma, lam)
    for row, first in ((0, 2), (1, 2), (2, 2)):
        end = first + int(MASK[row].sum())
        for t in range(7):
            expected = 0.0
            for later in range(t, end):
                following = float(values[row, later + 1]) if later + 1 < end else 0.0
                delta = float(rewards[row, later]) + gamma * following - float(values[row, later])
                expected += (gamma * lam) ** (later - t) * delta
            expected *= MASK[row, t]
            assert float(advantages[row, t]) == pytest.approx(expected, abs=1e-5)
            value = float(values[row, t]) * MASK[row, t]
            assert float(returns[row, t]) == pytest.approx(expected + value, abs=1e-5)


def test_policy_loss_against_a_loop() -> None:
    logp, old, advantages = _random("logp", "old", "advantages")
    loss, shares = policy_loss(logp, old, advantages, jnp.asarray(MASK), 0.2)
    metrics = finished(shares)
    terms, clipped = [], 0
    for row, t in zip(*np.nonzero(MASK), strict=True):
        ratio = math.exp(float(logp[row, t] - old[row, t]))
        advantage = float(advantages[row, t])
        terms.append(-min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage))
        clipped += abs(ratio - 1) > 0.2
    assert float(loss) == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert float(metrics["clip_fraction"]) == pytest.approx(clipped / len(terms))


def test_value_loss_against_a_loop() -> None:
    values, old, returns = _random("values", "old", "returns")
    loss = value_loss(values, old, returns, jnp.asarray(MASK), 0.2)
    terms = []
    for row, t in zip(*np.nonzero(MASK), strict=True):
        value, target, before = (float(x[row, t]) for x in (values, returns, old))
        near = min(max(value, before - 0.2), before + 0.2)
        terms.append(0.5 * max((value - target) ** 2, (near - target) ** 2))
    assert float(loss) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_an_answer_that_was_cut_off_gets_a_stop_token_to_be_scored_at() -> None:
    ids = jnp.array([[5, 6, 7, 8, 2, 0, 0], [5, 6, 7, 8, 9, 9, 9], [5, 6, 2, 0, 0, 0, 0]])
    valid = jnp.asarray(MASK).at[:, :2].set(True)
    sequences = Sequences(ids, valid, jnp.asarray(MASK))
    longer = with_stop(sequences, jnp.array([True, False, True]), STOP)
    assert longer.ids[1].tolist() == [5, 6, 7, 8, 9, 9, 9, 2]
    assert longer.valid.sum(axis=1).tolist() == [5, 8, 3]
    assert longer.target.sum(axis=1).tolist() == [3, 5, 1]  # the policy did not choose it
    assert longer.ids[0].tolist() == [5, 6, 7, 8, 2, 0, 0, 0]


@pytest.fixture(scope="module")
def models(small: GLMConfig) -> Iterator[Models]:
    with jax.set_mesh(LAYOUT.mesh()):
        policy: CausalLM = jax.jit(partial(init_model, small, LAYOUT))(jax.random.key(0))
        assert policy.w_head is not None
        policy.w_head = policy.w_head * 30.0
        scorer: ScalarModel = scalar_model(policy.trunk, LAYOUT, jax.random.key(1))
        yield Models(actor=policy, critic=scorer, reference=policy, reward=scorer)


@pytest.mark.parametrize("part", [{"top_k": 5}, {"top_p": 0.9}])
def test_sampling_from_a_part_of_the_distribution_is_refused(part: dict[str, float]) -> None:
    config = PPOConfig(sampling=SamplingConfig(**part))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="top_k and top_p must be 0 and 1"):
        config.check(LAYOUT, LAYOUT)


def _answers(models: Models, sampling: SamplingConfig) -> Generation:
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 64, (8, 5)).astype(np.int32)
    valid = np.arange(5) >= (np.arange(8) % 4)[:, None]
    prompts = Prompts(np.where(valid, ids, 0), valid, np.arange(8, dtype=np.int32))
    sample = Sampler(models.actor.trunk.config, sampling, (STOP, 7), LAYOUT)
    return sample(models.actor, LAYOUT.put(prompts), jax.random.key(5))


def _experience(
    models: Models, answers: Generation, config: PPOConfig, baseline: float = 0.0
) -> tuple[Experience, Metrics]:
    make = jax.jit(partial(make_experience, config=config, stop_id=STOP, layout=LAYOUT))
    return make(models, answers, jnp.full(8, baseline))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_step_zero_ratio_is_one_and_kl_zero_at_any_temperature(
    models: Models, temperature: float
) -> None:
    sampling = SamplingConfig(max_new_tokens=12, temperature=temperature)
    config = PPOConfig(batch_size=8, sampling=sampling, kl_coef=0.1)
    answers = _answers(models, sampling)
    experience, metrics = _experience(models, answers, config)

    assert abs(float(metrics["kl"])) <= 1e-6
    assert abs(float(metrics["kl_exact"])) <= 1e-6
    assert float(metrics["drift"]) <= 1e-5  # what was sampled and what the trainer computes
    mask = answers.sequences.target
    _, shares = policy_loss(experience.logp, experience.logp, experience.advantages, mask, 0.2)
    of_loss = finished(shares)
    assert float(of_loss["ratio_mean"]) == 1.0 == float(of_loss["ratio_max"])


def test_the_update_programs_ratio_starts_at_one(models: Models) -> None:
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.8)
    config = PPOConfig(batch_size=8, minibatches=2, sampling=sampling)
    answers = _answers(models, sampling)
    experience, _ = _experience(models, answers, config)
    rows = take_rows(experience, jnp.array([6, 1, 3, 4]), LAYOUT), answers.sequences
    loss = jax.jit(partial(actor_loss, config=config, layout=LAYOUT))
    metrics = finished(loss(models.actor, rows, actor_counts(rows))[1])
    assert float(metrics["ratio_mean"]) == pytest.approx(1.0, abs=1e-6)
    assert float(metrics["ratio_max"]) == pytest.approx(1.0, abs=1e-5)


def test_baseline_shifts_the_reward_and_nothing_else(models: Models) -> None:
    sampling = SamplingConfig(max_new_tokens=12)
    config = PPOConfig(batch_size=8, sampling=sampling)
    answers = _answers(models, sampling)
    _, without = _experience(models, answers, config)
    _, with_it = _experience(models, answers, config, 0.25)
    assert float(with_it["reward"]) == pytest.approx(float(without["reward"]) - 0.25, abs=1e-6)
    assert float(with_it["score"]) == float(without["score"])


def test_a_tokens_value_is_that_of_the_state_before_it(models: Models) -> None:
    sampling = SamplingConfig(max_new_tokens=12)
    config = PPOConfig(batch_size=8, sampling=sampling)
    answers = _answers(models, sampling)
    experience, _ = _experience(models, answers, config)
    sequences = answers.sequences
    states = apply_scalar(models.critic, sequences.ids, sequences.valid, LAYOUT)
    np.testing.assert_allclose(experience.values[:, 1:], states[:, :-1], atol=1e-6)


def test_settings_that_cannot_run_are_named() -> None:
    with pytest.raises(UserError, match=r"ppo.batch_size = 10 .* ppo.minibatches = 4"):
        PPOConfig(batch_size=10, minibatches=4).check(LAYOUT, LAYOUT)
    with pytest.raises(UserError, match=r"ppo.sampling.temperature = 0"):
        PPOConfig(sampling=SamplingConfig(temperature=0.0)).check(LAYOUT, LAYOUT)
    with pytest.raises(UserError, match=r"multiple of 4"):
        PPOConfig(batch_size=6, minibatches=1).check(Layout(data=4), Layout(data=4))
