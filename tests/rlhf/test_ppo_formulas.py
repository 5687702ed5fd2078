"""Experience and losses of PPO against NumPy in float64; the models are tables of logits, values and scores."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlhf.ppo
from glm_jax.batch import Sequences
from glm_jax.config import PRESETS
from glm_jax.generate import Generation, SamplingConfig
from glm_jax.metrics import finished
from glm_jax.model import CausalLM
from glm_jax.model_v2 import TrunkV2
from glm_jax.scalar import ScalarModel
from rlhf.kl import KLConfig
from rlhf.ppo import (
    Experience,
    Models,
    PPOConfig,
    actor_counts,
    actor_loss,
    contents,
    critic_counts,
    critic_loss,
    make_experience,
    score_answers,
    take_rows,
)
from sharding.errors import UserError
from sharding.layout import Layout

B, T, V, STOP = 4, 7, 6, 2
ONE = Layout()
RNG = np.random.default_rng(0)
LOGITS, REF_LOGITS, NEW_LOGITS = (2 * RNG.normal(size=(3, B, T, V))).astype(np.float32)
VALUES, NEW_VALUES = RNG.normal(size=(2, B, T)).astype(np.float32)
SCORES = np.array([0.4, -7.0, 1.5, 0.9], np.float32)  # one beyond the clip
BASELINE = np.array([0.1, 0.2, -0.3, 0.4], np.float32)
TARGET = np.zeros((B, T), bool)
for _row, _length in enumerate([4, 2, 3, 1]):
    TARGET[_row, 3 : 3 + _length] = True
VALID = TARGET | (np.arange(T) < 3)
VALID[0, 0] = False
ENDED = np.array([True, False, True, False])
IDS = np.zeros((B, T), np.int32)
for _b in range(B):  # every token is the second most probable one of the policy that sampled
    IDS[_b, 1:] = np.argsort(-LOGITS[_b, :-1])[:, 1]
SFT = Sequences(np.ones((2, 3), np.int32), np.ones((2, 3), bool), np.array([[0, 1, 1]] * 2, bool))
SFT_LOSS = 1.7
CLOSE: dict[str, Any] = {"rel": 0.0, "abs": 1e-5}  # float32 sums of some ten terms below 10


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(model: ScalarModel, rows: Sequences, layout: Layout) -> jax.Array:
        assert rows.ids.shape == (B, T + 1)  # with a stop token for answers that have none
        assert (np.asarray(rows.ids)[~ENDED] == STOP).sum(axis=1).min() >= 1
        return model.w_scalar

    def language_loss(actor: CausalLM, batch: Sequences, count: Any, layout: Layout) -> Any:
        assert isinstance(actor, CausalLM) and layout is ONE
        return jnp.float32(SFT_LOSS) * jnp.sum(batch.target) / count, {}

    def table(model: Any, ids: jax.Array, valid: jax.Array, layout: Layout) -> Any:
        np.testing.assert_array_equal(ids, IDS)
        np.testing.assert_array_equal(valid, VALID)
        assert layout is ONE
        return model.w_head if isinstance(model, CausalLM) else model.w_scalar

    monkeypatch.setattr(rlhf.ppo, "apply_model", table)
    monkeypatch.setattr(rlhf.ppo, "apply_scalar", table)
    monkeypatch.setattr(rlhf.ppo, "sequence_scores", scores)
    monkeypatch.setattr(rlhf.ppo, "language_loss", language_loss)


def _trunk() -> TrunkV2:
    return TrunkV2(jnp.zeros((1, 1)), None, jnp.zeros(1), PRESETS["chatglm3-6b"])


def _policy(logits: np.ndarray) -> CausalLM:
    return CausalLM(_trunk(), jnp.asarray(logits))


def _scorer(numbers: np.ndarray) -> ScalarModel:
    return ScalarModel(_trunk(), jnp.asarray(numbers))


def _answers() -> Generation:
    sequences = Sequences(*map(jnp.asarray, (IDS, VALID, TARGET)))
    logp = jnp.asarray(np.where(TARGET, _logp(LOGITS, CONFIG)[0] - 0.25, 0.0), jnp.float32)
    return Generation(sequences, logp, jnp.asarray(ENDED))


CONFIG = PPOConfig(
    batch_size=B,
    samples=2,
    minibatches=1,
    sampling=SamplingConfig(temperature=0.7),
    kl=KLConfig(coef=0.05),
    gamma=0.9,
    gae_lambda=0.8,
)
TOP_K = dataclasses.replace(CONFIG.sampling, top_k=3)
SETTINGS = {
    "gae": CONFIG,
    "gae whitened": dataclasses.replace(CONFIG, whiten=True, sampling=TOP_K),
    "penalty": dataclasses.replace(CONFIG, truncated="penalty", truncation_penalty=0.6),
    "mask": dataclasses.replace(CONFIG, truncated="mask", whiten=True),
    "rloo": dataclasses.replace(CONFIG, advantage="rloo", sampling=TOP_K),
    "grpo": dataclasses.replace(CONFIG, advantage="grpo", kl=KLConfig(0.05, "loss")),
    "clipped log-ratio": dataclasses.replace(CONFIG, kl=KLConfig(0.05, log_ratio_clip=0.3)),
}


def _distributions(logits: np.ndarray, config: PPOConfig) -> np.ndarray:
    """Log-probabilities of what can be drawn at the position before each token, -inf elsewhere."""
    scaled = logits.astype(np.float64) / config.sampling.temperature
    if config.sampling.top_k:
        drawn = np.argsort(-LOGITS, axis=-1)[..., : config.sampling.top_k]
        keep = np.zeros(scaled.shape, bool)
        np.put_along_axis(keep, drawn, True, axis=-1)
        scaled = np.where(keep, scaled, -np.inf)
    return np.asarray(scaled - np.log(np.exp(scaled).sum(-1, keepdims=True)))


def _logp(logits: np.ndarray, config: PPOConfig) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of every token, and the whole distributions, both aligned to the token."""
    whole = np.concatenate([np.zeros((B, 1, V)), _distributions(logits, config)[:, :-1]], axis=1)
    return np.take_along_axis(whole, IDS[..., None], axis=-1)[..., 0], whole


