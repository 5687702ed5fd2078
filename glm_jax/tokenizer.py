r"""ChatGLM3's tokenizer: a SentencePiece model, nine special tokens after it, and the chat format.

Ids are those of `tokenization_chatglm.py` in THUDM/chatglm3-6b (later revision), without its code:
a role message is `<|role|> encode("{metadata}\n") encode(content)`, each text part tokenised on
its own, so that each carries the dummy prefix. Text never becomes a special token.
"""

import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from sharding.errors import UserError

Message = Mapping[str, Any]  # {"role", "content"}, optionally "metadata" and (system) "tools"

SPECIAL_TOKENS = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
ROLES = ("system", "user", "assistant", "observation")

# What the repository of ChatGLM3 states about its tokenizer. Left out: `chat_template`, whose text
# gives other ids than the format the model was trained with (spaces around the newline). The class
# is named by its home repository, because no code is written beside the files.
TOKENIZER_CONFIG = {
    "name_or_path": "THUDM/chatglm3-6b",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {
        "AutoTokenizer": ["THUDM/chatglm3-6b--tokenization_chatglm.ChatGLMTokenizer", None]
    },
}


class ChatGLM3Tokenizer:
    """Text <-> ids, and conversations -> the sequences ChatGLM3 is prompted and trained with.

    Ids: `<unk>` 0 (also the padding), `<s>` 1, `</s>` 2, the other SentencePiece pieces, then
    `SPECIAL_TOKENS` in order.
    """

    pad_id = 0

    def __init__(self, model: bytes, config: Mapping[str, Any] = TOKENIZER_CONFIG):
        """Args: `model`, a serialised SentencePiece model; `config`, what `save` writes beside it.

        Raises RuntimeError when `model` is no SentencePiece model.
        """
        self._model = model
        self._config = dict(config)
        self._pieces = sentencepiece.SentencePieceProcessor()
        self._pieces.LoadFromSerializedProto(model)
        self.num_pieces: int = self._pieces.vocab_size()
        self.vocab_size = self.num_pieces + len(SPECIAL_TOKENS)
        self.special = {token: self.num_pieces + i for i, token in enumerate(SPECIAL_TOKENS)}
        self._spelling = {token_id: token for token, token_id in self.special.items()}
        self.eos_id: int = self._pieces.eos_id()
        self.user_id = self.special["<|user|>"]
        self.assistant_id = self.special["<|assistant|>"]
        self.observation_id = self.special["<|observation|>"]
        self.stop_ids = (self.eos_id, self.user_id, self.observation_id)
        self.prefix = (self.special["[gMASK]"], self.special["sop"])  # opens every sequence

    @classmethod
    def load(cls, directory: Path) -> "ChatGLM3Tokenizer":
        """Read `tokenizer.model` (and `tokenizer_config.json`, if any) of a checkpoint directory.

        Raises UserError when a file is missing, unreadable or not what its name says.
        """
        path, config_path = directory / "tokenizer.model", directory / "tokenizer_config.json"
        hint = "give a directory that holds ChatGLM3's tokenizer.model"
        try:
            model = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {hint}") from error
        try:
            config = json.loads(config_path.read_bytes()) if config_path.exists() else None
        except (OSError, ValueError) as error:
            raise UserError(f"{config_path}: not readable as JSON; mend or remove it") from error
        try:
            return cls(model) if config is None else cls(model, config)
        except RuntimeError as error:
            raise UserError(f"{path}: not a SentencePiece model; {hint}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "ChatGLM3Tokenizer":
        """Train a small tokenizer with ChatGLM3's rules on `texts`.

        The rules are read off the original's model file: byte-pair merges, no normalisation, a
        dummy prefix, white space kept, digits apart, bytes for what no piece covers (the newline
        among them, at the original's id 13). The same texts give the same bytes, in any order.

        Args:
            texts: training texts; taken line by line, so that no piece holds a newline.
            vocab_size: as the model sees it, special tokens included.

        Raises:
            UserError: no text, or a vocabulary too small or too large for the texts.
        """
        lines = [line for text in texts for line in text.splitlines() if line.strip()]
        if not lines:
            raise UserError("tokenizer: no text to train on; give more data")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(lines),
                model_writer=model,
                vocab_size=vocab_size - len(SPECIAL_TOKENS),
                character_coverage=_coverage(lines, vocab_size),
                model_type="bpe",
                normalization_rule_name="identity",
                add_dummy_prefix=True,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                byte_fallback=True,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                num_threads=1,  # the number is written into the model file
                minloglevel=3,
            )
        except RuntimeError as error:
            reason = " ".join(str(error).rsplit("] ", 1)[-1].split()) or "SentencePiece refuses"
            raise UserError(
                f"tokenizer: cannot make a vocabulary of {vocab_size} from {len(lines)} lines "
                f"({reason.rstrip('.')}); choose another vocabulary size or give more text"
            ) from error
        return cls(model.getvalue())

    def save(self, directory: Path) -> None:
        """Write the tokenizer files of a ChatGLM3 repository; each appears whole or not at all."""
        directory.mkdir(parents=True, exist_ok=True)
        config = json.dumps(self._config, ensure_ascii=False, indent=2) + "\n"
        files = {"tokenizer.model": self._model, "tokenizer_config.json": config.encode()}
        for name, content in files.items():
            temporary = directory / f".{name}.{os.getpid()}"
            temporary.write_bytes(content)
            temporary.replace(directory / name)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without any special token."""
        ids: list[int] = self._pieces.Encode(text)
        return ids

    def decode(self, ids: Iterable[int] | np.ndarray, skip_special: bool = True) -> str:
        """Text of `ids`; special tokens are skipped, or spelt out as the original does.

        Ids beyond the vocabulary (a model's padded rows) count as special without a spelling.
        """
        text, run = "", list[int]()
        for token in map(int, ids):
            if token < self.num_pieces:
                if not (skip_special and token == self.pad_id):
                    run.append(token)
            elif not skip_special:
                text, run = text + self._pieces.Decode(run), []
                text += self._spelling.get(token, "")
        return text + str(self._pieces.Decode(run))

    def decode_answer(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of a generated answer: up to the first stop token, without its metadata line."""
        answer: list[int] = []
        for token in map(int, ids):
            if token in self.stop_ids:
                break
            answer.append(token)
        metadata, newline, content = self.decode(answer).partition("\n")
        return (content if newline else metadata).strip()

    def message(self, message: Message) -> list[int]:
        """Ids of one message of a conversation, its role token first.

        Raises UserError on a role that ChatGLM3 does not know.
        """
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise UserError(f"message: unknown role {role!r}; use one of {', '.join(ROLES)}")
        if role == "system" and "tools" in message:
            content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
        metadata = self.encode(f"{message.get('metadata', '')}\n")
        return [self.special[f"<|{role}|>"], *metadata, *self.encode(content)]

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids that ask for the next answer (`build_chat_input`); they end with `<|assistant|>`."""
        return [
            *self.prefix,
            *(token for message in messages for token in self.message(message)),
            self.assistant_id,
        ]

    def chat_example(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """A whole conversation for training, and which of its tokens are prediction targets.

        Targets follow the official fine-tuning script: every token of an answer but its role
        token, and the token after it (the next role token, or the closing `</s>`), which teaches
        the model to stop. The script also trains on observations; here only answers count.
        """
        ids, target = list(self.prefix), [False] * len(self.prefix)
        after_answer = False
        for message in messages:
            new, answer = self.message(message), message["role"] == "assistant"
            ids += new
            target += [after_answer] + [answer] * (len(new) - 1)
            after_answer = answer
        return [*ids, self.eos_id], [*target, after_answer]


def _coverage(lines: Sequence[str], vocab_size: int) -> float:
    """Share of the character occurrences that get a piece of their own; bytes spell the others.

    The original's 0.9999, unless single characters would then take more than 60 % of the pieces:
    a small vocabulary of Chinese needs room for words too.
    """
    counts = sorted(Counter(character for line in lines for character in line).values())[::-1]
    room = int(0.6 * (vocab_size - len(SPECIAL_TOKENS) - 259))  # 259: <unk>, <s>, </s>, 256 bytes
    share = sum(counts[: max(room, 0)]) / sum(counts)
    return min(0.9999, max(0.98, share))  # below 0.98 SentencePiece refuses


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
