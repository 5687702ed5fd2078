"""Checks of an iteration's updates: losses, clips, gradients, minibatches, optimizers, and what must not change."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from glm_jax.optim import OptimConfig
from rlhf.doctor.adamw import Arrays, gradient_in
from rlhf.doctor.evidence import Evidence
from rlhf.doctor.finding import HEADROOM, Finding, first_failure, judged
from rlhf.doctor.recorder import Loss, Probed, Updated
from rlhf.ppo import PPOConfig

GRADIENT = 2e-3  # relative distance of two gradients in float32, sums of many terms that cancel


class Learnt(NamedTuple):
    """State of the models after an iteration."""

    actor_learns: bool
    frozen: Mapping[str, bool | None]  # a frozen model is as at the start; None: its memory is gone
    changed: Mapping[str, bool]  # a model that learns is another than before its updates
    carried: Mapping[
        str, bool
    ]  # a learner, or the KL coefficient, came as the iteration before had left it
    returned: Mapping[str, bool]  # a learner is returned as its last update left it
    done: Mapping[str, int]  # position in each role's schedule before this iteration
    kl_coef: float  # of the next iteration
    orders: tuple[np.ndarray, ...]  # of rows, in iterations looked at before


def updates_of(e: Evidence, role: str) -> list[Updated]:
    """The updates of a role, in order."""
    return [x for x in e.updates if x.role == role]


def is_sound(x: Updated) -> bool:
    """Tell whether an update's gradient is finite; otherwise the update changed nothing."""
    return math.isfinite(x.metrics["grad_norm"])


def _probes(e: Evidence) -> list[Probed]:
    """Probes of the roles that have a finite gradient in any update."""
    return [x for x in e.probes if any(map(is_sound, updates_of(e, x.role)))]


def ratio(e: Evidence, learnt: Learnt) -> Finding:
    """The first update begins with the policy that sampled: its ratio is 1 at every token."""
    updates = updates_of(e, "actor")
    if not updates:
        return Finding("skip", "the actor did not learn (ppo.critic_warmup)")
    first, counted = updates[0].metrics, int(updates[0].rows.counts.sum())
    if not counted:
        return Finding("skip", "no token of the first minibatch counts (ppo.truncated)")
    advice = (
        "the update computes other log-probabilities than those it is compared with: another temperature or support "
        "(ppo.sampling), or rows that do not belong together"
    )
    what = "of the first update and 1"
    largest = math.expm1(min(e.logp_rounding.largest, 50.0))
    mean = e.logp_rounding.of_mean(np.ones(counted))
    return first_failure(
        [
            judged(abs(first["ratio_max"] - 1.0), largest, f"largest ratio {what}", advice),
            judged(abs(first["ratio_mean"] - 1.0), mean, f"mean ratio {what}", advice),
        ]
    )


def loss_normalisation(e: Evidence, learnt: Learnt) -> Finding:
    """Parts of every update's loss are the doctor's: means over the whole minibatch, however it is cut."""
    found = [_parts(e, x, 1.5, "the first update in float32") for x in _probes(e) if not x.far]
    found += [
        _parts(e, x, 1.5, f"update {i + 1} of the {role}")
        for role in ("critic", "actor")
        for i, x in enumerate(updates_of(e, role))
        if is_sound(x)
    ]
    return first_failure(found or [Finding("skip", "no update")])


def clips(e: Evidence, learnt: Learnt) -> Finding:
    """Far from the policy that sampled, losses are clipped on the right side and no further."""
    found = [_parts(e, x, 3.0, "a trial far from the policy") for x in _probes(e) if x.far]
    return first_failure(found or [Finding("skip", "seen in an earlier iteration")])


