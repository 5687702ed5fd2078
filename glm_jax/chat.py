"""A conversation with a model: history, streaming, and commands."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from glm_jax.generate import SamplingConfig, stream
from glm_jax.model import CausalLM
from glm_jax.tokenizers import Message, Tokenizer
from sharding.disk.directory import write_json
from sharding.disk.paths import absolute
from sharding.errors import UserError
from sharding.layout import Layout

HELP = "/reset forgets, /system TEXT sets the system message and forgets, /save FILE keeps the conversation, /quit ends"


@dataclasses.dataclass
class Chat:
    """One conversation. Answer n draws from a random stream of its own: a conversation repeats with its seed."""

    model: CausalLM
    tokenizer: Tokenizer
    sampling: SamplingConfig
    layout: Layout
    seed: int = 0
    messages: list[Message] = dataclasses.field(default_factory=list)
    num_answers: int = 0

    def reply(self, text: str) -> Iterator[str]:
        """Pieces of the answer to `text` as they are drawn; both are then part of the history.

        Raises UserError where the conversation no longer fits the model's context; the history is then as before.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self.tokenizer.chat_prompt(asked)
        key = jax.random.fold_in(jax.random.key(self.seed), self.num_answers)
        answer = ""
        for so_far, piece in stream_text(
            self.model, self.tokenizer, prompt, key, self.sampling, self.layout
        ):
            answer = so_far
            yield piece
        self.num_answers += 1
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def complete(self, text: str) -> Iterator[str]:
        """Pieces of what continues `text`, without the chat format or any history."""
        prompt = [*self.tokenizer.prefix, *self.tokenizer.encode(text)]
        key = jax.random.key(self.seed)
        for _, piece in stream_text(
            self.model,
            self.tokenizer,
            prompt,
            key,
            self.sampling,
            self.layout,
            self.tokenizer.decode,
        ):
            yield piece

    def command(self, line: str) -> str:
        """Obey a line that begins with a slash; returns what to tell the user. Raises UserError."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/reset":
            self.messages = [m for m in self.messages if m["role"] == "system"]
            return "the conversation begins anew"
        if name == "/system":
            self.messages = [{"role": "system", "content": argument}] if argument else []
            self.tokenizer.chat_prompt([*self.messages, {"role": "user", "content": ""}])
            return "the system message is set, the conversation begins anew"
        if name == "/save":
            path = absolute(Path(argument or "chat.json"))
            write_json(path, list(self.messages))
            return f"saved to {path}"
        raise UserError(f"{name}: unknown command: {HELP}")


def stream_text(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: list[int],
    key: jax.Array,
    sampling: SamplingConfig,
    layout: Layout,
    decode: Callable[[list[int]], str] | None = None,
) -> Iterator[tuple[str, str]]:
    """(answer so far, what is new in it) as tokens are drawn; a character is shown once it is whole.

    Raises UserError where prompt and answer exceed the model's context.
    """
    total, room = len(prompt) + sampling.max_new_tokens, model.trunk.config.max_length
    if total > room:
        raise UserError(
            f"prompt and answer may take {len(prompt)} + {sampling.max_new_tokens} = {total} tokens, "
            f"but the model's context is {room}: shorten the prompt (/reset) or lower --max-new-tokens"
        )
    decode = decode or tokenizer.decode_answer
    ids: list[int] = []
    shown = ""
    for token in stream(model, prompt, key, sampling, tokenizer.stop_ids, layout):
        ids.append(token)
        text = decode(ids)
        if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text, text[len(shown) :]
            shown = text
    text = decode(ids)
    yield text, text[len(shown) :] if text.startswith(shown) else "\n" + text
