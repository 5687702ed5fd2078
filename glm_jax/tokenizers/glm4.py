"""GLM-4's tokenizer: byte-level BPE in tiktoken's format or in that of `tokenizers`, and the chat format."""

import abc
import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2.sandbox
import tiktoken
import tokenizers

from glm_jax.tokenizers.base import (
    CONFIG,
    ChatFormatError,
    Ids,
    Message,
    RoleTokenizer,
    read_files,
    read_tokenizer_config,
    well_formed,
)
from sharding.errors import UserError

RANKS = "tokenizer.model"
FAST = "tokenizer.json"
HINT = "give a directory that holds GLM-4's tokenizer.model or tokenizer.json"
# how text is cut before merging: contractions, words, numbers of up to three digits, punctuation, white space
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)


class GLM4Tokenizer(RoleTokenizer):
    """Ids: the ranks of the byte pairs, then the special tokens, `<|endoftext|>` first."""

    num_ranks: int

    def _set_up(self, special: Mapping[str, int], config: Mapping[str, Any], where: str) -> None:
        lacking = [token for token in SPECIAL_TOKENS[:10] if token not in special]
        if lacking:
            raise UserError(f"{where}: special token {lacking[0]} is missing; {HINT}")
        self.special = special
        self._config = config
        self._spelling = {token_id: token for token, token_id in special.items()}
        self.vocab_size = max(self.num_ranks, *(token + 1 for token in special.values()))
        self.pad_id = special["<|endoftext|>"]
        self.eos_id = special["<|user|>"]
        self.stop_ids = (self.pad_id, self.eos_id, special["<|observation|>"])
        self.prefix = (special["[gMASK]"], special["<sop>"])

    @abc.abstractmethod
    def _decode_bytes(self, ids: list[int]) -> bytes:
        """Bytes of ids that are not special."""

    def encode_original(self, text: str) -> list[int]:
        """Ids as the original's `encode` gives them, where special tokens that a text spells are special."""
        spelt = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")
        ids: list[int] = []
        for part in spelt.split(text):
            ids += [self.special[part]] if part in self.special else self.encode(part)
        return ids

    def decode(self, ids: Ids, skip_special: bool = True) -> str:
        """Text of `ids`. Spelt out, special tokens stand apart by a blank, as in the original."""
        parts: list[str] = []
        run: list[int] = []
        for token in map(int, ids):
            if token < self.num_ranks and token not in self._spelling:
                run.append(token)
            elif not skip_special and token in self._spelling:
                parts += [self._text(run)] * bool(run) + [self._spelling[token]]
                run = []
        parts += [self._text(run)] * bool(run)
        return " ".join(parts)

    def _text(self, ids: list[int]) -> str:
        return self._decode_bytes(ids).decode("utf-8", errors="replace")

    def message(self, message: Message) -> list[int]:
        """Ids of one message; tools are a system message of their own before the rest of it.

        Raises ChatFormatError on an unknown role, and on tools that the repository's chat template does not word.
        """
        if message["role"] != "system" or not message.get("tools"):
            return super().message(message)
        rest = {key: value for key, value in message.items() if key != "tools"}
        offer = super().message({"role": "system", "content": self._worded(message["tools"])})
        return offer + (super().message(rest) if message["content"] else [])

    def _worded(self, tools: Sequence[Any]) -> str:
        """The system text in which the repository's own chat template offers tools."""
        template = self._template
        tools = [_as_function(tool) for tool in tools]

        def render(**offer: Any) -> str:
            message = {"role": "system", "content": "", **offer}
            return template.render(messages=[message], add_generation_prompt=False)

        try:
            rendered, nothing, without = render(tools=tools), render(tools=[]), render()
            lost = [tool for tool in tools if render(tools=[tool]) == nothing]
        except Exception as error:  # a template can raise anything
            reason = " ".join(str(error).split())
            raise ChatFormatError(
                f"chat_template of {CONFIG}: fails ({reason}); leave the tools out"
            ) from error
        _, found, text = rendered.partition("<|system|>\n")
        if not found or rendered == without:
            raise ChatFormatError(
                f"chat_template of {CONFIG}: words no tools of a system message; leave the tools out"
            )
        if lost:
            tool = json.dumps(lost[0], ensure_ascii=False)[:60]
            raise ChatFormatError(f"chat_template of {CONFIG}: words no tool such as {tool}")
        return text

    @cached_property
    def _template(self) -> jinja2.Template:
        source = self._config.get("chat_template")
        if not isinstance(source, str):
            raise ChatFormatError(
                f"tools in a system message need the chat_template of {CONFIG}, which is missing"
            )
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True
        )
        try:
            return environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatFormatError(
                f"chat_template of {CONFIG}: {error.message}; leave the tools out"
            ) from error


