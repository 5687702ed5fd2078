"""An iteration of PPO on the host, beside the doctor's own readings of the same networks."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from glm_jax.batch import Sequences
from glm_jax.generate import Generation
from rlhf.doctor.finding import FLOAT32, Rounding
from rlhf.doctor.network import Readings
from rlhf.doctor.readers import Readers, as_trained
from rlhf.doctor.recorder import Probed, Recorder, Updated, rounding_matters
from rlhf.doctor.variations import Probe, probe, turned
from rlhf.ppo import Experience, Models, PPOConfig
from rlhf.ppo_iteration import Inputs
from sharding.processes import fetch


class Table(NamedTuple):
    """All prompts of a run, and the reference answer of each with its score."""

    ids: np.ndarray  # int32 [N, P], left-padded
    valid: np.ndarray  # bool [N, P]
    rows: np.ndarray  # int [M], those that PPO trains on
    baseline: np.ndarray  # float32 [N]
    answers: Sequence[Sequence[int]] | None = None  # token ids; None: there are none


class Setting(NamedTuple):
    """Settings that all evidence of a run is held against."""

    config: PPOConfig
    stop_ids: tuple[int, ...]
    stop_id: int  # token that closed the reward model's training examples
    tolerance: float = (
        FLOAT32  # of log-probabilities and scores at a temperature of 1: rounding of float32
    )
    trained: bool = True  # whether policy and reward model have learnt anything
    scheduled: bool = (
        False  # whether the optimizers follow ppo.actor and ppo.critic over ppo.iterations
    )
    table: Table | None = None  # None: prompts are taken as given
    key: Any = None  # of PPO's random numbers; None: keys of iterations are taken as given


class Evidence(NamedTuple):
    """Answers and experience of an iteration, and the doctor's own readings of the networks."""

    setting: Setting
    kl_coef: float
    same: bool  # whether the policy still is its reference
    inputs: Inputs
    answers: Generation
    baseline: np.ndarray  # float32 [B], of each answer's prompt
    reference_scores: (
        np.ndarray | None
    )  # float64 [B], the doctor's own of each prompt's reference answer, not clamped
    passed_baseline: np.ndarray  # float32 [B], that the experience was given
    strangers: tuple[
        str, ...
    ]  # roles whose model the experience was given and should not have been
    experience: Any  # an Experience of host arrays, without its support
    has_support: bool
    metrics: Mapping[str, float]
    own: Readings
    scores: np.ndarray  # float64 [B], of the reward model's training format, not clamped
    values: np.ndarray | None  # float64 [B, T], of the critic before each token
    logp_rounding: Rounding
    ref_rounding: Rounding
    score_rounding: Rounding
    value_rounding: Rounding
    turned: Any  # the experience the same answers with the padding on the other side; None: there is none
    probe: Probe | None
    others: Mapping[str, tuple[np.ndarray, np.ndarray]]  # stream -> its tokens and where they count
    keys: "Keys"
    updates: tuple[Updated, ...] = ()
    probes: tuple[Probed, ...] = ()

    @property
    def mask(self) -> np.ndarray:
        """bool [B, T], tokens of answers."""
        mask: np.ndarray = self.answers.sequences.target
        return mask


class Keys(NamedTuple):
    """Random keys of iterations, as words."""

    number: int  # of the iteration
    now: tuple[int, ...]
    expected: tuple[int, ...] | None
    before: tuple[tuple[int, ...], ...]  # of iterations that were looked at earlier
    rows_before: np.ndarray | None = (
        None  # of the prompts of the iteration before, where that was looked at
    )


