"""Experience and losses of PPO and DPO against float64 by hand; models are tables of numbers.

Actor, old actor and reference differ, values have moved and ratios lie on both sides of the clip: at the first update,
where all of them agree, half of the mistakes one can make would not show.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlhf.dpo
import rlhf.ppo
from glm_jax.batch import Pairs, Sequences
from glm_jax.generate import Generation, SamplingConfig
from glm_jax.model import CausalLM
from glm_jax.scalar import ScalarModel
from glm_jax.train import TrainState
from rlhf.dpo import DPOConfig, LabelledPairs, answer_logprobs, best_and_worst, pair_loss
from rlhf.kl import KLConfig
from rlhf.ppo import (
    Experience,
    Models,
    PPOConfig,
    actor_counts,
    actor_loss,
    critic_counts,
    critic_loss,
    make_experience,
)
from rlhf.ppo_iteration import Learners, current_models, minibatches
from sharding.layout import Layout

LAYOUT = Layout()
ROWS, COLUMNS, VOCAB, START = 12, 7, 6, 2
LENGTHS = np.array([5, 3, 1, 4] * 3)
MASK = (np.arange(COLUMNS) >= START) & (np.arange(COLUMNS) < START + LENGTHS[:, None])
SCORES, BASELINE = np.random.default_rng(4).normal(size=(2, ROWS))
BETA, SFT_LOSS = 0.2, 2.5
# a dozen float32 operations on numbers up to 10
RTOL, ATOL = 2e-5, 2e-6


def table(values: np.ndarray, kind: type = CausalLM) -> Any:
    """A model whose output is known: logits [B, T, V], or of a critic [B, T]."""
    return Mock(spec=kind, values=values)


class World(NamedTuple):
    """Models by role, and the answers that the old actor gave."""

    actor: Any  # as it is by now
    old: Any
    reference: Any
    critic: Any  # by now
    old_critic: Any
    answers: Generation


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Models that apply by being looked up."""
    rng = np.random.default_rng(3)

    def logits(near: np.ndarray | float = 0.0, scale: float = 1.0) -> np.ndarray:
        return near + scale * rng.normal(size=(ROWS, COLUMNS, VOCAB))

    old = logits()
    values = rng.normal(size=(ROWS, COLUMNS))
    ids = rng.integers(0, VOCAB, (ROWS, COLUMNS)).astype(np.int32)
    valid = (np.arange(COLUMNS) < START) | MASK
    sequences = Sequences(jnp.asarray(ids), jnp.asarray(valid), jnp.asarray(MASK))
    ended = jnp.array([True, True, True, False] * 3)
    answers = Generation(sequences, jnp.zeros((ROWS, COLUMNS)), ended)
    for name in ("apply_model", "apply_scalar"):
        monkeypatch.setattr(rlhf.ppo, name, lambda model, *_: jnp.float32(model.values))
    monkeypatch.setattr(rlhf.ppo, "sequence_scores", lambda *_: jnp.float32(SCORES))
    sft: Any = (jnp.float32(SFT_LOSS), {})
    monkeypatch.setattr(rlhf.ppo, "language_loss", lambda *_: sft)
    with jax.set_mesh(LAYOUT.mesh()):
        yield World(
            actor=table(logits(old, 0.5)),
            old=table(old),
            reference=table(logits()),
            critic=table(values + 0.5 * rng.normal(size=values.shape), ScalarModel),
            old_critic=table(values, ScalarModel),
            answers=answers,
        )


def _logp(model: Any, temperature: float) -> np.ndarray:
    """log p of every token in all of its vocabulary [B, T, V], aligned to the token."""
    scaled = model.values / temperature
    logp = scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))
    return np.pad(logp[:, :-1], ((0, 0), (1, 0), (0, 0)))


def _chosen(logp: np.ndarray, world: World) -> np.ndarray:
    ids = np.asarray(world.answers.sequences.ids)
    return np.take_along_axis(logp, ids[..., None], axis=-1)[..., 0]


def _experience(world: World, config: PPOConfig, has_critic: bool = True) -> Experience:
    critic = world.old_critic if has_critic else None
    models = Models(world.old, critic, world.reference, table(SCORES, ScalarModel))
    beta = jnp.float32(BETA)
    found, _, _ = make_experience(
        models, world.answers, jnp.float32(BASELINE), beta, config, 2, LAYOUT
    )
    return found


