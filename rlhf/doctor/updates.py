"""Checks of what the updates of an iteration did."""

from typing import Any

import numpy as np

from rlhf.doctor.evidence import Evidence, Learnt
from rlhf.doctor.finding import Finding, judged


def ratio(e: Evidence, learnt: Learnt) -> Finding:
    """The first update begins with the policy that sampled: its ratio is 1 at every token."""
    if "ratio_max" not in learnt.first:
        return Finding("skip", "the actor did not learn in the first update (ppo.critic_warmup)")
    gap = max(abs(learnt.first[name] - 1.0) for name in ("ratio_mean", "ratio_max"))
    return judged(
        gap,
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
    if "value_loss" in learnt.first and x.values is not None and x.returns is not None:
        squares = (x.values.astype(np.float64) - x.returns) ** 2
        gaps.append(abs(learnt.first["value_loss"] - 0.5 * mean(squares)))
    scale = max(1.0, float(np.abs(x.advantages[rows][counts]).max(initial=0.0)))
    return judged(
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
    ready = [name for name in learnt.changed if learnt.updates.get(name, 0)]
    still = [name for name in ready if not learnt.changed[name]]
    if not ready:
        return Finding("skip", "too few updates to tell")
    if not still:
        return Finding("pass", f"{' and '.join(ready)} changed")
    advice = "its learning rate is 0 (ppo.actor, ppo.critic) or its gradient is"
    return Finding("fail", f"{' and '.join(still)} did not change in training", advice)
