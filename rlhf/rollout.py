"""Prompts made ready for several answers each, and answers made ready for scoring."""

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from glm_jax.batch import Prompts, Sequences
from glm_jax.sampler import Sampler
from glm_jax.scalar import last_token
from rlhf.data.batches import in_order
from sharding.errors import UserError

Rows = TypeVar("Rows")


def repeated(rows: Rows, count: int) -> Rows:
    """Every row of host arrays [B, ...] `count` times, one after the other: a row for each answer to a prompt."""
    found: Rows = jax.tree.map(lambda x: np.repeat(np.asarray(x), count, axis=0), rows)
    return found


def prompt_batches(prompts: Prompts, answers: int, samples: int, sample: Sampler) -> list[Prompts]:
    """Every prompt once, in order, in batches for `samples` answers each: `answers` in all, or a prompt's if more.

    Which prompts go together, and with it what they are answered, depends on no layout: where one needs more rows to
    split, rows of padding make them up. The answers are scored in the pipeline's microbatches.
    """
    rows, training = max(1, answers // samples), sample.training
    pieces = training.ways("batch") * training.microbatches
    unit = math.lcm(
        training.ways("batch"),
        sample.generation.ways("batch"),
        pieces // math.gcd(pieces, samples),
    )
    return list(in_order(prompts, rows, -(-rows // unit) * unit))


def require_scores(scores: np.ndarray, rows: np.ndarray, whose: str) -> None:
    """Raise UserError where a score [prompts, samples] is not a number, naming the first of the prompts `rows`."""
    unscored = rows[~np.isfinite(scores).all(axis=1)]
    if len(unscored):
        raise UserError(
            f"the reward model scores {whose}'s answers to {len(unscored)} of {len(rows)} prompts with what is not a "
            f"number (first: prompt {unscored[0]}); look for NaN or infinity in its weights"
        )


def with_stop(sequences: Sequences, ended: Bool[Array, " B"], stop_id: int) -> Sequences:
    """Close every answer with `stop_id`, the token that closed the reward model's training examples; one column more.

    An answer may end at any stop token of the tokenizer, but reward training saw `Tokenizer.eos_id` alone: it takes the
    place of the token that an answer ended with, and follows an answer that was cut off. What the reward model reads is
    then `Tokenizer.chat_example` of the same text. `target` stays, since the policy did not sample this token.
    """
    wider = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1))), sequences)
    before = jnp.pad(
        sequences.target, ((0, 0), (1, 0))
    )  # is the token to the left part of the answer?
    append = before & ~wider.target & ~ended[:, None]
    close = append | (last_token(wider.target) & ended[:, None])
    return Sequences(
        ids=jnp.where(close, stop_id, wider.ids), valid=wider.valid | append, target=wider.target
    )
