"""What a check says, and the comparison that most of them make: on the host, in float64."""

from typing import Any, Literal, NamedTuple

import numpy as np


class Finding(NamedTuple):
    """What a check saw."""

    status: Literal["pass", "warn", "fail", "skip"]
    seen: str
    advice: str = ""  # the cause, and the field to change; where it did not pass


def worst(a: Any, b: Any, mask: Any = None) -> float:
    """Largest difference where it counts; NaN counts as infinite."""
    gap: np.ndarray = np.abs(np.asarray(a, np.float64) - b)
    gap = np.where(np.isfinite(gap), gap, np.inf)
    return float(gap.max() if mask is None else gap[mask].max(initial=0.0))


def judged(gap: float, limit: float, what: str, advice: str) -> Finding:
    """A pass where the largest difference is within the limit."""
    seen = f"{what} differ by {gap:.1e} at most (limit {limit:.0e})"
    return Finding("pass", seen) if gap <= limit else Finding("fail", seen, advice)
