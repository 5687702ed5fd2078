"""What an iteration of PPO did, brought to the host so that it can be recomputed there."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.batch import Sequences
from glm_jax.generate import Generation
from glm_jax.scalar import ScalarModel
from rlhf.ppo import Experience, Models, PPOConfig
from rlhf.ppo_iteration import Inputs, Iteration, Learners, RolledOut, current_models
from rlhf.rollout import repeated
from sharding.processes import fetch


class Setting(NamedTuple):
    """What all evidence of a run is seen against."""

    config: PPOConfig
    stop_ids: tuple[int, ...]
    stop_id: int  # token that every answer is scored at
    tolerance: float  # of log-probabilities, scores and values: rounding of the compute dtype
    trained: bool  # whether policy and reward model have learnt anything


class Evidence(NamedTuple):
    """An iteration's answers and experience, on the host, and the same things by other means."""

    setting: Setting
    kl_coef: float
    same: bool  # whether the policy still is its reference
    prompt_columns: int
    answers: Generation
    baseline: np.ndarray  # float32 [B]
    experience: Experience  # without its support
    metrics: Mapping[str, float]
    support_size: np.ndarray | None  # int32 [B, T], tokens that could be drawn
    scores: np.ndarray  # float32 [B], picked on the host, not clamped
    values: np.ndarray | None  # float32 [B, T], of the critic after each token
    turned: (
        Experience | None
    )  # of the same answers with the padding on the other side; None: there is none


class Learnt(NamedTuple):
    """What the updates of an iteration did."""

    rows: np.ndarray  # of the batch, in the first minibatch
    first: Mapping[str, float]  # metrics of the first update
    frozen: Mapping[
        str, bool | None
    ]  # whether a frozen model is what it was; None: its memory is gone
    changed: Mapping[str, bool]  # whether a model that learns has changed since the first look
    updates: Mapping[str, int]  # of each model that learns, since then


# model, ids, valid -> values, float32 [B, T]
ApplyScalar = Callable[[ScalarModel, jax.Array, jax.Array], jax.Array]


def gather(
    setting: Setting,
    iterate: Iteration,
    apply: ApplyScalar,
    learners: Learners,
    models: Models,
    inputs: Inputs,
    rolled_out: RolledOut,
    same: bool,
) -> Evidence:
    """The evidence of what was rolled out. Runs the scalar models once more, and the experience where padding moves.

    `apply` is `glm_jax.scalar.apply_scalar` in the iteration's layout.
    """
    current, layout = current_models(models, learners), iterate.layout
    answers: Generation = fetch(rolled_out.answers)
    experience, support = rolled_out.experience, rolled_out.experience.support
    read = _with_stop(answers, setting.stop_id)
    on_mesh = layout.put(read)

    def raw(model: ScalarModel) -> np.ndarray:
        values: np.ndarray = fetch(apply(model, on_mesh.ids, on_mesh.valid))
        return values

    column = read.valid.shape[1] - 1 - np.argmax(read.valid[:, ::-1], axis=1)
    baseline = repeated(inputs.baseline, setting.config.samples)
    return Evidence(
        setting=setting,
        kl_coef=learners.kl_coef,
        same=same,
        prompt_columns=inputs.prompts.ids.shape[1],
        answers=answers,
        baseline=baseline,
        experience=fetch(experience._replace(support=None)),
        metrics=rolled_out.figures,
        support_size=None if support is None else _aligned_sizes(fetch(_sizes(support))),
        scores=raw(current.reward)[np.arange(len(column)), column],
        values=None if current.critic is None else raw(current.critic)[:, :-1],
        turned=_turned(iterate, current, answers, baseline, learners.kl_coef),
    )


@jax.jit
def _sizes(support: jax.Array) -> jax.Array:
    return jnp.sum(support, axis=-1, dtype=jnp.int32)


def _aligned_sizes(sizes: np.ndarray) -> np.ndarray:
    return np.pad(sizes[:, :-1], ((0, 0), (1, 0)))


def _with_stop(answers: Generation, stop_id: int) -> Sequences:
    """What the reward model should read, made row by row: prompt, answer, and `stop_id` in place of its stop token."""
    ids, valid, target = answers.sequences
    ids, valid = (np.pad(x, ((0, 0), (0, 1))) for x in (ids, valid))
    for row, ended in enumerate(answers.ended):
        end = np.flatnonzero(target[row])[-1] + (0 if ended else 1)
        ids[row, end], valid[row, end] = stop_id, True
    return Sequences(ids, valid, np.pad(target, ((0, 0), (0, 1))))


def _turned(
    iterate: Iteration,
    current: Models,
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
    experience, _, _ = iterate.experience_of(
        current, generation, put(baseline), np.float32(kl_coef)
    )
    host: Experience = fetch(experience._replace(support=None))

    def back(x: Any) -> Any:
        return _rolled(x, shift) if x.ndim == 2 else x

    moved: Experience = jax.tree.map(back, host)
    return moved


def _rolled(x: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Row b of [B, T] rolled right by shift[b]."""
    column = (np.arange(x.shape[1]) - shift[:, None]) % x.shape[1]
    return np.take_along_axis(x, column, axis=1)