def _expected(config: PPOConfig) -> dict[str, Any]:
    """An experience and its metrics, written out."""
    logp, p = _logp(LOGITS, config)
    ref_logp, q = _logp(REF_LOGITS, config)
    gap = logp - ref_logp
    scores = np.clip(SCORES.astype(np.float64), -config.score_clip, config.score_clip)
    if config.truncated == "penalty":
        scores = scores - np.where(ENDED, 0, config.truncation_penalty)
    rewards = scores - BASELINE
    counts = TARGET & ENDED[:, None] if config.truncated == "mask" else TARGET
    limit = config.kl.log_ratio_clip or np.inf
    coef = config.kl.coef if config.kl.place == "reward" else 0.0
    shaped = np.where(TARGET, -coef * np.clip(gap, -limit, limit), 0.0)
    advantages = np.zeros((B, T))
    found: dict[str, Any] = {"values": None, "returns": None}
    ends = [3 + int(TARGET[b].sum()) for b in range(B)]
    for b, end in enumerate(ends):
        shaped[b, end - 1] += rewards[b]
    if config.advantage == "gae":
        values = np.concatenate([np.zeros((B, 1)), VALUES[:, :-1].astype(np.float64)], axis=1)
        returns = np.zeros((B, T))
        for b, end in enumerate(ends):
            later = following = 0.0
            for t in reversed(range(3, end)):
                delta = shaped[b, t] + config.gamma * following - values[b, t]
                later = delta + config.gamma * config.gae_lambda * later
                advantages[b, t], returns[b, t] = later, later + values[b, t]
                following = values[b, t]
        found = {"values": values, "returns": returns}
    else:
        sums = shaped.sum(axis=1).reshape(-1, 2)
        for b in range(B):
            own, other = sums[b // 2, b % 2], sums[b // 2, 1 - b % 2]
            advantage = own - other
            if config.advantage == "grpo":
                deviation = math.sqrt((own - other) ** 2 / 2 + 1e-8)
                advantage = (own - (own + other) / 2) / deviation
            advantages[b] = np.where(TARGET[b], advantage, 0.0)
    if config.whiten:
        chosen = advantages[counts]
        advantages = np.where(counts, (advantages - chosen.mean()) / chosen.std(), 0.0)
    finite = np.isfinite(p)
    kl = np.where(finite, np.exp(p) * (np.where(finite, p, 0) - np.where(finite, q, 0)), 0).sum(-1)
    found |= {
        "counts": counts, "logp": logp, "ref_logp": ref_logp, "scores": scores, "shaped": shaped,
        "advantages": advantages,
    }  # fmt: skip
    metrics = {
        "reward": rewards.mean(),
        "reward_se": rewards.std(ddof=1) / B**0.5,
        "score": scores.mean(),
        "kl": gap[TARGET].mean(),
        "kl_k2": (gap[TARGET] ** 2 / 2).mean(),
        "kl_k3": (np.exp(-gap[TARGET]) - 1 + gap[TARGET]).mean(),
        "kl_exact": kl[TARGET].mean(),
        "entropy": -logp[TARGET].mean(),
        "drift": np.abs(logp - _logp(LOGITS, CONFIG)[0] + 0.25)[TARGET].max(),
        "length": TARGET.sum() / B,
        "ended": ENDED.mean(),
        "other_stop": np.mean([ENDED[b] and IDS[b, end - 1] != STOP for b, end in enumerate(ends)]),
        "advantage_std": math.sqrt((advantages[counts] ** 2).mean()),
    }
    return {**found, "metrics": metrics}


def _experience(config: PPOConfig, **changed: Any) -> tuple[Experience, Any, Any]:
    models = Models(
        _policy(LOGITS),
        _scorer(VALUES) if config.advantage == "gae" else None,
        _policy(REF_LOGITS),
        _scorer(SCORES),
    )._replace(**changed)
    baseline = jnp.asarray(changed.pop("baseline", BASELINE))
    with jax.set_mesh(ONE.mesh()):
        return make_experience(
            models, _answers(), baseline, jnp.float32(config.kl.coef), config, STOP, ONE
        )


@pytest.mark.parametrize("name", SETTINGS)
def test_an_experience_and_its_metrics_are_those_written_out(name: str) -> None:
    config = SETTINGS[name]
    experience, metrics, finite = _experience(config)
    expected = _expected(config)
    for field in (
        "counts",
        "logp",
        "ref_logp",
        "values",
        "returns",
        "scores",
        "shaped",
        "advantages",
    ):
        ours, by_hand = getattr(experience, field), expected[field]
        if by_hand is None:
            assert ours is None, field
            continue
        where = TARGET if ours.ndim == 2 else np.ones(B, bool)
        np.testing.assert_allclose(
            np.where(where, ours, 0), np.where(where, by_hand, 0), rtol=0, atol=2e-5, err_msg=field
        )
    np.testing.assert_array_equal(experience.advantages[~experience.counts & ~TARGET], 0.0)
    assert set(metrics) == set(expected["metrics"])
    for field, by_hand in expected["metrics"].items():
        assert float(metrics[field]) == pytest.approx(by_hand, rel=0, abs=2e-5), field
    assert all(np.asarray(x).all() and x.shape == (B,) for x in finite)
    like = contents(config)
    for field in Experience._fields:
        assert (getattr(like, field) is None) == (getattr(experience, field) is None), field
    if config.sampling.top_k:
        assert experience.support is not None and (experience.support[:, :-1].sum(-1) == 3).all()


@pytest.mark.parametrize("name", ["gae", "rloo", "gae whitened"])
def test_contents_have_the_structure_of_an_experience(name: str) -> None:
    found: Any = jax.tree.structure(contents(SETTINGS[name]))
    assert found == jax.tree.structure(_experience(SETTINGS[name])[0])


@pytest.mark.parametrize("part", ["actor", "critic", "reference", "reward"])
def test_rows_with_nan_are_those_of_the_model_that_has_it(part: str) -> None:
    arrays = {"actor": LOGITS, "critic": VALUES, "reference": REF_LOGITS, "reward": SCORES}
    broken = arrays[part].copy()
    broken[1] = np.nan
    model = _policy(broken) if part in ("actor", "reference") else _scorer(broken)
    _, _, finite = _experience(CONFIG, **{part: model})
    bad = {"actor": {"actor"}, "critic": {"critic"}, "reference": {"reference"}}
    for field in finite._fields:
        rows = np.asarray(getattr(finite, field)).tolist()
        ill = field in bad.get(part, {"score", "reward"})
        assert rows == ([True, False, True, True] if ill else [True] * B), field


def test_nan_off_the_answer_is_no_fault_of_a_model() -> None:
    broken = VALUES.copy()
    broken[:, :2] = np.nan  # before the answers; column 2 is the value of their first token
    _, _, finite = _experience(CONFIG, critic=_scorer(broken))
    assert np.asarray(finite.critic).all()


def test_without_a_critic_its_rows_count_as_those_of_the_actor() -> None:
    broken = LOGITS.copy()
    broken[2] = np.nan
    _, _, finite = _experience(SETTINGS["rloo"], actor=_policy(broken))
    assert finite.critic.tolist() == finite.actor.tolist() == [True, True, False, True]


def test_scores_are_clamped_to_either_side() -> None:
    with jax.set_mesh(ONE.mesh()):
        config = dataclasses.replace(CONFIG, score_clip=1.0)
        found = score_answers(
            _scorer(np.array([-3.0, -0.5, 0.5, 3.0], np.float32)), _answers(), config, STOP, ONE
        )
    assert found.tolist() == [-1.0, -0.5, 0.5, 1.0]


# losses


def _mean(values: np.ndarray, counts: np.ndarray, share: int) -> float:
    return float(values[counts].sum() / (share * counts.sum()))


@pytest.mark.parametrize("name", ["gae", "mask", "grpo", "gae whitened"])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
@pytest.mark.parametrize("share", [1, 3])
def test_the_actors_loss_is_the_sum_written_out(
    name: str, entropy_weight: float, share: int
) -> None:
    config = dataclasses.replace(
        SETTINGS[name], entropy_weight=entropy_weight, sft_weight=0.2, clip_range=0.3
    )
    experience, expected = _experience(config)[0], _expected(config)
    counts, advantages = expected["counts"], expected["advantages"]
    logp, p = _logp(NEW_LOGITS, config)
    ratio = np.exp(logp - expected["logp"])
    by_token = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 0.7, 1.3))
    parts = {"policy_loss": _mean(by_token, counts, share), "sft_loss": SFT_LOSS / share}
    loss = parts["policy_loss"] + 0.2 * parts["sft_loss"]
    if config.kl.place == "loss":
        gap = logp - expected["ref_logp"]
        parts["kl_loss"] = _mean(np.exp(-gap) - 1 + gap, counts, share)
        loss += 0.05 * parts["kl_loss"]
    if entropy_weight:
        entropy = -np.where(np.isfinite(p), np.exp(p) * np.where(np.isfinite(p), p, 0), 0).sum(-1)
        parts["policy_entropy"] = _mean(entropy, counts, share)
        loss -= entropy_weight * parts["policy_entropy"]
    rows = experience, jax.tree.map(jnp.asarray, SFT)
    tokens, sft_tokens = actor_counts(rows)
    assert (int(tokens), int(sft_tokens)) == (counts.sum(), 4)
    with jax.set_mesh(ONE.mesh()):
        found, shares = actor_loss(
            _policy(NEW_LOGITS), rows, (share * tokens, share * sft_tokens), config, ONE
        )
    metrics = {key: float(value) for key, value in finished(shares).items()}
    of_policy = {"ratio_mean", "ratio_max", "clip_fraction", "approx_kl"}
    assert set(metrics) == set(parts) | of_policy
    for key, value in parts.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5, abs=2e-5), key
    assert float(found) == pytest.approx(loss, rel=1e-5, abs=2e-5)


