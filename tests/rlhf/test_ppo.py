"""What must hold of an iteration's experience before the first update, and of the settings."""

import math
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glm_jax.batch import Prompts, Sequences
from glm_jax.config import GLMConfig
from glm_jax.generate import Generation, SamplingConfig
from glm_jax.loss import token_logprobs
from glm_jax.metrics import Metrics, finished
from glm_jax.model import CausalLM, apply_model, init_model
from glm_jax.sampler import Sampler
from glm_jax.scalar import ScalarModel, apply_scalar, scalar_model
from rlhf.advantages import shaped_rewards
from rlhf.kl import KLConfig
from rlhf.losses import policy_loss
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
from tests.tolerances import rounding, terms_of

LAYOUT = Layout()
STOP = 2
MASK = np.array([[0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0, 0]], bool)


def test_score_stands_on_the_last_token_of_the_answer() -> None:
    zeros = jnp.zeros(MASK.shape)
    shaped = shaped_rewards(jnp.array([0.3, -0.4, 0.002]), zeros, zeros, jnp.asarray(MASK), 0.05)
    expected = np.zeros(MASK.shape, np.float32)
    expected[0, 4], expected[1, 6], expected[2, 2] = 0.3, -0.4, 0.002
    np.testing.assert_array_equal(np.asarray(shaped), expected)


def test_every_answer_is_closed_by_the_token_of_reward_training() -> None:
    ids = jnp.array([[5, 6, 7, 8, 2, 0, 0], [5, 6, 7, 8, 9, 9, 9], [5, 6, 11, 0, 0, 0, 0]])
    valid = jnp.asarray(MASK).at[:, :2].set(True)
    sequences = Sequences(ids, valid, jnp.asarray(MASK))
    longer = with_stop(sequences, jnp.array([True, False, True]), STOP)
    assert longer.ids[1].tolist() == [5, 6, 7, 8, 9, 9, 9, 2]  # appended to what was cut off
    assert longer.ids[2].tolist() == [5, 6, 2, 0, 0, 0, 0, 0]  # in place of another stop token
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


def _rounding(models: Models, temperature: float) -> float:
    """Bound of the difference between log-probabilities of two programs, in nats; logits are about 0.6 sqrt(D)."""
    config = models.actor.trunk.config
    logits = 0.6 * config.hidden_size**0.5 / temperature
    return rounding(2 * terms_of(config, 17), logits)


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
    experience, metrics, _ = make(models, answers, jnp.full(8, baseline), config.kl.coef)
    return experience, metrics


@pytest.mark.parametrize(
    "settings",
    [(0.6, 0, 1.0), (1.0, 0, 1.0), (1.7, 0, 1.0), (1.0, 5, 1.0), (0.8, 0, 0.9), (1.2, 20, 0.7)],
)
def test_step_zero_ratio_is_one_and_kl_zero_however_answers_are_drawn(
    models: Models, settings: tuple[float, int, float]
) -> None:
    sampling = SamplingConfig(12, *settings)
    config = PPOConfig(batch_size=8, sampling=sampling, kl=KLConfig(coef=0.1))
    answers = _answers(models, sampling)
    experience, metrics = _experience(models, answers, config)

    assert float(metrics["kl"]) == pytest.approx(0.0, abs=1e-6)
    assert float(metrics["kl_exact"]) == pytest.approx(0.0, abs=1e-6)
    # sampled log-probabilities against the trainer's
    atol = _rounding(models, sampling.temperature)
    assert float(metrics["drift"]) == pytest.approx(0.0, abs=atol)
    mask = answers.sequences.target
    _, shares = policy_loss(experience.logp, experience.logp, experience.advantages, mask, 0.2)
    of_loss = finished(shares)
    assert float(of_loss["ratio_mean"]) == 1.0 == float(of_loss["ratio_max"])


def test_only_the_reward_model_reads_another_stop_token(models: Models) -> None:
    sampling = SamplingConfig(max_new_tokens=12)
    config = PPOConfig(batch_size=8, sampling=sampling)
    answers = _answers(models, sampling)
    ids, _, target = (np.asarray(x) for x in answers.sequences)
    last = ids[np.arange(8), 16 - np.argmax(target[:, ::-1], axis=1)]
    others = np.asarray(answers.ended) & (last != STOP)
    assert others.any() and not others.all()
    experience, metrics = _experience(models, answers, config)
    assert float(metrics["other_stop"]) == pytest.approx(others.mean())
    np.testing.assert_array_equal(experience.sequences.ids, ids)
    np.testing.assert_array_equal(experience.counts, target)
    # each as by a program that knows no reward model, up to 4 units in the last place of a logit of 13
    logits = apply_model(models.actor, *answers.sequences[:2], LAYOUT)
    logp = np.where(target, token_logprobs(logits, answers.sequences.ids), 0.0)
    np.testing.assert_allclose(np.where(target, experience.logp, 0.0), logp, atol=4e-6)
    assert models.critic is not None and experience.values is not None
    states = apply_scalar(models.critic, *answers.sequences[:2], LAYOUT)
    np.testing.assert_allclose(experience.values[:, 1:], states[:, :-1], atol=1e-6)


