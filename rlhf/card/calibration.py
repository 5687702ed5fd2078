"""Margins between the scores of two answers as probabilities: calibration, and their histogram.

`margin` is the score of the preferred answer less that of the other.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

CONFIDENCE_BINS = 10  # from 1/2 to 1
MARGIN_BINS = 20  # on either side of 0
MARGIN_TAIL = 0.995  # what lies beyond this quantile is counted in the outermost bins


@dataclasses.dataclass(frozen=True)
class ConfidenceBin:
    """Predictions of `low` <= confidence < `high` (the last bin holds 1 too)."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Whether sigmoid of a difference of scores is how often the judges agree."""

    ece: float
    confidence: float  # mean
    nll: float  # nats/pair
    chance_nll: float  # log 2
    bins: tuple[ConfidenceBin, ...]


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Margins other than 0, by bin; the outermost bins hold what lies beyond them."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


def calibration(margin: Float[np.ndarray, " P"], weight: Float[np.ndarray, " P"]) -> Calibration:
    """ECE = sum over bins of weight share * |accuracy - confidence| (Guo et al. 2017, eq. 3), and eq. 1 of the paper.

    The model predicts the answer that it scores higher, with confidence max(p, 1 - p), p = sigmoid(difference of the
    two scores). Both are the same in whichever order the pair is presented, so that confidence knows nothing of
    the label; p of the preferred answer would.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    edges = np.linspace(0.5, 1.0, CONFIDENCE_BINS + 1)
    number = np.searchsorted(edges[1:-1], confidence, side="right")
    counts = np.bincount(number, minlength=CONFIDENCE_BINS)
    weights, *sums = (
        np.bincount(number, weight * x, minlength=CONFIDENCE_BINS)
        for x in (np.ones(len(margin)), confidence, half_points(margin))
    )
    bins = tuple(
        ConfidenceBin(
            float(low), float(high), int(n), *((sure / w, right / w) if n else (None, None))
        )
        for low, high, n, w, sure, right in zip(
            edges[:-1], edges[1:], counts, *(x.tolist() for x in (weights, *sums)), strict=True
        )
    )
    return Calibration(
        ece=float(np.abs(sums[0] - sums[1]).sum() / weight.sum()),
        confidence=float(np.average(confidence, weights=weight)),
        nll=float(np.average(np.logaddexp(0, -margin), weights=weight)),
        chance_nll=math.log(2),
        bins=bins,
    )


def margin_histogram(margin: Float[np.ndarray, " P"]) -> Histogram:
    """Equal bins with an edge at 0, so that right and wrong pairs share none."""
    margin = margin[margin != 0]
    reach = float(np.quantile(np.abs(margin), MARGIN_TAIL)) if len(margin) else 1.0
    right = np.linspace(0, reach, MARGIN_BINS + 1)
    edges = np.concatenate([-right[:0:-1], right])
    number = np.searchsorted(edges[1:-1], margin, side="right")
    counts = np.bincount(number, minlength=2 * MARGIN_BINS)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))


def half_points(gap: np.ndarray) -> Float[np.ndarray, " P"]:
    """1 where positive, 0 where negative, 1/2 at 0."""
    return np.sign(gap) / 2 + 0.5
