"""What a form is, and the checks that all of them share."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from glm_jax.tokenizers import ROLES
from rlhf.data.mistakes import Mistake
from rlhf.data.records import Comparison, Example, Messages, Prompt

Fields = Mapping[str, Any]
Record = Example | Comparison | Prompt


class Form(NamedTuple):
    """How the entries of a kind of file are told and read."""

    name: str
    required: frozenset[str]  # fields by which it is recognised
    optional: frozenset[str]  # others that it may have
    parse: Callable[[Fields], list[Record]]  # raises Mistake

    def fits(self, fields: Fields) -> bool:
        """Whether an entry may be of this form."""
        return self.required <= fields.keys() <= self.required | self.optional

    def unknown(self, fields: Fields) -> list[str]:
        """Fields that the form does not have."""
        return sorted(fields.keys() - self.required - self.optional)


def text_of(fields: Fields, name: str, empty: bool = False) -> str:
    """A field's text. Raises Mistake where it is missing, no text, or (unless `empty`) has nothing to read."""
    if name not in fields:
        raise Mistake("malformed", f"field {name!r} is missing")
    return checked_text(fields[name], name, empty)


def checked_text(value: Any, name: str, empty: bool = False) -> str:
    """`value` as a text. Raises Mistake."""
    if not isinstance(value, str):
        raise Mistake("malformed", f"{name!r} is not a text but {_kind(value)}")
    if not empty and not value.strip():
        raise Mistake("empty", f"empty {name}")
    return value


def list_of(fields: Fields, name: str) -> list[Any]:
    """A field's list. Raises Mistake where it is missing or no list."""
    if name not in fields:
        raise Mistake("malformed", f"field {name!r} is missing")
    if not isinstance(fields[name], list):
        raise Mistake("malformed", f"{name!r} is not a list but {_kind(fields[name])}")
    found: list[Any] = fields[name]
    return found


def _kind(value: Any) -> str:
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")


def conversation(messages: Any, name: str = "prompt") -> Messages:
    """Messages that end with the user (or an observation), checked. Raises Mistake."""
    if not isinstance(messages, list | tuple) or not messages:
        raise Mistake("empty", f"empty {name}: give a text or a list of messages")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Mistake(
                "malformed", f"a message of {name!r} has no role: use one of {', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise Mistake("empty", f"empty {name}: every message needs a text as its 'content'")
        if not isinstance(message.get("metadata", ""), str):
            raise Mistake("malformed", "the 'metadata' of a message is not a text")
    if messages[-1]["role"] not in ("user", "observation"):
        raise Mistake("malformed", f"the {name} ends with no question: end it with the user's turn")
    return tuple(messages)


def instruction(fields: Fields) -> Messages:
    """The conversation of an entry with `instruction` and perhaps `input`, `history`, `system` (Taori et al. 2023)."""
    asked = text_of(fields, "instruction")
    given = checked_text(fields.get("input") or "", "input", empty=True)
    messages: list[dict[str, str]] = []
    if system := checked_text(fields.get("system") or "", "system", empty=True):
        messages.append({"role": "system", "content": system})
    for turn in fields.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise Mistake("malformed", "'history' is not a list of [question, answer]")
        for role, content in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": checked_text(content, "history")})
    question = f"{asked}\n{given}" if given.strip() else asked
    return conversation([*messages, {"role": "user", "content": question}])


def ranking(
    prompt: Messages,
    responses: Iterable[Any],
    ranks: Iterable[float],
    labels: Mapping[str, tuple[float | None, ...]] | None = None,
    annotator: str = "",
    task: str = "",
) -> Comparison:
    """A comparison, checked; `ranks` may be any numbers, the smaller the better. Raises Mistake."""
    texts = tuple(checked_text(response, "response") for response in responses)
    order = list(ranks)
    if len(texts) < 2:
        raise Mistake("single", f"a ranking of {len(texts)} response" + "s" * (len(texts) != 1))
    if len(order) != len(texts):
        raise Mistake("malformed", f"{len(order)} ranks of {len(texts)} responses")
    if len(set(texts)) < len(texts):
        raise Mistake("equal", "two of the responses are the same text")
    places = sorted(set(order))
    dense = tuple(places.index(rank) + 1 for rank in order)
    return Comparison(prompt, texts, dense, labels or {}, annotator, task)
