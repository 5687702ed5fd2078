"""The jobs by name: what `glm-jax certify` trains under every layout."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from glm_jax.batch import Judged, Pairs
from glm_jax.config import Config
from glm_jax.generate import Generation, SamplingConfig
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.train import Update, init_state
from glm_jax.weights import host_weights
from rlhf.dpo import DPOConfig, LabelledPairs, dpo_update
from rlhf.kl import KLConfig
from rlhf.ppo import PPOConfig
from rlhf.ppo_iteration import Iteration
from rlhf.reward import RewardConfig, reward_update
from rlhf.sft import sft_update
from rlhf.trials.models import (
    ANSWER,
    VOCAB,
    place_model,
    place_scorer,
    rng,
    sequences,
)
from rlhf.trials.ppo import small_ppo
from rlhf.trials.recording import Recorder, Replayed, Role, Seen, remembering, seen_of
from sharding.layout import Layout

# AdamW's usual eps makes whole steps of gradients that are 0 but for rounding
OPTIM = OptimConfig(learning_rate=5e-3, warmup_fraction=0.0, eps=1e-3)
# of two updates an iteration: what rounding leaves of the first step, the others enlarge with the learning rate
TWICE = dataclasses.replace(OPTIM, learning_rate=2e-3)

NO_CLIP = 1e9


class Iterations(NamedTuple):
    """A choice of how the iterations of a job run."""

    generation: Layout | None = None  # to sample in; None: the training layout without its pipeline
    replay: tuple[Generation, ...] = ()  # learnt from in place of the layout's own answers
    # ratio and value; in bfloat16 rounding would decide whether a token beside its clip has a gradient
    clip: bool = True


class Job(NamedTuple):
    """A job that is set up: its steps, each with its updates, and the programs that they run."""

    updates: Iterator[list[Seen]]
    programs: Mapping[str, "Watched"]
    roles: Mapping[str, Role]
    answers: list[Generation]  # of every iteration so far, on the host, before any were replaced


class Watched:
    """A jitted program that compiles itself, so that what it compiled can be read; once for every kind of arguments."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self.compiled: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        """Run the program."""
        leaves, structure = jax.tree.flatten(args)
        key = (structure, *((jax.typeof(x), getattr(x, "sharding", None)) for x in leaves))
        if key not in self.compiled:
            self.compiled[key] = self.program.lower(*args).compile()
        return self.compiled[key](*args)


def _updates(model: Any, update: Callable[..., Update], batches: list[Any], layout: Layout) -> Job:
    """The job of one model; `update` makes its update of an optimizer."""
    optimizer = _optimizer(len(batches))
    watched = Watched(update(optimizer=optimizer, layout=layout))

    def run() -> Iterator[list[Seen]]:
        state = init_state(model, optimizer)
        for number, batch in enumerate(batches, 1):
            placed = layout.put(batch)
            state, metrics = watched(state, placed)
            yield [seen_of(f"update {number}", "", placed, state, metrics, layout)]

    role = Role(host_weights(model, layout), OPTIM, len(batches))
    return Job(run(), {"update": watched}, {"": role}, [])


def _optimizer(steps: int, config: OptimConfig = OPTIM) -> optax.GradientTransformation:
    return remembering(make_optimizer(config, steps))


def sft_job(config: Config, rows: int, steps: int, layout: Layout) -> Job:
    """Supervised fine-tuning."""
    batches = [sequences(config, f"sft {i}", rows) for i in range(steps)]
    return _updates(place_model(config, layout), sft_update, batches, layout)


def _pairs(config: Config, number: int, rows: int) -> Pairs:
    return Pairs(
        sequences(config, f"chosen {number}", rows), sequences(config, f"rejected {number}", rows)
    )


def reward_job(config: Config, rows: int, steps: int, layout: Layout) -> Job:
    """The reward model."""
    batches = [
        Judged(_pairs(config, i, rows), rng(f"weight {i}").uniform(0.2, 1, rows).astype(np.float32))
        for i in range(steps)
    ]
    update = partial(reward_update, RewardConfig(l2_weight=0.1))
    return _updates(place_scorer(config, layout), update, batches, layout)


def dpo_job(config: Config, rows: int, steps: int, layout: Layout) -> Job:
    """Direct preference optimisation with SFT mixed in."""
    batches = [
        (
            LabelledPairs(
                _pairs(config, i, rows),
                rng(f"reference {i}").normal(size=(rows, 2)).astype(np.float32),
            ),
            sequences(config, f"sft {i}", rows),
        )
        for i in range(steps)
    ]
    update = partial(dpo_update, DPOConfig(sft_weight=0.5))
    return _updates(place_model(config, layout), update, batches, layout)


def ppo_job(
    config: Config, rows: int, steps: int, layout: Layout, how: Iterations = Iterations()
) -> Job:
    """Whole iterations of PPO: answers, scores, advantages, two minibatches of actor and critic."""
    drawn = SamplingConfig(max_new_tokens=ANSWER, temperature=0.9)
    settings = PPOConfig(sampling=drawn, kl=KLConfig(coef=0.1), sft_weight=0.5)
    return _iterations(settings, config, rows, steps, layout, how)


def grpo_job(
    config: Config, rows: int, steps: int, layout: Layout, how: Iterations = Iterations()
) -> Job:
    """Whole iterations of GRPO: four answers a prompt from a part of the vocabulary, whitened, the KL in the loss."""
    settings = PPOConfig(
        advantage="grpo",
        samples=4,
        whiten=True,
        kl=KLConfig(coef=0.1, place="loss"),
        entropy_weight=0.01,
        truncated="penalty",
        sft_weight=0.5,
        sampling=SamplingConfig(max_new_tokens=ANSWER, temperature=0.9, top_k=VOCAB // 2),
    )
    return _iterations(settings, config, rows, steps, layout, how)


def _iterations(
    settings: PPOConfig, config: Config, rows: int, steps: int, layout: Layout, how: Iterations
) -> Job:
    settings = dataclasses.replace(settings, batch_size=2 * rows, minibatches=2)
    if not how.clip:
        settings = dataclasses.replace(settings, clip_range=NO_CLIP, value_clip=NO_CLIP)
    optimizers = (_optimizer(2 * steps, TWICE), _optimizer(2 * steps, TWICE))
    small = small_ppo(config, settings, optimizers, layout, generation=how.generation)
    has_critic = settings.advantage == "gae"
    names = ("experience_of", "update_actor", *(("update_critic",) if has_critic else ()))
    programs = {name: Watched(getattr(small.iterate, name)) for name in names}
    sample = Replayed(small.iterate.sample, how.replay)
    recorder = Recorder(sample, layout)
    recording: dict[str, Any] = {
        name: partial(getattr(recorder, name), programs[name]) for name in names
    }
    iterate: Iteration = dataclasses.replace(small.iterate, sample=sample, **recording)

    def run() -> Iterator[list[Seen]]:
        learners = small.learners
        for step in range(steps):
            key = jax.random.key(step)
            learners, _, _ = iterate(learners, small.models, small.inputs(step), key)
            yield recorder.taken(step + 1)

    states = {"actor": small.learners.actor, "critic": small.learners.critic}
    roles = {
        role: Role(host_weights(state.model, layout), TWICE, 2 * steps)
        for role, state in states.items()
        if state is not None
    }
    return Job(run(), programs, roles, sample.drawn)


JOBS: Mapping[str, Callable[..., Job]] = {
    "sft": sft_job,
    "reward": reward_job,
    "dpo": dpo_job,
    "ppo": ppo_job,
    "grpo": grpo_job,
}
SAMPLING_JOBS = ("ppo", "grpo")
