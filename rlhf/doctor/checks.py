"""The checks: each recomputes something on the host, in float64, and says what is wrong and which field to change."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from rlhf.doctor.evidence import Evidence, Learnt


class Finding(NamedTuple):
    """What a check saw."""

    status: Literal["pass", "warn", "fail", "skip"]
    seen: str
    advice: str = ""  # the cause, and the field to change; where it did not pass


def _worst(a: Any, b: Any, mask: Any = None) -> float:
    """Largest difference where it counts; NaN counts as infinite."""
    gap: np.ndarray = np.abs(np.asarray(a, np.float64) - b)
    gap = np.where(np.isfinite(gap), gap, np.inf)
    return float(gap.max() if mask is None else gap[mask].max(initial=0.0))


def _judged(worst: float, limit: float, what: str, advice: str) -> Finding:
    seen = f"{what} differ by {worst:.1e} at most (limit {limit:.0e})"
    return Finding("pass", seen) if worst <= limit else Finding("fail", seen, advice)


def response_mask(e: Evidence) -> Finding:
    """Exactly the answer's tokens count: from the first column after the prompt to its first stop token."""
    sequences, start = e.answers.sequences, e.prompt_columns
    stops = np.isin(sequences.ids[:, start:], e.setting.stop_ids)
    width = stops.shape[1]
    first = np.where(stops.any(axis=1), stops.argmax(axis=1), width - 1)
    expected = np.zeros_like(sequences.target)
    expected[:, start:] = np.arange(width) <= first[:, None]
    wrong = np.flatnonzero((expected != sequences.target).any(axis=1))
    mode = e.setting.config.truncated
    counts = expected & (e.answers.ended[:, None] | (mode != "mask"))
    uncounted = np.flatnonzero((counts != e.experience.counts).any(axis=1))
    if not len(wrong) and not len(uncounted):
        return Finding("pass", f"{int(expected.sum())} tokens of {len(expected)} answers count")
    if len(wrong):
        return Finding(
            "fail",
            f"{len(wrong)} answers have tokens that count and should not, or the reverse (first: row {wrong[0]})",
            "the response mask is off: it must cover the answer and its first stop token, and nothing of the prompt",
        )
    return Finding(
        "fail",
        f"{len(uncounted)} answers are learnt from, or left out, against ppo.truncated = {mode}",
        "the mask of what is learnt from does not follow ppo.truncated",
    )


def stop_token(e: Evidence) -> Finding:
    """An answer has ended where its last token is a stop token; some answers do."""
    ids, _, target = e.answers.sequences
    last = ids[np.arange(len(ids)), target.shape[1] - 1 - np.argmax(target[:, ::-1], axis=1)]
    stopped = np.isin(last, e.setting.stop_ids)
    wrong = np.flatnonzero(stopped != e.answers.ended)
    if len(wrong):
        return Finding(
            "fail",
            f"{len(wrong)} answers are said to have ended, or not, against their last token (first: row {wrong[0]})",
            "the stop tokens of sampling are not those of the tokenizer",
        )
    share = float(e.answers.ended.mean())
    seen = f"{share:.0%} of {len(ids)} answers end by themselves"
    if share == 0.0 and e.setting.trained:
        advice = (
            "no answer stops: the SFT data teaches no stop token, or ppo.sampling.max_new_tokens is too small; "
            "with ppo.truncated = mask nothing would be learnt"
        )
        return Finding("fail" if e.setting.config.truncated == "mask" else "warn", seen, advice)
    if share < 0.5 and e.setting.trained:
        advice = "most answers are cut off: raise ppo.sampling.max_new_tokens, or set ppo.truncated"
        return Finding("warn", seen, advice)
    return Finding("pass", seen)


def rollout_logprobs(e: Evidence) -> Finding:
    """The log-probabilities that decoding gave are those of the trainer's program."""
    worst = _worst(e.experience.logp, e.answers.logp, e.answers.sequences.target)
    return _judged(
        worst,
        e.setting.tolerance,
        "log-probabilities of rollout and trainer",
        "the two see different distributions: another temperature, top_k or top_p (ppo.sampling) on one side, other "
        "positions, or weights of an earlier iteration in the generation layout (generation_layout)",
    )


