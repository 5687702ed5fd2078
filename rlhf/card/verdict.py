"""The verdict on a reward model: one grade and plain sentences, by rules over the figures of its report card.

The grade is that of the first rule in `RULES` which applies; every rule that applies adds its sentences. Where none
does, the model is better than chance and than length, and its grade is "good" or "fair".
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from rlhf.card.figures import Figures, Point, Preference
from rlhf.card.intervals import Estimate

GRADES = {
    "says nothing": "its scores do not tell answers apart",
    "too few pairs": "nothing can be told from so few dialogues",
    "a length ruler": "it measures length and is no better than counting tokens",
    "worse than chance": "it prefers what the judges reject; are the labels swapped?",
    "near chance": "its accuracy cannot be told from tossing a coin",
    "no better than length": "better than chance, but not shown to beat counting tokens",
    "biased": "it leans to a position or to a length by more than the judges do",
    "uneven": "it works on some tasks and not on others",
    "overconfident": "it ranks, but is surer than it is right: its scores are spread too far",
    "fair": "better than chance and than length",
    "good": "its accuracy surely lies above what the paper's 32B model has on its own data",
}

DECISIVE = ("says nothing", "too few pairs")
"""Grades beside which no other figure means anything."""

CONSTANT = 0.9
"""Share of pairs with exactly equal scores from which on a model says nothing."""

MIN_DIALOGUES = 30
"""Fewer dialogues are too few: the interval of a bootstrap over a handful of clusters is too narrow to be believed."""

DETECTED = 1.96 + 0.84
"""Standard errors between an accuracy and chance at which 4 of 5 samples show it: 95 % level, 80 % power."""

SAME_AS_LENGTH = 0.8
"""Spearman correlation of score with length, of either sign, that makes a model which beats no ruler a ruler."""

ALWAYS_LONGER = 0.95
"""Share of pairs in which such a model prefers the longer answer, or the shorter one, to be a ruler."""

LEAN = 0.1
"""Bias of position or length on balanced pairs, of either sign: 0.1 prefers the one side in 60 % against 50 %."""

MISCALIBRATED = 0.1
"""ECE from which on confidence is not to be believed, where its mean lies outside the interval of the accuracy."""

OVERFIT = 0.1
"""Accuracy in training above the held-out one's interval, from which on pairs were learnt by heart."""

LAST_STEPS = 0.1
"""Share of the recorded steps, the last ones, whose mean is the accuracy in training."""

GOOD = 0.65
"""Lower end of the accuracy's interval of a good model: what the paper's 32B model reaches (arXiv 2404.00934)."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One word of `GRADES`, and the sentences that explain it, the most important one first."""

    grade: str
    sentences: tuple[str, ...]


def judge(figures: Figures, history: Sequence[Point] = ()) -> Verdict:
    """The verdict on these figures; no rule is asked after one of `DECISIVE` applied."""
    accuracy = figures.accuracy
    sentences = [
        f"It prefers the judges' answer in {told(accuracy)} of {accuracy.count:,} pairs on {accuracy.dialogues:,}"
        f" dialogues (chance: 50%; the longer answer: {told(figures.length.ruler)})."
    ]
    grades = []
    for grade, rule in RULES:
        if found := rule(figures):
            grades.append(grade)
            sentences += found
        if found and grade in DECISIVE:
            break
    else:
        sentences += [*_timid(figures), *_overfit(figures, history)]
    if not grades:
        grades = ["good" if accuracy.above(GOOD) else "fair"]
        sentences.append(f"It is better than chance and than length: {grades[0]}.")
    return Verdict(grades[0], tuple(sentences))


def told(estimate: Estimate) -> str:
    """61.2% (58.0% to 64.3%)."""
    if estimate.value is None:
        return "no pair"
    text = f"{estimate.value:.1%}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({estimate.low:.1%} to {estimate.high:.1%})"


def pairs_needed(accuracy: Estimate) -> int | None:
    """How many more pairs, as clustered as these, would tell this accuracy from chance in 4 of 5 samples.

    Normal approximation: a standard error shrinks with the square root of the pairs. None where no difference was
    seen, or no interval is known.
    """
    if accuracy.value is None or accuracy.low is None or accuracy.high is None:
        return None
    error, effect = (accuracy.high - accuracy.low) / (2 * 1.96), abs(accuracy.value - 0.5)
    if effect == 0:
        return None
    return max(0, math.ceil(accuracy.count * ((DETECTED * error / effect) ** 2 - 1)))


def _says_nothing(figures: Figures) -> list[str]:
    if figures.scores.std == 0:
        return ["It gives every answer the same score."]
    equal = figures.scores.equal
    return [f"It scores both answers alike in {equal:.1%} of pairs."] if equal >= CONSTANT else []


