"""A tokenizer of one token a character: lengths can be counted by eye, and nothing has to be trained."""

from collections.abc import Sequence

import pytest

from glm_jax.tokenizers.base import ChatFormatError, Ids, Message, Tokenizer


class CharTokenizer(Tokenizer):
    """A prompt is 1, then its texts and 2; an answer is its text and 3. It knows no system message."""

    pad_id, eos_id, stop_ids, prefix, vocab_size = 0, 3, (3,), (1,), 2**17

    def encode(self, text: str) -> list[int]:
        return [ord(character) + 10 for character in text]

    def decode(self, ids: Ids, skip_special: bool = True) -> str:
        return "".join(chr(int(token) - 10) for token in ids if int(token) >= 10)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        if messages[0]["role"] == "system":
            raise ChatFormatError("no system messages")
        return [1, *(t for m in messages for t in self.encode(str(m["content"]))), 2]

    def chat_example(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        asked, answer = self.chat_prompt(messages[:-1]), self.encode(str(messages[-1]["content"]))
        return [*asked, *answer, 3], [False] * len(asked) + [True] * (len(answer) + 1)


@pytest.fixture(scope="session")
def characters() -> Tokenizer:
    """A CharTokenizer."""
    return CharTokenizer()
