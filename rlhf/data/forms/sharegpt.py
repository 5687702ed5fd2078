"""ShareGPT's conversations, as collected and as fine-tuning tools write them."""

import json
from typing import Any

from rlhf.data.forms.form import (
    Fields,
    Form,
    Record,
    checked_text,
    conversation,
    list_of,
    with_system,
)
from rlhf.data.mistakes import Mistake
from rlhf.data.records import Example

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "observation": "observation",
}


def parse_sharegpt(fields: Fields) -> list[Record]:
    """{"conversations": [{"from", "value"}, ...]}, ending with the model's answer; perhaps `system` and `tools`."""
    messages: list[dict[str, Any]] = []
    for turn in list_of(fields, "conversations"):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise Mistake("malformed", f"a turn is not from one of {', '.join(_ROLES)}")
        if not isinstance(turn.get("value"), str) or not turn["value"].strip():
            raise Mistake("empty", "a turn says nothing")
        messages.append({"role": _ROLES[speaker], "content": turn["value"]})
    if not messages or messages[-1]["role"] != "assistant":
        raise Mistake("malformed", "the conversation does not end with an answer")
    system = checked_text(fields.get("system") or "", "system", empty=True)
    asked = with_system(messages[:-1], system, _tools(fields.get("tools")))
    response = checked_text(messages[-1]["content"], "value")
    return [Example(conversation(asked, "conversation"), response)]


def _tools(value: Any) -> Any:
    """The tools that fine-tuning tools write as the text of a JSON array. Raises Mistake."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise Mistake("malformed", f"'tools' is no JSON ({error})") from None


SHAREGPT = Form(
    "sharegpt",
    frozenset({"conversations"}),
    frozenset({"id", "system", "tools"}),
    parse_sharegpt,
    identifiers=frozenset({"id"}),
)
