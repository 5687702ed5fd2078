"""The experience of an iteration's answers under other models, and with their padding on the other side."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from glm_jax.batch import Sequences
from glm_jax.generate import Generation
from rlhf.doctor.network import Readings, precise
from rlhf.doctor.readers import Readers
from rlhf.doctor.recorder import rounding_matters
from rlhf.ppo import Experience, Models
from rlhf.ppo_iteration import Iteration
from sharding.processes import fetch


class Probe(NamedTuple):
    """The experience of other models of the same shapes, in float32: it shows which of them each field is made of."""

    baseline: np.ndarray
    kl_coef: float
    experience: Any  # an Experience of host arrays
    own: Readings
    scores: np.ndarray
    values: np.ndarray | None


# final norms of the probe's models, as multiples: every model is another one, none is far from what it was
SCALES: Mapping[str, float] = {"actor": 0.8, "critic": 1.3, "reference": 1.2, "reward": 0.7}


def probe(
    readers: Readers,
    models: Models,
    answers: Generation,
    closed: Sequences,
    kl_coef: float,
    edge: float,
) -> Probe:
    """The experience of `answers` under models with rescaled final norms, another baseline and coefficient."""
    changed = models._replace(
        **{
            name: _rescaled(model, SCALES[name])
            for name, model in models._asdict().items()
            if model is not None
        }
    )
    wide = rounding_matters(models.actor)
    if wide:
        changed = precise(changed)
    baseline = np.linspace(-0.5, 0.5, len(closed.ids)).astype(np.float32)
    coef = 0.1 if kl_coef == 0.0 else 2 * kl_coef
    with jax.default_matmul_precision("highest" if wide else None):
        experience, _, _ = readers.iterate.experience_of(
            changed, answers, readers.layout.put(baseline), np.float32(coef)
        )
    no_others = np.zeros((4, *closed.ids[:, :-1].shape), np.int32)[: _num_streams(readers)]
    own = readers.tokens(
        changed.actor,
        changed.reference,
        answers.sequences,
        experience.support,
        no_others,
        edge,
        wide,
    )
    values = None
    if changed.critic is not None:
        values = readers.values(changed.critic, answers.sequences, wide)
    scores = readers.scores(changed.reward, closed, wide)
    host: Experience = fetch(experience._replace(support=None))
    return Probe(baseline, coef, host, own, scores, values)


def _num_streams(readers: Readers) -> int:
    return 4 if readers.iterate.config.samples > 1 else 3


def _rescaled(model: Any, scale: float) -> Any:
    trunk = model.trunk
    return dataclasses.replace(
        model, trunk=dataclasses.replace(trunk, final_norm=trunk.final_norm * scale)
    )


def turned(
    iterate: Iteration,
    models: Models,
    answers: Generation,
    baseline: np.ndarray,
    kl_coef: float,
) -> Experience | None:
    """The experience of the same answers with left padding moved to the right, by the same program, moved back."""
    shift = np.argmax(answers.sequences.valid, axis=1)
    if not shift.any():
        return None
    sequences, logp = jax.tree.map(lambda x: _rolled(x, -shift), (answers.sequences, answers.logp))
    put = iterate.layout.put
    generation = Generation(Sequences(*put(sequences)), put(logp), put(answers.ended))
    experience, _, _ = iterate.experience_of(models, generation, put(baseline), np.float32(kl_coef))
    host: Experience = fetch(experience._replace(support=None))

    def back(x: Any) -> Any:
        return _rolled(x, shift) if x.ndim == 2 else x

    moved: Experience = jax.tree.map(back, host)
    return moved


def _rolled(x: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Row b of [B, T] rolled right by shift[b]."""
    column = (np.arange(x.shape[1]) - shift[:, None]) % x.shape[1]
    return np.take_along_axis(x, column, axis=1)