def _parts(e: Evidence, x: Updated | Probed, reach: float, where: str) -> Finding:
    """`reach`: a bound of the ratio at most tokens."""
    config, rows, own = e.setting.config, x.rows, x.own
    counts = rows.counts
    limits: dict[str, float] = {}
    exact = isinstance(x, Probed)
    of_value, of_logp, of_sft = (
        rounding.exact if exact else rounding
        for rounding in (e.value_rounding, e.logp_rounding, e.ref_rounding)
    )
    if x.role == "critic":
        assert rows.values is not None and rows.returns is not None
        off = np.abs(rows.values.astype(np.float64) - rows.returns)[counts]
        limits["value_loss"] = of_value.of_mean(off + config.value_clip + 1.0)
    else:
        ones = np.ones(max(1, int(counts.sum())))
        advantages = np.abs(rows.advantages[counts])
        limits["policy_loss"] = of_logp.of_mean(reach * advantages)
        limits["sft_loss"] = of_sft.of_mean(ones)
        away = np.abs(rows.logp.astype(np.float64) - rows.ref_logp)[counts]
        limits["kl_loss"] = of_logp.of_mean(away + 0.1)
        limits["approx_kl"] = of_logp.of_mean(0.5 * reach * ones)
        limits["policy_entropy"] = of_logp.of_mean(4 * ones)
    found = []
    for name, limit in limits.items():
        if name not in own.parts and name not in x.metrics:
            continue
        seen, expected = x.metrics.get(name, math.nan), own.parts.get(name, math.nan)
        if isinstance(x, Updated) and x.precise is not None:
            limit += HEADROOM * abs(x.precise.parts[name] - expected)
        limit = max(limit, 1e-5 * abs(expected))
        found.append(
            judged(
                _gap(seen, expected),
                limit,
                f"{name} of {where} and its recomputation",
                _ADVICE[name],
            )
        )
    found.append(_sum(config, x, where))
    return first_failure(found)


_MEANS = "it is a mean of means, of shards (layout) or of accumulated pieces (accumulate), or counts other tokens"
_ADVICE: Mapping[str, str] = {
    "policy_loss": f"the ratio is clipped on the wrong side or further than ppo.clip_range, or {_MEANS}",
    "value_loss": f"values are clipped on the wrong side or further than ppo.value_clip, or {_MEANS}",
    "sft_loss": f"its sign is turned, or {_MEANS}",
    "kl_loss": f"the KL is not k3 of the policy from the reference (but from the policy that sampled?), or {_MEANS}",
    "approx_kl": f"it is not k3 of the policy that sampled from this one, or {_MEANS}",
    "policy_entropy": f"its sign is turned, its support another, or {_MEANS}",
}


def _gap(seen: float, expected: float) -> float:
    gap = abs(seen - expected)
    return gap if math.isfinite(gap) else math.inf


def _sum(config: PPOConfig, x: Updated | Probed, where: str) -> Finding:
    """The loss that is differentiated is the weighted sum of its reported parts."""
    m = x.metrics
    if x.role == "critic":
        terms = {"value_loss": config.value_weight}
    else:
        terms = {"policy_loss": 1.0, "sft_loss": config.sft_weight}
        terms |= {"kl_loss": config.kl.coef} if config.kl.place == "loss" else {}
        terms |= {"policy_entropy": -config.entropy_weight} if config.entropy_weight else {}
    total = sum(weight * m.get(name, math.nan) for name, weight in terms.items())
    size = sum(abs(weight * m.get(name, math.nan)) for name, weight in terms.items())
    spelt = " ".join(f"{weight:+g} {name}" for name, weight in terms.items())
    return judged(
        _gap(m["loss"], total),
        1e-5 * max(size, 1e-3),
        f"loss of {where} and {spelt}",
        "a term has another weight or sign than its field says (ppo.sft_weight, ppo.entropy_weight, ppo.kl.coef, "
        "ppo.value_weight)",
    )


def _distance(a: Arrays, b: Arrays, scale: float = 1.0) -> tuple[float, float]:
    """Euclidean distance of two gradients and the norm of the second, times `scale`."""
    gap = sum(float(((a[name] - scale * g) ** 2).sum()) for name, g in b.items())
    norm = sum(float(((scale * g) ** 2).sum()) for g in b.values())
    return math.sqrt(gap), math.sqrt(norm)


def _doubt(own: Loss, precise: Loss | None) -> float:
    """Relative error of a gradient that rounding in the compute dtype explains."""
    if precise is None:
        return GRADIENT
    gap, norm = _distance(own.gradient, precise.gradient)
    return GRADIENT + HEADROOM * gap / max(norm, 1e-30)


