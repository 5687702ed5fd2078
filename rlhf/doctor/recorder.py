"""The programs of an iteration, recording what goes in and out; each update is followed by the doctor's own."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.batch import Sequences
from glm_jax.generate import Generation
from glm_jax.metrics import Metrics
from glm_jax.train import TrainState, to_host
from rlhf.doctor.adamw import Arrays, Sample, entries, sample
from rlhf.doctor.network import (
    Counts,
    actor_parts,
    added,
    critic_parts,
    global_norm,
    gradient_of,
    precise,
    take,
)
from rlhf.ppo import Experience, Finite, Models
from rlhf.ppo_iteration import Iteration
from sharding.fingerprint import fingerprint
from sharding.processes import fetch

ROLES = ("actor", "critic")


class Loss(NamedTuple):
    """The doctor's own loss of a minibatch."""

    parts: Mapping[str, float]  # by the update's names, "loss" among them
    norm: float  # of the whole gradient
    gradient: Arrays  # sampled entries of it


class Updated(NamedTuple):
    """One update of one role."""

    role: str
    visited: np.ndarray  # rows of its minibatch
    rows: Any  # those rows of the Experience, on the host and without support
    metrics: Mapping[str, float]
    before: Sample
    after: Sample
    own: Loss
    precise: (
        Loss | None
    )  # `own` in float32, of the first update; None where the run computes so anyway
    experience: bool  # whether the update was given the experience that was made
    sft: Sequences | None


class Probed(NamedTuple):
    """The loss of an update, whose state stays as it is, in float32 whatever the run computes in."""

    role: str
    far: bool  # on rows that are far from the policy; else on those of its first minibatch
    rows: Any
    metrics: Mapping[str, float]
    own: Loss


