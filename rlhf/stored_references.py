"""Reference answers on disk, which one stage of a run leaves for the next."""

import json
from pathlib import Path

import numpy as np

from glm_jax.tokenizers import Tokenizer
from rlhf.reference import References
from sharding.disk.directory import write_jsonl
from sharding.errors import UserError


def write_references(
    path: Path, references: References, texts: list[str], kept: set[int], tokenizer: Tokenizer
) -> None:
    """A line a prompt, whose text is in `texts`; `kept` are the rows that PPO trains on. Raises UserError."""
    records = [
        {
            "prompt": text,
            "reference": tokenizer.decode_answer(ids),
            "ids": ids,
            "scores": scores,
            "kept": row in kept,
        }
        for row, (text, ids, scores) in enumerate(
            zip(texts, references.answers, references.scores.tolist(), strict=True)
        )
    ]
    write_jsonl(path, records)


def read_references(path: Path, texts: list[str]) -> References:
    """What `write_references` wrote, to the bit. Raises UserError where it is damaged, or of other prompts."""
    try:
        # str.splitlines would also cut where an answer has a separator of Unicode's
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        same = [line["prompt"] for line in lines] == texts
        scores = np.array([line["scores"] for line in lines], np.float32)
        references = References([line["ids"] for line in lines], scores)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}; --restart begins the run anew") from None
    if not same:
        raise UserError(
            f"{path} has reference answers to other prompts than the recipe now asks for: --restart begins the run anew"
        )
    return references
