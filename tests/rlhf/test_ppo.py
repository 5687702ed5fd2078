"""What must hold of an iteration's experience before the first update, and of the settings."""

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


def _rounding(models: Models, temperature: float) -> float:
    """What log-probabilities of two programs may differ by, in nats: logits are about 0.02 * 30 * sqrt(D)."""
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
    # what was sampled and what the trainer computes
    atol = _rounding(models, sampling.temperature)
    assert float(metrics["drift"]) == pytest.approx(0.0, abs=atol)
    mask = answers.sequences.target
    _, shares = policy_loss(experience.logp, experience.logp, experience.advantages, mask, 0.2)
    of_loss = finished(shares)
    assert float(of_loss["ratio_mean"]) == 1.0 == float(of_loss["ratio_max"])


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
