"""Prompt quality on the paper's three axes, by rules, from a file, or by a model behind an HTTP endpoint.

"Intention (clear / ambiguous / totally unclear), semantics (clear / guessable / incomprehensible), answerable or beyond
the model" (arXiv 2404.00934, section 3.1.1); thresholds are not in the paper.
"""

import json
import re
import unicodedata
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.data.entries import read_entries
from rlhf.data.filter_config import Endpoint
from rlhf.data.mistakes import OnMistake, Tally
from rlhf.data.records import Messages, prompt_key, prompt_text, user_turn
from sharding.errors import UserError


class Quality(NamedTuple):
    """A prompt's marks, the higher the better."""

    intention: int  # 2 clear, 1 ambiguous, 0 totally unclear
    semantics: int  # 2 clear, 1 guessable, 0 incomprehensible
    answerable: int  # 1 within what a model can answer, 0 beyond it


Scorer = Callable[[Sequence[Messages]], list[Quality]]

_LETTER = re.compile(r"[^\W\d_]")
_REPEATED = re.compile(r"(.)\1{9,}|(.{2,20}?)\2{5,}", re.DOTALL)
# what no model knows by itself
_LIVE = re.compile(
    r"https?://|\b(?:right now|today'?s|current(?:ly)?|latest|real[- ]time)\b"
    r"|现在几点|今天(?:的)?(?:天气|新闻|日期)|最新|实时",
    re.IGNORECASE,
)


def by_rules(prompts: Sequence[Messages]) -> list[Quality]:
    """Marks by what a regular expression can see of the last message: coarse, but it needs no model."""
    return [_marks(str(prompt[-1]["content"])) for prompt in prompts]


def _marks(text: str) -> Quality:
    letters = _LETTER.findall(text)
    broken = sum(unicodedata.category(c) in ("Co", "Cn") or c == "\ufffd" for c in text)
    if not letters or broken > len(text) / 10:
        return Quality(0, 0, 0)
    share = len(letters) / len(text)
    semantics = 2 if share > 0.4 and not _REPEATED.search(text) else 1 if share > 0.15 else 0
    # a word or two may be a question or its remainder; an ideograph says about as much as two letters
    said = sum(2 if c > "\u2e80" else 1 for c in letters)
    intention = 2 if said >= 8 else 1 if said >= 3 else 0
    return Quality(intention, semantics, int(not _LIVE.search(text)))


def from_file(path: Path) -> Scorer:
    """Marks that a model gave beforehand: lines {"prompt", "intention", "semantics", "answerable"}.

    Raises UserError on a damaged file, and when asked for a prompt that is not there.
    """
    marks: dict[str, Quality] = {}
    for entry in read_entries(path, Tally(OnMistake())):
        prompt = entry.fields.get("prompt")
        messages = user_turn(prompt) if isinstance(prompt, str) else tuple(prompt or ())
        marks[prompt_key(messages)] = _checked(entry.fields, entry.where)

    def score(prompts: Sequence[Messages]) -> list[Quality]:
        found = [marks.get(prompt_key(prompt)) for prompt in prompts]
        for prompt, quality in zip(prompts, found, strict=True):
            if quality is None:
                text = prompt_text(prompt).replace("\n", " ")[:40]
                raise UserError(f"{path}: no marks for the prompt {text!r}; score it too")
        return [quality for quality in found if quality is not None]

    return score


def _checked(fields: Any, where: str) -> Quality:
    highest = Quality(2, 2, 1)._asdict()
    marks = {name: fields.get(name) if isinstance(fields, dict) else None for name in highest}
    for name, most in highest.items():
        if marks[name] not in range(most + 1):
            raise UserError(
                f"{where}: {name} is {marks[name]!r}; give a whole number from 0 to {most}"
            )
    return Quality(**{name: int(mark or 0) for name, mark in marks.items()})


INSTRUCTION = """Judge the user's last message below as a question to a language model without tools.
Answer with one JSON object, nothing else: {"intention": 2 if it is clear what is wanted, 1 if ambiguous, 0 if totally
unclear, "semantics": 2 if the wording is clear, 1 if its meaning can be guessed, 0 if incomprehensible, "answerable": 1
if such a model can answer it, 0 if it is beyond it}."""


def from_endpoint(endpoint: Endpoint) -> Scorer:
    """A model's marks. Raises UserError when it cannot be asked or answers with something else."""

    def score(prompts: Sequence[Messages]) -> list[Quality]:
        with ThreadPoolExecutor(endpoint.threads) as pool:
            return list(pool.map(partial(_ask, endpoint), prompts))

    return score


def _ask(endpoint: Endpoint, prompt: Messages) -> Quality:
    body = {
        "model": endpoint.model,
        "temperature": 0,
        "messages": [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": prompt_text(prompt)},
        ],
    }
    request = urllib.request.Request(
        f"{endpoint.url.rstrip('/')}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {endpoint.key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=endpoint.timeout_s) as response:
            answer = json.load(response)["choices"][0]["message"]["content"]
        said = json.loads(re.sub(r"^```(?:json)?|```$", "", answer.strip()).strip())
    except OSError as error:
        message = f"{endpoint.url}: cannot be asked ({error}); check url, model and key"
        raise UserError(message) from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        message = f"{endpoint.url}: {endpoint.model} did not answer with marks; use another model"
        raise UserError(message) from error
    return _checked(said, f"{endpoint.url}: the answer of {endpoint.model}")