class Recorder:
    """Records one iteration: run it with `programs`.

    Attributes:
        seen: what `experience_of` was given: models, answers, baseline, KL coefficient.
        updates: all updates in order.
        probes: one of each role that learns, if `probing`.
        last: role -> fingerprint of its weights and optimizer after its last update.
    """

    def __init__(self, iterate: Iteration, losses: "Losses", probing: bool) -> None:
        self._iterate = iterate
        self._losses = losses
        self._probing = probing
        self.seen: tuple[Models, Generation, np.ndarray, float] | None = None
        self.experience: Experience | None = None
        self.updates: list[Updated] = []
        self.probes: list[Probed] = []
        self.last: dict[str, tuple[int, int]] = {}

    @property
    def programs(self) -> Iteration:
        """The iteration, whose programs are recorded."""
        return dataclasses.replace(
            self._iterate,
            experience_of=self._experience_of,
            update_actor=partial(self._update, "actor"),
            update_critic=partial(self._update, "critic"),
        )

    def _experience_of(
        self, models: Models, answers: Generation, baseline: jax.Array, kl_coef: np.float32
    ) -> tuple[Experience, Metrics, Finite]:
        self.seen = models, answers, fetch(baseline), float(kl_coef)
        found = self._iterate.experience_of(models, answers, baseline, kl_coef)
        self.experience = found[0]
        return found

    def _update(self, role: str, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        experience, index, *rest = batch
        update = getattr(self._iterate, f"update_{role}")
        sft = rest[0] if rest else None
        first = not any(x.role == role for x in self.updates)
        of, rounds = partial(self._losses, role, state.model), rounding_matters(state.model)
        if first and self._probing:
            self._probe(role, state, batch, True)
            if rounds:
                self._probe(role, state, batch, False)
        own = of(experience, index, sft)
        wide = of(experience, index, sft, wide=True) if first and rounds else None
        before = sample(state)
        state, metrics = update(state, batch)
        self.updates.append(
            Updated(
                role,
                np.asarray(index),
                _host_rows(experience, index),
                to_host(metrics),
                before,
                sample(state),
                own,
                wide,
                experience is self.experience,
                None if sft is None else fetch(sft),
            )
        )
        self.last[role] = fingerprint((state.model, state.opt_state))
        return state, metrics

    def _probe(self, role: str, state: TrainState, batch: Any, far: bool) -> None:
        experience, index, *rest = batch
        if far:
            experience = _shifted(experience, self._iterate)
        wide = rounding_matters(state.model)
        with jax.default_matmul_precision("highest" if wide else None):
            found = self._losses.metrics_of[role](precise(state), (experience, index, *rest))
        own = self._losses(role, state.model, experience, index, rest[0] if rest else None, wide)
        rows = _host_rows(experience, index)
        self.probes.append(Probed(role, far, rows, to_host(found), own))


@jax.jit
def _taken(tree: Any, index: jax.Array) -> Any:
    return take(tree, index)


def _host_rows(experience: Experience, index: Any) -> Experience:
    rows: Experience = fetch(experience._replace(support=None))
    picked: Experience = jax.tree.map(lambda x: x[np.asarray(index)], rows)
    return picked


def _metrics_of(update: Any) -> Callable[[TrainState, Any], Metrics]:
    """The metrics alone of an update, whose state is not donated."""
    plain = getattr(update, "__wrapped__", update)
    return jax.jit(lambda state, batch: plain(state, batch)[1])


def rounding_matters(model: Any) -> bool:
    """Tell whether the run's products round more than float32 on the host would."""
    return model.trunk.config.compute_dtype != "float32" or jax.default_backend() != "cpu"


def _shifted(experience: Experience, iterate: Iteration) -> Experience:
    """An experience in which every clip matters: ratios, value changes and advantages of all sizes and both signs."""
    config, draw = iterate.config, np.random.default_rng(0)
    shape = experience.counts.shape
    sizes = np.array([0.5, 1.2, 2.0, 4.0])

    def of(scale: float) -> np.ndarray:
        return scale * draw.choice(sizes, shape) * draw.choice([-1.0, 1.0], shape)

    host = fetch((experience.logp, experience.values))
    changes: dict[str, Any] = {
        "logp": host[0] - of(config.clip_range),
        "ref_logp": host[0] - of(0.25),
        "advantages": draw.choice([-1.0, 1.0], shape) * draw.uniform(0.5, 2.0, shape),
    }
    if host[1] is not None:
        old = host[1] - of(config.value_clip)
        changes |= {"values": old, "returns": host[1] + of(2 * config.value_clip)}
    arrays = {name: x.astype(np.float32) for name, x in changes.items()}
    return experience._replace(**iterate.layout.put(arrays))


class Losses:
    """The doctor's own losses and gradients, compiled once; in as many pieces as the updates accumulate.

    Attributes:
        metrics_of: role -> program that gives the metrics of its update and leaves the state alone.
    """

    def __init__(self, iterate: Iteration) -> None:
        layout, config = iterate.layout, iterate.config
        whole = dataclasses.replace(layout, accumulate=1)
        self._pieces = layout.accumulate
        self._programs = {
            "actor": gradient_of(
                partial(actor_parts, config=config, kl_coef=config.kl.coef, layout=whole)
            ),
            "critic": gradient_of(partial(critic_parts, config=config, layout=whole)),
        }
        self.metrics_of = {role: _metrics_of(getattr(iterate, f"update_{role}")) for role in ROLES}

    def __call__(
        self,
        role: str,
        model: Any,
        experience: Experience,
        index: Any,
        sft: Sequences | None,
        wide: bool = False,
    ) -> Loss:
        """The loss of rows `index`, with `sft` for the actor; `wide`: in float32 at the highest precision."""
        rows = _taken(experience, index)
        targets = jnp.int32(1) if sft is None else jnp.sum(sft.target)
        counts = Counts(jnp.maximum(jnp.sum(rows.counts), 1), jnp.maximum(targets, 1))
        total: Any = None
        for piece in range(self._pieces):
            part, text = (_every(x, piece, self._pieces) for x in (rows, sft))
            batch = (part, counts) if role == "critic" else (part, text, counts)
            with jax.default_matmul_precision("highest" if wide else None):
                found = self._programs[role](precise(model) if wide else model, *batch)
            total = found if total is None else added(total, found)
        (loss, parts), gradient = total
        host = to_host({**parts, "loss": loss, "norm": global_norm(gradient)})
        return Loss(host, host.pop("norm"), entries(gradient))


def _every(rows: Any, first: int, stride: int) -> Any:
    """Rows first, first + stride, ... of a batch."""
    if stride == 1 or rows is None:
        return rows
    count = len(jax.tree.leaves(rows)[0])
    return _taken(rows, np.arange(first, count, stride, dtype=np.int32))
