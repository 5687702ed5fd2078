"""Iterations of PPO (arXiv 2404.00934, section 3): the programs of `rlhf.ppo`, each compiled once, and the loop."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glm_jax.batch import Prompts, Sequences
from glm_jax.generate import Generation
from glm_jax.metrics import Metrics
from glm_jax.model import CausalLM
from glm_jax.optim import make_optimizer
from glm_jax.sampler import Sampler
from glm_jax.scalar import ScalarModel
from glm_jax.train import Report, TrainState, Update, init_state, make_update, num_tokens, to_host
from rlhf.ppo import (
    ActorRows,
    Experience,
    Models,
    PPOConfig,
    actor_counts,
    actor_loss,
    critic_counts,
    critic_loss,
    make_experience,
    score_answers,
    take_rows,
)
from sharding.layout import Layout
from sharding.processes import fetch


def reference_scores(
    reward: ScalarModel,
    sft_model: CausalLM,
    sample: Sampler,
    prompts: Iterable[Prompts],
    num_prompts: int,
    config: PPOConfig,
    stop_id: int,
    key: jax.Array,
    layout: Layout,
    report: Report,
) -> np.ndarray:
    """r(x, y_ref) by prompt index, float32 [num_prompts]: y_ref is one answer a prompt by the SFT model.

    Drawn before training and exactly as rollouts are (the paper leaves greedy or sampled open), so that the first
    iteration's reward has mean 0.
    """
    score = jax.jit(partial(score_answers, config=config, stop_id=stop_id, layout=layout))
    scores = np.full(num_prompts, np.nan, np.float32)
    for number, batch in enumerate(prompts):
        answers = sample(sft_model, layout.put(batch), jax.random.fold_in(key, number))
        row = np.asarray(batch.row)
        scores[row[row >= 0]] = fetch(score(reward, answers))[row >= 0]
        tokens = int(num_tokens(answers.sequences))
        report(number + 1, {"score": float(np.nanmean(scores))}, tokens)
    return scores


class Learners(NamedTuple):
    """The two models that an iteration changes."""

    actor: TrainState
    critic: TrainState


class Inputs(NamedTuple):
    """What an iteration works on; host arrays."""

    prompts: Prompts
    baseline: np.ndarray  # float32 [B], the score of each prompt's reference answer, or 0
    sft_batches: Iterator[Sequences]  # one is taken an update of the actor


@dataclasses.dataclass(frozen=True)
class Iteration:
    """The programs of one iteration, each compiled once, and what happens between them."""

    config: PPOConfig
    sample: Sampler
    layout: Layout
    experience_of: Callable[[Models, Generation, jax.Array], tuple[Experience, Metrics]]
    update_actor: Update
    update_critic: Update

    def __call__(
        self,
        learners: Learners,
        models: Models,
        inputs: Inputs,
        key: jax.Array,
        actor_learns: bool = True,
    ) -> tuple[Learners, dict[str, float], int]:
        """The learners after an iteration, its metrics, and the tokens of its answers."""
        (actor, critic), layout = learners, self.layout
        sample_key, shuffle_key = jax.random.split(key)
        with self.sample.lend(actor.model) as loan:
            answers = self.sample.draw(loan.policy, layout.put(inputs.prompts), sample_key)
        actor = dataclasses.replace(actor, model=loan.policy)
        current = models._replace(actor=actor.model, critic=critic.model)
        baseline = layout.put(inputs.baseline)
        experience, metrics = self.experience_of(current, answers, baseline)
        losses: list[Metrics] = []
        for index in _minibatches(shuffle_key, self.config):
            critic, critic_metrics = self.update_critic(critic, (experience, index))
            merged = {**critic_metrics, "value_loss": critic_metrics["loss"]}
            if actor_learns:
                sft_batch = layout.put(next(inputs.sft_batches))
                actor, actor_metrics = self.update_actor(actor, (experience, index, sft_batch))
                merged = {**merged, **actor_metrics}
            losses.append(merged)
        means = {name: jnp.mean(jnp.stack([x[name] for x in losses])) for name in losses[0]}
        tokens = int(num_tokens(answers.sequences))
        figures = to_host({**metrics, **means})
        if loan.cost.num_bytes:
            figures |= {"reshard_gb": loan.cost.num_bytes / 1e9, "reshard_s": loan.cost.seconds}
        return Learners(actor, critic), figures, tokens


def make_iteration(
    config: PPOConfig,
    optimizers: tuple[optax.GradientTransformation, optax.GradientTransformation],
    sample: Sampler,
    stop_id: int,
    layout: Layout,
) -> Iteration:
    """An iteration with these optimizers of actor and critic."""

    def actor_rows(batch: tuple[Experience, jax.Array, Sequences]) -> ActorRows:
        experience, index, sft_batch = batch
        return take_rows(experience, index, layout), sft_batch

    def critic_rows(batch: tuple[Experience, jax.Array]) -> Experience:
        rows: Experience = take_rows(*batch, layout)
        return rows

    actor = partial(actor_loss, config=config, layout=layout)
    critic = partial(critic_loss, config=config, layout=layout)
    return Iteration(
        config,
        sample,
        layout,
        jax.jit(partial(make_experience, config=config, stop_id=stop_id, layout=layout)),
        make_update(actor, actor_counts, optimizers[0], layout, actor_rows),
        make_update(critic, critic_counts, optimizers[1], layout, critic_rows),
    )


def train_ppo(
    models: Models,
    config: PPOConfig,
    prompts: Iterator[Prompts],
    sft_batches: Iterator[Sequences],
    baseline: np.ndarray,
    sample: Sampler,
    stop_id: int,
    key: jax.Array,
    layout: Layout,
    report: Report,
) -> tuple[CausalLM, ScalarModel]:
    """Actor and critic after `config.iterations` iterations; `baseline` holds r(x, y_ref) by prompt index (or 0)."""
    config.check(layout, sample.generation)
    updates = config.iterations * config.epochs * config.minibatches
    optimizers = (make_optimizer(config.actor, updates), make_optimizer(config.critic, updates))
    iterate = make_iteration(config, optimizers, sample, stop_id, layout)
    learners = Learners(
        init_state(models.actor, optimizers[0]), init_state(models.critic, optimizers[1])
    )
    for number in range(1, config.iterations + 1):
        batch = next(prompts)
        inputs = Inputs(batch, baseline[np.asarray(batch.row)], sft_batches)
        learns = number > config.critic_warmup
        learners, metrics, tokens = iterate(
            learners, models, inputs, jax.random.fold_in(key, number), learns
        )
        report(number, metrics, tokens)
    return learners.actor.model, learners.critic.model


def _minibatches(key: jax.Array, config: PPOConfig) -> Iterator[np.ndarray]:
    """int32 row numbers of every minibatch of an iteration, reshuffled each epoch."""
    for epoch in range(config.epochs):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), config.batch_size)
        yield from np.split(np.asarray(order, np.int32), config.minibatches)
