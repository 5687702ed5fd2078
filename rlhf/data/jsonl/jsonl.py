"""JSON lines -> records, every mistake named by file and line."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_jax.tokenizers import ROLES
from rlhf.data.records import (
    Example,
    Messages,
    Preference,
    Prompt,
    Splits,
    prompt_key,
    read_text,
    require_examples,
    require_fraction,
    split_by_prompt,
    uniform_hash,
    user_turn,
)
from sharding.errors import UserError


@dataclass(frozen=True)
class JsonlData:
    """A user's own data, in UTF-8 files of one JSON object a line; other fields are ignored.

    A prompt is a string (one user turn) or a list of {"role", "content"} that ends with the user.

    sft: lines {"prompt", "response"}.
    preferences: lines {"prompt", "chosen", "rejected"}, `chosen` being what people preferred.
    prompts: lines {"prompt"}; a prompt that stands twice is taken once.
    heldout_fraction: share of the distinct prompts that is held out, in all three files alike.
    seed: draws which.
    """

    sft: Path
    preferences: Path
    prompts: Path
    heldout_fraction: float = 0.1
    seed: int = 0

    def paths(self) -> dict[str, Path]:
        """The files to read."""
        return {"sft": self.sft, "preferences": self.preferences, "prompts": self.prompts}

    def splits(self) -> Splits:
        """All records, in the order of the lines; raises UserError naming the file and the line."""
        require_fraction(self.heldout_fraction)
        examples = [
            Example(prompt, answer(line, "response", where))
            for where, line, prompt in read_lines(self.sft)
        ]
        preferences = [
            preference(line, prompt, where) for where, line, prompt in read_lines(self.preferences)
        ]
        distinct = {prompt_key(prompt): prompt for _, _, prompt in read_lines(self.prompts)}
        prompts = [Prompt(prompt) for prompt in distinct.values()]
        asked = [record.prompt for table in (examples, preferences, prompts) for record in table]
        heldout = {
            key: uniform_hash(self.seed, key) < self.heldout_fraction
            for key in map(prompt_key, asked)
        }
        return require_examples(
            Splits(
                sft=split_by_prompt(examples, heldout),
                preferences=split_by_prompt(preferences, heldout),
                prompts=split_by_prompt(prompts, heldout),
            ),
            f"give more lines, or another heldout_fraction than {self.heldout_fraction}",
        )


def read_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any], Messages]]:
    """("file:line", the object, its prompt) of every line that is not blank."""
    for number, text in enumerate(read_text(path).split("\n"), start=1):
        if text.strip():
            where = f"{path}:{number}"
            line = parse_line(text, where)
            yield where, line, parse_prompt(line, where)


def parse_line(text: str, where: str) -> Mapping[str, Any]:
    """The JSON object of a line."""
    try:
        line = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: malformed JSON ({error}); mend the line") from error
    if not isinstance(line, dict):
        raise UserError(f"{where}: not a JSON object; write {{...}} with its fields, one a line")
    return line


def parse_prompt(line: Mapping[str, Any], where: str) -> Messages:
    """The conversation in a line's `prompt`, checked."""
    if "prompt" not in line:
        raise UserError(f"{where}: field 'prompt' is missing; add it")
    prompt = line["prompt"]
    messages = user_turn(prompt) if isinstance(prompt, str) else prompt
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError(f"{where}: empty prompt; give a text or a list of messages")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(
                f"{where}: a message of 'prompt' has no role; use one of {', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise UserError(f"{where}: empty prompt; every message needs a text as its 'content'")
        if not isinstance(message.get("metadata", ""), str):
            raise UserError(f"{where}: the 'metadata' of a message is not a text; make it one")
    if messages[-1]["role"] not in ("user", "observation"):
        raise UserError(f"{where}: the prompt ends with no question; end it with the user's turn")
    return tuple(messages)


def answer(line: Mapping[str, Any], field: str, where: str) -> str:
    """The text in an answer's field."""
    if field not in line:
        raise UserError(f"{where}: field {field!r} is missing; add it")
    text = line[field]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: empty {field}; give a text or remove the line")
    return text


def preference(line: Mapping[str, Any], prompt: Messages, where: str) -> Preference:
    """The two answers of a line; a tie has no preferred one."""
    chosen, rejected = answer(line, "chosen", where), answer(line, "rejected", where)
    if chosen == rejected:
        raise UserError(f"{where}: chosen and rejected are the same text; remove the line")
    return Preference(prompt, chosen, rejected)
