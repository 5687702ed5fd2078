"""An iteration of PPO (arXiv 2404.00934, section 3): the programs of `rlhf.ppo`, each compiled once."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glm_jax.batch import Prompts, Sequences
from glm_jax.generate import Generation
from glm_jax.metrics import Metrics
from glm_jax.sampler import Sampler
from glm_jax.train import (
    TrainState,
    Update,
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


class RolledOut(NamedTuple):
    """Answers of the policy as it is, and what is to be learnt from them."""

    answers: Generation | None  # None where the iteration was interrupted after them
    experience: Experience
    figures: dict[str, float]  # of the answers, and what it cost to move the policy
    tokens: int  # of the answers


Measure = Callable[[np.ndarray, Generation], Mapping[str, float]]  # (rows of the prompts, answers)
Updates = list[dict[str, jax.Array]]  # the metrics of every update of an iteration


class Midway(NamedTuple):
    """An iteration that is rolled out, and some of its updates done."""

    rolled_out: RolledOut
    updates: Updates


Told = Callable[[Learners, Midway], None]


def unheard(*_: object) -> None:
    """Tell nobody."""


Step = Callable[[Learners, Models, Inputs, jax.Array, bool], tuple[Learners, dict[str, float], int]]


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
    measure: Measure | None = None

    def __call__(
        self,
        learners: Learners,
        models: Models,
        inputs: Inputs,
        key: jax.Array,
        actor_learns: bool = True,
        told: Told = unheard,
    ) -> tuple[Learners, dict[str, float], int]:
        """The learners after an iteration, its metrics, and the tokens of its answers.

        `told` hears of every moment at which `finish` could go on. Raises UserError where a model's output or a
        gradient is not a number; nothing was learnt from it then.
        """
        sample_key, _ = jax.random.split(key)
        learners, rolled_out = self.roll_out(learners, models, inputs, sample_key)
        midway = Midway(rolled_out, [])
        told(learners, midway)
        return self.finish(learners, midway, inputs.sft_batches, key, actor_learns, told)

    def finish(
        self,
        learners: Learners,
        midway: Midway,
        sft_batches: Iterator[Sequences],
        key: jax.Array,
        actor_learns: bool,
        told: Told = unheard,
    ) -> tuple[Learners, dict[str, float], int]:
        """What is left of an iteration, of which `key` is the same. Raises UserError like the whole."""
        _, shuffle_key = jax.random.split(key)
        rolled_out, done = midway
        learners, updates = self.learn(
            learners,
            rolled_out.experience,
            sft_batches,
            shuffle_key,
            actor_learns,
            done,
            lambda learners, updates: told(learners, Midway(rolled_out, updates)),
        )
        return self.concluded(learners, rolled_out, updates)

    def roll_out(
        self, learners: Learners, models: Models, inputs: Inputs, key: jax.Array
    ) -> tuple[Learners, RolledOut]:
        """Sample and score; the learners are the same ones, of which the actor was moved. Raises UserError on NaN."""
        actor, samples, put = learners.actor, self.config.samples, self.layout.put
        prompts, baseline = put(inputs.prompts), put(repeated(inputs.baseline, samples))
        with self.sample.lend(actor.model) as loan:
            answers = self.sample.draw(loan.policy, prompts, key, samples)
        actor = dataclasses.replace(actor, model=loan.policy)
        learners = learners._replace(actor=actor)
        experience, metrics, finite = self.experience_of(
            current_models(models, learners), answers, baseline, np.float32(learners.kl_coef)
        )
        require_numbers(fetch(finite))
        figures = to_host(metrics)
        if self.measure is not None:
            rows = repeated(np.asarray(inputs.prompts.row), samples)
            figures |= self.measure(rows, answers)
        if (moved := loan.cost).num_bytes:
            figures |= {"reshard_gb": moved.num_bytes / 1e9, "reshard_s": moved.seconds}
        tokens = int(num_tokens(answers.sequences))
        return learners, RolledOut(answers, experience, figures, tokens)

    def learn(
        self,
        learners: Learners,
        experience: Experience,
        sft_batches: Iterator[Sequences],
        key: jax.Array,
        actor_learns: bool,
        done: Sequence[dict[str, jax.Array]] = (),
        told: Callable[[Learners, Updates], None] = unheard,
    ) -> tuple[Learners, Updates]:
        """Epochs of minibatch updates, or fewer where the policy has gone far enough; `done` were made already.

        `told` hears of every update.
        """
        actor, critic, kl_coef = learners
        updates = list(done)
        for number, index in enumerate(minibatches(key, self.config)):
            if updates and actor_learns and self._far(updates[-1]):
                break
            if number < len(done):
                continue
            metrics: dict[str, jax.Array] = {}
            if critic is not None:
                critic, metrics = self.update_critic(critic, (experience, index))
                metrics = {**metrics, "critic_grad_norm": metrics["grad_norm"]}
            if actor_learns:
                sft_batch = self.layout.put(next(sft_batches))
                actor, actor_metrics = self.update_actor(actor, (experience, index, sft_batch))
                metrics = {**metrics, **actor_metrics}
            updates.append(metrics)
            told(Learners(actor, critic, kl_coef), updates)
        return Learners(actor, critic, kl_coef), updates

    def _far(self, metrics: Mapping[str, jax.Array]) -> bool:
        limit = self.config.stop_kl
        return limit is not None and float(metrics["approx_kl"]) > limit

    def concluded(
        self, learners: Learners, rolled_out: RolledOut, updates: Updates
    ) -> tuple[Learners, dict[str, float], int]:
        """What the iteration returns: figures are means over its updates, the KL coefficient is adapted."""
        means = {name: jnp.mean(jnp.stack([x[name] for x in updates])) for name in updates[0]}
        figures = rolled_out.figures | to_host(means)
        # of a NaN the mean is NaN, so that one look is enough
        require_finite(figures, "ppo: an update")
        if learners.critic is not None:
            of_critic = {"loss": figures["value_loss"], "grad_norm": figures["critic_grad_norm"]}
            require_finite(of_critic, "ppo: an update of the critic")
        figures |= {"kl_coef": learners.kl_coef, "updates": float(len(updates))}
        coef = adapted(learners.kl_coef, figures["kl"], self.config.kl, self.config.batch_size)
        return learners._replace(kl_coef=coef), figures, rolled_out.tokens


def current_models(models: Models, learners: Learners) -> Models:
    """The models with the learners as they are."""
    critic = None if learners.critic is None else learners.critic.model
    return models._replace(actor=learners.actor.model, critic=critic)


SOURCES = {
    "score": "the reward model scores",
    "reward": "the scores less their baselines of",
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
                f"batch); nothing was learnt from this iteration. Look for NaN or infinity in the model's weights"
            )


def make_iteration(
    config: PPOConfig,
    optimizers: tuple[optax.GradientTransformation, optax.GradientTransformation],
    sample: Sampler,
    stop_id: int,
    layout: Layout,
    measure: Measure | None = None,
) -> Iteration:
    """An iteration with these optimizers of actor and critic; what `measure` says of its answers is in its metrics."""

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
        measure,
    )


def minibatches(key: jax.Array, config: PPOConfig) -> Iterator[np.ndarray]:
    """int32 row numbers of every minibatch of an iteration, reshuffled each epoch."""
    for epoch in range(config.epochs):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), config.batch_size)
        yield from np.split(np.asarray(order, np.int32), config.minibatches)