def gather(
    setting: Setting,
    readers: Readers,
    recorder: Recorder,
    frozen: Models,
    inputs: Inputs,
    metrics: Mapping[str, float],
    kl_coef: float,
    same: bool,
    strangers: Sequence[str],
    before: np.ndarray | None,
    keys: Keys,
    probing: bool,
) -> Evidence:
    """The evidence of what was rolled out.

    `frozen` has the reference and the reward model as the run holds them, `strangers` the roles whose model the
    experience was given and should not have been; `before`: tokens of the answers that were looked at last.
    """
    assert recorder.seen is not None and recorder.experience is not None
    given, answers, passed, _ = recorder.seen
    models = given._replace(reference=frozen.reference, reward=frozen.reward)
    baseline = np.repeat(np.asarray(inputs.baseline), setting.config.samples)
    experience, sampling = recorder.experience, setting.config.sampling
    host: Generation = fetch(answers)
    recorded: Experience = fetch(experience._replace(support=None))
    mask = host.sequences.target
    streams = _streams(host.sequences, setting.config.samples, before)
    others = np.stack([ids for ids, _ in streams.values()])
    read = partial(
        readers.tokens, models.actor, models.reference, answers.sequences, experience.support
    )
    rounds = rounding_matters(models.actor)
    floor = setting.tolerance * max(1.0, 1.0 / sampling.temperature)
    edge = min(1.0, 2 * floor)
    wide: Readings | None = None
    if rounds:
        wide = read(np.zeros_like(others), edge, wide=True)
        drift = np.abs(np.asarray(recorded.logp, np.float64) - wide.logp)[mask]
        edge = float(np.clip(2 * np.nanmax(drift, initial=0.0), 2 * floor, 0.5))
    own = read(others, edge)

    def measured(a: Any, b: Any, least: float) -> Rounding:
        return Rounding(np.abs(np.asarray(a, np.float64) - b).reshape(-1), least)

    exact_to = partial(Rounding, np.zeros(0))
    closed = as_trained(host, setting.stop_id)
    references = _references(setting, inputs, closed)
    scores = readers.scores(models.reward, closed)
    score_floor = setting.tolerance * max(1.0, float(np.abs(scores).max(initial=0.0)))
    score_rounding = exact_to(score_floor)
    if rounds:
        score_rounding = measured(scores, readers.scores(models.reward, closed, True), score_floor)
    values, value_rounding = None, exact_to(setting.tolerance)
    if models.critic is not None:
        values = readers.values(models.critic, answers.sequences)
        value_floor = setting.tolerance * max(1.0, float(np.abs(values[mask]).max(initial=0.0)))
        value_rounding = exact_to(value_floor)
        if rounds:
            precisely = readers.values(models.critic, answers.sequences, True)
            value_rounding = measured(values[mask], precisely[mask], value_floor)
    return Evidence(
        setting=setting,
        kl_coef=kl_coef,
        same=same,
        inputs=Inputs(fetch_rows(inputs.prompts), np.asarray(inputs.baseline), inputs.sft_batches),
        answers=host,
        baseline=baseline,
        reference_scores=None if references is None else readers.scores(models.reward, references),
        passed_baseline=passed,
        strangers=tuple(strangers),
        experience=recorded,
        has_support=experience.support is not None,
        metrics=metrics,
        own=own,
        scores=scores,
        values=values,
        logp_rounding=exact_to(floor)
        if wide is None
        else measured(own.logp[mask], wide.logp[mask], floor),
        ref_rounding=exact_to(floor)
        if wide is None
        else measured(own.ref_logp[mask], wide.ref_logp[mask], floor),
        score_rounding=score_rounding,
        value_rounding=value_rounding,
        turned=turned(readers.iterate, models, host, baseline, kl_coef),
        probe=probe(readers, models, answers, closed, kl_coef, edge) if probing else None,
        others=streams,
        keys=keys,
    )


def fetch_rows(rows: Any) -> Any:
    """Rows on the host, picked from their table or fetched from the mesh."""
    return jax.tree.map(np.asarray, rows)


def _references(setting: Setting, inputs: Inputs, like: Sequences) -> Sequences | None:
    """Prompts with their reference answers, each closed as in reward training, in the shape of `like`."""
    table, config = setting.table, setting.config
    if table is None or table.answers is None or not config.reference_baseline:
        return None
    rows = np.repeat(np.asarray(inputs.prompts.row), config.samples)
    start = table.ids.shape[1]
    ids, valid = np.zeros_like(like.ids), np.zeros_like(like.valid)
    ids[:, :start], valid[:, :start] = table.ids[rows], table.valid[rows]
    for place, row in enumerate(rows):
        answer = list(table.answers[row])
        if answer and answer[-1] in setting.stop_ids:
            answer.pop()
        answer.append(setting.stop_id)
        ids[place, start : start + len(answer)] = answer
        valid[place, start : start + len(answer)] = True
    return Sequences(ids, valid, np.zeros_like(valid))


def _streams(
    sequences: Sequences, samples: int, before: np.ndarray | None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tokens of other streams at the place of each token, and where both have one."""
    ids, _, target = sequences

    def pair(other: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.where(there, other, 0).astype(np.int32), there & target

    found = {"neighbouring tokens of an answer": pair(_right(ids), _right(target) & target)}

    def rows_later(count: int) -> tuple[np.ndarray, np.ndarray]:
        other, there = np.roll(ids, -count, axis=0), np.roll(target, -count, axis=0).copy()
        there[len(there) - count :] = False
        return pair(other, there)

    if samples > 1:
        other, there = rows_later(1)
        there[samples - 1 :: samples] = False  # the next row answers another prompt
        found["samples of a prompt"] = other, there
    found["answers to different prompts"] = rows_later(min(samples, len(ids)))
    blank = np.zeros_like(target)
    if before is not None and before.shape == ids.shape:
        found["answers of different iterations"] = pair(np.maximum(before, 0), before >= 0)
    else:
        found["answers of different iterations"] = np.zeros_like(ids), blank
    return found


def _right(x: np.ndarray) -> np.ndarray:
    return np.pad(x[:, :-1], ((0, 0), (1, 0)))
