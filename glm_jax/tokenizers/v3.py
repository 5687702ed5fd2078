r"""ChatGLM3's tokenizer: a SentencePiece model, nine special tokens after it, and the chat format.

Ids are those of `tokenization_chatglm.py` in THUDM/chatglm3-6b (later revision), without its code. Each text part of
a message carries SentencePiece's dummy prefix. Text never becomes a special token.
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from glm_jax.tokenizers.base import (
    CONFIG,
    Ids,
    Message,
    RoleTokenizer,
    load_pieces,
    read_files,
    well_formed,
)
from sharding.errors import UserError

MODEL = "tokenizer.model"
HINT = "give a directory that holds ChatGLM3's tokenizer.model"
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


class ChatGLM3Tokenizer(RoleTokenizer):
    """Ids: `<unk>` 0 (also the padding), `<s>` 1, `</s>` 2, the other pieces, then `SPECIAL_TOKENS` in order."""

    pad_id = 0

    def __init__(self, files: dict[str, bytes], where: str = MODEL) -> None:
        """Args: the repository's tokenizer files; `where`, their directory in errors. Raises UserError."""
        self.files = files
        self._pieces = load_pieces(files[MODEL], where, HINT)
        self.num_pieces: int = self._pieces.vocab_size()
        self.vocab_size = self.num_pieces + len(SPECIAL_TOKENS)
        self.special = {token: self.num_pieces + i for i, token in enumerate(SPECIAL_TOKENS)}
        self._spelling = {token_id: token for token, token_id in self.special.items()}
        self.eos_id = self._pieces.eos_id()
        self.stop_ids = (self.eos_id, self.special["<|user|>"], self.special["<|observation|>"])
        self.prefix = (self.special["[gMASK]"], self.special["sop"])

    @classmethod
    def load(cls, directory: Path) -> "ChatGLM3Tokenizer":
        """Read `tokenizer.model`. Raises UserError when it is missing, unreadable or no SentencePiece model."""
        return cls(read_files(directory, MODEL, HINT), str(directory / MODEL))

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
        config = json.dumps(TOKENIZER_CONFIG, ensure_ascii=False, indent=2) + "\n"
        return cls({MODEL: model.getvalue(), CONFIG: config.encode()})

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without any special token."""
        ids: list[int] = self._pieces.Encode(well_formed(text))
        return ids

    def decode(self, ids: Ids, skip_special: bool = True) -> str:
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

    def content(self, message: Message) -> str:
        """Text of a message; tools follow that of the system as JSON."""
        text: str = message["content"]
        if message["role"] == "system" and "tools" in message:
            text += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
        return text


def _coverage(lines: Sequence[str], vocab_size: int) -> float:
    """Share of the character occurrences that get a piece of their own; bytes spell the others.

    The original's 0.9999, unless single characters would then take more than 60 % of the pieces:
    a small vocabulary of Chinese needs room for words too.
    """
    counts = sorted(Counter(character for line in lines for character in line).values())[::-1]
    room = int(0.6 * (vocab_size - len(SPECIAL_TOKENS) - 259))  # 259: <unk>, <s>, </s>, 256 bytes
    share = sum(counts[: max(room, 0)]) / sum(counts)
    return min(0.9999, max(0.98, share))  # below 0.98 SentencePiece refuses
