"""The figures of a reward model's report card. Pure functions on arrays of P judged pairs.

Figures over pairs are weighted means (`Sample`), as in training; those over answers count every answer once.
`win` is 1 where the model scores the preferred answer higher, 0 where lower, 1/2 where both are equal.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr

from rlhf.card.answers import Answers, Triples
from rlhf.card.calibration import Calibration, Histogram, half_points
from rlhf.card.intervals import Estimate, Sample, contrast, difference, share


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Pairs whose preferred answer is `low` <= gap < `high` tokens longer; None: no bound."""

    low: int | None
    high: int | None
    accuracy: Estimate
    ruler: float | None  # accuracy of preferring the longer answer


@dataclasses.dataclass(frozen=True)
class Length:
    """The model beside a ruler that prefers the longer answer (equal lengths: 1/2)."""

    ruler: Estimate
    over_ruler: Estimate  # accuracy of the model - that of the ruler
    over_shorter: Estimate  # the same against preferring the shorter answer
    correlation: float | None  # Spearman's, of score with length over distinct answers
    buckets: tuple[Bucket, ...]


@dataclasses.dataclass(frozen=True)
class Preference:
    """How often an answer with some property - listed first, longer - is preferred, equal scores counting 1/2."""

    model: Estimate
    judges: Estimate
    difference: Estimate  # model - judges
    accuracy_with: Estimate  # where the preferred answer has the property
    accuracy_against: Estimate  # where the other one has it
    lean: (
        Estimate  # (accuracy_with - accuracy_against) / 2: the bias were the judges' share one half
    )


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of distinct answers, and how many pairs have no winner."""

    answers: int
    mean: float
    std: float
    min: float
    max: float
    equal: float  # share of pairs whose two scores are exactly equal


@dataclasses.dataclass(frozen=True)
class Task:
    """Scores of the answers to one task, and the accuracy on its pairs."""

    name: str
    answers: int
    mean: float
    std: float
    accuracy: Estimate


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Scores by task; pairs of an unknown task are left out.

    The paper's task bias: rewards of different tasks lie apart, though no pair compares them
    (arXiv 2404.00934, section 3.2).
    """

    rows: tuple[Task, ...]
    spread: float | None  # largest mean - smallest mean
    explained: float | None  # share of the variance of scores that lies between tasks (eta^2)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The model against one annotator."""

    name: str
    accuracy: Estimate
    kappa: float | None


@dataclasses.dataclass(frozen=True)
class Figures:
    """What was measured of a reward model on held-out pairs."""

    accuracy: Estimate
    length: Length
    # of the answer listed first, over pairs whose order the data says; a scalar score can only have it from the data
    position: Preference
    verbosity: Preference  # of the longer answer; pairs of equal lengths are left out
    calibration: Calibration
    scores: Scores
    margins: Histogram
    tasks: Tasks
    annotators: tuple[Agreement, ...]
    triples: Triples


@dataclasses.dataclass(frozen=True)
class Point:
    """A step of the reward model's training; None: not recorded, or not finite."""

    step: int
    score_mean: float | None = None
    score_std: float | None = None
    accuracy: float | None = None  # on the pairs of the step
    heldout_accuracy: float | None = None


def length_gaps(
    win: Float[np.ndarray, " P"],
    gap: Int[np.ndarray, " P"],
    sample: Sample,
    answers: Answers,
    edges: Sequence[int],
    seed: int,
) -> Length:
    """The model beside the ruler, over all pairs and by how much longer the preferred answer is."""
    ruler = half_points(gap)
    bucket = np.searchsorted(edges, gap, side="right")
    bounds = (None, *edges, None)
    return Length(
        ruler=share(ruler, sample, seed),
        over_ruler=difference(win - ruler, sample, seed),
        over_shorter=difference(win - (1 - ruler), sample, seed),
        correlation=_spearman(answers.score, answers.tokens),
        buckets=tuple(
            Bucket(
                low=bounds[number],
                high=bounds[number + 1],
                accuracy=share(win[bucket == number], sample.take(bucket == number), seed),
                ruler=sample.take(bucket == number).mean(ruler[bucket == number]),
            )
            for number in range(len(edges) + 1)
        ),
    )


