"""ChatGLM2's tokenizer: a SentencePiece model and five special tokens after it."""

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

MODEL = "tokenizer.model"
HINT = "give a directory that holds ChatGLM2's tokenizer.model"
SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")


class ChatGLM2Tokenizer(RoundTokenizer):
    """Ids: `<unk>` 0 (also the padding), `<s>` 1, `</s>` 2, the other pieces, then `SPECIAL_TOKENS` in order."""

    pad_id = 0

    def __init__(self, files: dict[str, bytes], where: str = MODEL) -> None:
        """Args: the repository's tokenizer files; `where`, their directory in errors. Raises UserError."""
        self.files = files
        self._pieces = load_pieces(files[MODEL], where, HINT)
        self.num_pieces: int = self._pieces.vocab_size()
        self.vocab_size = self.num_pieces + len(SPECIAL_TOKENS)
        self.special = {token: self.num_pieces + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.eos_id = self._pieces.eos_id()
        self.stop_ids = (self.eos_id,)
        self.prefix = (self.special["[gMASK]"], self.special["sop"])

    @classmethod
    def load(cls, directory: Path) -> "ChatGLM2Tokenizer":
        """Read `tokenizer.model`. Raises UserError when it is missing, unreadable or no SentencePiece model."""
        return cls(read_files(directory, MODEL, HINT), str(directory / MODEL))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no spelling of a special token is one."""
        ids: list[int] = self._pieces.Encode(well_formed(text))
        return ids

    def decode(self, ids: Ids, skip_special: bool = True) -> str:
        """Text of `ids`; special tokens have no spelling."""
        known = [token for token in map(int, ids) if token < self.num_pieces]
        if skip_special:
            known = [token for token in known if token != self.pad_id]
        text: str = self._pieces.Decode(known)
        return text

    def question(self, messages: Sequence[Message]) -> list[int]:
        """Rounds count from 1, and every one has its heading."""
        history, query = self.rounds(messages)
        turns = [
            f"[Round {i}]\n\n问：{old}\n\n答：{answer}\n\n"
            for i, (old, answer) in enumerate(history, 1)
        ]
        return self.encode("".join(turns) + f"[Round {len(turns) + 1}]\n\n问：{query}\n\n答：")

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """[gMASK] sop, then the question's ids."""
        return [*self.prefix, *self.question(messages)]

    def chat_example(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The last answer and the `</s>` after it are the target, as in the official script."""
        asked, answer = self._split_answer(messages)
        prompt = self.chat_prompt(asked)
        spoken = [*self.encode(answer), self.eos_id]
        return prompt + spoken, [False] * len(prompt) + [True] * len(spoken)