@pytest.mark.parametrize("name", ["gae", "mask"])
@pytest.mark.parametrize("share", [1, 3])
def test_the_critics_loss_is_the_clipped_square_error(name: str, share: int) -> None:
    config = dataclasses.replace(SETTINGS[name], value_clip=0.3, value_weight=0.7)
    experience, expected = _experience(config)[0], _expected(config)
    counts, returns, old = expected["counts"], expected["returns"], expected["values"]
    new = np.concatenate([np.zeros((B, 1)), NEW_VALUES[:, :-1]], axis=1).astype(np.float64)
    near = old + np.clip(new - old, -0.3, 0.3)
    value = _mean(np.maximum((new - returns) ** 2, (near - returns) ** 2) / 2, counts, share)
    variance = returns[counts].var()
    explained = _mean(1 - (new - returns) ** 2 / variance, counts, share)
    tokens, spread = critic_counts(experience)
    assert int(tokens) == counts.sum()
    assert float(spread) == pytest.approx(variance, **CLOSE)
    with jax.set_mesh(ONE.mesh()):
        loss, shares = critic_loss(
            _scorer(NEW_VALUES), experience, (share * tokens, spread), config, ONE
        )
    assert float(loss) == pytest.approx(0.7 * value, **CLOSE)
    metrics = finished(shares)
    assert float(metrics["value_loss"]) == pytest.approx(value, **CLOSE)
    # divided by a variance near 1
    assert float(metrics["explained_variance"]) == pytest.approx(explained, rel=1e-4, abs=1e-4)


