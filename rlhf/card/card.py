"""The report card of a reward model: is it any good? Arrays in, figures and a verdict out."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from rlhf.card.answers import distinct, triples
from rlhf.card.calibration import calibration, half_points, margin_histogram
from rlhf.card.figures import (
    Figures,
    Point,
    agreements,
    length_gaps,
    preference,
    scores,
    tasks,
)
from rlhf.card.intervals import Sample, share
from rlhf.card.verdict import Verdict, judge
from sharding.errors import UserError

LENGTH_EDGES = (
    -255,
    -63,
    -15,
    0,
    1,
    16,
    64,
    256,
)  # tokens; equal lengths have a bucket of their own
LARGEST = float(np.finfo(np.float32).max)


class Scored(NamedTuple):
    """P judged pairs of answers, scored by the model; a row a pair."""

    chosen: Float[np.ndarray, " P"]  # score of the preferred answer
    rejected: Float[np.ndarray, " P"]
    chosen_tokens: Int[np.ndarray, " P"]  # lengths of the answers
    rejected_tokens: Int[np.ndarray, " P"]
    prompt: Int[np.ndarray, " P"]  # its number
    chosen_answer: Int[np.ndarray, " P"]  # number of the answer, at least within its prompt
    rejected_answer: Int[np.ndarray, " P"]
    chosen_first: Bool[np.ndarray, " P"]  # whether the data lists the preferred answer first
    task: Sequence[str]  # "": unknown
    annotator: Sequence[str]  # "": unknown
    dialogue: Int[np.ndarray, " P"]  # number of the dialogue that the prompt is from
    weight: Float[np.ndarray, " P"]  # in every mean over pairs, as in training
    order_known: Bool[np.ndarray, " P"]  # whether the data says which answer it lists first


@dataclasses.dataclass(frozen=True)
class Card(Figures):
    """The figures, how training went, and the verdict."""

    history: tuple[Point, ...]
    verdict: Verdict


def grade(
    scored: Scored,
    history: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
    edges: Sequence[int] = LENGTH_EDGES,
) -> Card:
    """The report card of a model that gave these scores.

    Args:
        scored: held-out pairs.
        history: steps of its training, with the fields of `Point`; other keys are passed over.
        seed: of the bootstrap; figures do not depend on it, intervals hardly.
        edges: increasing bounds of the length gap's buckets, in tokens.

    Raises:
        UserError: no pairs, columns of unequal lengths, or scores that are not finite.
    """
    _check(scored)
    margin = scored.chosen.astype(np.float64) - scored.rejected.astype(np.float64)
    gap = scored.chosen_tokens.astype(np.int64) - scored.rejected_tokens.astype(np.int64)
    win, differs, known = half_points(margin), gap != 0, scored.order_known
    sample = Sample(scored.weight.astype(np.float64), scored.dialogue)
    answers = distinct(
        np.stack([scored.chosen, scored.rejected]).astype(np.float64),
        np.stack([scored.chosen_tokens, scored.rejected_tokens]),
        scored.prompt,
        scored.dialogue,
        np.stack([scored.chosen_answer, scored.rejected_answer]),
    )
    figures = Figures(
        accuracy=share(win, sample, seed),
        length=length_gaps(win, gap, sample, answers, edges, seed),
        position=preference(win[known], scored.chosen_first[known], sample.take(known), seed),
        verbosity=preference(win[differs], gap[differs] > 0, sample.take(differs), seed),
        calibration=calibration(margin, sample.weight),
        scores=scores(answers, margin),
        margins=margin_histogram(margin),
        tasks=tasks(scored.task, win, sample, answers, seed),
        annotators=agreements(scored.annotator, win, scored.chosen_first, known, sample, seed),
        triples=triples(answers, seed),
    )
    points = tuple(_point(record) for record in history)
    return Card(**vars(figures), history=points, verdict=judge(figures, points))


def as_json(card: Card) -> dict[str, Any]:
    """The card in the types that JSON has; what is not defined is null."""
    return json.loads(json.dumps(dataclasses.asdict(card), allow_nan=False))


def _check(scored: Scored) -> None:
    pairs = len(scored.chosen)
    for name, column in scored._asdict().items():
        if len(column) != pairs:
            raise UserError(f"report card: {len(column)} rows of {name}, but {pairs} of chosen")
    if not pairs:
        raise UserError("report card: no judged pairs, there is nothing to grade")
    if not (scored.weight > 0).all():
        raise UserError(
            f"report card: the weight of row {np.argmin(scored.weight > 0)} is not a positive number"
        )
    # larger than float32 holds counts as infinite: differences and squares stay finite in float64
    finite = (np.abs(scored.chosen) <= LARGEST) & (np.abs(scored.rejected) <= LARGEST)
    if not finite.all():
        raise UserError(
            f"report card: {np.sum(~finite):,} of {pairs:,} pairs have a score that is not finite, the first in row"
            f" {np.argmin(finite)}: the model has diverged, take an earlier checkpoint"
        )


def _point(record: Mapping[str, Any]) -> Point:
    names = [field.name for field in dataclasses.fields(Point) if field.name != "step"]
    values = {name: float(record[name]) for name in names if record.get(name) is not None}
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    return Point(int(record["step"]), **finite)
