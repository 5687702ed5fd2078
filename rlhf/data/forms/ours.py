"""Our own form: one JSON object a line, for prompts, conversations to imitate and comparisons alike (docs/data.md)."""

from typing import Any

from rlhf.data.forms.form import (
    Fields,
    Form,
    Record,
    checked_text,
    conversation,
    list_of,
    ranking,
    text_of,
)
from rlhf.data.mistakes import Mistake
from rlhf.data.records import Comparison, Example, Messages, Preference, Prompt, user_turn

ANY = frozenset({"task", "id"})  # of every kind of line; an id is the user's own
COMPARED = ANY | {"labels", "annotator"}


def _prompt(fields: Fields) -> Messages:
    if "prompt" not in fields:
        raise Mistake("malformed", "field 'prompt' is missing")
    value = fields["prompt"]
    return (
        user_turn(checked_text(value, "prompt")) if isinstance(value, str) else conversation(value)
    )


def parse_prompt(fields: Fields) -> list[Record]:
    """A line {"prompt"}."""
    return [Prompt(_prompt(fields))]


def parse_example(fields: Fields) -> list[Record]:
    """A line {"prompt", "response"}."""
    return [Example(_prompt(fields), text_of(fields, "response"))]


def parse_pair(fields: Fields) -> list[Record]:
    """A line {"prompt", "chosen", "rejected"}."""
    both = [text_of(fields, name) for name in ("chosen", "rejected")]
    if both[0] == both[1]:
        raise Mistake("equal", "chosen and rejected are the same text")
    return [_ranking(fields, both, [1, 2])]


def parse_ranking(fields: Fields) -> list[Record]:
    """A line {"prompt", "responses"}, best first unless it has "ranks"."""
    responses = list_of(fields, "responses")
    ranks = list_of(fields, "ranks") if "ranks" in fields else list(range(1, len(responses) + 1))
    if not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks):
        raise Mistake("malformed", "'ranks' are not whole numbers: 1 is the best")
    return [_ranking(fields, responses, ranks)]


def _ranking(fields: Fields, responses: list[Any], ranks: list[int]) -> Record:
    annotator, task = (
        checked_text(fields.get(name, ""), name, True) for name in ("annotator", "task")
    )
    labels = _labels(fields.get("labels", {}), len(responses))
    return ranking(_prompt(fields), responses, ranks, labels, annotator, task)


def _labels(value: Any, count: int) -> dict[str, tuple[float | None, ...]]:
    """{"helpfulness": [4, 2], ...}: a number (or null) a response."""
    if not isinstance(value, dict):
        raise Mistake("malformed", "'labels' is not an object of lists, a number a response")
    for criterion, numbers in value.items():
        numeric = isinstance(numbers, list) and all(
            x is None or (isinstance(x, int | float) and not isinstance(x, bool)) for x in numbers
        )
        if not numeric or len(numbers) != count:
            raise Mistake(
                "malformed", f"'labels' need a number (or null) a response: {criterion!r}"
            )
    return {criterion: tuple(numbers) for criterion, numbers in value.items()}


PAIR = Form(
    "pair",
    frozenset({"prompt", "chosen", "rejected"}),
    COMPARED | {"weight", "chosen_first"},
    parse_pair,
)
RANKING = Form("ranking", frozenset({"prompt", "responses"}), COMPARED | {"ranks"}, parse_ranking)
EXAMPLE = Form("example", frozenset({"prompt", "response"}), ANY, parse_example)
PROMPT = Form("prompt", frozenset({"prompt"}), ANY, parse_prompt)


def line_of(record: Record) -> dict[str, Any]:
    """The line that says what a record says; what is empty is left out."""
    prompt = _shortest(record.prompt)
    if isinstance(record, Example):
        return {"prompt": prompt, "response": record.response}
    if isinstance(record, Prompt):
        return {"prompt": prompt}
    return {
        "prompt": prompt,
        "responses": list(record.responses),
        "ranks": list(record.ranks),
        **_said(record.annotator, record.task),
        **({"labels": {k: list(v) for k, v in record.labels.items()}} if record.labels else {}),
    }


def pair_line(comparison: Comparison, pair: Preference) -> dict[str, Any]:
    """The line of one pair of a comparison."""
    indices = [comparison.responses.index(text) for text in (pair.chosen, pair.rejected)]
    labels = {name: [marks[i] for i in indices] for name, marks in comparison.labels.items()}
    return {
        "prompt": _shortest(pair.prompt),
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "weight": pair.weight,
        "chosen_first": pair.chosen_first,
        **_said(pair.annotator, pair.task),
        **({"labels": labels} if labels else {}),
    }


def _shortest(prompt: Messages) -> Any:
    """A text where that says it all, else the messages."""
    if len(prompt) == 1 and prompt[0].keys() == {"role", "content"} and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return list(prompt)


def _said(annotator: str, task: str) -> dict[str, str]:
    return {name: said for name, said in (("annotator", annotator), ("task", task)) if said}