def support(e: Evidence) -> Finding:
    """No more tokens could be drawn than ppo.sampling allows, and those drawn could be."""
    sampling = e.setting.config.sampling
    if e.support_size is None:
        if sampling.truncates:
            return Finding(
                "fail",
                "the trainer normalises over the whole vocabulary",
                "ppo.sampling.top_k and top_p cut the rollout's distribution and not the trainer's",
            )
        return Finding("skip", "every token can be drawn")
    sizes = e.support_size[e.answers.sequences.target]
    seen = f"{sizes.min()} to {sizes.max()} tokens could be drawn"
    if sizes.min() < 1 or (sampling.top_k and sizes.max() > sampling.top_k + 1):
        return Finding("fail", seen, f"ppo.sampling.top_k = {sampling.top_k} is not applied")
    return Finding("pass", seen)


def kl_at_the_start(e: Evidence) -> Finding:
    """A policy that is its reference is at a distance of 0 from it."""
    if not e.same:
        return Finding("skip", "the policy has moved away from its reference")
    worst = _worst(e.experience.logp, e.experience.ref_logp, e.answers.sequences.target)
    worst = max(worst, abs(e.metrics["kl_exact"]))
    return _judged(
        worst,
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


def shaped_rewards(e: Evidence) -> Finding:
    """r_t = -beta log-ratio, and score - baseline on the last token: so an answer's sum is reward - beta KL."""
    config, x, mask = e.setting.config, e.experience, e.answers.sequences.target
    log_ratio = np.asarray(x.logp, np.float64) - x.ref_logp
    if config.kl.log_ratio_clip is not None:
        log_ratio = np.clip(log_ratio, -config.kl.log_ratio_clip, config.kl.log_ratio_clip)
    beta = e.kl_coef if config.kl.place == "reward" else 0.0
    expected = np.where(mask, -beta * log_ratio, 0.0)
    rewards = x.scores.astype(np.float64) - e.baseline
    if config.truncated == "penalty":
        rewards -= config.truncation_penalty * ~e.answers.ended
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    expected[np.arange(len(last)), last] += rewards
    sums = _worst(x.shaped.sum(axis=1), expected.sum(axis=1))
    finding = _judged(
        max(sums, _worst(x.shaped, expected)),
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


def scores(e: Evidence) -> Finding:
    """The reward model's output at the stop token of every answer, clamped."""
    clip = e.setting.config.score_clip
    return _judged(
        _worst(e.experience.scores, np.clip(e.scores, -clip, clip)),
        e.setting.tolerance,
        "scores and the reward model's output at the stop token",
        "the score is read elsewhere than at the answer's end-of-turn token (answers that were cut off get one), or "
        "not clamped to ppo.score_clip",
    )


def values(e: Evidence) -> Finding:
    """A token's value is the critic's output before it was drawn."""
    if e.values is None or e.experience.values is None:
        return Finding("skip", "no critic")
    before = np.pad(e.values[:, :-1], ((0, 0), (1, 0)))
    return _judged(
        _worst(e.experience.values, before, e.answers.sequences.target),
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
        groups = shaped.sum(axis=1).reshape(-1, config.samples)
        gaps = groups - groups.mean(axis=1, keepdims=True)
        if config.advantage == "rloo":
            gaps *= config.samples / (config.samples - 1)
        else:
            gaps /= np.sqrt(groups.var(axis=1, ddof=1, keepdims=True) + 1e-8)
        expected = np.where(mask, gaps.reshape(-1, 1), 0.0)
    counts = x.counts
    if config.whiten and counts.any():
        expected = (expected - expected[counts].mean()) / np.sqrt(expected[counts].var() + 1e-8)
    scale = max(1.0, float(np.abs(expected[counts]).max(initial=0.0)))
    return _judged(
        _worst(x.advantages, expected, counts) / scale,
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


def padding(e: Evidence) -> Finding:
    """Log-probabilities, scores and values do not depend on where the padding stands."""
    if e.turned is None:
        return Finding("skip", "no prompt is padded")
    mask, here, there = e.answers.sequences.target, e.experience, e.turned
    gaps = {
        "log-probabilities": _worst(here.logp, there.logp, mask),
        "reference log-probabilities": _worst(here.ref_logp, there.ref_logp, mask),
        "scores": _worst(here.scores, there.scores),
    }
    if here.values is not None and there.values is not None:
        gaps["values"] = _worst(here.values, there.values, mask)
    name = max(gaps, key=lambda key: gaps[key])
    return _judged(
        gaps[name],
        e.setting.tolerance,
        f"{name} with padding on the left and on the right",
        "padding changes what the model sees: positions count it, or attention reads it, or the score is read at it",
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


def ratio(e: Evidence, learnt: Learnt) -> Finding:
    """The first update begins with the policy that sampled: its ratio is 1 at every token."""
    if "ratio_max" not in learnt.first:
        return Finding("skip", "the actor does not learn in this iteration (ppo.critic_warmup)")
    worst = max(abs(learnt.first[name] - 1.0) for name in ("ratio_mean", "ratio_max"))
    return _judged(
        worst,
        e.setting.tolerance,
        "ratio of the first update and 1",
        "the update computes other log-probabilities than those it is compared with: another temperature or support "
        "(ppo.sampling), or rows that do not belong together",
    )


def loss_normalisation(e: Evidence, learnt: Learnt) -> Finding:
    """Losses are means over the answer tokens of the whole minibatch, however it is cut into shards and pieces."""
    x, rows = e.experience, learnt.rows
    counts = x.counts[rows]
    number = max(1, int(counts.sum()))

    def mean(values: Any) -> float:
        return float(np.where(counts, values[rows], 0.0).astype(np.float64).sum() / number)

    gaps = []
    if "policy_loss" in learnt.first:
        gaps.append(abs(learnt.first["policy_loss"] + mean(x.advantages)))
    if x.values is not None and x.returns is not None:
        squares = (x.values.astype(np.float64) - x.returns) ** 2
        gaps.append(abs(learnt.first["value_loss"] - 0.5 * mean(squares)))
    scale = max(1.0, float(np.abs(x.advantages[rows][counts]).max(initial=0.0)))
    return _judged(
        max(gaps, default=0.0) / scale,
        max(1e-4, e.setting.tolerance),
        "losses of the first update and means over its tokens",
        "a loss is a mean of means, of shards (layout) or of accumulated pieces (accumulate), or counts other tokens",
    )


def frozen(e: Evidence, learnt: Learnt) -> Finding:
    """Updates leave the reference and the reward model as they were, bit for bit."""
    gone = [name for name, same in learnt.frozen.items() if same is None]
    changed = [name for name, same in learnt.frozen.items() if same is False]
    if gone:
        advice = (
            "an update has freed it: it shares memory with a model that learns and must be a copy"
        )
        return Finding("fail", f"the memory of {' and '.join(gone)} is gone", advice)
    if changed:
        advice = "it must not learn: the KL would be measured from a moving target"
        return Finding("fail", f"{' and '.join(changed)} changed in training", advice)
    return Finding("pass", f"{' and '.join(learnt.frozen)} are what they were, bit for bit")


def learning(e: Evidence, learnt: Learnt) -> Finding:
    """What is to learn has changed."""
    # the first update of a warm-up has a learning rate of 0
    ready = [name for name in learnt.changed if learnt.updates.get(name, 0) > 1]
    still = [name for name in ready if not learnt.changed[name]]
    if not ready:
        return Finding("skip", "too few updates to tell")
    if not still:
        return Finding("pass", f"{' and '.join(ready)} changed")
    advice = "its learning rate is 0 (ppo.actor, ppo.critic) or its gradient is"
    return Finding("fail", f"{' and '.join(still)} did not change in training", advice)


OF_ROLLOUT: Mapping[str, Callable[[Evidence], Finding]] = {
    "response mask": response_mask,
    "stop token": stop_token,
    "rollout log-probabilities": rollout_logprobs,
    "support": support,
    "KL at the start": kl_at_the_start,
    "KL estimators": kl_estimators,
    "scores": scores,
    "shaped rewards": shaped_rewards,
    "values": values,
    "advantages": advantages,
    "padding": padding,
    "reward scale": reward_scale,
}
OF_UPDATE: Mapping[str, Callable[[Evidence, Learnt], Finding]] = {
    "ratio": ratio,
    "loss normalisation": loss_normalisation,
    "frozen models": frozen,
    "learning": learning,
}
