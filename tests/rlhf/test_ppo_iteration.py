"""Iterations of PPO on input that is bad or at the edge: a documented value or a clear line, never NaN in weights."""

import dataclasses
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.config import PRESETS
from glm_jax.generate import Generation, SamplingConfig
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.train import TrainState
from rlhf.ppo import Models, PPOConfig
from rlhf.ppo_iteration import Iteration, Midway
from rlhf.trials.models import ANSWER, tiny
from rlhf.trials.ppo import PLAIN, SmallPPO, small_ppo
from sharding.errors import UserError
from sharding.fingerprint import fingerprint
from sharding.layout import Layout

CONFIG = dataclasses.replace(tiny(PRESETS["chatglm3-6b"]), num_layers=2)
LAYOUT = Layout()
ROWS = PLAIN.batch_size
OPTIMIZERS = (make_optimizer(OptimConfig(learning_rate=5e-3), 8),) * 2


@pytest.fixture(scope="module")
def small() -> Any:
    """One set of programs for all tests that change no setting which they are compiled with."""
    with jax.set_mesh(LAYOUT.mesh()):
        yield small_ppo(CONFIG, PLAIN, OPTIMIZERS, LAYOUT)


def _with(small: SmallPPO, **settings: Any) -> Iteration:
    """The same programs under settings that only the loop reads."""
    config = dataclasses.replace(small.iterate.config, **settings)
    return dataclasses.replace(small.iterate, config=config)


def _copied(state: TrainState) -> TrainState:
    copy: TrainState = jax.tree.map(jnp.copy, state)
    return copy


def _fresh(small: SmallPPO) -> Any:
    """Learners that an iteration may donate."""
    actor, critic, coef = small.learners
    assert critic is not None
    return small.learners._replace(actor=_copied(actor), critic=_copied(critic), kl_coef=coef)


def _weights(learners: Any) -> tuple[Any, Any]:
    return fingerprint(learners.actor.model), fingerprint(learners.critic.model)


@pytest.mark.parametrize(
    ("role", "line"),
    [
        ("reward", r"the reward model scores 16 of 16 answers are not numbers \(first: row 0"),
        ("reference", r"the reference model's log-probabilities of 16 of 16"),
        ("critic", r"the critic's values of 16 of 16"),
        ("actor", r"the policy's log-probabilities of 16 of 16"),
    ],
)
def test_a_model_with_nan_is_named_and_nothing_is_learnt(
    small: SmallPPO, role: str, line: str
) -> None:
    learners, models = _fresh(small), small.models
    ill = jax.tree.map(lambda x: x * jnp.nan, getattr(models, role))
    if role in ("actor", "critic"):
        state = dataclasses.replace(getattr(learners, role), model=ill)
        learners = learners._replace(**{role: state})
    else:
        models = models._replace(**{role: ill})
    unused = Mock()
    iterate = dataclasses.replace(small.iterate, update_actor=unused, update_critic=unused)
    with pytest.raises(UserError, match=line):
        iterate(learners, models, small.inputs(0), jax.random.key(0))
    unused.assert_not_called()


def test_nan_in_one_row_names_the_row(small: SmallPPO) -> None:
    inputs = small.inputs(0)
    baseline = inputs.baseline.copy()
    baseline[3] = np.nan  # as of a reference answer that could not be scored
    with pytest.raises(UserError, match=r"row 3"):
        small.iterate(
            _fresh(small), small.models, inputs._replace(baseline=baseline), jax.random.key(0)
        )


def test_a_gradient_that_is_not_finite_leaves_the_weights(small: SmallPPO) -> None:
    learners = _fresh(small)
    before = _weights(learners)
    learners, rolled_out = small.iterate.roll_out(
        learners, small.models, small.inputs(0), jax.random.key(0)
    )
    experience = rolled_out.experience
    nothing = jnp.nan * experience.advantages
    ill = experience._replace(advantages=nothing, returns=nothing)
    midway = Midway(rolled_out._replace(experience=ill), [])
    learners, updates = small.iterate.learn(
        learners, midway, small.inputs(0).sft_batches, jax.random.key(1), True
    )
    assert _weights(learners) == before
    assert int(learners.actor.step) == 2  # they count, although nothing was learnt
    with pytest.raises(UserError, match="ppo: an update: the gradient is not finite"):
        small.iterate.concluded(learners, rolled_out, updates, True)


def test_sampling_leaves_moments_and_schedule_where_they_were(small: SmallPPO) -> None:
    learners, _, _ = small.iterate(_fresh(small), small.models, small.inputs(0), jax.random.key(0))
    before = jax.device_get((learners.actor.step, learners.actor.opt_state, learners.critic))
    learners, _ = small.iterate.roll_out(learners, small.models, small.inputs(1), jax.random.key(1))
    after = jax.device_get((learners.actor.step, learners.actor.opt_state, learners.critic))
    assert int(before[0]) == 2
    assert any(np.any(moment) for moment in jax.tree.leaves(before[1]))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_what_is_measured_of_the_answers_is_in_the_metrics(small: SmallPPO) -> None:
    seen: list[tuple[list[int], int]] = []

    def measure(rows: np.ndarray, answers: Generation) -> dict[str, float]:
        seen.append((rows.tolist(), len(answers.ended)))
        return {"judged": 0.25}

    iterate = dataclasses.replace(small.iterate, measure=measure)
    _, figures, _ = iterate(_fresh(small), small.models, small.inputs(0), jax.random.key(0))
    assert figures["judged"] == 0.25
    assert seen == [(list(range(ROWS)), ROWS)]


