"""Iterations of PPO (arXiv 2404.00934, section 3): the programs of `rlhf.ppo`, each compiled once, and the loop."""

import dataclasses
from collections.abc import Callable, Iterator
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
from glm_jax.train import (
    Report,
    TrainState,
    Update,
    init_state,
    make_update,
    num_tokens,
    require_finite,
    to_host,
)
from rlhf.kl import adapted
from rlhf.ppo import (
    ActorRows,
    Experience,
    Finite,
    Models,
    PPOConfig,
    actor_counts,
    actor_loss,
    critic_counts,
    critic_loss,
    make_experience,
    take_rows,
)
from rlhf.rollout import repeated
from sharding.errors import UserError
from sharding.layout import Layout
from sharding.processes import fetch


class Learners(NamedTuple):
    """What an iteration changes."""

    actor: TrainState
    critic: TrainState | None
    kl_coef: float


class Inputs(NamedTuple):
    """What an iteration works on; host arrays."""

    prompts: Prompts  # B / samples rows
    baseline: np.ndarray  # float32 [B / samples], the score of each prompt's reference answer, or 0
    sft_batches: Iterator[Sequences]  # one is taken an update of the actor


@dataclasses.dataclass(frozen=True)
class Iteration:
    """The programs of one iteration, each compiled once, and what happens between them."""

    config: PPOConfig
    sample: Sampler
    layout: Layout
    experience_of: Callable[
        [Models, Generation, jax.Array, np.float32], tuple[Experience, Metrics, Finite]
    ]
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
        """The learners after an iteration, its metrics, and the tokens of its answers.

        Raises UserError, before any update, where a model's output is not a number.
        """
        config, layout, actor = self.config, self.layout, learners.actor
        sample_key, shuffle_key = jax.random.split(key)
        prompts, baseline = layout.put(repeated((inputs.prompts, inputs.baseline), config.samples))
        with self.sample.lend(actor.model) as loan:
            answers = self.sample.draw(loan.policy, prompts, sample_key)
        actor = dataclasses.replace(actor, model=loan.policy)
        critic = None if learners.critic is None else learners.critic.model
        current = models._replace(actor=actor.model, critic=critic)
        coef = np.float32(learners.kl_coef)
        experience, metrics, finite = self.experience_of(current, answers, baseline, coef)
        require_numbers(fetch(finite))
        learners = learners._replace(actor=actor)
        learners, means = self._learn(learners, experience, inputs, shuffle_key, actor_learns)
        figures = {**to_host(metrics), **means, "kl_coef": learners.kl_coef}
        if loan.cost.num_bytes:
            figures |= {"reshard_gb": loan.cost.num_bytes / 1e9, "reshard_s": loan.cost.seconds}
        next_coef = adapted(learners.kl_coef, figures["kl"], config.kl, config.batch_size)
        tokens = int(num_tokens(answers.sequences))
        return learners._replace(kl_coef=next_coef), figures, tokens

    def _learn(
        self,
        learners: Learners,
        experience: Experience,
        inputs: Inputs,
        key: jax.Array,
        actor_learns: bool,
    ) -> tuple[Learners, dict[str, float]]:
        """Epochs of minibatch updates, or fewer where the policy has gone far enough; means over the updates."""
        actor, critic, kl_coef = learners
        done: list[dict[str, jax.Array]] = []
        for index in _minibatches(key, self.config):
            metrics: dict[str, jax.Array] = {}
            if critic is not None:
                critic, metrics = self.update_critic(critic, (experience, index))
                metrics = {**metrics, "critic_grad_norm": metrics["grad_norm"]}
            if actor_learns:
                sft_batch = self.layout.put(next(inputs.sft_batches))
                actor, actor_metrics = self.update_actor(actor, (experience, index, sft_batch))
                metrics = {**metrics, **actor_metrics}
            done.append(metrics)
            limit = self.config.stop_kl
            if actor_learns and limit is not None and float(metrics["approx_kl"]) > limit:
                break
        # of a NaN the mean is NaN, so that one look is enough
        means = to_host({name: jnp.mean(jnp.stack([x[name] for x in done])) for name in done[0]})
        require_finite(
            means, "ppo: an update of the actor" if actor_learns else "ppo: of the critic"
        )
        if critic is not None:
            critic_means = {"loss": means["value_loss"], "grad_norm": means["critic_grad_norm"]}
            require_finite(critic_means, "ppo: an update of the critic")
        return Learners(actor, critic, kl_coef), {**means, "updates": float(len(done))}


SOURCES = {
    "score": "the reward model scores",
    "actor": "the policy's log-probabilities of",
    "reference": "the reference model's log-probabilities of",
    "critic": "the critic's values of",
}


def require_numbers(finite: Finite) -> None:
    """Raise UserError that names the model and the first answer where something is NaN or infinite; host arrays."""
    for name, rows in finite._asdict().items():
        if not rows.all():
            bad = np.flatnonzero(~rows)
            raise UserError(
                f"ppo: {SOURCES[name]} {len(bad)} of {len(rows)} answers are not numbers (first: row {bad[0]} of the "
                f"batch); nothing was learnt from this iteration. Look for NaN or infinity in that model's weights"
            )


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
        return take_rows(experience, index), sft_batch

    def critic_rows(batch: tuple[Experience, jax.Array]) -> Experience:
        rows: Experience = take_rows(*batch)
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
) -> tuple[CausalLM, ScalarModel | None]:
    """Actor and critic after `config.iterations` iterations; `baseline` holds r(x, y_ref) by prompt index (or 0).

    Batches of `prompts` have config.batch_size / config.samples rows.
    """
    config.check(layout, sample.generation)
    updates = config.iterations * config.epochs * config.minibatches
    optimizers = (make_optimizer(config.actor, updates), make_optimizer(config.critic, updates))
    iterate = make_iteration(config, optimizers, sample, stop_id, layout)
    critic = None if models.critic is None else init_state(models.critic, optimizers[1])
    learners = Learners(init_state(models.actor, optimizers[0]), critic, config.kl.coef)
    for number in range(1, config.iterations + 1):
        batch = next(prompts)
        inputs = Inputs(batch, baseline[np.asarray(batch.row)], sft_batches)
        learns = number > config.critic_warmup
        learners, metrics, tokens = iterate(
            learners, models, inputs, jax.random.fold_in(key, number), learns
        )
        report(number, metrics, tokens)
    return learners.actor.model, None if learners.critic is None else learners.critic.model


def _minibatches(key: jax.Array, config: PPOConfig) -> Iterator[np.ndarray]:
    """int32 row numbers of every minibatch of an iteration, reshuffled each epoch."""
    for epoch in range(config.epochs):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), config.batch_size)
        yield from np.split(np.asarray(order, np.int32), config.minibatches)
