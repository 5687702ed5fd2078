"""Checks of which rows the updates of an iteration visit, and when they end."""

import itertools

import numpy as np

from rlhf.doctor.evidence import Evidence
from rlhf.doctor.finding import Finding
from rlhf.doctor.updates import Learnt, updates_of

FACTORIAL = 13  # rows from which on two equal orders are no accident


def minibatches(e: Evidence, learnt: Learnt) -> Finding:
    """Every epoch visits every row once, in an order of its own."""
    config = e.setting.config
    size = config.batch_size // config.minibatches
    orders: list[np.ndarray] = []
    if updates_of(e, "actor") and not learnt.actor_learns:
        return Finding("fail", "the actor learns in the warm-up of the critic", "ppo.critic_warmup")
    for role in ("critic", "actor"):
        visited = [x.visited for x in updates_of(e, role)]
        if not visited:
            continue
        wanted = config.epochs * config.minibatches
        if len(visited) != wanted and config.stop_kl is None:
            return Finding(
                "fail",
                f"{len(visited)} updates of the {role}, not {wanted}",
                "ppo.epochs x ppo.minibatches",
            )
        for epoch in range(0, len(visited), config.minibatches):
            rows = visited[epoch : epoch + config.minibatches]
            order = np.concatenate(rows)
            twice = len(order) - len(np.unique(order))
            if twice or order.min() < 0 or order.max() >= config.batch_size:
                return Finding(
                    "fail",
                    f"an epoch of the {role} visits {twice} rows twice",
                    "minibatches are sampled with replacement: an epoch is a permutation of the batch",
                )
            if any(len(x) != size for x in rows):
                return Finding(
                    "fail", f"a minibatch of the {role} has not {size} rows", "ppo.minibatches"
                )
            if len(rows) == config.minibatches and (
                role == "critic" or not updates_of(e, "critic")
            ):
                orders.append(order)
    if not all(x.experience for x in e.updates):
        return Finding(
            "fail", "an update has another experience than the iteration's", "stale experience"
        )
    earlier = list(learnt.orders)
    for order in orders:
        same = any(np.array_equal(order, x) for x in earlier)
        if same and config.batch_size >= FACTORIAL:
            return Finding(
                "fail",
                "two epochs visit their rows in the same order",
                "the key of the shuffle is not folded with the epoch or the iteration",
            )
        earlier.append(order)
    texts = [x.sft for x in updates_of(e, "actor") if x.sft is not None]
    for now, then in itertools.pairwise(texts):
        several = len(np.unique(now.ids, axis=0)) >= FACTORIAL
        if several and np.array_equal(now.ids, then.ids):
            return Finding(
                "fail", "two updates have the same SFT batch", "the SFT data stands still"
            )
    if early := _stopped_wrongly(e):
        return Finding("fail", early, "ppo.stop_kl")
    if not e.updates:
        return Finding("skip", "no update")
    return Finding("pass", f"{len(orders)} epochs visit every row once, in orders of their own")


def _stopped_wrongly(e: Evidence) -> str:
    """Describe updates that continue or end against `ppo.stop_kl`; empty where none does."""
    config, updates = e.setting.config, updates_of(e, "actor")
    if config.stop_kl is None or not updates:
        return ""
    far = [x.metrics.get("approx_kl", 0.0) > config.stop_kl for x in updates]
    if any(far[:-1]):
        return f"updates go on after one at more than {config.stop_kl:g} nats/token"
    if len(far) < config.epochs * config.minibatches and not far[-1]:
        return f"updates end after {len(far)} though the policy is within {config.stop_kl:g} nats/token"
    return ""


def orders_of(e: Evidence) -> list[np.ndarray]:
    """The order of rows in every whole epoch of an iteration."""
    config = e.setting.config
    role = "critic" if updates_of(e, "critic") else "actor"
    visited = [x.visited for x in updates_of(e, role)]
    starts = range(0, len(visited) - config.minibatches + 1, config.minibatches)
    return [np.concatenate(visited[i : i + config.minibatches]) for i in starts]
