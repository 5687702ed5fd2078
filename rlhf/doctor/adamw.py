"""AdamW, its clip and its learning rate in NumPy and float64, on a sample of a model's entries."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from glm_jax.optim import OptimConfig
from glm_jax.train import TrainState
from glm_jax.weights import named_weights

ENTRIES = 4096  # sampled of every weight
ULP = 2.0**-23  # float32: distance of neighbouring numbers, relative

Arrays = Mapping[str, np.ndarray]


class Sample(NamedTuple):
    """Entries of a training state, the same ones every time, by weight; float64 on the host."""

    step: int  # updates done
    counts: tuple[int, ...]  # of them as the optimizer's parts count
    weights: Arrays
    mean: Arrays  # first moment
    square: Arrays  # second moment


def entries(tree: Any) -> dict[str, np.ndarray]:
    """Evenly spread entries of the first shard that this process has of every weight; float64 [n], n <= ENTRIES."""
    found = {}
    for name, leaf in named_weights(tree).items():
        shard = np.asarray(leaf.addressable_shards[0].data).reshape(-1)
        stride = max(1, shard.size // ENTRIES)
        found[name] = shard[::stride].astype(np.float64)
    return found


def sample(state: TrainState) -> Sample:
    """The sample of a state whose optimizer is an AdamW of optax."""
    moments = [optax.tree.get(state.opt_state, name) for name in ("mu", "nu")]
    counts = optax.tree.get_all_with_path(state.opt_state, "count")
    return Sample(
        int(jax.device_get(state.step)),
        tuple(int(jax.device_get(count)) for _, count in counts),
        entries(state.model),
        *(entries(moment) for moment in moments),
    )


def learning_rate(config: OptimConfig, update: int, total: int) -> float:
    """Learning rate of update `update` = 1 .. `total`: linear up, then half a cosine down to the last one."""
    warm = round(config.warmup_fraction * total)
    if update <= warm:
        return config.learning_rate * update / warm
    done = (min(update, total) - max(1, warm)) / max(1, total - max(1, warm))
    share = config.final_fraction + (1 - config.final_fraction) * 0.5 * (
        1 + math.cos(math.pi * done)
    )
    return config.learning_rate * share


def is_decayed(name: str) -> bool:
    """Tell whether weight decay applies: to all weights but norm scales and biases."""
    last = name.rsplit(".", 1)[-1]
    return "norm" not in last and not last.startswith("b_")


class Followed(NamedTuple):
    """Distances of an update from AdamW, by weight; 1 is the limit of each."""

    moments: dict[str, float]  # distance of the moments from those of the gradient
    step: dict[str, float]  # of single entries of the weights from AdamW's step
    rate: float  # learning rate that the weights took, as a multiple of the expected one
    decay: dict[str, float]  # error of the decay that the weights took, in its standard errors


def gradient_in(before: Sample, after: Sample, config: OptimConfig) -> dict[str, np.ndarray]:
    """The clipped gradient that an update added to the first moment."""
    b1 = config.beta1
    return {name: (after.mean[name] - b1 * x) / (1 - b1) for name, x in before.mean.items()}


def follow(
    before: Sample, after: Sample, config: OptimConfig, rate: float, number: int
) -> Followed:
    """Compare an update with AdamW: number `number` of the optimizer, at learning rate `rate`."""
    gradient = gradient_in(before, after, config)
    b1, b2 = config.beta1, config.beta2
    moments, steps, decays = {}, {}, {}
    ratio = weight = 0.0
    for name, g in gradient.items():
        square = b2 * before.square[name] + (1 - b2) * g**2
        # the gradient is a difference of two rounded moments
        doubt = ULP * (np.abs(before.mean[name]) + np.abs(after.mean[name])) / (1 - b1)
        allowed = 16 * ((1 - b2) * (2 * np.abs(g) + doubt) * doubt + ULP * square) + 1e-45
        moments[name] = float((np.abs(after.square[name] - square) / allowed).max(initial=0.0))
        unbiased = after.mean[name] / (1 - b1**number)
        root = np.sqrt(after.square[name] / (1 - b2**number))
        direction = unbiased / (root + config.eps)
        w, moved = before.weights[name], after.weights[name] - before.weights[name]
        shrink = config.weight_decay * w if is_decayed(name) else np.zeros_like(w)
        expected = -rate * (direction + shrink)
        # weights are rounded once they have moved; the step is rounded too
        unit = ULP * (np.abs(w) + np.abs(expected)) + 1e-45
        rest = moved - expected
        steps[name] = float((np.abs(rest) / (2 * unit + 1e-4 * np.abs(expected))).max(initial=0.0))
        # steps of several units are rounded at random; smaller ones may be rounded away altogether
        clear = np.abs(expected) > 4 * unit
        w, moved, expected, rest, unit = (x[clear] for x in (w, moved, expected, rest, unit))
        ratio += float((moved * expected / unit**2).sum())
        weight += float((expected**2 / unit**2).sum())
        # the rest that is parallel to the weights is decay
        along = float((w**2 / unit**2).sum()) ** 0.5
        if along:
            off = float((rest * w / unit**2).sum())
            tolerated = 6 * along + 1e-3 * abs(float((expected * w / unit**2).sum()))
            decays[name] = abs(off) / tolerated
    return Followed(moments, steps, ratio / weight if weight else 1.0, decays)