def _shaped(world: World, config: PPOConfig) -> np.ndarray:
    """Rewards of tokens: the score less its baseline on the last one, less beta log-ratio on each."""
    temperature = config.sampling.temperature
    ratio = _chosen(_logp(world.old, temperature), world)
    ratio = ratio - _chosen(_logp(world.reference, temperature), world)
    rewards = np.where(MASK, -BETA * ratio, 0.0)
    rewards[np.arange(ROWS), START + LENGTHS - 1] += SCORES - BASELINE
    return rewards


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("gamma_lambda", [(1.0, 0.95), (0.9, 0.7)])
def test_an_experience_by_hand(
    world: World, whiten: bool, gamma_lambda: tuple[float, float]
) -> None:
    """Returns are of the advantages as they are before they are whitened."""
    gamma, lam = gamma_lambda
    sampling = SamplingConfig(temperature=0.8)
    config = PPOConfig(
        batch_size=ROWS, whiten=whiten, gamma=gamma, gae_lambda=lam, sampling=sampling
    )
    found = _experience(world, config)
    rewards = _shaped(world, config)
    values = np.pad(world.old_critic.values[:, :-1], ((0, 0), (1, 0)))
    advantages = np.zeros((ROWS, COLUMNS))
    for row, length in enumerate(LENGTHS):
        later = following = 0.0
        for t in reversed(range(START, START + length)):
            delta = rewards[row, t] + gamma * following - values[row, t]
            later = advantages[row, t] = delta + gamma * lam * later
            following = values[row, t]
    returns = np.where(MASK, advantages + values, 0.0)
    if whiten:
        inside = advantages[MASK]
        advantages = np.where(MASK, (advantages - inside.mean()) / inside.std(), 0.0)
    assert found.values is not None and found.returns is not None
    for name, expected in (
        ("logp", _chosen(_logp(world.old, 0.8), world)),
        ("ref_logp", _chosen(_logp(world.reference, 0.8), world)),
        ("scores", SCORES),
        ("shaped", rewards),
        ("values", values),
        ("advantages", advantages),
        ("returns", returns),
    ):
        ours = np.asarray(getattr(found, name))
        where = MASK if ours.ndim == 2 else slice(None)
        np.testing.assert_allclose(ours[where], expected[where], err_msg=name, rtol=RTOL, atol=ATOL)
    np.testing.assert_array_equal(found.counts, MASK)


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_an_experience_without_a_critic_by_hand(world: World, advantage: Any) -> None:
    config = PPOConfig(batch_size=ROWS, samples=2, advantage=advantage)
    found = _experience(world, config, has_critic=False)
    totals = _shaped(world, config).sum(axis=1)
    expected = np.zeros(ROWS)
    for row in range(ROWS):
        other = totals[row ^ 1]  # the other answer to the prompt
        expected[row] = totals[row] - other
        if (
            advantage == "grpo"
        ):  # of two numbers the deviation is the gap over sqrt 2; the KL is not divided
            gap = (SCORES - BASELINE)[row] - (SCORES - BASELINE)[row ^ 1]
            expected[row] = np.sign(gap) / np.sqrt(2) + (expected[row] - gap) / 2
    np.testing.assert_allclose(
        found.advantages, np.where(MASK, expected[:, None], 0), rtol=RTOL, atol=ATOL
    )
    assert found.values is None and found.returns is None


LOSSES = [
    PPOConfig(sft_weight=0.3),
    PPOConfig(sft_weight=0.3, clip_range=0.05, sampling=SamplingConfig(temperature=0.7)),
    PPOConfig(sft_weight=0.0, entropy_weight=0.4),
    PPOConfig(sft_weight=0.1, kl=KLConfig(coef=0.25, place="loss")),
    PPOConfig(entropy_weight=0.2, kl=KLConfig(coef=0.25, place="loss")),
]


@pytest.mark.parametrize("config", LOSSES, ids=range(len(LOSSES)))
def test_what_the_actor_lowers_by_hand(world: World, config: PPOConfig) -> None:
    """mean(max(-A r, -A clip(r))) + sft_weight L_SFT + coef k3(pi, pi_0) - entropy_weight H, away from ratio 1."""
    config = dataclasses.replace(config, batch_size=ROWS)
    temperature = config.sampling.temperature
    experience = _experience(world, config)
    now, old = (_chosen(_logp(x, temperature), world)[MASK] for x in (world.actor, world.old))
    reference = _chosen(_logp(world.reference, temperature), world)[MASK]
    ratio, a = np.exp(now - old), np.asarray(experience.advantages, np.float64)[MASK]
    eps = config.clip_range
    # both clips bind, with advantages of both signs
    sides = itertools.product((ratio > 1 + eps, ratio < 1 - eps), (a > 0, a < 0))
    assert all((side & sign).any() for side, sign in sides)
    clipped = np.clip(ratio, 1 - eps, 1 + eps)
    expected = np.maximum(-a * ratio, -a * clipped).mean() + config.sft_weight * SFT_LOSS
    if config.kl.place == "loss":
        gap = now - reference
        expected += config.kl.coef * (np.exp(-gap) - 1 + gap).mean()
    logp = _logp(world.actor, temperature)
    entropy = -(np.exp(logp) * logp).sum(axis=-1)[MASK].mean()
    expected -= config.entropy_weight * entropy
    rows = (experience, world.answers.sequences)
    loss, _ = actor_loss(world.actor, rows, actor_counts(rows), config, LAYOUT)
    assert float(loss) == pytest.approx(expected, rel=RTOL, abs=ATOL)


