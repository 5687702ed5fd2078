"""Checks of rewards: the distance from the reference, the score, and what they make together."""

from typing import Any

import numpy as np

from rlhf.doctor.evidence import Evidence
from rlhf.doctor.finding import Finding, first_failure, judged, within, worst


def kl_at_the_start(e: Evidence) -> Finding:
    """A policy that is its reference is at a distance of 0 from it."""
    if not e.same:
        return Finding("skip", "the policy has moved away from its reference")
    gaps = (np.asarray(e.experience.logp, np.float64) - e.experience.ref_logp)[e.mask]
    gaps = np.append(gaps, e.metrics["kl_exact"])
    return within(
        gaps,
        e.logp_rounding,
        "log-probabilities of policy and reference, which are one model,",
        "the reference is scored at another temperature, support or padding than the policy (ppo.sampling), or is "
        "another model",
    )


def kl_estimators(e: Evidence) -> Finding:
    """k1 and k3 estimate the exact KL; k3 and the exact one are not negative."""
    mask = e.mask
    log_ratio = np.where(
        mask, np.asarray(e.experience.logp, np.float64) - e.experience.ref_logp, 0.0
    )
    count = mask.sum()
    exact, k1 = e.metrics["kl_exact"], log_ratio.sum() / count
    k3 = np.where(mask, np.expm1(-log_ratio) + log_ratio, 0.0).sum() / count
    own = float(np.where(mask, np.asarray(e.own.kl, np.float64), 0.0).sum() / count)
    # answers are independent, their tokens are not
    by_answer = (log_ratio - exact * mask).sum(axis=1)
    error = np.sqrt((by_answer**2).sum()) / count
    rounding = e.logp_rounding.of_mean(np.ones(int(count)))
    seen = f"k1 {k1:.2e}, k3 {k3:.2e}, exact {exact:.2e} nats/token"
    advice = (
        "the KL is not that of the distribution that answers are sampled from: log-probabilities, temperature or "
        "support of policy and reference differ (ppo.sampling), or its sign is turned"
    )
    reported = abs(e.metrics["kl"] - k1) + abs(e.metrics["kl_k3"] - k3)
    good = (
        exact >= -1e-6
        and abs(k1 - exact) <= 6 * error + rounding
        and abs(own - exact) <= rounding
        and reported <= 1e-4 * max(1.0, abs(k1), abs(k3))
    )
    return Finding("pass", seen) if good else Finding("fail", seen, advice)


def scores(e: Evidence) -> Finding:
    """Scores are the reward model's output where its training examples were closed, clamped, less the penalty."""
    config = e.setting.config
    clip = config.score_clip
    penalty = config.truncation_penalty * ~e.answers.ended if config.truncated == "penalty" else 0.0
    found = []
    rows = [("scores", e.experience, e.scores, e.score_rounding)]
    if e.probe is not None:
        exact = e.score_rounding.exact
        rows.append(("another model's scores", e.probe.experience, e.probe.scores, exact))
    for name, x, own, rounding in rows:
        found.append(
            within(
                np.asarray(x.scores, np.float64) - np.clip(own, -clip, clip) + penalty,
                rounding,
                f"{name} and the reward model's output at the end of the answer",
                "the score is read elsewhere than at the token that closed the reward model's training examples (it "
                "takes the place of any stop token, and follows an answer that was cut off), not clamped to "
                "ppo.score_clip, without the truncation penalty (ppo.truncated), or another model's",
            )
        )
    return first_failure(found)


def shaped_rewards(e: Evidence) -> Finding:
    """r_t = -beta log-ratio, and score - baseline on the last token: so an answer's sum is reward - beta KL."""
    found = [_shaped(e, e.experience, e.baseline, e.kl_coef)]
    if e.probe is not None:
        found.append(_shaped(e, e.probe.experience, e.probe.baseline, e.probe.kl_coef))
    return first_failure(found)


def expected_shaped(
    e: Evidence, x: Any, baseline: np.ndarray, kl_coef: float
) -> tuple[np.ndarray, np.ndarray]:
    """Shaped rewards of tokens, float64 [B, T], and the rewards of answers [B]."""
    config, mask = e.setting.config, e.mask
    log_ratio = np.asarray(x.logp, np.float64) - x.ref_logp
    if config.kl.log_ratio_clip is not None:
        log_ratio = np.clip(log_ratio, -config.kl.log_ratio_clip, config.kl.log_ratio_clip)
    beta = kl_coef if config.kl.place == "reward" else 0.0
    expected = np.where(mask, -beta * log_ratio, 0.0)
    rewards = np.asarray(x.scores, np.float64) - baseline
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    expected[np.arange(len(last)), last] += rewards
    return expected, rewards


def _shaped(e: Evidence, x: Any, baseline: np.ndarray, kl_coef: float) -> Finding:
    expected, rewards = expected_shaped(e, x, baseline, kl_coef)
    limit = 1e-4 * max(1.0, float(np.abs(rewards).max()))
    sums = worst(x.shaped.sum(axis=1), expected.sum(axis=1))
    finding = judged(
        max(sums, worst(x.shaped, expected)),
        limit,
        "shaped rewards and score - baseline - beta KL",
        "",
    )
    if finding.status == "pass":
        return finding
    if sums <= limit:
        return finding._replace(
            advice="an answer's rewards have the right sum on the wrong tokens: the score belongs on its last one"
        )
    return finding._replace(
        advice="the reward is not score - baseline - beta KL. Possible causes: scores rounded to integers, another "
        "prompt's baseline (ppo.reference_baseline), a truncation penalty that is taken twice (ppo.truncated), or the "
        "KL's sign, place or coefficient (ppo.kl)"
    )


def reward_scale(e: Evidence) -> Finding:
    """Scores differ, and the clamp is there for outliers only."""
    clip = e.setting.config.score_clip
    spread, clamped = float(e.scores.std()), float((np.abs(e.scores) >= clip).mean())
    seen = f"scores {e.scores.mean():.3g} +- {spread:.2g}, {clamped:.0%} beyond ppo.score_clip = {clip:g}"
    if spread < 1e-6:
        advice = "the reward model scores every answer alike: there is nothing to learn from it"
        return Finding("fail", seen, advice)
    if clamped > 0.5:
        advice = "most scores are clamped to the same number: raise ppo.score_clip, or train the reward model with "
        return Finding("fail", seen, advice + "a larger reward.l2_weight")
    if clamped > 0.05:
        return Finding("warn", seen, "many scores are clamped: raise ppo.score_clip")
    return Finding("pass", seen)
