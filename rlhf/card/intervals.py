"""Weighted means over judged pairs with 95 % intervals.

Pairs of one prompt share answers, and prompts of one dialogue share their history: dialogues are what is resampled.
Every figure starts its own generator from `seed`: neither the order of rows nor other figures change an interval.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

LEVEL = 0.95
REPLICATES = 2000
DRAWS_AT_ONCE = 4_000_000  # counts held in memory while resampling

Statistic = Callable[[np.ndarray], np.ndarray]  # totals of K columns, [R, K] -> [R]; NaN: undefined


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with its interval; None where there is nothing to tell it from."""

    value: float | None
    low: float | None  # no interval from a single dialogue
    high: float | None
    count: int  # rows it was taken over
    dialogues: int

    def above(self, level: float) -> bool:
        """Whether the whole interval lies above `level`."""
        return self.low is not None and self.low > level

    def below(self, level: float) -> bool:
        """Whether the whole interval lies below `level`."""
        return self.high is not None and self.high < level


class Sample(NamedTuple):
    """The rows that a figure is a mean over: a weight and a dialogue for each of P rows."""

    weight: Float[np.ndarray, " P"]
    dialogue: Int[np.ndarray, " P"]

    def take(self, rows: np.ndarray) -> "Sample":
        """The rows of a mask or of indices."""
        return Sample(self.weight[rows], self.dialogue[rows])

    def mean(self, values: np.ndarray) -> float | None:
        """Weighted mean; None of no rows."""
        return float(np.average(values, weights=self.weight)) if len(values) else None


def share(points: Float[np.ndarray, " P"], sample: Sample, seed: int) -> Estimate:
    """Mean of points between 0 and 1.

    Where every point is 0, or every one 1, resampling sees no variance and would claim certainty: the interval is
    then the exact binomial one with a dialogue as the trial (Clopper & Pearson 1934).
    """
    found = difference(points, sample, seed)
    unseen = ((1 - LEVEL) / 2) ** (1 / max(found.dialogues, 1))
    if found.value == 1.0:
        return dataclasses.replace(found, low=unseen, high=1.0)
    if found.value == 0.0:
        return dataclasses.replace(found, low=0.0, high=1 - unseen)
    return found


def difference(points: Float[np.ndarray, " P"], sample: Sample, seed: int) -> Estimate:
    """Mean of points of either sign, such as paired differences."""
    columns = sample.weight * np.stack([points, np.ones(len(points))])
    ratio = lambda totals: _ratio(totals[:, 0], totals[:, 1])  # noqa: E731
    return _bootstrap(columns, sample.dialogue, ratio, seed)


def contrast(
    points: Float[np.ndarray, " P"],
    side: Bool[np.ndarray, " P"],
    sample: Sample,
    seed: int,
) -> Estimate:
    """(mean where `side` - mean elsewhere) / 2: None where one of the two is empty."""
    columns = sample.weight * np.stack([points * side, side, points * ~side, ~side])

    def half_gap(totals: np.ndarray) -> np.ndarray:
        return (_ratio(totals[:, 0], totals[:, 1]) - _ratio(totals[:, 2], totals[:, 3])) / 2

    return _bootstrap(columns, sample.dialogue, half_gap, seed)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _bootstrap(
    columns: Float[np.ndarray, "K P"],
    dialogue: Int[np.ndarray, " P"],
    statistic: Statistic,
    seed: int,
) -> Estimate:
    """Percentile bootstrap over clusters (Efron & Tibshirani 1993, chapters 8 and 13).

    Dialogues whose columns have the same sums cannot be told apart. How often each such kind is drawn is multinomial,
    so that a million pairs cost no more than the few hundred kinds they make: the same distribution, not an
    approximation.
    """
    if not len(dialogue):
        return Estimate(None, None, None, 0, 0)
    names, number = np.unique(dialogue, return_inverse=True)
    count, dialogues = len(dialogue), len(names)
    sums = np.stack([np.bincount(number, column, minlength=dialogues) for column in columns])
    value = statistic(sums.sum(axis=1)[None])[0]
    if np.isnan(value):
        return Estimate(None, None, None, count, dialogues)
    if dialogues == 1:
        return Estimate(float(value), None, None, count, dialogues)
    kinds, sizes = _kinds(np.round(sums, 12))  # equal ones but for rounding are of one kind
    rng = np.random.default_rng(seed)
    rows = max(1, DRAWS_AT_ONCE // len(sizes))
    drawn = [
        statistic(
            rng.multinomial(dialogues, sizes / dialogues, min(rows, REPLICATES - start)) @ kinds
        )
        for start in range(0, REPLICATES, rows)
    ]
    replicates = np.concatenate(drawn)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(replicates[~np.isnan(replicates)], [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high), count, dialogues)


def _kinds(sums: Float[np.ndarray, "K C"]) -> tuple[np.ndarray, np.ndarray]:
    """Distinct columns as rows [U, K], and how many there are of each [U]."""
    ordered = sums[:, np.lexsort(sums)]
    new = np.append(True, np.any(np.diff(ordered), axis=0))
    starts = np.flatnonzero(new)
    return ordered[:, starts].T, np.diff(np.append(starts, sums.shape[1]))
