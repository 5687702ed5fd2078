"""Checks of values, advantages and returns."""

from typing import Any

import numpy as np

from rlhf.doctor.evidence import Evidence
from rlhf.doctor.finding import Finding, Rounding, first_failure, judged, within, worst


def values(e: Evidence) -> Finding:
    """A token's value is the critic's output before it was sampled."""
    if e.values is None or e.experience.values is None:
        return Finding("skip", "no critic")
    rows: list[tuple[str, Any, Any, Rounding]] = [
        ("values of tokens", e.experience.values, e.values, e.value_rounding)
    ]
    if e.probe is not None and e.probe.values is not None:
        probe, exact = e.probe, e.value_rounding.exact
        rows.append(("values of another critic", probe.experience.values, probe.values, exact))
    return first_failure(
        [
            within(
                (np.asarray(seen, np.float64) - own)[e.mask],
                rounding,
                f"{name} and the critic's output before them",
                "values are aligned to the wrong token (the critic must not have seen the token it is a baseline "
                "for), or are another model's",
            )
            for name, seen, own, rounding in rows
        ]
    )


def advantages(e: Evidence) -> Finding:
    """GAE, RLOO or GRPO of the shaped rewards, whitened over the whole batch if asked for; returns beside them."""
    found = [_advantages(e, e.experience, e.baseline)]
    if e.probe is not None:
        found.append(_advantages(e, e.probe.experience, e.probe.baseline))
    return first_failure(found)


def _advantages(e: Evidence, x: Any, baseline: np.ndarray) -> Finding:
    config, mask = e.setting.config, e.mask
    shaped = np.where(mask, x.shaped, 0.0).astype(np.float64)
    findings = []
    if config.advantage == "gae":
        assert x.values is not None and x.returns is not None
        old = np.where(mask, x.values, 0.0).astype(np.float64)
        expected = _gae(shaped, old, mask, config.gamma, config.gae_lambda)
        returns = np.where(mask, expected + old, 0.0)
        size = max(1.0, float(np.abs(returns).max(initial=0.0)))
        findings.append(
            judged(
                worst(x.returns, returns, mask) / size,
                1e-4,
                "returns and advantage plus value",
                "returns are not the unwhitened advantage plus the critic's value. Possible causes: made of whitened "
                "advantages (ppo.whiten), or with the next token's value",
            )
        )
    else:
        expected = _grouped(e, shaped, np.asarray(x.scores, np.float64) - baseline)
    counts = x.counts
    if config.whiten and counts.any():
        gaps = expected - expected[counts].mean()
        tied = _tied(expected[counts][None])[0, 0]
        expected = 0.0 * gaps if tied else gaps / np.sqrt(expected[counts].var() + 1e-8)
    scale = max(1.0, float(np.abs(expected[counts]).max(initial=0.0)))
    findings.append(
        judged(
            worst(x.advantages, expected, counts) / scale,
            1e-3,
            f"advantages ({config.advantage}{', whitened' if config.whiten else ''}) and their recomputation",
            "the estimate is another one. Possible causes: it does not end with the answer, groups answers of "
            "different prompts (ppo.samples), is whitened per shard and not over the whole batch, or whitened again "
            "(ppo.whiten)",
        )
    )
    return first_failure(findings)


def _grouped(e: Evidence, shaped: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """RLOO or GRPO: an answer against the others to its prompt."""
    config = e.setting.config
    sums, rewards = (x.reshape(-1, config.samples) for x in (shaped.sum(axis=1), rewards))
    gaps = sums - sums.mean(axis=1, keepdims=True)
    if config.advantage == "rloo":
        gaps *= config.samples / (config.samples - 1)
    else:  # the reward is divided by its deviation, unless it ties; the KL is not
        of_reward = rewards - rewards.mean(axis=1, keepdims=True)
        deviation = np.sqrt(rewards.var(axis=1, ddof=1, keepdims=True) + 1e-8)
        gaps += np.where(_tied(rewards), 0.0, of_reward / deviation) - of_reward
    return np.where(e.mask, gaps.reshape(-1, 1), 0.0)


def _tied(groups: np.ndarray) -> np.ndarray:
    """bool [N, 1], groups whose numbers are equal up to the rounding of a score in float32."""
    size = np.maximum(np.abs(groups).max(axis=1, keepdims=True), 1.0)
    found: np.ndarray = np.ptp(groups, axis=1, keepdims=True) <= 64 * 2.0**-23 * size
    return found


def _gae(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, gamma: float, lam: float
) -> np.ndarray:
    found = np.zeros_like(rewards)
    advantage = following = np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = np.where(mask[:, t], delta + gamma * lam * advantage, 0.0)
        following = np.where(mask[:, t], values[:, t], 0.0)
        found[:, t] = advantage
    return found