def _too_few(figures: Figures) -> list[str]:
    accuracy = figures.accuracy
    if accuracy.dialogues >= MIN_DIALOGUES:
        return []
    missing = math.ceil((MIN_DIALOGUES / accuracy.dialogues - 1) * accuracy.count)
    more = max(missing, pairs_needed(accuracy) or 0)
    dialogues = f"{accuracy.dialogues} dialogue{'s are' if accuracy.dialogues > 1 else ' is'}"
    return [
        f"{dialogues} too few to judge by: about {more:,} more pairs, on {MIN_DIALOGUES} dialogues at least, would be"
        " needed to tell it from chance."
    ]


def _worse(figures: Figures) -> list[str]:
    if not figures.accuracy.below(0.5):
        return []
    return ["It is worse than chance: it prefers what the judges reject."]


def _ruler(figures: Figures) -> list[str]:
    length, longer = figures.length, figures.verbosity.model.value
    correlation = length.correlation or 0.0
    share = 0.5 if longer is None else longer
    sentences = []
    for side, gain, related, prefers in (
        ("longer", length.over_ruler, correlation, share),
        ("shorter", length.over_shorter, -correlation, 1 - share),
    ):
        if not gain.above(0) and (related >= SAME_AS_LENGTH or prefers >= ALWAYS_LONGER):
            sentences.append(
                f"It is a length ruler: it prefers the {side} answer in {prefers:.1%} of pairs (Spearman correlation of"
                f" score with length: {correlation:.2f}), and its accuracy is above that of this rule by {told(gain)}."
            )
    return sentences


def _near_chance(figures: Figures) -> list[str]:
    accuracy = figures.accuracy
    if accuracy.above(0.5) or accuracy.below(0.5):
        return []
    more = pairs_needed(accuracy)
    needed = (
        f"; were {accuracy.value:.1%} its true accuracy, about {more:,} more pairs would tell it from chance"
        if more
        else ""
    )
    return [f"It is near chance: the interval holds 50%{needed}."]


def _no_better(figures: Figures) -> list[str]:
    if not figures.accuracy.above(0.5) or _ruler(figures):
        return []
    return [
        f"It is not shown to beat preferring the {side} answer: its accuracy is above that by {told(gain)}."
        for side, gain in (
            ("longer", figures.length.over_ruler),
            ("shorter", figures.length.over_shorter),
        )
        if not gain.above(0)
    ]


def _biased(figures: Figures) -> list[str]:
    return [
        f"It leans to the answer {side if found.lean.above(0) else other}: it prefers the one {side} in"
        f" {told(found.model)} of pairs, the judges in {told(found.judges)}."
        for found, side, other in (
            (figures.position, "listed first", "listed second"),
            (figures.verbosity, "that is longer", "that is shorter"),
        )
        if _leans(found)
    ]


def _leans(found: Preference) -> bool:
    lean = found.lean
    return lean.value is not None and abs(lean.value) >= LEAN and (lean.above(0) or lean.below(0))


def _uneven(figures: Figures) -> list[str]:
    overall = figures.accuracy
    return [
        f"On task {task.name!r} it is near chance or worse: {told(task.accuracy)} of {task.accuracy.count:,} pairs."
        for task in figures.tasks.rows
        if task.accuracy.low is not None and task.accuracy.low <= 0.5
        if overall.low is not None and task.accuracy.below(overall.low)
    ]


def _overconfident(figures: Figures) -> list[str]:
    found, accuracy = figures.calibration, figures.accuracy
    if not (found.ece >= MISCALIBRATED and accuracy.below(found.confidence)):
        return []
    return [
        f"It is overconfident: {found.confidence:.1%} sure on average, right in {accuracy.value:.1%}"
        f" (calibration error {found.ece:.1%})."
    ]


def _timid(figures: Figures) -> list[str]:
    found, accuracy = figures.calibration, figures.accuracy
    if not (found.ece >= MISCALIBRATED and accuracy.above(found.confidence)):
        return []
    return [
        f"It is right more often than it says: {found.confidence:.1%} sure on average, right in {accuracy.value:.1%};"
        " its scores lie close together, which does no harm to the ranking."
    ]


def _overfit(figures: Figures, history: Sequence[Point]) -> list[str]:
    seen = [point.accuracy for point in history if point.accuracy is not None]
    last = seen[-max(1, math.ceil(len(seen) * LAST_STEPS)) :]
    if not last or not figures.accuracy.below(sum(last) / len(last) - OVERFIT):
        return []
    return [
        f"It picked {sum(last) / len(last):.1%} right at the end of training: it has learnt those pairs by heart."
    ]


RULES: tuple[tuple[str, Callable[[Figures], list[str]]], ...] = (
    ("says nothing", _says_nothing),
    ("too few pairs", _too_few),
    ("a length ruler", _ruler),
    ("worse than chance", _worse),
    ("near chance", _near_chance),
    ("no better than length", _no_better),
    ("biased", _biased),
    ("uneven", _uneven),
    ("overconfident", _overconfident),
)