def test_equal_returns_divide_by_a_small_variance() -> None:
    experience = _experience(CONFIG)[0]._replace(returns=jnp.full((B, T), 0.5))
    assert float(critic_counts(experience)[1]) == pytest.approx(1e-8)


def test_rows_are_taken_from_every_array() -> None:
    experience = _experience(CONFIG)[0]
    order = np.array([2, 0, 3, 1])
    with jax.set_mesh(ONE.mesh()):
        taken = take_rows(ONE.put(jax.device_get(experience)), jnp.asarray(order))
    for ours, whole in zip(jax.tree.leaves(taken), jax.tree.leaves(experience), strict=True):
        np.testing.assert_array_equal(ours, np.asarray(whole)[order])


# settings


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"batch_size": 6, "minibatches": 4}, r"batch_size = 6 .* ppo.minibatches = 4"),
        ({"batch_size": 6, "samples": 4}, r"batch_size = 6 .* ppo.samples = 4"),
        ({"sampling": SamplingConfig(temperature=0.0)}, r"ppo.sampling.temperature = 0"),
        ({"advantage": "rloo"}, r"ppo.advantage = rloo compares .* ppo.samples"),
        ({"advantage": "grpo", "samples": 2, "critic_warmup": 1}, r"ppo.critic_warmup = 1 is for"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        PPOConfig(**{"batch_size": 8, "minibatches": 1, **changes}).check(ONE, ONE)


def test_layouts_must_divide_minibatches_and_prompts() -> None:
    PPOConfig(batch_size=8, minibatches=2, samples=2).check(Layout(data=4), Layout(data=2))
    PPOConfig(batch_size=8, samples=2, advantage="rloo").check(ONE, ONE)
    PPOConfig(batch_size=8, critic_warmup=3).check(ONE, ONE)
    with pytest.raises(UserError, match=r"ppo.batch_size / ppo.minibatches = 4 does not"):
        PPOConfig(batch_size=8, minibatches=2).check(Layout(data=8), ONE)
    with pytest.raises(UserError, match=r"ppo.batch_size / ppo.samples = 4 does not"):
        PPOConfig(batch_size=8, minibatches=1, samples=2).check(ONE, Layout(data=8))
    # prompts are not cut into microbatches or accumulated pieces
    split = Layout(data=2, microbatches=2, accumulate=2)
    PPOConfig(batch_size=8, minibatches=1, samples=4).check(split, split)
