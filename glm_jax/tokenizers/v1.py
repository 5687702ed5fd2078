"""ChatGLM-6B's tokenizer: a SentencePiece model with pieces of its own for newlines, tabs and runs of blanks."""

import re
from collections.abc import Sequence
from pathlib import Path

from glm_jax.tokenizers.base import (
    Ids,
    Message,
    RoundTokenizer,
    load_pieces,
    read_files,
    well_formed,
)
from sharding.errors import UserError

MODEL = "ice_text.model"
HINT = "give a directory that holds ChatGLM-6B's ice_text.model"
# what the original takes for special tokens when a text spells them; [gMASK] is not among them
SPELT = ("<sop>", "<eop>", "</s>", "[MASK]", "<pad>", "<unk>")
LONGEST_BLANK = 80
# only the lengths that have a piece: text may spell any other
BLANKS = rf"<\|blank_({'|'.join(map(str, range(2, LONGEST_BLANK + 1)))})\|>"
PUNCTUATION = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
CHINESE = "[\u4e00-\u9fff]"


class ChatGLMTokenizer(RoundTokenizer):
    """Ids: `<unk>` 0, `<s>` 1, `</s>` 2, `<pad>` 3, `<n>` 4, text, `[MASK]` 130000 and the other special tokens."""

    def __init__(self, files: dict[str, bytes], where: str = MODEL) -> None:
        """Args: the repository's tokenizer files; `where`, their directory in errors. Raises UserError."""
        self.files = files
        self._pieces = load_pieces(files[MODEL], where, HINT)
        for piece in ("<pad>", "<eop>", "[MASK]", "[gMASK]", "<sop>"):
            if self._pieces.PieceToId(piece) == self._pieces.unk_id():
                raise UserError(f"{where}: holds no piece {piece}; {HINT}")
        self.vocab_size = self._pieces.vocab_size()
        self.pad_id = self._pieces.PieceToId("<pad>")
        self.mask_id = self._pieces.PieceToId("[MASK]")
        self.eos_id = self._pieces.PieceToId("<eop>")
        self.stop_ids = (self.eos_id,)
        self.prefix = (self._pieces.PieceToId("[gMASK]"), self._pieces.PieceToId("<sop>"))

    @classmethod
    def load(cls, directory: Path) -> "ChatGLMTokenizer":
        """Read `ice_text.model`. Raises UserError when it is missing, unreadable or no SentencePiece model."""
        return cls(read_files(directory, MODEL, HINT), str(directory / MODEL))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no spelling of a special token is one."""
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        for length in range(LONGEST_BLANK, 1, -1):
            text = text.replace(" " * length, f"<|blank_{length}|>")
        ids: list[int] = self._pieces.Encode(well_formed(text))
        return ids

    def encode_original(self, text: str) -> list[int]:
        """Ids as the original's `encode` gives them, where special tokens that a text spells are special.

        White space beside them is lost.
        """
        ids: list[int] = []
        parts = re.split("(" + "|".join(map(re.escape, SPELT)) + ")", text)
        for number, part in enumerate(parts):
            if part in SPELT:
                ids.append(self._pieces.PieceToId(part))
                continue
            part = part.lstrip() if number > 0 else part
            part = part.rstrip() if number < len(parts) - 1 else part
            ids += self.encode(part) if part else []
        return ids

    def decode(self, ids: Ids, skip_special: bool = True) -> str:
        """Text of `ids`; special tokens have no spelling.

        The model's normalisation is lossy: full-width characters come back as half-width ones.
        """
        text: str = self._pieces.Decode([i for i in map(int, ids) if i < self.vocab_size])
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(BLANKS, lambda match: " " * int(match[1]), text)

    def clean(self, answer: str) -> str:
        """The original's wiping: Chinese punctuation beside Chinese characters."""
        answer = answer.strip()
        for half, full in PUNCTUATION.items():
            answer = re.sub(f"({CHINESE}){re.escape(half)}", rf"\1{full}", answer)
            answer = re.sub(f"{re.escape(half)}({CHINESE})", rf"{full}\1", answer)
        return answer

    def question(self, messages: Sequence[Message]) -> list[int]:
        """Rounds count from 0; a first question stands alone."""
        history, query = self.rounds(messages)
        if not history:
            return self.encode(query)
        turns = [
            f"[Round {i}]\n问：{old}\n答：{answer}\n" for i, (old, answer) in enumerate(history)
        ]
        return self.encode("".join(turns) + f"[Round {len(history)}]\n问：{query}\n答：")

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The question's ids, then [gMASK]<sop>, which ask for the answer."""
        return [*self.question(messages), *self.prefix]

    def chat_example(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The last answer is the target, with `<sop>` before it and `<eop>` after it, as in the official script."""
        asked, answer = self._split_answer(messages)
        prompt = self.chat_prompt(asked)
        spoken = [*self.encode(answer), self.eos_id]
        return prompt + spoken, [False] * (len(prompt) - 1) + [True] * (1 + len(spoken))
