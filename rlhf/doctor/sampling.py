"""Tests that sampled tokens follow their distribution, and that random streams are independent.

Each has a false alarm rate of `FALSE_ALARMS`, whatever the distributions are.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from rlhf.doctor.finding import Finding

FALSE_ALARMS = 1e-7  # of a test on an iteration of a sound run


class Stream(NamedTuple):
    """Tokens that are compared with those of another stream, and the chance that they agree."""

    name: str
    same: np.ndarray  # bool [n]
    chance: np.ndarray  # float64 [n], probability of the other stream's token


def uniforms(above: np.ndarray, tied: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1] for every token, uniform and independent where tokens follow their distributions.

    The probability of all tokens that are more likely, plus a random share of those that are as likely (Rosenblatt
    1952, randomised for discrete distributions).
    """
    share = np.random.default_rng(seed).random(len(above))
    return np.clip(above + share * tied, 0.0, 1.0)


def uniformity(numbers: np.ndarray, rounding: float) -> Finding:
    """Tokens follow their distributions: their uniform numbers do, in their mean and as a whole.

    `rounding` is how far rounding moves log-probabilities (nats), which bends the numbers.
    """
    count = len(numbers)
    if count < 8:
        return Finding("skip", f"{count} tokens are too few to tell")
    off = float(numbers.mean()) - 0.5
    spread = 1 / math.sqrt(12 * count)
    bend = rounding / 4  # p (1 - p) at most
    # sums of uniform numbers have lighter tails than the normal distribution
    sigmas = max(0.0, abs(off) - bend) / spread
    distance = float(stats.kstest(numbers, "uniform").statistic)
    chance = float(stats.kstwo.sf(max(0.0, distance - bend), count))
    limit = -float(stats.norm.ppf(FALSE_ALARMS / 4))
    seen = f"{count} tokens: rank {off:+.3f} of 0.5 in the mean ({sigmas:.1f} standard errors)"
    if sigmas <= limit and chance >= FALSE_ALARMS / 2:
        return Finding("pass", f"{seen}, Kolmogorov-Smirnov distance {distance:.3f}")
    side = "more likely" if off < 0 else "less likely"
    return Finding(
        "fail",
        f"{seen}, Kolmogorov-Smirnov distance {distance:.3f}: a sound sampler does this once in "
        f"{1 / FALSE_ALARMS:.0e} iterations",
        f"sampled tokens are {side} than their distribution says: noise of another size, another temperature, or a "
        f"token that is not the largest of log-probability plus noise",
    )


def independence(streams: list[Stream], rounding: float) -> Finding:
    """Tokens of different streams agree no more often than by chance (Chernoff's bound on the excess)."""
    told = []
    for name, same, chance in streams:
        if not len(same):
            continue
        count, expected = int(same.sum()), float(chance.sum()) * (1 + rounding) + 1e-9
        bound = 0.0
        if count > expected:
            bound = -(count * math.log(count / expected) - count + expected)
        told.append(f"{name} {count} of {len(same)} (expected {expected:.1f})")
        if bound < math.log(FALSE_ALARMS / max(1, len(streams))):
            return Finding(
                "fail",
                f"{name} agree in {count} of {len(same)} tokens, where chance gives {expected:.1f}",
                f"{name} share their random numbers: the key is not folded with what tells them apart",
            )
    if not told:
        return Finding("skip", "one stream only")
    return Finding("pass", "agreeing tokens: " + ", ".join(told))
