"""Tokenizers of all generations, chosen by what a directory holds."""

from pathlib import Path

from glm_jax.tokenizers import glm4, v1, v2, v3
from glm_jax.tokenizers.base import (
    ROLES,
    ChatFormatError,
    Message,
    Tokenizer,
    pad_left,
    pad_right,
    read_files,
    read_tokenizer_config,
)
from glm_jax.tokenizers.glm4 import FastTokenizer, RanksTokenizer
from glm_jax.tokenizers.v1 import ChatGLMTokenizer
from glm_jax.tokenizers.v2 import ChatGLM2Tokenizer
from glm_jax.tokenizers.v3 import ChatGLM3Tokenizer
from sharding.errors import UserError

__all__ = [
    "ROLES",
    "ChatFormatError",
    "ChatGLM2Tokenizer",
    "ChatGLM3Tokenizer",
    "ChatGLMTokenizer",
    "FastTokenizer",
    "Message",
    "RanksTokenizer",
    "Tokenizer",
    "holds_tokenizer",
    "load_tokenizer",
    "pad_left",
    "pad_right",
]


def holds_tokenizer(directory: Path) -> bool:
    """Tell whether a directory holds a tokenizer's files."""
    return any((directory / name).is_file() for name in (v1.MODEL, v3.MODEL, glm4.FAST))


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer whose files a directory holds. Raises UserError where it holds none."""
    if (directory / v1.MODEL).is_file():
        return ChatGLMTokenizer.load(directory)
    if (directory / v3.MODEL).is_file():
        if glm4.is_ranks(read_files(directory, v3.MODEL, v3.HINT)[v3.MODEL]):
            return RanksTokenizer.load(directory)
        kind = ChatGLM2Tokenizer if _is_v2(directory) else ChatGLM3Tokenizer
        return kind.load(directory)
    if (directory / glm4.FAST).is_file():
        return FastTokenizer.load(directory)
    raise UserError(
        f"no tokenizer in {directory}: expected {v1.MODEL} (ChatGLM-6B), {v2.MODEL} (ChatGLM2, ChatGLM3, GLM-4) "
        f"or {glm4.FAST} (GLM-4 for transformers)"
    )


def _is_v2(directory: Path) -> bool:
    """ChatGLM2 and ChatGLM3 share one model file; the config beside it tells them apart.

    By the name of a repository where one is given: ChatGLM2's own names its predecessor.
    """
    name = str(read_tokenizer_config(directory).get("name_or_path", "")).lower()
    beside = directory / "config.json"
    if beside.is_file():
        # what the model says of itself counts for more
        text = beside.read_text(encoding="utf-8", errors="replace").lower()
        for generation in ("chatglm2", "chatglm3"):
            if generation in text:
                return generation == "chatglm2"
    return "chatglm3" not in name and ("chatglm2" in name or name.endswith("chatglm-6b"))
