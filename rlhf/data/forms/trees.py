"""OpenAssistant's message trees: every question whose answers people ranked (Köpf et al. 2023)."""

from collections.abc import Iterator
from typing import Any

from rlhf.data.forms.form import Fields, Form, Record, conversation, ranking
from rlhf.data.mistakes import Mistake

_ROLES = {"prompter": "user", "assistant": "assistant"}


def parse_tree(fields: Fields) -> list[Record]:
    """{"message_tree_id", "prompt": {"text", "role", "replies": [...]}}; rank 0 is the best of the replies."""
    return list(_rankings(fields["prompt"], []))


def _rankings(node: Any, before: list[dict[str, str]]) -> Iterator[Record]:
    if not isinstance(node, dict) or node.get("role") not in _ROLES:
        raise Mistake("malformed", "a message of the tree has no role: prompter or assistant")
    text, replies = node.get("text"), node.get("replies") or []
    if not isinstance(text, str) or not isinstance(replies, list):
        raise Mistake("malformed", "a message of the tree has no text, or replies that are no list")
    talk = [*before, {"role": _ROLES[node["role"]], "content": text}]
    ranked = [r for r in replies if isinstance(r, dict) and isinstance(r.get("rank"), int)]
    if node["role"] == "prompter" and len(ranked) > 1:
        lang = str(node.get("lang") or "")
        texts = [reply.get("text") for reply in ranked]
        ranks = [reply["rank"] for reply in ranked]
        yield ranking(conversation(talk), texts, ranks, task=lang, listed=True)
    for reply in replies:
        yield from _rankings(reply, talk)


TREE = Form(
    "tree",
    frozenset({"message_tree_id", "prompt"}),
    frozenset({"tree_state", "origin"}),
    parse_tree,
    identifiers=frozenset({"message_tree_id"}),
    unread=frozenset({"tree_state", "origin"}),
)
