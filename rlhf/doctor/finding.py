"""The result of a check, and the comparisons that most checks make: on the host, in float64."""

from typing import Any, Literal, NamedTuple

import numpy as np

QUANTILES = (0.5, 0.9, 0.99, 1.0)
HEADROOM = 4.0  # two programs that round differently are some sqrt(2) further apart than one from the truth
FLOAT32 = 1e-4  # nats, or units of a score: what float32 rounding stays below at a temperature of 1


class Finding(NamedTuple):
    """What a check saw."""

    status: Literal["pass", "warn", "fail", "skip"]
    seen: str
    advice: str = ""  # the likely cause, and the field to change; where it did not pass


class Rounding(NamedTuple):
    """Measured rounding of a quantity: |compute dtype - float32| at every place.

    So the limits know the dtype, the depth, the temperature and how many places there are. They hold quantile by
    quantile: a maximum over many tokens is larger than one over few.
    """

    gaps: np.ndarray  # float64 [n]
    floor: float  # what float32 rounding stays below

    @property
    def exact(self) -> "Rounding":
        """The limits of the same quantity where it is computed in float32."""
        return Rounding(np.zeros(0), self.floor)

    @property
    def largest(self) -> float:
        """Limit of the largest difference."""
        return HEADROOM * float(self.gaps.max(initial=0.0)) + self.floor

    def of_mean(self, weights: np.ndarray) -> float:
        """Limit of an error in the mean of n terms, of which term i is `weights`[i] times a quantity."""
        if not len(weights):
            return self.floor
        typical = float(np.sqrt(np.mean(self.gaps**2))) if len(self.gaps) else 0.0
        size = float(np.sqrt(np.mean(np.asarray(weights, np.float64) ** 2)))
        # errors are partly independent, partly of one sign
        return size * (HEADROOM * typical * (2.0 / np.sqrt(len(weights)) + 0.1) + self.floor)

    def excess(self, gaps: np.ndarray) -> tuple[float, float, float]:
        """The quantile that is furthest over its limit: (difference, limit, quantile); NaN counts as infinite."""
        gaps = np.where(np.isfinite(gaps), np.abs(gaps), np.inf)
        rows = []
        for q in QUANTILES:
            seen = float(np.quantile(gaps, q, method="higher")) if len(gaps) else 0.0
            own = float(np.quantile(self.gaps, q, method="higher")) if len(self.gaps) else 0.0
            rows.append((seen, HEADROOM * own + self.floor, q))
        return max(rows, key=lambda row: row[0] / row[1])


def worst(a: Any, b: Any, mask: Any = None) -> float:
    """Largest difference where it counts; NaN counts as infinite."""
    gap: np.ndarray = np.abs(np.asarray(a, np.float64) - b)
    gap = np.where(np.isfinite(gap), gap, np.inf)
    return float(gap.max(initial=0.0) if mask is None else gap[mask].max(initial=0.0))


def judged(gap: float, limit: float, what: str, advice: str) -> Finding:
    """A pass where the largest difference is within the limit."""
    seen = f"{what} differ by {gap:.1e} at most (limit {limit:.0e})"
    return Finding("pass", seen) if gap <= limit else Finding("fail", seen, advice)


def within(gaps: np.ndarray, rounding: Rounding, what: str, advice: str) -> Finding:
    """A pass where differences are those of rounding, quantile by quantile."""
    seen, limit, q = rounding.excess(gaps)
    place = "at most" if q == 1.0 else f"at the {100 * q:.0f} % quantile"
    text = f"{what} differ by {seen:.1e} {place} (limit {limit:.1e})"
    return Finding("pass", text) if seen <= limit else Finding("fail", text, advice)


def first_failure(findings: list[Finding]) -> Finding:
    """The first that fails; else the first that warns, else the last."""
    for status in ("fail", "warn"):
        for finding in findings:
            if finding.status == status:
                return finding
    return findings[-1]