def preference(
    win: Float[np.ndarray, " P"],
    favoured: Bool[np.ndarray, " P"],
    sample: Sample,
    seed: int,
) -> Preference:
    """Of a property that one answer of every pair has; `favoured`: the preferred answer has it."""
    model, judges = np.where(favoured, win, 1 - win), favoured.astype(np.float64)
    return Preference(
        model=share(model, sample, seed),
        judges=share(judges, sample, seed),
        difference=difference(model - judges, sample, seed),
        accuracy_with=share(win[favoured], sample.take(favoured), seed),
        accuracy_against=share(win[~favoured], sample.take(~favoured), seed),
        lean=contrast(win, favoured, sample, seed),
    )


def scores(answers: Answers, margin: Float[np.ndarray, " P"]) -> Scores:
    """Over distinct answers, because an answer of a ranking stands in several pairs."""
    score = answers.score
    return Scores(
        answers=len(score),
        mean=float(score.mean()),
        std=float(score.std())
        if np.ptp(score)
        else 0.0,  # rounding must not make equal ones differ
        min=float(score.min()),
        max=float(score.max()),
        equal=float((margin == 0).mean()),
    )


def tasks(
    names: Sequence[str],
    win: Float[np.ndarray, " P"],
    sample: Sample,
    answers: Answers,
    seed: int,
) -> Tasks:
    """An answer counts once in each task that it stands in."""
    rows, members = [], []
    for name, pairs in _groups(names):
        found = np.unique(np.concatenate([answers.chosen[pairs], answers.rejected[pairs]]))
        score = answers.score[found]
        members.append(score)
        accuracy = share(win[pairs], sample.take(pairs), seed)
        rows.append(Task(name, len(score), float(score.mean()), float(score.std()), accuracy))
    if len(rows) < 2:
        return Tasks(tuple(rows), None, None)
    means, sizes = np.array([row.mean for row in rows]), np.array([row.answers for row in rows])
    everyone = np.concatenate(members)
    between = float(np.sum(sizes * (means - everyone.mean()) ** 2))
    total = float(np.sum((everyone - everyone.mean()) ** 2))
    explained = between / total if np.ptp(everyone) else None
    return Tasks(tuple(rows), float(np.ptp(means)), explained)


def agreements(
    names: Sequence[str],
    win: Float[np.ndarray, " P"],
    chosen_first: Bool[np.ndarray, " P"],
    order_known: Bool[np.ndarray, " P"],
    sample: Sample,
    seed: int,
) -> tuple[Agreement, ...]:
    """Agreement with every known annotator.

    kappa = (agreement - expected) / (1 - expected) on "the first listed is better" (Cohen 1960), expected from how
    often either says so; equal scores count half for each answer. Over the pairs whose order is known; None where
    there are none, or both always say the same.
    """
    found = []
    for name, pairs in _groups(names):
        accuracy = share(win[pairs], sample.take(pairs), seed)
        known = pairs[order_known[pairs]]
        mean = sample.take(known).mean
        judges = mean(chosen_first[known])
        model = mean(np.where(chosen_first[known], win[known], 1 - win[known]))
        agree = mean(win[known])
        kappa = None
        if agree is not None and judges is not None and model is not None:
            expected = model * judges + (1 - model) * (1 - judges)
            kappa = (agree - expected) / (1 - expected) if expected < 1 else None
        found.append(Agreement(name, accuracy, kappa))
    return tuple(found)


def _spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's rank correlation; None where either is constant."""
    return float(spearmanr(x, y).statistic) if np.ptp(x) and np.ptp(y) else None


def _groups(names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, rows that have it) in the order of names, without the unknown one ""."""
    known = sorted(set(names))
    numbers = dict(zip(known, range(len(known)), strict=True))
    number = np.fromiter(map(numbers.__getitem__, names), np.int64, len(names))
    ends = np.cumsum(np.bincount(number, minlength=len(known)))[:-1]
    for name, rows in zip(known, np.split(np.argsort(number, kind="stable"), ends), strict=True):
        if name:
            yield name, rows
