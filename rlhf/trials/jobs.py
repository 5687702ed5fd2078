"""The jobs by name: what `glm-jax certify` trains under every layout."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from glm_jax.batch import Judged, Pairs
from glm_jax.config import Config
from glm_jax.generate import SamplingConfig
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.train import TrainState, Update, init_state
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
from sharding.layout import Layout

# AdamW's usual eps makes whole steps of gradients that are 0 but for rounding
OPTIM = OptimConfig(learning_rate=5e-3, warmup_fraction=0.0, eps=1e-3)
# of two updates an iteration: what rounding leaves of the first step, the others enlarge with the learning rate
TWICE = dataclasses.replace(OPTIM, learning_rate=2e-3)


class Seen(NamedTuple):
    """What one update did, on the host."""

    losses: Mapping[str, float]
    models: Mapping[str, tuple[Any, Any]]  # name -> (weights after it, gradient), laid out


class Job(NamedTuple):
    """A job that is set up: its updates, and the programs that they run."""

    updates: Iterator[Seen]
    programs: Mapping[str, "Watched"]


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


def _updates(
    model: Any,
    optimizer: optax.GradientTransformation,
    update: Update,
    batches: list[Any],
    layout: Layout,
) -> Job:
    watched = Watched(update)

    def run() -> Iterator[Seen]:
        state = init_state(model, optimizer)
        for batch in batches:
            state, metrics = watched(state, layout.put(batch))
            yield Seen({"loss": float(metrics["loss"])}, {"": _seen(state)})

    return Job(run(), {"update": watched})


def _seen(state: TrainState) -> tuple[Any, Any]:
    return state.model, state.opt_state.gradient


def _optimizer(steps: int, config: OptimConfig = OPTIM) -> optax.GradientTransformation:
    return remembering(make_optimizer(config, steps))


def sft_job(config: Config, rows: int, steps: int, layout: Layout) -> Job:
    """Supervised fine-tuning."""
    optimizer = _optimizer(steps)
    batches = [sequences(config, f"sft {i}", rows) for i in range(steps)]
    update = sft_update(optimizer, layout)
    return _updates(place_model(config, layout), optimizer, update, batches, layout)


def _pairs(config: Config, number: int, rows: int) -> Pairs:
    return Pairs(
        sequences(config, f"chosen {number}", rows), sequences(config, f"rejected {number}", rows)
    )


def reward_job(config: Config, rows: int, steps: int, layout: Layout) -> Job:
    """The reward model."""
    optimizer = _optimizer(steps)
    batches = [
        Judged(_pairs(config, i, rows), rng(f"weight {i}").uniform(0.2, 1, rows).astype(np.float32))
        for i in range(steps)
    ]
    update = reward_update(RewardConfig(l2_weight=0.1), optimizer, layout)
    return _updates(place_scorer(config, layout), optimizer, update, batches, layout)


def dpo_job(config: Config, rows: int, steps: int, layout: Layout) -> Job:
    """Direct preference optimisation with SFT mixed in."""
    optimizer = _optimizer(steps)
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
    update = dpo_update(DPOConfig(sft_weight=0.5), optimizer, layout)
    return _updates(place_model(config, layout), optimizer, update, batches, layout)


def ppo_job(config: Config, rows: int, steps: int, layout: Layout) -> Job:
    """Whole iterations of PPO: answers, scores, advantages, two minibatches of actor and critic."""
    sampling = SamplingConfig(max_new_tokens=ANSWER, temperature=0.9)
    settings = PPOConfig(sampling=sampling, kl=KLConfig(coef=0.1), sft_weight=0.5)
    return _iterations(settings, config, rows, steps, layout)


def grpo_job(config: Config, rows: int, steps: int, layout: Layout) -> Job:
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
    return _iterations(settings, config, rows, steps, layout)


def _iterations(settings: PPOConfig, config: Config, rows: int, steps: int, layout: Layout) -> Job:
    settings = dataclasses.replace(settings, batch_size=2 * rows, minibatches=2)
    optimizers = (_optimizer(2 * steps, TWICE), _optimizer(2 * steps, TWICE))
    small = small_ppo(config, settings, optimizers, layout)
    has_critic = settings.advantage == "gae"
    names = ("experience_of", "update_actor", *(("update_critic",) if has_critic else ()))
    programs = {name: Watched(getattr(small.iterate, name)) for name in names}
    iterate: Iteration = dataclasses.replace(small.iterate, **programs)  # type: ignore[arg-type]

    def run() -> Iterator[Seen]:
        learners = small.learners
        for step in range(steps):
            learners, metrics, _ = iterate(
                learners, small.models, small.inputs(step), jax.random.key(step)
            )
            losses: dict[str, float] = {"loss": metrics["loss"]}
            seen = {"actor": _seen(learners.actor)}
            if learners.critic is not None:
                losses["value_loss"] = metrics["value_loss"]
                seen["critic"] = _seen(learners.critic)
            yield Seen(losses, seen)

    return Job(run(), programs)


JOBS: Mapping[str, Callable[[Config, int, int, Layout], Job]] = {
    "sft": sft_job,
    "reward": reward_job,
    "dpo": dpo_job,
    "ppo": ppo_job,
    "grpo": grpo_job,
}