def _as_function(tool: Any) -> Any:
    """A tool as the template reads it: a bare function, as ChatGLM3 and fine-tuning tools list it, gets its type."""
    if isinstance(tool, Mapping) and "name" in tool and "type" not in tool:
        return {"type": "function", "function": tool}
    return tool


class RanksTokenizer(GLM4Tokenizer):
    """Read from tiktoken's ranks (the remote-code repositories)."""

    def __init__(self, files: dict[str, bytes], config: Mapping[str, Any], where: str) -> None:
        """Args: the repository's tokenizer files and parsed config; `where`, the file in errors. Raises UserError."""
        self.files = files
        ranks = _read_ranks(files[RANKS], where)
        self._encoding = tiktoken.Encoding(
            "glm-4", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        self.num_ranks = len(ranks)
        named = config.get("added_tokens_decoder") or {
            len(ranks) + i: {"content": token} for i, token in enumerate(SPECIAL_TOKENS)
        }
        try:
            special = {entry["content"]: int(token) for token, entry in named.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{where}: {CONFIG} beside it has added_tokens_decoder, but not as id: {{content}}; {HINT}"
            ) from error
        self._set_up(special, config, where)

    @classmethod
    def load(cls, directory: Path) -> "RanksTokenizer":
        """Read `tokenizer.model`. Raises UserError when it is missing, unreadable or holds no ranks."""
        files = read_files(directory, RANKS, HINT)
        return cls(files, read_tokenizer_config(directory), str(directory / RANKS))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no spelling of a special token is one."""
        return self._encoding.encode_ordinary(text)

    def _decode_bytes(self, ids: list[int]) -> bytes:
        return self._encoding.decode_bytes(ids)


def _read_ranks(model: bytes, where: str) -> dict[bytes, int]:
    """Lines of "base64-of-the-bytes rank". Raises UserError on anything else."""
    ranks: dict[bytes, int] = {}
    try:
        for line in model.splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise UserError(f"{where}: holds no byte-pair ranks; {HINT}") from error
    if not is_ranks(model) or sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{where}: holds no byte-pair ranks; {HINT}")
    return ranks


def is_ranks(model: bytes) -> bool:
    """Whether a tokenizer.model is tiktoken's, by its first line."""
    first = model[:1000].split(b"\n")[0]
    return re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+\r?", first) is not None


class FastTokenizer(GLM4Tokenizer):
    """Read from a tokenizer.json (the `-hf` repositories)."""

    def __init__(self, files: dict[str, bytes], config: Mapping[str, Any], where: str) -> None:
        """Args: the repository's tokenizer files and parsed config; `where`, the file in errors. Raises UserError."""
        self.files = files
        try:
            fields = json.loads(files[FAST])
            added = {entry["content"]: int(entry["id"]) for entry in fields["added_tokens"]}
            # without the added tokens no text can spell one of them; cutting and padding, which a file may ask
            # for, are no part of the ids
            plain = dict.fromkeys(("post_processor", "truncation", "padding")) | {
                "added_tokens": []
            }
            self._plain = tokenizers.Tokenizer.from_str(json.dumps({**fields, **plain}))
        except Exception as error:  # what the package raises has no narrower class
            reason = " ".join(str(error).split())
            raise UserError(f"{where}: not a tokenizer.json of GLM-4: {reason}; {HINT}") from error
        self.num_ranks = self._plain.get_vocab_size(with_added_tokens=False)
        self._set_up(added, config, where)

    @classmethod
    def load(cls, directory: Path) -> "FastTokenizer":
        """Read `tokenizer.json`. Raises UserError when it is missing, unreadable or of another kind."""
        files = read_files(directory, FAST, HINT)
        return cls(files, read_tokenizer_config(directory), str(directory / FAST))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no spelling of a special token is one."""
        ids: list[int] = self._plain.encode(well_formed(text), add_special_tokens=False).ids
        return ids

    def _decode_bytes(self, ids: list[int]) -> bytes:
        pieces = "".join(self._plain.id_to_token(token) or "" for token in ids)
        return bytes(_BYTES[character] for character in pieces)


def _byte_alphabet() -> Iterable[tuple[str, int]]:
    """The characters in which byte-level BPE files spell bytes: printable ones themselves, others from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    yield from ((chr(byte), byte) for byte in shown)
    yield from ((chr(256 + n), byte) for n, byte in enumerate(hidden))


_BYTES = dict(_byte_alphabet())