def gradient(e: Evidence, learnt: Learnt) -> Finding:
    """The moments receive the gradient of the doctor's own loss, clipped by its norm."""
    found: list[Finding] = []
    doubts: dict[str, float] = {}
    advice = (
        "the loss is not what is differentiated: a gradient that is stopped or flows where it should not, other rows "
        "or weights, or another clip (ppo.actor.clip_norm)"
    )
    for probe in _probes(e):
        own = probe.own
        gap = abs(probe.metrics["grad_norm"] - own.norm) / max(own.norm, 1e-12)
        where = "far from the policy" if probe.far else "in float32"
        what = f"gradient norms of the {probe.role} {where}"
        found.append(judged(gap, GRADIENT, what, advice))
    numbers: Counter[str] = Counter()
    for x in e.updates:
        numbers[x.role] += 1
        if x.precise is not None or x.role not in doubts:
            doubts[x.role] = _doubt(x.own, x.precise)
        if not is_sound(x) or x.own.norm < 1e-9:
            continue
        config = optim_of(e, x.role)
        clip = min(1.0, config.clip_norm / x.own.norm)
        recovered = gradient_in(x.before, x.after, config)
        gap, norm = _distance(recovered, x.own.gradient, clip)
        # a difference of rounded moments
        unsure = sum(
            float(((np.abs(x.before.mean[n]) + np.abs(x.after.mean[n])) ** 2).sum())
            for n in recovered
        )
        limit = doubts[x.role] * norm + 2**-22 * math.sqrt(unsure) / (1 - config.beta1)
        found.append(
            judged(
                gap / max(norm, 1e-30),
                limit / max(norm, 1e-30),
                f"gradients of the {x.role} in update {numbers[x.role]} and their recomputation",
                advice,
            )
        )
    return first_failure(found or [Finding("skip", "no update")])


def optim_of(e: Evidence, role: str) -> OptimConfig:
    """Settings of a role's optimizer."""
    config = e.setting.config
    return config.actor if role == "actor" else config.critic


def kl_coefficient(e: Evidence, learnt: Learnt) -> Finding:
    """The next KL coefficient rises where the KL is above its target, and falls where it is below."""
    config = e.setting.config
    if not learnt.carried.get("KL coefficient", True):
        lost = f"the KL coefficient is {e.kl_coef:.4g}, not as the iteration before left it"
        return Finding("fail", lost, "the coefficient that adapts is lost between iterations")
    kl, expected = config.kl, e.kl_coef
    if kl.target is not None and learnt.actor_learns:
        count = e.mask.sum()
        log_ratio = np.asarray(e.experience.logp, np.float64) - e.experience.ref_logp
        seen = float(np.where(e.mask, log_ratio, 0.0).sum() / count)
        error = float(np.clip(seen / kl.target - 1.0, -0.2, 0.2))
        expected *= 1.0 + error * min(1.0, config.batch_size / kl.horizon)
    return judged(
        abs(learnt.kl_coef - expected) / max(expected, 1e-12),
        1e-5,
        "the next KL coefficient and its recomputation, relatively,",
        "it adapts the wrong way, without a target, or while the actor does not learn (ppo.kl.target, "
        "ppo.critic_warmup)",
    )


def frozen(e: Evidence, learnt: Learnt) -> Finding:
    """Updates leave the reference and the reward model as they were at the start of the run, bit for bit."""
    gone = [name for name, same in learnt.frozen.items() if same is None]
    changed = [name for name, same in learnt.frozen.items() if same is False]
    if gone:
        advice = (
            "an update has freed it: it shares memory with a model that learns and must be a copy"
        )
        return Finding("fail", f"the memory of {' and '.join(gone)} is gone", advice)
    if changed:
        advice = "it must not learn: the KL would be measured from a moving target"
        return Finding(
            "fail", f"{' and '.join(changed)} changed since the start of the run", advice
        )
    return Finding("pass", f"{' and '.join(learnt.frozen)} are what they were, bit for bit")


def learning(e: Evidence, learnt: Learnt) -> Finding:
    """Models that learn have changed, and no others have."""
    ready = [role for role in learnt.changed if updates_of(e, role)]
    still = [role for role in ready if not learnt.changed[role]]
    if still and all(x.own.norm == 0.0 for role in still for x in updates_of(e, role)):
        seen = f"{' and '.join(still)} did not change: every gradient is 0"
        advice = "no token counts (ppo.truncated = mask, every answer cut off), or all rewards tie"
        return Finding("warn", seen, advice)
    idle = [role for role, new in learnt.changed.items() if new and role not in ready]
    lost = [role for role, same in learnt.returned.items() if not same]
    if idle:
        advice = "a model learns where it should not (ppo.critic_warmup)"
        return Finding("fail", f"{' and '.join(idle)} changed without an update", advice)
    if lost:
        seen = f"{' and '.join(lost)} is not returned as its last update left it"
        return Finding("fail", seen, "the result of an update is dropped")
    if not ready:
        return Finding("skip", "nothing learns")
    if not still:
        return Finding("pass", f"{' and '.join(ready)} changed")
    advice = (
        "its learning rate is 0 (ppo.actor, ppo.critic), its gradient is, or no gradient is finite"
    )
    return Finding("fail", f"{' and '.join(still)} did not change in training", advice)
