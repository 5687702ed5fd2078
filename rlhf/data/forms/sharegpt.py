"""ShareGPT's conversations, as collected and as fine-tuning tools write them."""

from rlhf.data.forms.form import Fields, Form, Record, conversation, list_of
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
    """{"conversations": [{"from", "value"}, ...]}, ending with the model's answer."""
    messages = []
    for turn in list_of(fields, "conversations"):
        if not isinstance(turn, dict) or turn.get("from") not in _ROLES:
            raise Mistake("malformed", f"a turn is not from one of {', '.join(_ROLES)}")
        if not isinstance(turn.get("value"), str) or not turn["value"].strip():
            raise Mistake("empty", "a turn says nothing")
        messages.append({"role": _ROLES[turn["from"]], "content": turn["value"]})
    if not messages or messages[-1]["role"] != "assistant":
        raise Mistake("malformed", "the conversation does not end with an answer")
    return [Example(conversation(messages[:-1], "conversation"), messages[-1]["content"])]


SHAREGPT = Form(
    "sharegpt", frozenset({"conversations"}), frozenset({"id", "system", "tools"}), parse_sharegpt
)
