"""Length balancing of ChatGLM-RLHF (arXiv 2404.00934, section 3.1.2): no bucket of pairs says that longer is better."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf.data.filter_config import EDGES
from rlhf.data.pairs import PairTable


class Bucket(NamedTuple):
    """Pairs whose lengths differ by `low` to below `high` (None: without end)."""

    low: int
    high: int | None
    longer_wins: int
    shorter_wins: int
    equal: int  # d = 0

    @property
    def range(self) -> str:
        """The lengths' differences, as people read them."""
        if self.high is None:
            return f"{self.low} or more"
        return f"{self.low}" if self.high == self.low + 1 else f"{self.low} to {self.high - 1}"

    @property
    def win_rate(self) -> float | None:
        """Share in which the longer response is preferred: the accuracy of a length-only scorer; None without pairs."""
        decided = self.longer_wins + self.shorter_wins + self.equal
        return (self.longer_wins + self.equal / 2) / decided if decided else None

    def as_json(self) -> dict[str, int | float | None]:
        """Its fields and the win rate."""
        return {**self._asdict(), "longer_win_rate": self.win_rate}


def gaps(pairs: PairTable) -> np.ndarray:
    """int64 [P]: length of the preferred response minus that of the other."""
    return pairs.chosen_length.astype(np.int64) - pairs.rejected_length


def buckets(pairs: PairTable, edges: Sequence[int] = EDGES) -> list[Bucket]:
    """d = | |y_w| - |y_l| | of pairs that are no ties, by bucket, and who won there; the first one is d < edges[0]."""
    gap = gaps(pairs)[~pairs.tie]
    number = np.digitize(np.abs(gap), edges)
    found = []
    for i, low in enumerate((0, *edges)):
        here = gap[number == i]
        high = edges[i] if i < len(edges) else None
        longer, shorter = int((here > 0).sum()), int((here < 0).sum())
        found.append(Bucket(low, high, longer, shorter, len(here) - longer - shorter))
    return found


def balanced(pairs: PairTable, seed: int, edges: Sequence[int] = EDGES) -> np.ndarray:
    """bool [P]: pairs to keep, so that in every bucket of d as many longer as shorter responses are preferred.

    Of the side that has more, those with the smallest draw stay (the paper does not say how it balances); d = 0 stays.
    A scorer that only sees length is then right in half of the pairs of every bucket.
    """
    gap, draw = gaps(pairs), pairs.draw(seed)
    number = np.digitize(np.abs(gap), edges)
    keep = np.ones(len(pairs), bool)
    for i in range(len(edges) + 1):
        sides = [np.flatnonzero((number == i) & (np.sign(gap) == sign)) for sign in (1, -1)]
        fewer = min(map(len, sides))
        for rows in sides:
            # the digests decide between equal draws, so that the order of rows never does
            order = np.lexsort((pairs.rejected[rows], pairs.chosen[rows], draw[rows]))
            keep[rows[order[fewer:]]] = False
    return keep