def test_updates_end_where_the_policy_has_gone_far_enough(small: SmallPPO) -> None:
    learners, figures, _ = _with(small, epochs=3)(
        _fresh(small), small.models, small.inputs(0), jax.random.key(0)
    )
    assert figures["updates"] == 6 and int(learners.actor.step) == 6
    limit = figures["approx_kl"] / 10
    learners, figures, _ = _with(small, epochs=3, stop_kl=limit)(
        _fresh(small), small.models, small.inputs(0), jax.random.key(0)
    )
    assert 1 < figures["updates"] < 6
    assert learners.critic is not None
    assert int(learners.actor.step) == int(learners.critic.step) == 6  # the schedule moves on


def test_the_kl_coefficient_adapts_from_one_iteration_to_the_next(small: SmallPPO) -> None:
    kl = dataclasses.replace(PLAIN.kl, target=1e-3, horizon=ROWS)
    iterate, learners = _with(small, kl=kl), _fresh(small)
    learners, first, _ = iterate(learners, small.models, small.inputs(0), jax.random.key(0))
    assert first["kl_coef"] == pytest.approx(0.1)
    assert learners.kl_coef == pytest.approx(0.1 * 0.8)  # no KL yet: below the target
    learners, second, _ = iterate(learners, small.models, small.inputs(1), jax.random.key(1))
    assert second["kl_coef"] == pytest.approx(0.08) and second["kl"] > 0.01
    assert learners.kl_coef == pytest.approx(0.08 * 1.2)


def test_equal_rewards_teach_a_critic_free_policy_nothing_and_break_nothing() -> None:
    config = dataclasses.replace(
        PLAIN,
        advantage="grpo",
        samples=4,
        sft_weight=0.0,
        kl=dataclasses.replace(PLAIN.kl, coef=0.0),
    )
    with jax.set_mesh(LAYOUT.mesh()):
        iterate, models, learners, inputs = small_ppo(CONFIG, config, OPTIMIZERS, LAYOUT)
        models.reward.w_scalar = models.reward.w_scalar * 0.0
        learners, figures, _ = iterate(learners, models, inputs(0), jax.random.key(0))
    assert figures["advantage_std"] == figures["grad_norm"] == 0.0
    assert all(np.isfinite(value) for value in figures.values())


def _with_no_answer_ended(iterate: Iteration) -> Iteration:
    """Rollouts of which every one is said to have been cut off."""

    def experience_of(models: Models, answers: Generation, *rest: Any) -> Any:
        return iterate.experience_of(models, answers._replace(ended=answers.ended & False), *rest)

    return dataclasses.replace(iterate, experience_of=experience_of)


def test_of_answers_that_are_all_cut_off_only_sft_is_learnt() -> None:
    config = dataclasses.replace(PLAIN, truncated="mask")
    with jax.set_mesh(LAYOUT.mesh()):
        iterate, models, learners, inputs = small_ppo(CONFIG, config, OPTIMIZERS, LAYOUT)
        _, figures, _ = _with_no_answer_ended(iterate)(
            learners, models, inputs(0), jax.random.key(0)
        )
    assert figures["policy_loss"] == figures["value_loss"] == 0.0
    assert figures["loss"] == pytest.approx(config.sft_weight * figures["sft_loss"])
    assert all(np.isfinite(value) for value in figures.values())


def test_answers_of_nothing_but_a_stop_token_are_learnt_from(small: SmallPPO) -> None:
    """The emptiest answer there is: the stop token is its only token."""
    sampling = SamplingConfig(max_new_tokens=ANSWER, temperature=0.7)
    every = tuple(range(CONFIG.vocab_size))
    with jax.set_mesh(LAYOUT.mesh()):
        iterate, models, _, inputs = small_ppo(CONFIG, PLAIN, OPTIMIZERS, LAYOUT, sampling, every)
        iterate = dataclasses.replace(small.iterate, sample=iterate.sample)
        _, figures, _ = iterate(_fresh(small), models, inputs(0), jax.random.key(0))
    assert figures["length"] == 1.0 and figures["ended"] == 1.0
    assert all(np.isfinite(value) for value in figures.values())


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"batch_size": 10, "minibatches": 4}, r"ppo.batch_size = 10 .* ppo.minibatches = 4"),
        ({"batch_size": 16, "samples": 3}, r"ppo.batch_size = 16 .* ppo.samples = 3"),
        ({"advantage": "grpo"}, r"ppo.advantage = grpo compares answers to one prompt"),
        (
            {"advantage": "rloo", "samples": 2, "critic_warmup": 1},
            r"ppo.critic_warmup = 1 is for a critic",
        ),
        (
            {"sampling": SamplingConfig(temperature=0.0)},
            r"ppo.sampling.temperature = 0 has no log-probabilities",
        ),
    ],
)
def test_settings_that_cannot_run_are_named(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        PPOConfig(**settings).check(LAYOUT, LAYOUT)