@pytest.mark.isa
def test_the_update_programs_ratio_starts_at_one(models: Models) -> None:
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.8)
    config = PPOConfig(batch_size=8, minibatches=2, sampling=sampling)
    answers = _answers(models, sampling)
    experience, _ = _experience(models, answers, config)
    rows = take_rows(experience, jnp.array([6, 1, 3, 4])), answers.sequences
    loss = jax.jit(partial(actor_loss, config=config, layout=LAYOUT))
    metrics = finished(loss(models.actor, rows, actor_counts(rows))[1])
    assert float(metrics["ratio_mean"]) == pytest.approx(1.0, abs=1e-6)
    atol = _rounding(models, sampling.temperature)
    assert float(metrics["ratio_max"]) == pytest.approx(1.0, abs=atol)


def test_baseline_shifts_the_reward_and_nothing_else(models: Models) -> None:
    sampling = SamplingConfig(max_new_tokens=12)
    config = PPOConfig(batch_size=8, sampling=sampling)
    answers = _answers(models, sampling)
    _, without = _experience(models, answers, config)
    _, with_it = _experience(models, answers, config, 0.25)
    assert float(with_it["reward"]) == pytest.approx(float(without["reward"]) - 0.25, abs=1e-6)
    assert float(with_it["score"]) == float(without["score"])


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_a_group_is_normalised_by_its_scores_and_not_by_its_kl(
    models: Models, place: Literal["reward", "loss"]
) -> None:
    sampling = SamplingConfig(max_new_tokens=12)
    config = PPOConfig(
        batch_size=8,
        samples=4,
        advantage="grpo",
        truncated="penalty",
        kl=KLConfig(coef=0.02, place=place),
        sampling=sampling,
    )
    answers = _answers(models, sampling)
    head = models.actor.w_head
    assert head is not None
    other = nnx.clone(models.reference)
    other.w_head = 0.9 * head
    mute = nnx.clone(models.reward)
    mute.w_scalar = 0.0 * mute.w_scalar
    mask = np.asarray(answers.sequences.target)
    ended = jnp.asarray([True] * 4 + [False, True, True, False])
    answers = answers._replace(ended=ended)  # of equal scores the first group ties, the second not
    tied = models._replace(critic=None, reference=other, reward=mute)
    for case in (tied, tied._replace(reward=models.reward)):
        experience, _ = _experience(case, answers, config)
        log_ratio = np.where(
            mask, np.asarray(experience.logp) - np.asarray(experience.ref_logp), 0.0
        )
        costs = [-0.02 * math.fsum(row) if place == "reward" else 0.0 for row in log_ratio]
        assert place == "loss" or max(map(abs, costs)) > 0.01
        scores = [float(x) for x in experience.scores]
        for row in range(8):
            group = range(4 * (row // 4), 4 * (row // 4) + 4)
            spread = statistics.stdev(scores[i] for i in group)
            gap = scores[row] - statistics.fmean(scores[i] for i in group)
            expected = gap / spread if spread > 1e-6 else 0.0
            expected += costs[row] - statistics.fmean(costs[i] for i in group)
            found = np.asarray(experience.advantages[row])
            # 1e-4 is added to deviations, which are 0.5 for the penalty alone and 0.02 for scores alone
            np.testing.assert_allclose(found[mask[row]], expected, rtol=1e-4, atol=1e-5)
            assert not found[~mask[row]].any()
        if case is tied and place == "loss":
            assert not np.asarray(experience.advantages[:4]).any()


def test_a_tokens_value_is_that_of_the_state_before_it(models: Models) -> None:
    sampling = SamplingConfig(max_new_tokens=12)
    config = PPOConfig(batch_size=8, sampling=sampling)
    answers = _answers(models, sampling)
    experience, _ = _experience(models, answers, config)
    sequences = answers.sequences
    assert models.critic is not None and experience.values is not None
    states = apply_scalar(models.critic, sequences.ids, sequences.valid, LAYOUT)
    np.testing.assert_allclose(experience.values[:, 1:], states[:, :-1], atol=1e-6)


def test_settings_that_cannot_run_are_named() -> None:
    with pytest.raises(UserError, match=r"ppo.batch_size = 10 .* ppo.minibatches = 4"):
        PPOConfig(batch_size=10, minibatches=4).check(LAYOUT, LAYOUT)
    with pytest.raises(UserError, match=r"ppo.sampling.temperature = 0"):
        PPOConfig(sampling=SamplingConfig(temperature=0.0)).check(LAYOUT, LAYOUT)
    with pytest.raises(UserError, match=r"multiple of 4"):
        PPOConfig(batch_size=6, minibatches=1).check(Layout(data=4), Layout(data=4))
