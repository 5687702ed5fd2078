"""Checks of moments, steps, weight decay and learning rates."""

from rlhf.doctor.adamw import follow, learning_rate
from rlhf.doctor.evidence import Evidence
from rlhf.doctor.finding import Finding, first_failure
from rlhf.doctor.recorder import Updated
from rlhf.doctor.updates import Learnt, is_sound, optim_of, updates_of


def optimizer(e: Evidence, learnt: Learnt) -> Finding:
    """Moments, steps and weights follow AdamW, with decay of matrices alone and the scheduled learning rate."""
    found: list[Finding] = []
    for role in ("critic", "actor"):
        updates, done = updates_of(e, role), learnt.done[role]
        lost = [name for name, same in learnt.carried.items() if name == role and not same]
        if lost:
            return Finding(
                "fail",
                f"the {role}'s weights or optimizer are not as the iteration before left them",
                "moments, step or weights are lost between iterations",
            )
        for i, x in enumerate(updates):
            if not is_sound(x):
                continue
            found.append(_followed(e, x, f"update {i + 1} of the {role}", done + i))
    return first_failure(found or [Finding("skip", "no update")])


def _followed(e: Evidence, x: Updated, where: str, done: int) -> Finding:
    """`done`: position in the role's schedule before this update."""
    config = e.setting.config
    optim = optim_of(e, x.role)
    if x.before.step != done:
        return Finding(
            "fail",
            f"{where} is number {x.before.step + 1} of its state, and should be {done + 1}",
            "steps are counted in iterations, or lost between them",
        )
    ahead = {after - before for before, after in zip(x.before.counts, x.after.counts, strict=True)}
    if x.after.step != x.before.step + 1 or ahead != {1}:
        return Finding("fail", f"{where} counts as {sorted(ahead)} steps", "an update is one step")
    iterations = config.iterations - (config.critic_warmup if x.role == "actor" else 0)
    total = max(1, iterations * config.epochs * config.minibatches)
    number = min(x.after.counts)
    rate = learning_rate(optim, done + 1, total) if e.setting.scheduled else optim.learning_rate
    followed = follow(x.before, x.after, optim, rate, number)
    if not e.setting.scheduled:
        rate *= followed.rate
        followed = follow(x.before, x.after, optim, rate, number)
    name = max(followed.moments, key=lambda n: followed.moments[n])
    if not followed.moments[name] <= 1.0:
        return Finding(
            "fail",
            f"the second moment of {name} after {where} is not beta2 v + (1 - beta2) g^2",
            "moments are lost between updates, or beta1 and beta2 differ from the optimizer's fields",
        )
    if e.setting.scheduled and not abs(followed.rate - 1.0) <= 1e-2:
        return Finding(
            "fail",
            f"{where} takes {followed.rate:.3f} of the learning rate {rate:.3g}",
            "the schedule is another: counted in iterations, over updates in which the role does not learn, or begun "
            f"anew (ppo.{x.role})",
        )
    name = max(followed.decay, key=lambda n: followed.decay[n], default="")
    if name and not followed.decay[name] <= 1.0:
        return Finding(
            "fail",
            f"{where} shrinks {name} by another weight decay than it should",
            "weight decay applies to matrices and embeddings, not to norms and biases (weight_decay)",
        )
    name = max(followed.step, key=lambda n: followed.step[n])
    if not followed.step[name] <= 1.0:
        return Finding(
            "fail",
            f"{where} moves {name} by another step than AdamW's ({followed.step[name]:.1f} times the limit)",
            "epsilon inside the root, no correction of the moments' bias, or another epsilon (eps)",
        )
    return Finding("pass", f"moments and weights follow AdamW at {rate:.3g}")
