"""Checks of rewards: the distance from the reference, the score, and what they make together."""

import numpy as np

from rlhf.doctor.evidence import Evidence
from rlhf.doctor.finding import Finding, judged, worst


def kl_at_the_start(e: Evidence) -> Finding:
    """A policy that is its reference is at a distance of 0 from it."""
    if not e.same:
        return Finding("skip", "the policy has moved away from its reference")
    gap = worst(e.experience.logp, e.experience.ref_logp, e.answers.sequences.target)
    gap = max(gap, abs(e.metrics["kl_exact"]))
    return judged(
        gap,
        e.setting.tolerance,
        "log-probabilities of policy and reference, which are one model,",
        "the reference is scored at another temperature, support or padding than the policy (ppo.sampling), or is "
        "another model",
    )


def kl_estimators(e: Evidence) -> Finding:
    """k1 and k3 estimate the exact KL; k3 and the exact one are not negative."""
    mask = e.answers.sequences.target
    log_ratio = np.where(
        mask, np.asarray(e.experience.logp, np.float64) - e.experience.ref_logp, 0.0
    )
    count = mask.sum()
    exact, k1 = e.metrics["kl_exact"], log_ratio.sum() / count
    k3 = np.where(mask, np.expm1(-log_ratio) + log_ratio, 0.0).sum() / count
    # answers are independent, their tokens are not
    by_answer = (log_ratio - exact * mask).sum(axis=1)
    error = np.sqrt((by_answer**2).sum()) / count
    seen = f"k1 {k1:.2e}, k3 {k3:.2e}, exact {exact:.2e} nats/token"
    advice = (
        "the KL is not that of the distribution that answers are drawn from: log-probabilities, temperature or support "
        "of policy and reference differ (ppo.sampling), or its sign is turned"
    )
    reported = abs(e.metrics["kl"] - k1) + abs(e.metrics["kl_k3"] - k3)
    good = exact >= -1e-6 and abs(k1 - exact) <= 6 * error + 1e-6 and reported <= 1e-4
    return Finding("pass", seen) if good else Finding("fail", seen, advice)


def scores(e: Evidence) -> Finding:
    """The reward model's output at the stop token of every answer, clamped, less the penalty for a cut-off one."""
    config = e.setting.config
    expected = np.clip(e.scores, -config.score_clip, config.score_clip)
    if config.truncated == "penalty":
        expected = expected - config.truncation_penalty * ~e.answers.ended
    return judged(
        worst(e.experience.scores, expected),
        e.setting.tolerance,
        "scores and the reward model's output at the stop token",
        "the score is read elsewhere than at the answer's end-of-turn token (answers that were cut off get one), or "
        "not clamped to ppo.score_clip",
    )


def shaped_rewards(e: Evidence) -> Finding:
    """r_t = -beta log-ratio, and score - baseline on the last token: so an answer's sum is reward - beta KL."""
    config, x, mask = e.setting.config, e.experience, e.answers.sequences.target
    log_ratio = np.asarray(x.logp, np.float64) - x.ref_logp
    if config.kl.log_ratio_clip is not None:
        log_ratio = np.clip(log_ratio, -config.kl.log_ratio_clip, config.kl.log_ratio_clip)
    beta = e.kl_coef if config.kl.place == "reward" else 0.0
    expected = np.where(mask, -beta * log_ratio, 0.0)
    rewards = x.scores.astype(np.float64) - e.baseline
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    expected[np.arange(len(last)), last] += rewards
    sums = worst(x.shaped.sum(axis=1), expected.sum(axis=1))
    finding = judged(
        max(sums, worst(x.shaped, expected)),
        1e-4 * max(1.0, float(np.abs(rewards).max())),
        "shaped rewards and score - baseline - beta KL",
        "",
    )
    if finding.status == "pass":
        return finding
    if sums <= 1e-4 * max(1.0, float(np.abs(rewards).max())):
        return finding._replace(
            advice="an answer's rewards have the right sum on the wrong tokens: the score belongs on its last one"
        )
    return finding._replace(
        advice="the reward is not score - baseline - beta KL: scores rounded to integers, another prompt's baseline "
        "(ppo.reference_baseline), or the KL's sign or coefficient (ppo.kl.coef)"
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
