"""What every tokenizer of the family does: text <-> ids, and conversations -> prompts and training examples."""

import abc
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from sharding.errors import UserError

Message = Mapping[str, Any]  # {"role", "content"}, optionally "metadata" and (system) "tools"
Ids = Iterable[int] | np.ndarray

CONFIG = "tokenizer_config.json"
ROLES = ("system", "user", "assistant", "observation")


class ChatFormatError(UserError):
    """A conversation that the model's chat format cannot express."""


class Tokenizer(abc.ABC):
    """Text <-> ids, and conversations -> the sequences a model is prompted and trained with.

    Text of a message never becomes a special token, whatever it spells.
    """

    pad_id: int
    eos_id: int  # closes a training example
    stop_ids: tuple[int, ...]  # any of them ends an answer
    prefix: tuple[
        int, ...
    ]  # special tokens that open every sequence (ChatGLM-6B: that end the prompt)
    vocab_size: int  # ids there are; a model may have more rows
    files: dict[str, bytes]  # what `save` writes: the repository's own files

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of plain text; none of them is special."""

    @abc.abstractmethod
    def decode(self, ids: Ids, skip_special: bool = True) -> str:
        """Text of `ids`; special tokens are skipped, or spelt out as the original does.

        Ids beyond the vocabulary (a model's padded rows) count as special without a spelling.
        """

    @abc.abstractmethod
    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids that ask for the next answer. Raises ChatFormatError on a role the model does not know."""

    @abc.abstractmethod
    def chat_example(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """A whole conversation for training, and which of its tokens are prediction targets."""

    def decode_answer(self, ids: Ids) -> str:
        """Text of a generated answer, up to its first stop token."""
        answer: list[int] = []
        for token in map(int, ids):
            if token in self.stop_ids:
                break
            answer.append(token)
        return self.clean(self.decode(answer))

    def clean(self, answer: str) -> str:
        """What the original strips off an answer's text."""
        return answer.strip()

    def save(self, directory: Path) -> None:
        """Write the repository's tokenizer files; each appears whole or not at all."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            temporary = directory / f".{name}.{os.getpid()}"
            temporary.write_bytes(content)
            temporary.replace(directory / name)


class RoleTokenizer(Tokenizer):
    r"""A tokenizer whose messages open with a token of their role (ChatGLM3, GLM-4).

    A message is `<|role|> encode("{metadata}\n") encode(content)`, each text part tokenised on its own.
    """

    special: Mapping[str, int]

    @property
    def assistant_id(self) -> int:
        """The token that asks for an answer."""
        return self.special["<|assistant|>"]

    def message(self, message: Message) -> list[int]:
        """Ids of one message, its role token first. Raises ChatFormatError on an unknown role."""
        role = message["role"]
        if role not in ROLES:
            raise ChatFormatError(f"message: unknown role {role!r}; use one of {', '.join(ROLES)}")
        metadata = self.encode(f"{message.get('metadata', '')}\n")
        return [self.special[f"<|{role}|>"], *metadata, *self.encode(self.content(message))]

    def content(self, message: Message) -> str:
        """Text of a message, its tools included. The default knows no tools."""
        text: str = message["content"]
        return text

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids that ask for the next answer; they end with `<|assistant|>`."""
        spoken = [token for message in messages for token in self.message(message)]
        return [*self.prefix, *spoken, self.assistant_id]

    def chat_example(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """A whole conversation for training, and which of its tokens are prediction targets.

        Targets follow the official fine-tuning scripts: every token of an answer but its role token, and the token
        after it (the next role token, or the closing one), which teaches the model to stop. The scripts also train
        on observations; here only answers count.
        """
        ids, target = list(self.prefix), [False] * len(self.prefix)
        after_answer = False
        for message in messages:
            new, answer = self.message(message), message["role"] == "assistant"
            ids += new
            target += [after_answer] + [answer] * (len(new) - 1)
            after_answer = answer
        return [*ids, self.eos_id], [*target, after_answer]

    def clean(self, answer: str) -> str:
        """Without the metadata line, which ends at the first newline."""
        metadata, newline, content = answer.partition("\n")
        return (content if newline else metadata).strip()


class RoundTokenizer(Tokenizer):
    """A tokenizer whose prompt is one text with numbered rounds (ChatGLM-6B, ChatGLM2)."""

    def rounds(self, messages: Sequence[Message]) -> tuple[list[tuple[str, str]], str]:
        """Earlier (question, answer) pairs and the last question.

        Raises ChatFormatError unless user and assistant take turns, the user speaks last and no message has metadata:
        these models know no other.
        """
        roles = [message["role"] for message in messages]
        wanted = ["user", "assistant"] * (len(roles) // 2) + ["user"]
        if roles != wanted:
            raise ChatFormatError(
                f"messages {', '.join(roles) or '(none)'}: this model knows only user and assistant in turn, "
                f"the user last: leave the others out"
            )
        if any(message.get("metadata") for message in messages):
            raise ChatFormatError(
                "a message has metadata, which this model's prompt has no place for: leave it out"
            )
        texts = [str(message["content"]) for message in messages]
        return list(zip(texts[0:-1:2], texts[1::2], strict=True)), texts[-1]

    @abc.abstractmethod
    def question(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the prompt's text."""

    def _split_answer(self, messages: Sequence[Message]) -> tuple[Sequence[Message], str]:
        if not messages or messages[-1]["role"] != "assistant":
            raise ChatFormatError("a training conversation must end with the assistant's answer")
        return messages[:-1], str(messages[-1]["content"])


def read_files(directory: Path, model: str, hint: str) -> dict[str, bytes]:
    """The model file and `tokenizer_config.json` (if any) of a directory. Raises UserError."""
    names = [model, CONFIG] if (directory / CONFIG).exists() else [model]
    files: dict[str, bytes] = {}
    for name in names:
        try:
            files[name] = (directory / name).read_bytes()
        except OSError as error:
            raise UserError(
                f"{directory / name}: cannot be read ({error.strerror}); {hint}"
            ) from error
    return files


def well_formed(text: str) -> str:
    """Text whose lone surrogates, which JSON can hold but no encoding, are U+FFFD, as tiktoken has it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """The fields of `tokenizer_config.json`, empty where there is none. Raises UserError where it is no JSON."""
    path = directory / CONFIG
    try:
        fields = json.loads(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON; mend or remove it") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: holds no JSON object; mend or remove it")
    return fields


def load_pieces(model: bytes, where: str, hint: str) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model. Raises UserError where `model` is none."""
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise UserError(f"{where}: not a SentencePiece model; {hint}") from error
    return pieces


def pad_right(
    sequences: Sequence[Sequence[int]], length: int, value: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Stack [N, length] int32 with `value` behind each sequence, and bool [N, length]: real token.

    Raises ValueError when a sequence is longer than `length`.
    """
    ids = np.full((len(sequences), length), value, np.int32)
    valid = np.zeros((len(sequences), length), bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        valid[row, : len(sequence)] = True
    return ids, valid


def pad_left(
    sequences: Sequence[Sequence[int]], length: int, value: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Like `pad_right`, with the padding in front: the form in which the original generates."""
    ids, valid = pad_right([sequence[::-1] for sequence in sequences], length, value)
    return np.ascontiguousarray(ids[:, ::-1]), np.ascontiguousarray(valid[:, ::-1])
