"""Pairs of whole conversations that differ in their last answer: Anthropic's HH, and chat messages."""

import re
from typing import Any

from rlhf.data.forms.form import (
    MESSAGE_FIELDS,
    Fields,
    Form,
    Record,
    checked_number,
    checked_text,
    conversation,
    ranking,
)
from rlhf.data.mistakes import Mistake
from rlhf.data.records import Labels

_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
Talk = list[dict[str, Any]]


def transcript(text: str) -> Talk:
    r"""The messages of "\n\nHuman: ...\n\nAssistant: ..." (Bai et al. 2022). Raises Mistake."""
    parts = _SPEAKER.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise Mistake("malformed", "a transcript does not begin with 'Human:' or 'Assistant:'")
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": _ROLES[speaker], "content": said.strip()} for speaker, said in turns]


def _pair(chosen: Talk, rejected: Talk, labels: Labels | None = None) -> list[Record]:
    for talk in (chosen, rejected):
        if talk[-1]["role"] != "assistant":
            raise Mistake("malformed", "a transcript does not end with the assistant's answer")
    if chosen[:-1] != rejected[:-1]:
        raise Mistake("prompt_differs", "chosen and rejected answer different prompts")
    prompt = conversation(chosen[:-1])
    return [ranking(prompt, (chosen[-1]["content"], rejected[-1]["content"]), (1, 2), labels)]


def parse_transcripts(fields: Fields) -> list[Record]:
    """A line {"chosen", "rejected"}: transcripts, or lists of messages."""
    return _pair(_talk(fields, "chosen"), _talk(fields, "rejected"))


def parse_chats(fields: Fields) -> list[Record]:
    """The same beside its prompt, as in the binarised UltraFeedback: two scores become labels."""
    names = [f"score_{side}" for side in ("chosen", "rejected")]
    marks = [None if (x := fields.get(name)) is None else checked_number(x, name) for name in names]
    labels = {} if marks == [None, None] else {"score": tuple(marks)}
    return _pair(_talk(fields, "chosen"), _talk(fields, "rejected"), labels)


def _talk(fields: Fields, name: str) -> Talk:
    value = fields[name]
    if isinstance(value, str):
        return transcript(checked_text(value, name))
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Mistake("malformed", f"{name!r} is neither a transcript nor a list of messages")
    if not value:
        raise Mistake("empty", f"empty {name}")
    talk = [
        {"role": m.get("role"), "content": m.get("content")}
        | {more: m[more] for more in MESSAGE_FIELDS if more in m}
        for m in value
    ]
    if not all(isinstance(message["content"], str) for message in talk):
        raise Mistake("malformed", f"a message of {name!r} has no text")
    return talk


HH = Form("hh", frozenset({"chosen", "rejected"}), frozenset(), parse_transcripts)
CHATS = Form(
    "chats",
    frozenset({"prompt", "chosen", "rejected", "messages"}),
    frozenset({"prompt_id", "score_chosen", "score_rejected"}),
    parse_chats,
    identifiers=frozenset({"prompt_id"}),
    unread=frozenset({"prompt", "messages"}),  # both stand in `chosen`
)
