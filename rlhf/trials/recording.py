"""Records of what a small case of certify does, on the host, where two runs are compared."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from glm_jax.batch import Prompts
from glm_jax.generate import Generation
from glm_jax.metrics import Metrics
from glm_jax.model import CausalLM
from glm_jax.optim import OptimConfig
from glm_jax.sampler import Sampler
from glm_jax.train import TrainState
from glm_jax.weights import host_weights
from rlhf.ppo import Experience
from sharding.layout import Layout
from sharding.processes import fetch

Arrays = Mapping[str, np.ndarray]


class Role(NamedTuple):
    """A model that a job trains: its start and its optimizer's settings."""

    start: Arrays  # weights before the first update, by path
    optim: OptimConfig
    num_updates: int  # in all, that the schedule is made for


class Seen(NamedTuple):
    """An update of a model, or the sampling and scoring of an iteration, on the host."""

    where: str  # such as "update 2"
    role: str  # of the model that is updated; "" where there is one, and where none is
    data: Arrays  # batches and masks, from the devices: equal under every layout
    answers: Generation | None  # of an iteration, as they were sampled
    figures: Arrays  # log-probabilities, scores and advantages
    losses: Mapping[str, float]
    gradients: Arrays  # by path
    weights: Arrays  # after the update, by path


class Remembered(NamedTuple):
    """State of an optimizer that keeps the last gradient beside its own."""

    inner: optax.OptState
    gradient: Any


def remembering(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer; its state holds the gradient of the last update."""

    def init(params: Any) -> Remembered:
        return Remembered(optimizer.init(params), optax.tree.zeros_like(params))

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Remembered]:
        inner_update = optax.with_extra_args_support(optimizer).update
        updates, inner = inner_update(grads, state.inner, params, **extra)
        return updates, Remembered(inner, grads)

    return optax.GradientTransformationExtraArgs(init, update)


def by_path(tree: Any) -> Arrays:
    """Path -> array on the host."""
    on_host = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path).lstrip(".")
        on_host[name] = np.asarray(fetch(leaf) if isinstance(leaf, jax.Array) else leaf)
    return on_host


def seen_of(
    where: str, role: str, data: Any, state: TrainState, metrics: Metrics, layout: Layout
) -> Seen:
    """Bring an update to the host; its optimizer is a `remembering` one."""
    losses = {"loss": float(metrics["loss"])}
    gradients = host_weights(state.opt_state.gradient, layout)
    weights = host_weights(state.model, layout)
    return Seen(where, role, by_path(data), None, {}, losses, gradients, weights)


class Replayed(Sampler):
    """A sampler that records its answers and, where there are others to replay, gives these instead."""

    def __init__(self, sampler: Sampler, replay: tuple[Generation, ...]) -> None:
        vars(self).update(vars(sampler))
        self.replay = replay
        self.drawn: list[Generation] = []

    def draw(
        self, policy: CausalLM, prompts: Prompts, key: jax.Array, samples: int = 1
    ) -> Generation:
        """Sample, record the answers, and return those to replay."""
        answers = super().draw(policy, prompts, key, samples)
        self.drawn.append(fetch(answers))
        if not self.replay:
            return answers
        replayed: Generation = self.training.put(self.replay[len(self.drawn) - 1])
        return replayed


class Recorder:
    """Records what the programs of an iteration are given and give."""

    def __init__(self, sample: Replayed, layout: Layout) -> None:
        self.sample = sample
        self.layout = layout
        self.seen: list[Seen] = []

    def taken(self, iteration: int) -> list[Seen]:
        """Everything since the last call, which is iteration `iteration`."""
        taken = [x._replace(where=f"iteration {iteration}{x.where}") for x in self.seen]
        self.seen = []
        return taken

    def experience_of(self, program: Any, *args: Any) -> Any:
        """Record answers and experience."""
        made = program(*args)
        experience: Experience = made[0]
        exact = {"sequences": experience.sequences, "counts": experience.counts}
        names = ("logp", "ref_logp", "scores", "shaped", "values", "advantages", "returns")
        there = {name: getattr(experience, name) for name in names}
        figures = {name: np.asarray(fetch(x)) for name, x in there.items() if x is not None}
        answers = self.sample.drawn[-1]
        self.seen.append(Seen("", "", by_path(exact), answers, figures, {}, {}, {}))
        return made

    def update_actor(self, program: Any, state: TrainState, batch: Any) -> Any:
        """Record an update of the actor: its rows and its SFT data."""
        return self._update("actor", program, state, batch, batch[1:])

    def update_critic(self, program: Any, state: TrainState, batch: Any) -> Any:
        """Record an update of the critic and its rows."""
        return self._update("critic", program, state, batch, batch[1:])

    def _update(self, role: str, program: Any, state: Any, batch: Any, data: Any) -> Any:
        state, metrics = program(state, batch)
        number = 1 + sum(seen.role == role for seen in self.seen)
        where = f", update {number} of the {role}"
        self.seen.append(seen_of(where, role, data, state, metrics, self.layout))
        return state, metrics
