"""The kinds of batch that travel from the input pipelines to the jitted programs.

All are NamedTuples, hence pytrees: NumPy arrays on the host, `jax.Array` on the mesh.
B batch, T tokens, P prompt tokens, J judged pairs of a row.
"""

from typing import Any, NamedTuple

Array = Any  # np.ndarray on the host, jax.Array on the mesh


class Sequences(NamedTuple):
    """Padded token sequences; padding may stand on either side.

    `target[b, t]` says that `ids[b, t]` counts as a prediction target (predicted at t - 1).
    """

    ids: Array  # int32 [B, T]
    valid: Array  # bool  [B, T], False at padding
    target: Array  # bool  [B, T], implies valid


class Pairs(NamedTuple):
    """Two answers to the same prompt; `target` marks the answer's tokens."""

    chosen: Sequences
    rejected: Sequences


class Judged(NamedTuple):
    """Judged pairs, one a row, and what each counts for."""

    pairs: Pairs
    weight: Array  # float32 [B], 0 at padding


class Packed(NamedTuple):
    """Judged pairs, several answers a row, each with its prompt before it; an answer may stand in several pairs."""

    ids: Array  # int32 [B, T]
    segments: Array  # int32 [B, T], number of the answer in its row, from 1; 0 at padding
    chosen_end: Array  # int32 [B, J], column of the last token of the preferred answer
    rejected_end: Array  # int32 [B, J]
    weight: Array  # float32 [B, J], 0 where there is no pair


class Prompts(NamedTuple):
    """Left-padded prompts, so that all answers start in the same column."""

    ids: Array  # int32 [B, P]
    valid: Array  # bool  [B, P]
    row: Array  # int32 [B], row number of the prompt in its split
