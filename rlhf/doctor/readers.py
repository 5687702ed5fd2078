"""The doctor's programs that read networks, compiled once a run."""

import dataclasses
from functools import partial

import jax
import numpy as np

from glm_jax.batch import Sequences
from glm_jax.generate import Generation
from glm_jax.model import CausalLM
from glm_jax.scalar import ScalarModel
from rlhf.doctor.network import Readings, precise, read_scalar, read_tokens
from rlhf.ppo_iteration import Iteration
from sharding.processes import fetch


class Readers:
    """The doctor's own programs, compiled once."""

    def __init__(self, iterate: Iteration) -> None:
        self.iterate = iterate
        self.layout = dataclasses.replace(iterate.layout, accumulate=1)
        sampling = iterate.config.sampling
        self._tokens = jax.jit(partial(read_tokens, sampling=sampling, layout=self.layout))
        self._scalar = jax.jit(partial(read_scalar, layout=self.layout))

    def tokens(
        self,
        policy: CausalLM,
        reference: CausalLM,
        sequences: Sequences,
        support: jax.Array | None,
        others: np.ndarray,
        edge: float,
        wide: bool = False,
    ) -> Readings:
        """See `read_tokens`; `wide`: in float32 at the highest precision. On the host."""
        if wide:
            policy, reference = precise(policy), precise(reference)
        moved = jax.device_put(
            others,
            jax.sharding.NamedSharding(
                jax.sharding.get_mesh(), self.layout.spec(None, "batch", "time")
            ),
        )
        with jax.default_matmul_precision("highest" if wide else None):
            found: Readings = fetch(
                self._tokens(policy, reference, sequences, support, moved, np.float32(edge))
            )
        return found

    def scalar(self, model: ScalarModel, sequences: Sequences, wide: bool = False) -> np.ndarray:
        """float64 [B, T], the head's output at every position."""
        with jax.default_matmul_precision("highest" if wide else None):
            found = self._scalar(precise(model) if wide else model, sequences.ids, sequences.valid)
        return np.asarray(fetch(found), np.float64)

    def scores(self, model: ScalarModel, read: Sequences, wide: bool = False) -> np.ndarray:
        """float64 [B], the reward model's output at the last token of each row; `read` lies on the host."""
        values = self.scalar(model, self.layout.put(read), wide)
        last = read.valid.shape[1] - 1 - np.argmax(read.valid[:, ::-1], axis=1)
        return values[np.arange(len(last)), last]

    def values(self, model: ScalarModel, sequences: Sequences, wide: bool = False) -> np.ndarray:
        """float64 [B, T], the critic's output before each token."""
        return np.pad(self.scalar(model, sequences, wide)[:, :-1], ((0, 0), (1, 0)))


def as_trained(answers: Generation, stop_id: int) -> Sequences:
    """Sequences in the format of reward training, row by row: prompt, answer, `stop_id` in place of a stop token."""
    ids, valid, target = answers.sequences
    ids, valid = (np.pad(x, ((0, 0), (0, 1))) for x in (ids, valid))
    for row in range(len(ids)):
        columns = np.flatnonzero(target[row])
        if not len(columns):
            continue
        end = columns[-1] + (0 if answers.ended[row] else 1)
        ids[row, end], valid[row, end] = stop_id, True
    return Sequences(ids, valid, np.pad(target, ((0, 0), (0, 1))))
