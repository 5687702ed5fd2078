"""An iteration of PPO in small."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optax

from glm_jax.config import Config
from glm_jax.generate import SamplingConfig
from glm_jax.sampler import Sampler
from glm_jax.train import TrainState, init_state
from rlhf.kl import KLConfig
from rlhf.ppo import Models, PPOConfig
from rlhf.ppo_iteration import Inputs, Iteration, Learners, make_iteration
from rlhf.trials.models import ANSWER, STOP_IDS, place_model, place_scorer, prompts, sequences
from sharding.layout import Layout


class SmallPPO(NamedTuple):
    """An iteration and what it works on."""

    iterate: Iteration
    models: Models
    learners: Learners
    inputs: Callable[[int], Inputs]  # of a step


# for trials that are about something else
PLAIN = PPOConfig(
    batch_size=16,
    minibatches=2,
    kl=KLConfig(coef=0.1),
    sampling=SamplingConfig(max_new_tokens=ANSWER, temperature=0.7),
)
Optimizers = tuple[optax.GradientTransformation, optax.GradientTransformation]


def small_ppo(
    model: Config,
    config: PPOConfig,
    optimizers: Optimizers,
    layout: Layout,
    sampling: SamplingConfig | None = None,
    stop_ids: tuple[int, ...] = STOP_IDS,
    start: Callable[[Any, optax.GradientTransformation], TrainState] = init_state,
    generation: Layout | None = None,
) -> SmallPPO:
    """PPO of a tiny model on the current mesh; `optimizers` are those of actor and critic.

    With `sampling` and `stop_ids` rollouts may differ from what `config` says, and `start` makes the actor's state: so
    that what a bug there does can be seen. `generation` is the layout to sample in; None: `layout` without pipeline.
    """
    sample = Sampler(model, sampling or config.sampling, stop_ids, layout, generation)
    iterate = make_iteration(config, optimizers, sample, STOP_IDS[0], layout)
    policy, scorer = place_model(model, layout), place_scorer(model, layout)
    critic = place_scorer(model, layout) if config.advantage == "gae" else None
    learners = Learners(
        start(policy, optimizers[0]),
        None if critic is None else init_state(critic, optimizers[1]),
        config.kl.coef,
    )
    count = config.batch_size // config.samples
    baseline = np.linspace(-0.1, 0.1, count, dtype=np.float32)

    def inputs(step: int) -> Inputs:
        sft = (
            sequences(model, f"sft {step} {number}", config.batch_size // 2)
            for number in itertools.count()
        )
        return Inputs(prompts(model, f"prompts {step}", count), baseline, sft)

    return SmallPPO(iterate, Models(policy, critic, policy, scorer), learners, inputs)
