"""An iteration of PPO on the host, beside the doctor's own readings of the same networks."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from glm_jax.batch import Sequences
from glm_jax.generate import Generation
from glm_jax.model import CausalLM
from glm_jax.scalar import ScalarModel
from rlhf.doctor.finding import FLOAT32, Rounding
from rlhf.doctor.network import Readings, precise, read_scalar, read_tokens
from rlhf.doctor.recorder import Probed, Recorder, Updated, rounding_matters
from rlhf.ppo import Experience, Models, PPOConfig
from rlhf.ppo_iteration import Inputs, Iteration
from sharding.processes import fetch


class Table(NamedTuple):
    """All prompts that PPO may draw, and the score of each one's reference answer."""

    ids: np.ndarray  # int32 [N, P], left-padded
    valid: np.ndarray  # bool [N, P]
    baseline: np.ndarray  # float32 [N]


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
    probe: "Probe | None"
    others: Mapping[str, tuple[np.ndarray, np.ndarray]]  # stream -> its tokens and where they count
    keys: "Keys"
    updates: tuple[Updated, ...] = ()
    probes: tuple[Probed, ...] = ()

    @property
    def mask(self) -> np.ndarray:
        """bool [B, T], tokens of answers."""
        mask: np.ndarray = self.answers.sequences.target
        return mask


class Probe(NamedTuple):
    """The experience of other models of the same shapes, in float32: it shows which of them each field is made of."""

    baseline: np.ndarray
    kl_coef: float
    experience: Any  # an Experience of host arrays
    own: Readings
    scores: np.ndarray
    values: np.ndarray | None


class Keys(NamedTuple):
    """Random keys of iterations, as words."""

    number: int  # of the iteration
    now: tuple[int, ...]
    expected: tuple[int, ...] | None
    before: tuple[tuple[int, ...], ...]  # of iterations that were looked at earlier


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


def gather(
    setting: Setting,
    readers: Readers,
    recorder: Recorder,
    frozen: Models,
    inputs: Inputs,
    metrics: Mapping[str, float],
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
    given, answers, passed, kl_coef = recorder.seen
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
        turned=_turned(readers.iterate, models, host, baseline, kl_coef),
        probe=_probe(readers, models, answers, closed, kl_coef, edge) if probing else None,
        others=streams,
        keys=keys,
    )


def fetch_rows(rows: Any) -> Any:
    """Rows on the host, picked from their table or fetched from the mesh."""
    return jax.tree.map(np.asarray, rows)


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


# final norms of the probe's models, as multiples: every model is another one, none is far from what it was
SCALES: Mapping[str, float] = {"actor": 0.8, "critic": 1.3, "reference": 1.2, "reward": 0.7}


def _probe(
    readers: Readers,
    models: Models,
    answers: Generation,
    closed: Sequences,
    kl_coef: float,
    edge: float,
) -> Probe:
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


def _turned(
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
