"""Length balancing of ChatGLM-RLHF (arXiv 2404.00934, section 3.1.2): no bucket of pairs says that longer is better."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf.data.filter_config import EDGES, FilterConfig
from rlhf.data.pairs import PairTable, weights_of


class Bucket(NamedTuple):
    """Pairs whose lengths differ by `low` to below `high` (None: without end)."""

    low: int
    high: int | None
    longer_wins: int
    shorter_wins: int
    equal: int  # d = 0
    longer_weight: float  # of the pairs counted above
    shorter_weight: float
    equal_weight: float

    @property
    def range(self) -> str:
        """The lengths' differences, as people read them."""
        if self.high is None:
            return f"{self.low} or more"
        return f"{self.low}" if self.high == self.low + 1 else f"{self.low} to {self.high - 1}"

    @property
    def win_rate(self) -> float | None:
        """Accuracy of a scorer that prefers the longer response, by weight; None without pairs."""
        total = self.longer_weight + self.shorter_weight + self.equal_weight
        return (self.longer_weight + self.equal_weight / 2) / total if total else None

    def as_json(self) -> dict[str, int | float | None]:
        """Its fields and the win rate."""
        return {**self._asdict(), "longer_win_rate": self.win_rate}


def gaps(pairs: PairTable) -> np.ndarray:
    """int64 [P]: length of the preferred response minus that of the other."""
    return pairs.chosen_length.astype(np.int64) - pairs.rejected_length


def buckets(
    pairs: PairTable, edges: Sequence[int] = EDGES, weight: np.ndarray | None = None
) -> list[Bucket]:
    """d = | |y_w| - |y_l| | of pairs that are no ties, by bucket, and who won there; the first one is d < edges[0].

    `weight`: float64 [P], what each counts for; None: what the data states, 1 where it states nothing.
    """
    if weight is None:
        weight = np.where(np.isnan(pairs.weight), 1.0, pairs.weight)
    gap, weight = gaps(pairs)[~pairs.tie], weight[~pairs.tie]
    number = np.digitize(np.abs(gap), edges)
    found = []
    for i, low in enumerate((0, *edges)):
        sides = [(number == i) & (np.sign(gap) == sign) for sign in (1, -1, 0)]
        counts = (int(side.sum()) for side in sides)
        weights = (math.fsum(weight[side]) for side in sides)
        found.append(Bucket(low, edges[i] if i < len(edges) else None, *counts, *weights))
    return found


def debiased(pairs: PairTable, config: FilterConfig) -> tuple[np.ndarray, np.ndarray]:
    """Rows that stay, bool [P], and what each of those counts for, float64 [rows that stay].

    A pair counts for what the data states, else for 1 / (pairs of its prompt that stay) or 1, as `config.weigh` says.
    With `config.balance`, `balanced` chooses the rows, and `levelled` then lowers weights: in every bucket of d pairs
    with a longer winner are as many as, and weigh as much as, those with a shorter one.
    """
    keep = np.ones(len(pairs), bool)
    if config.balance:
        keep = balanced(pairs, config.seed, config.edges)
    left = pairs.take(keep)
    weight = left.weight.copy()
    open_ = np.isnan(weight)
    weight[open_] = weights_of(left.prompt[open_]) if config.weigh == "prompt" else 1.0
    return keep, levelled(left, weight, config.edges) if config.balance else weight


def levelled(pairs: PairTable, weight: np.ndarray, edges: Sequence[int] = EDGES) -> np.ndarray:
    """float64 [P]: weights of which the heavier side of every bucket of d is scaled down to the lighter one.

    Weights only shrink, so that no prompt counts for more than before; d = 0 keeps its weight.
    """
    gap, weight = gaps(pairs), weight.copy()
    number = np.digitize(np.abs(gap), edges)
    for i in range(len(edges) + 1):
        sides = [(number == i) & (np.sign(gap) == sign) for sign in (1, -1)]
        # exactly rounded sums, which no order of rows changes
        totals = [math.fsum(weight[side]) for side in sides]
        for side, total in zip(sides, totals, strict=True):
            if total > min(totals):
                weight[side] *= min(totals) / total
    return weight


def balanced(pairs: PairTable, seed: int, edges: Sequence[int] = EDGES) -> np.ndarray:
    """bool [P]: pairs to keep, so that in every bucket of d as many longer as shorter responses are preferred.

    Of the side that has more, those with the smallest draw stay (the paper does not say how it balances); d = 0 stays.
    A scorer that only sees length is then right in half of the pairs of every bucket, counted and not weighed.
    """
    gap, draw, source = gaps(pairs), pairs.draw(seed), pairs.source()
    number = np.digitize(np.abs(gap), edges)
    keep = np.ones(len(pairs), bool)
    for i in range(len(edges) + 1):
        sides = [np.flatnonzero((number == i) & (np.sign(gap) == sign)) for sign in (1, -1)]
        fewer = min(map(len, sides))
        for rows in sides:
            # the digests decide between equal draws, so that the order of rows never does
            order = np.lexsort(
                (
                    pairs.said[rows],
                    source[rows],
                    pairs.rejected[rows],
                    pairs.chosen[rows],
                    draw[rows],
                )
            )
            keep[rows[order[fewer:]]] = False
    return keep
