"""What a form is, and the checks that all of them share."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from glm_jax.tokenizers import ROLES
from rlhf.data.mistakes import Mistake
from rlhf.data.records import Comparison, Example, Labels, Messages, Prompt

Fields = Mapping[str, Any]
Record = Example | Comparison | Prompt
MESSAGE_FIELDS = ("role", "content", "metadata", "tools")
_MESSAGE = frozenset(MESSAGE_FIELDS)
_SURROGATE = re.compile("[\ud800-\udfff]")


class Form(NamedTuple):
    """How the entries of a kind of file are told and read."""

    name: str
    required: frozenset[str]  # fields by which it is recognised
    optional: frozenset[str]  # others that it may have
    parse: Callable[[Fields], list[Record]]  # raises Mistake
    # of both: what names an entry or its sources, and what is not read, which every entry that has it counts
    identifiers: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()

    def fits(self, fields: Fields) -> bool:
        """Whether an entry may be of this form."""
        return self.required <= fields.keys() <= self.required | self.optional

    def unknown(self, fields: Fields) -> list[str]:
        """Fields that the form does not have, those of its messages among them."""
        known = self.required | self.optional
        found = fields.keys() - known
        for name in known & {"prompt", "chosen", "rejected"}:
            messages = fields.get(name)
            for message in messages if isinstance(messages, list) else ():
                if isinstance(message, dict) and not message.keys() <= _MESSAGE:
                    found |= {f"{name}[].{field}" for field in message.keys() - _MESSAGE}
        return sorted(found)


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
    if not value.isascii() and _SURROGATE.search(value):
        raise Mistake("malformed", f"{name!r} holds half of a character (a lone surrogate)")
    return value


def checked_number(value: Any, name: str) -> float:
    """`value` as a number that is finite. Raises Mistake."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise Mistake("malformed", f"{name!r} is {str(value)[:40]}: give a number")
    return value


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False


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
        offers = _offers_tools(message)
        content = message.get("content")
        if not isinstance(content, str) or not (content.strip() or offers):
            raise Mistake("empty", f"empty {name}: every message needs a text as its 'content'")
        checked_text(content, name, empty=True)
        if not isinstance(message.get("metadata", ""), str):
            raise Mistake("malformed", "the 'metadata' of a message is not a text")
        checked_text(message.get("metadata", ""), "metadata", empty=True)
    if messages[-1]["role"] not in ("user", "observation"):
        raise Mistake("malformed", f"the {name} ends with no question: end it with the user's turn")
    return tuple(messages)


def _offers_tools(message: Mapping[str, Any]) -> bool:
    """Tell whether a message offers tools, which only a system message can. Raises Mistake."""
    if "tools" not in message:
        return False
    tools = message["tools"]
    if message["role"] != "system":
        raise Mistake("malformed", "'tools' of another message than the system's")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Mistake("malformed", "'tools' is not a list of objects")
    checked_text(json.dumps(tools, ensure_ascii=False), "tools")
    return bool(tools)


def with_system(messages: list[dict[str, Any]], system: str, tools: Any = None) -> Any:
    """Messages that begin with a system message of this text and these tools, where there are any. Raises Mistake."""
    first = messages[0] if messages and messages[0]["role"] == "system" else None
    if first is not None and system.strip() and first["content"] != system:
        raise Mistake("malformed", "'system' and the first message are two system messages")
    if not system.strip() and not tools:
        return messages
    opening = dict(first or {"role": "system", "content": system.strip() and system})
    if tools:
        opening["tools"] = tools
    return [opening, *messages[first is not None :]]


def instruction(fields: Fields) -> Messages:
    """The conversation of an entry with `instruction` and perhaps `input`, `history`, `system` (Taori et al. 2023)."""
    asked = text_of(fields, "instruction")
    given = checked_text(fields.get("input") or "", "input", empty=True)
    messages: list[dict[str, str]] = []
    system = checked_text(fields.get("system") or "", "system", empty=True)
    for turn in fields.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise Mistake("malformed", "'history' is not a list of [question, answer]")
        for role, content in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": checked_text(content, "history")})
    question = f"{asked}\n{given}" if given.strip() else asked
    return conversation(with_system([*messages, {"role": "user", "content": question}], system))


def ranking(
    prompt: Messages,
    responses: Iterable[Any],
    ranks: Iterable[float],
    labels: Labels | None = None,
    annotator: str = "",
    task: str = "",
    weight: float | None = None,
    strength: float | None = None,
    listed: bool = False,
) -> Comparison:
    """A comparison, checked; `ranks` may be any numbers, the smaller the better. Raises Mistake.

    `listed`: the responses stand in an order that the ranks did not make.
    """
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
    return Comparison(prompt, texts, dense, labels or {}, annotator, task, weight, strength, listed)
