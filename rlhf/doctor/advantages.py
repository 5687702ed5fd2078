"""Checks of values and advantages."""

import numpy as np

from rlhf.advantages import TIE
from rlhf.doctor.evidence import Evidence
from rlhf.doctor.finding import Finding, judged, worst


def values(e: Evidence) -> Finding:
    """A token's value is the critic's output before it was drawn."""
    if e.values is None or e.experience.values is None:
        return Finding("skip", "no critic")
    before = np.pad(e.values[:, :-1], ((0, 0), (1, 0)))
    return judged(
        worst(e.experience.values, before, e.answers.sequences.target),
        e.setting.tolerance,
        "values of tokens and the critic's output before them",
        "values are aligned to the wrong token: the critic must not have seen the token it is a baseline for",
    )


def advantages(e: Evidence) -> Finding:
    """GAE, RLOO or GRPO of the shaped rewards, whitened over the whole batch if asked for."""
    config, x, mask = e.setting.config, e.experience, e.answers.sequences.target
    shaped = np.where(mask, x.shaped, 0.0).astype(np.float64)
    if config.advantage == "gae":
        assert x.values is not None
        expected = _gae(
            shaped, np.where(mask, x.values, 0.0), mask, config.gamma, config.gae_lambda
        )
    else:
        rewards = (x.scores.astype(np.float64) - e.baseline).reshape(-1, config.samples)
        sums = shaped.sum(axis=1).reshape(-1, config.samples)
        gaps = sums - sums.mean(axis=1, keepdims=True)
        if config.advantage == "rloo":
            gaps *= config.samples / (config.samples - 1)
        else:  # the reward is divided by its deviation, unless it ties; the KL is not
            of_reward = rewards - rewards.mean(axis=1, keepdims=True)
            deviation = np.sqrt(rewards.var(axis=1, ddof=1, keepdims=True) + 1e-8)
            size = np.maximum(np.abs(rewards).max(axis=1, keepdims=True), 1.0)
            differ = np.ptp(rewards, axis=1, keepdims=True) > TIE * size
            gaps += np.where(differ, of_reward / deviation, 0.0) - of_reward
        expected = np.where(mask, gaps.reshape(-1, 1), 0.0)
    counts = x.counts
    if config.whiten and counts.any():
        tied = np.ptp(expected[counts]) <= TIE * max(1.0, np.abs(expected[counts]).max())
        expected = np.where(tied, expected[counts].mean(), expected)
        expected = (expected - expected[counts].mean()) / np.sqrt(expected[counts].var() + 1e-8)
    scale = max(1.0, float(np.abs(expected[counts]).max(initial=0.0)))
    return judged(
        worst(x.advantages, expected, counts) / scale,
        1e-3,
        f"advantages ({config.advantage}{', whitened' if config.whiten else ''}) and their recomputation",
        "the estimate does not end with the answer, groups answers of different prompts (ppo.samples), or is whitened "
        "per shard and not over the whole batch (ppo.whiten)",
    )


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
