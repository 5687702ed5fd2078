"""Which snapshots of a training stay, and which make room for new ones."""

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Retention:
    """What stays: the last ones, those at multiples of a number, and the best."""

    last: int = 2
    every: int | None = None
    best: int = 0  # of those that have a worth; of equal ones the later

    def staying(self, worths: Mapping[int, float | None]) -> set[int]:
        """Those of the steps in `worths` that stay; a worth, the higher the better, may be None or NaN: not known."""
        steps = sorted(worths)
        known = {
            step: worth
            for step, worth in worths.items()
            if worth is not None and not math.isnan(worth)
        }
        by_worth = sorted(known, key=lambda step: (known[step], step))
        return {
            *steps[max(0, len(steps) - self.last) :],
            *(step for step in steps if self.every and step % self.every == 0),
            *by_worth[max(0, len(by_worth) - self.best) :],
        }
