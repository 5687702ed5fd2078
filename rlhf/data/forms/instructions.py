"""Entries with an instruction and perhaps an input: alpaca, its rankings, PandaLM, UltraFeedback, LLMBar."""

from statistics import fmean
from typing import Any

from rlhf.data.forms.form import (
    Fields,
    Form,
    Record,
    checked_text,
    instruction,
    list_of,
    ranking,
    text_of,
)
from rlhf.data.mistakes import Mistake
from rlhf.data.records import Example, user_turn

_ANNOTATORS = ("annotator1", "annotator2", "annotator3")


def parse_alpaca(fields: Fields) -> list[Record]:
    """{"instruction", "input", "output"}: an example, or a ranking where the output is a list, best first."""
    prompt, output = instruction(fields), fields["output"]
    if isinstance(output, list):
        return [ranking(prompt, output, range(len(output)))]
    return [Example(prompt, checked_text(output, "output"))]


def parse_pandalm(fields: Fields) -> list[Record]:
    """Two responses judged by three people: 0 a tie, 1 and 2 the better response (Wang et al. 2024)."""
    prompt = instruction(fields)
    responses = [checked_text(fields[name], name) for name in ("response1", "response2")]
    records: list[Record] = []
    for annotator in _ANNOTATORS:
        verdict = fields[annotator]
        if verdict not in (0, 1, 2):
            raise Mistake("malformed", f"{annotator!r} is {verdict!r}: give 0 (tie), 1 or 2")
        ranks = {0: (1, 1), 1: (1, 2), 2: (2, 1)}[verdict]
        task = checked_text(fields.get("motivation_app") or "", "motivation_app", empty=True)
        records.append(
            ranking(prompt, responses, ranks, annotator=annotator, task=task, listed=True)
        )
    return records


def parse_llmbar(fields: Fields) -> list[Record]:
    """{"input", "output_1", "output_2", "label"}: the label is 1 or 2 (Zeng et al. 2024)."""
    prompt = user_turn(text_of(fields, "input"))
    responses = [text_of(fields, name) for name in ("output_1", "output_2")]
    if fields["label"] not in (1, 2):
        raise Mistake("malformed", f"'label' is {fields['label']!r}: give 1 or 2")
    return [ranking(prompt, responses, (1, 2) if fields["label"] == 1 else (2, 1), listed=True)]


def parse_ultrafeedback(fields: Fields) -> list[Record]:
    """{"instruction", "completions"}: ranked by the mean of the ratings that each got (Cui et al. 2024).

    Not by its `overall_score`, which the annotating model gave beside a critique and often against the ratings; that
    serves where a completion has no ratings.
    """
    prompt = user_turn(text_of(fields, "instruction"))
    completions = list_of(fields, "completions")
    responses, ratings = [], []
    scores: list[Any] = []
    for completion in completions:
        if not isinstance(completion, dict):
            raise Mistake("malformed", "a completion is not an object")
        responses.append(completion.get("response"))
        rated = _ratings(completion.get("annotations") or {})
        ratings.append(rated)
        scores.append(fmean(rated.values()) if rated else completion.get("overall_score"))
    if not all(isinstance(score, int | float) for score in scores):
        raise Mistake("malformed", "a completion has neither ratings nor an overall_score")
    criteria = sorted(set().union(*ratings)) if ratings else []
    labels = {name: tuple(rated.get(name) for rated in ratings) for name in criteria}
    task = checked_text(fields.get("source") or "", "source", empty=True)
    ranks = [-score for score in scores]
    return [ranking(prompt, responses, ranks, labels, task=task, listed=True)]


def _ratings(annotations: Any) -> dict[str, float]:
    """criterion -> rating; a criterion that the annotator called N/A is left out."""
    found = {}
    for criterion, said in annotations.items() if isinstance(annotations, dict) else ():
        try:
            found[str(criterion)] = float(said["Rating"])
        except (KeyError, TypeError, ValueError):
            continue
    return found


ALPACA = Form(
    "alpaca",
    frozenset({"instruction", "output"}),
    frozenset({"input", "history", "system"}),
    parse_alpaca,
)
PANDALM = Form(
    "pandalm",
    frozenset({"instruction", "input", "response1", "response2", *_ANNOTATORS}),
    frozenset({"idx", "motivation_app", "cmp_key"}),
    parse_pandalm,
    identifiers=frozenset({"idx", "cmp_key"}),
)
LLMBAR = Form(
    "llmbar", frozenset({"input", "output_1", "output_2", "label"}), frozenset(), parse_llmbar
)
ULTRAFEEDBACK = Form(
    "ultrafeedback",
    frozenset({"instruction", "completions"}),
    frozenset({"source", "models", "correct_answers", "incorrect_answers"}),
    parse_ultrafeedback,
    identifiers=frozenset({"models"}),
    unread=frozenset({"correct_answers", "incorrect_answers"}),
)
