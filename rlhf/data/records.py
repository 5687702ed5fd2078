"""The kinds of record, and the rule that holds prompts out."""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from sharding.errors import UserError

Messages = tuple[Mapping[str, Any], ...]  # each {"role", "content", optionally "metadata", "tools"}


class Example(NamedTuple):
    """A conversation to imitate."""

    prompt: Messages
    response: str


class Comparison(NamedTuple):
    """Two or more answers to one prompt, as one annotator ranked them."""

    prompt: Messages
    responses: tuple[str, ...]
    ranks: tuple[int, ...]  # of each response, 1 the best; equal ranks are a tie
    # criterion (helpfulness, safety, fluency, ...) -> a number a response, None where nobody said
    labels: Mapping[str, tuple[float | None, ...]] = MappingProxyType({})
    annotator: str = ""
    task: str = ""  # the intent of the prompt, as the data names it


class Preference(NamedTuple):
    """Two answers to one prompt, the first preferred by people."""

    prompt: Messages
    chosen: str
    rejected: str
    weight: float = 1.0  # of the pair in a mean over pairs
    annotator: str = ""
    task: str = ""
    chosen_first: bool = True  # whether the data lists the preferred answer first


class Prompt(NamedTuple):
    """A conversation that waits for an answer."""

    prompt: Messages


Record = TypeVar("Record", Example, Preference, Prompt)


class Split(NamedTuple):
    """One table on its two sides; no prompt stands on both."""

    train: Sequence[Any]
    heldout: Sequence[Any]


class Splits(NamedTuple):
    """The tables of one data set: `Example`, `Preference` and `Prompt` records.

    All three agree about the side of a prompt, so that no stage has trained on what another holds
    out.
    """

    sft: Split
    preferences: Split
    prompts: Split


def user_turn(text: str) -> Messages:
    """The conversation that consists of one user's message."""
    return ({"role": "user", "content": text},)


def prompt_text(prompt: Messages) -> str:
    """A prompt as people read it: the contents of its messages, one a line."""
    return "\n".join(str(message["content"]) for message in prompt)


def prompt_key(prompt: Messages) -> str:
    """What makes two prompts the same, whatever the order of a message's fields."""
    return json.dumps(prompt, ensure_ascii=False, sort_keys=True)


def same_prompt(prompt: Messages) -> str:
    """A prompt without what does not make it another one: case, width, and where blanks stand."""
    said = [[str(m["role"]), unicodedata.normalize("NFKC", str(m["content"]))] for m in prompt]
    plain = [(role, " ".join(text.casefold().split())) for role, text in said]
    return json.dumps(plain, ensure_ascii=False)


def uniform_hash(seed: int, *parts: str) -> float:
    """A number in [0, 1) that depends on the texts and the seed alone, not on what came before.

    Nothing is stored or drawn, so adding a record leaves every other record where it was.
    """
    text = json.dumps([seed, *parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()) / 2**48


def split_by_prompt(records: Iterable[Record], heldout: Mapping[str, bool]) -> Split:
    """Divide `records` by what `heldout` says of their `prompt_key`, in their order."""
    train: list[Record] = []
    held: list[Record] = []
    for record in records:
        (held if heldout[prompt_key(record.prompt)] else train).append(record)
    return Split(train, held)


def require_examples(splits: Splits, tables: Iterable[str]) -> Splits:
    """Return `splits`; raise UserError when a side of one of these tables is empty."""
    for table in tables:
        for side, records in getattr(splits, table)._asdict().items():
            if not records:
                raise UserError(
                    f"data: no {side} example is left in {table}; give more data, or another heldout_fraction"
                )
    return splits


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; raises UserError when it is missing, unreadable or not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 (byte {error.start}); convert the file to UTF-8"
        ) from error


def require_fraction(value: float) -> None:
    """Raise UserError unless 0 < value < 1."""
    if not 0 < value < 1:
        raise UserError(f"data: heldout_fraction is {value}; choose a number between 0 and 1")