@pytest.mark.parametrize("clip", [0.1, 0.4, 10.0])
def test_what_the_critic_lowers_by_hand(world: World, clip: float) -> None:
    """value_weight mean(max((V - R)^2, (V_clip - R)^2)) / 2, where values have moved by more than the clip."""
    config = PPOConfig(batch_size=ROWS, value_clip=clip, value_weight=0.6)
    experience = _experience(world, config)
    now, old = (
        np.pad(x.values[:, :-1], ((0, 0), (1, 0)))[MASK] for x in (world.critic, world.old_critic)
    )
    returns = np.asarray(experience.returns, np.float64)[MASK]
    assert clip == 10.0 or ((now - old > clip).any() and (now - old < -clip).any())
    near = np.clip(now, old - clip, old + clip)
    expected = 0.6 * np.maximum((now - returns) ** 2, (near - returns) ** 2).mean() / 2
    count = critic_counts(experience)
    loss, _ = critic_loss(world.critic, experience, count, config, LAYOUT)
    assert float(loss) == pytest.approx(expected, rel=RTOL, abs=ATOL)


# which rows an epoch visits, and which models stay


@pytest.mark.parametrize("counts", [(1, 8), (3, 4), (4, 1), (2, 2)])
def test_an_epoch_visits_every_row_once_in_an_order_of_its_own(counts: tuple[int, int]) -> None:
    epochs, minis = counts
    config = PPOConfig(batch_size=64, epochs=epochs, minibatches=minis)
    orders = []
    for key in (jax.random.key(0), jax.random.key(1)):
        found = list(minibatches(key, config))
        assert [len(index) for index in found] == [64 // minis] * (epochs * minis)
        for epoch in range(epochs):
            order = np.concatenate(found[epoch * minis : (epoch + 1) * minis])
            assert sorted(order) == list(range(64))
            orders.append(tuple(order))
    assert len(set(orders)) == 2 * epochs  # two of 64! are equal by chance never
    assert tuple(range(64)) not in orders


def test_only_actor_and_critic_follow_their_learners() -> None:
    one, other = (Models(*(f"{role} {x}" for role in Models._fields)) for x in "ab")  # type: ignore[arg-type]
    actor, critic = (TrainState(0, model, None) for model in (other.actor, other.critic))
    now = current_models(one, Learners(actor, critic, 0.1))
    assert now == one._replace(actor=other.actor, critic=other.critic)


# DPO


def test_an_answers_log_probability_is_the_sum_over_its_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logp = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    monkeypatch.setattr(rlhf.dpo, "sequence_logprobs", lambda *_: jnp.asarray(logp))
    sequences = Sequences(jnp.asarray(MASK), jnp.asarray(MASK), jnp.asarray(MASK))
    found = answer_logprobs(table(logp), sequences, LAYOUT)
    expected = [row[keep].sum() for row, keep in zip(logp.astype(float), MASK, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_dpo_lowers_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """-log sigmoid(beta h) + sft_weight L_SFT, h of whole answers that differ in length."""
    rng = np.random.default_rng(1)
    logp = rng.normal(size=(2 * ROWS, COLUMNS)).astype(np.float32)
    reference = rng.normal(size=(ROWS, 2)).astype(np.float32)
    chosen = Sequences(*(jnp.asarray(x) for x in (MASK.astype(np.int32), MASK, MASK)))
    other = Sequences(*(x[::-1] for x in chosen))
    sft: Any = (jnp.float32(SFT_LOSS), {})
    monkeypatch.setattr(rlhf.dpo, "sequence_logprobs", lambda *_: jnp.asarray(logp))
    monkeypatch.setattr(rlhf.dpo, "language_loss", lambda *_: sft)
    config = DPOConfig(beta=0.4, sft_weight=0.3)
    with jax.set_mesh(LAYOUT.mesh()):
        batch = (LabelledPairs(Pairs(chosen, other), jnp.asarray(reference)), chosen)
        loss, _ = pair_loss(table(logp), batch, (ROWS, jnp.int32(1)), config, LAYOUT)
    expected = config.sft_weight * SFT_LOSS
    for row in range(ROWS):
        w = logp[2 * row][MASK[row]].astype(float).sum() - reference[row, 0]
        l = logp[2 * row + 1][MASK[ROWS - 1 - row]].astype(float).sum() - reference[row, 1]  # noqa: E741
        expected += np.log1p(np.exp(-config.beta * (w - l))) / ROWS
    assert float(loss) == pytest.approx(expected, rel=RTOL, abs=ATOL)


def test_best_and_worst_go_by_score_and_not_by_log_probability() -> None:
    rng = np.random.default_rng(0)
    scores, logp = (rng.normal(size=(50, 5)) for _ in range(2))
    ids = np.arange(250, dtype=np.int32)[:, None]
    everywhere = np.ones_like(ids, bool)
    answers, ended = Sequences(ids, everywhere, everywhere), np.ones((50, 5), bool)
    found = best_and_worst(answers, scores, ended, logp, DPOConfig())
    for row in range(50):
        order = sorted(range(5), key=lambda k: scores[row, k])
        best, worst = order[-1], order[0]
        assert found.pairs.chosen.ids[row, 0] == 5 * row + best
        assert found.pairs.rejected.ids[row, 0] == 5 * row + worst
        np.testing.assert_array_equal(found.ref_logp[row], logp[row, [best, worst]])
