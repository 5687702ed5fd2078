"""The kinds of record, and the rule that holds dialogues out."""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from sharding.errors import UserError

Messages = tuple[Mapping[str, Any], ...]  # each {"role", "content", optionally "metadata", "tools"}
Labels = Mapping[str, tuple[float | None, ...]]


class Example(NamedTuple):
    """A conversation to imitate."""

    prompt: Messages
    response: str
    task: str = ""  # the intent of the prompt, as the data names it
    where: str = ""  # "file:line" it is from; empty where no file has it as a line


class Comparison(NamedTuple):
    """Two or more answers to one prompt, as one annotator ranked them."""

    prompt: Messages
    responses: tuple[str, ...]
    ranks: tuple[int, ...]  # of each response, 1 the best; equal ranks are a tie
    # criterion (helpfulness, safety, fluency, ...) -> a number a response, None where nobody said
    labels: Labels = MappingProxyType({})
    annotator: str = ""
    task: str = ""  # the intent of the prompt, as the data names it
    weight: float | None = None  # of each of its pairs, where the data states one
    strength: float | None = None  # of the preference between two responses, in the data's scale
    # True: the data lists the responses in an order of its own; False: best first, so that their order says nothing
    listed: bool = False


class Preference(NamedTuple):
    """Two answers to one prompt, the first preferred by people."""

    prompt: Messages
    chosen: str
    rejected: str
    weight: float = 1.0  # of the pair in a mean over pairs
    annotator: str = ""
    task: str = ""
    chosen_first: bool | None = (
        None  # whether the data lists the preferred answer first; None: unknown
    )
    labels: Labels = MappingProxyType({})  # criterion -> a number (or None) of chosen and rejected
    strength: float | None = None  # of the preference, in the data's scale
    weight_stated: bool = (
        False  # whether the data states the weight, which `weigh` then leaves alone
    )
    where: str = ""  # "file:line" it is from; empty where no file has it as a line


class Prompt(NamedTuple):
    """A conversation that waits for an answer."""

    prompt: Messages
    task: str = ""
    where: str = ""


Record = TypeVar("Record", Example, Preference, Prompt)


class Split(NamedTuple):
    """One table on its two sides; no dialogue stands on both."""

    train: Sequence[Any]
    heldout: Sequence[Any]


class Splits(NamedTuple):
    """The tables of one data set: `Example`, `Preference` and `Prompt` records.

    All three agree about the side of a dialogue (`dialogue_key`), so that no stage has trained on
    what another holds out.
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
    return json.dumps([_plain(message) for message in prompt], ensure_ascii=False, sort_keys=True)


def dialogue_key(prompt: Messages) -> str:
    """Name the dialogue that a prompt is from: its first user turn, spelt as in `same_prompt`.

    All tables are split by it, and intervals take it for what was sampled: the prompts of one dialogue hold each
    other's answers. System messages before the turn make no other dialogue. Without a user turn, the first message
    that is not the system's stands for it.
    """
    spoken = [message for message in prompt if message["role"] != "system"] or list(prompt)
    first = next((message for message in spoken if message["role"] == "user"), spoken[0])
    return same_prompt(({"role": first["role"], "content": first["content"]},))


def _plain(message: Mapping[str, Any]) -> list[Any]:
    text = unicodedata.normalize("NFKC", str(message["content"]))
    more = {name: message[name] for name in ("metadata", "tools") if message.get(name)}
    return [str(message["role"]), " ".join(text.casefold().split()), *([more] if more else [])]


def uniform_hash(seed: int, *parts: str) -> float:
    """A number in [0, 1) that depends on the texts and the seed alone, not on what came before.

    Nothing is stored or drawn, so adding a record leaves every other record where it was.
    """
    text = json.dumps([seed, *parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()) / 2**48


def split_by_dialogue(records: Iterable[Record], heldout: Mapping[str, bool]) -> Split:
    """Divide `records` by what `heldout` says of their `dialogue_key`, in their order."""
    train: list[Record] = []
    held: list[Record] = []
    for record in records:
        (held if heldout[dialogue_key(record.prompt)] else train).append(record)
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
