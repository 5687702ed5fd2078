"""Prompts made ready for several answers each, and answers made ready for scoring."""

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from glm_jax.batch import Sequences
from glm_jax.sampler import Sampler

Rows = TypeVar("Rows")


def repeated(rows: Rows, count: int) -> Rows:
    """Every row of host arrays [B, ...] `count` times, one after the other: a row for each answer to a prompt."""
    found: Rows = jax.tree.map(lambda x: np.repeat(np.asarray(x), count, axis=0), rows)
    return found


def prompts_at_once(answers: int, samples: int, sample: Sampler) -> int:
    """Size of a batch of prompts that get `samples` answers each, about `answers` in all; both layouts can split it."""
    ways = math.lcm(*(layout.ways("batch") for layout in (sample.training, sample.generation)))
    return max(1, answers // samples // ways) * ways


def with_stop(sequences: Sequences, ended: Bool[Array, " B"], stop_id: int) -> Sequences:
    """One column longer, with `stop_id` appended to the answers that did not stop by themselves.

    The reward model reads its score at an end-of-turn token (the paper's later code appends it): an answer cut off at
    the length limit gets one as well. The appended token is no target: the policy did not choose it.
    """
    wider = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1))), sequences)
    before = jnp.pad(
        sequences.target, ((0, 0), (1, 0))
    )  # is the token to the left part of the answer?
    append = before & ~wider.target & ~ended[:, None]
    return Sequences(
        ids=jnp.where(append, stop_id, wider.ids), valid=wider.valid | append, target=wider.target
    )
