"""Our own form: one JSON object a line, for prompts, conversations to imitate and comparisons alike (docs/data.md)."""

from typing import Any

from rlhf.data.forms.form import (
    Fields,
    Form,
    Record,
    checked_number,
    checked_text,
    conversation,
    list_of,
    ranking,
    text_of,
)
from rlhf.data.mistakes import Mistake
from rlhf.data.pairs import preference_of
from rlhf.data.records import (
    Comparison,
    Example,
    Labels,
    Messages,
    Preference,
    Prompt,
    user_turn,
)

ID = frozenset({"id"})  # the user's own
ANY = frozenset({"task"}) | ID  # of every kind of line
COMPARED = ANY | {"labels", "annotator", "weight"}


def _prompt(fields: Fields) -> Messages:
    if "prompt" not in fields:
        raise Mistake("malformed", "field 'prompt' is missing")
    value = fields["prompt"]
    return (
        user_turn(checked_text(value, "prompt")) if isinstance(value, str) else conversation(value)
    )


def parse_prompt(fields: Fields) -> list[Record]:
    """A line {"prompt"}."""
    return [Prompt(_prompt(fields), _name(fields, "task"))]


def parse_example(fields: Fields) -> list[Record]:
    """A line {"prompt", "response"}."""
    return [Example(_prompt(fields), text_of(fields, "response"), _name(fields, "task"))]


def parse_pair(fields: Fields) -> list[Record]:
    """A line {"prompt", "chosen", "rejected"}; labels stand in this order, whichever `chosen_first` says."""
    both = [text_of(fields, name) for name in ("chosen", "rejected")]
    if both[0] == both[1]:
        raise Mistake("equal", "chosen and rejected are the same text")
    first = fields.get("chosen_first")
    if not isinstance(first, bool | None):
        raise Mistake("malformed", f"'chosen_first' is {str(first)[:40]}: give true or false")
    found = _ranking(fields, both, [1, 2], first is not None)
    if first is False:
        labels = {name: marks[::-1] for name, marks in found.labels.items()}
        responses, ranks = found.responses[::-1], found.ranks[::-1]
        found = found._replace(responses=responses, ranks=ranks, labels=labels)
    strength = fields.get("strength")
    if strength is not None:
        found = found._replace(strength=checked_number(strength, "strength"))
    return [found]


def parse_ranking(fields: Fields) -> list[Record]:
    """A line {"prompt", "responses"}, best first unless it has "ranks"."""
    responses = list_of(fields, "responses")
    ranks = list_of(fields, "ranks") if "ranks" in fields else list(range(1, len(responses) + 1))
    if not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks):
        raise Mistake("malformed", "'ranks' are not whole numbers: 1 is the best")
    return [_ranking(fields, responses, ranks, "ranks" in fields)]


def _ranking(fields: Fields, responses: list[Any], ranks: list[int], listed: bool) -> Comparison:
    labels = _labels(fields.get("labels", {}), len(responses))
    weight = fields.get("weight")
    if weight is not None and not checked_number(weight, "weight") > 0:
        raise Mistake("malformed", f"'weight' is {weight}: give a positive number")
    return ranking(
        _prompt(fields),
        responses,
        ranks,
        labels,
        _name(fields, "annotator"),
        _name(fields, "task"),
        weight,
        listed=listed,
    )


def _name(fields: Fields, name: str) -> str:
    return checked_text(fields.get(name, ""), name, True)


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
        for number in numbers:
            if number is not None:
                checked_number(number, f"labels.{criterion}")
    return {criterion: tuple(numbers) for criterion, numbers in value.items()}


PAIR = Form(
    "pair",
    frozenset({"prompt", "chosen", "rejected"}),
    COMPARED | {"chosen_first", "strength"},
    parse_pair,
    identifiers=ID,
)
RANKING = Form(
    "ranking",
    frozenset({"prompt", "responses"}),
    COMPARED | {"ranks"},
    parse_ranking,
    identifiers=ID,
)
EXAMPLE = Form("example", frozenset({"prompt", "response"}), ANY, parse_example, identifiers=ID)
PROMPT = Form("prompt", frozenset({"prompt"}), ANY, parse_prompt, identifiers=ID)


def line_of(record: Record) -> dict[str, Any]:
    """The line that says what a record says; what is empty is left out.

    A comparison of two becomes a pair, unless they tie. Ranks are left out where the responses stand best first
    because of them: written, they would say that the data lists them so.
    """
    prompt = _shortest(record.prompt)
    if isinstance(record, Example):
        return {"prompt": prompt, "response": record.response, **_said(record)}
    if isinstance(record, Prompt):
        return {"prompt": prompt, **_said(record)}
    if len(record.ranks) == 2 and record.ranks[0] != record.ranks[1]:
        chosen, rejected = (record.ranks.index(rank) for rank in (1, 2))
        return pair_line(preference_of(record, chosen, rejected, 1.0), record.weight)
    places = list(range(1, len(record.ranks) + 1))
    return {
        "prompt": prompt,
        "responses": list(record.responses),
        **({"ranks": ranks} if (ranks := list(record.ranks)) != places or record.listed else {}),
        **_said(record),
        **_given(weight=record.weight, labels=_lists(record.labels)),
    }


def pair_line(pair: Preference, weight: float | None) -> dict[str, Any]:
    """The line of a pair; `weight` is what it states, None: nothing."""
    said = _given(weight=weight, chosen_first=pair.chosen_first, strength=pair.strength)
    texts = {"chosen": pair.chosen, "rejected": pair.rejected}
    labels = _given(labels=_lists(pair.labels))
    return {"prompt": _shortest(pair.prompt), **texts, **said, **_said(pair), **labels}


def _shortest(prompt: Messages) -> Any:
    """A text where that says it all, else the messages."""
    if len(prompt) == 1 and prompt[0].keys() == {"role", "content"} and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return list(prompt)


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _lists(labels: Labels) -> dict[str, list[float | None]] | None:
    return {name: list(marks) for name, marks in labels.items()} or None


def _said(record: Record | Preference) -> dict[str, str]:
    names = ("task",) if isinstance(record, Example | Prompt) else ("annotator", "task")
    return {name: said for name in names if (said := getattr(record, name))}
