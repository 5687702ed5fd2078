"""An iteration of PPO (arXiv 2404.00934, section 3): the programs of `rlhf.ppo`, each compiled once."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

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
    num_tokens,
    require_finite,
    skip_updates,
    to_host,
)
from rlhf.kl import adapted
from rlhf.ppo import (
    ActorRows,
    Experience,
    Finite,
    Models,
    PPOConfig,
    actor_update,
    critic_update,
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
Updates = list[Metrics]  # the metrics of every update of an iteration


class Midway(NamedTuple):
    """An iteration that is rolled out, and some of its updates done."""

    rolled_out: RolledOut
    updates: Updates


class Listener:
    """What hears how far an iteration is; this one does not listen."""

    def midway(self, learners: Learners, midway: Midway) -> None:
        """At this moment `Iteration.finish` could go on."""

    def skip(self, update: int, role: str, model: Any, batch: Any) -> bool:
        """Whether to leave an update out, of which the gradient is not finite: number `update` of the iteration.

        `role` says whose it is: "actor" or "critic". `model` has not learnt from `batch`, which is rows of the
        experience and, for the actor, of SFT data.
        """
        return False


UNHEARD = Listener()


# metrics that both roles have, and their names in those of an iteration where they are the critic's
OF_CRITIC = {"loss": "critic_loss", "grad_norm": "critic_grad_norm"}
_taken = jax.jit(take_rows)


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
        listener: Listener = UNHEARD,
    ) -> tuple[Learners, dict[str, float], int]:
        """The learners after an iteration, its metrics, and the tokens of its answers.

        Raises UserError where a model's output is not a number, or a gradient that `listener` does not leave out;
        nothing was learnt from it then.
        """
        sample_key, _ = jax.random.split(key)
        learners, rolled_out = self.roll_out(learners, models, inputs, sample_key)
        midway = Midway(rolled_out, [])
        listener.midway(learners, midway)
        return self.finish(learners, midway, inputs.sft_batches, key, actor_learns, listener)

    def finish(
        self,
        learners: Learners,
        midway: Midway,
        sft_batches: Iterator[Sequences],
        key: jax.Array,
        actor_learns: bool,
        listener: Listener = UNHEARD,
    ) -> tuple[Learners, dict[str, float], int]:
        """What is left of an iteration, of which `key` is the same. Raises UserError like the whole."""
        _, shuffle_key = jax.random.split(key)
        learners, updates = self.learn(
            learners, midway, sft_batches, shuffle_key, actor_learns, listener
        )
        return self.concluded(learners, midway.rolled_out, updates, actor_learns)

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
        midway: Midway,
        sft_batches: Iterator[Sequences],
        key: jax.Array,
        actor_learns: bool,
        listener: Listener = UNHEARD,
    ) -> tuple[Learners, Updates]:
        """Epochs of minibatch updates, or fewer where the policy has gone far enough; those of `midway` are done.

        The schedules of those that learn move past the updates that are not made.
        """
        rolled_out, done = midway
        updates = list(done)
        for number, index in enumerate(minibatches(key, self.config)):
            if updates and actor_learns and self._far(updates[-1]):
                break
            if number < len(done):
                continue
            sft_batch = self.layout.put(next(sft_batches)) if actor_learns else None
            learners, metrics = self._update(
                learners,
                rolled_out.experience,
                index,
                sft_batch,
                None if listener is UNHEARD else partial(listener.skip, number + 1),
            )
            updates.append(metrics)
            listener.midway(learners, Midway(rolled_out, updates))
        actor, critic, kl_coef = learners
        cut = self.config.epochs * self.config.minibatches - len(updates)
        if actor_learns:
            actor = skip_updates(actor, cut)
        if critic is not None:
            critic = skip_updates(critic, cut)
        return Learners(actor, critic, kl_coef), updates

    def _update(
        self,
        learners: Learners,
        experience: Experience,
        index: np.ndarray,
        sft_batch: Sequences | None,
        skip: Callable[[str, Any, Any], bool] | None,
    ) -> tuple[Learners, Metrics]:
        """An update of the critic and, with SFT data, of the actor; what is left out is counted and has no metrics.

        Without `skip` nobody waits for the devices.
        """
        actor, critic, kl_coef = learners
        by_role: dict[str, Metrics] = {}
        if critic is not None:
            critic, by_role["critic"] = self.update_critic(critic, (experience, index))
        if sft_batch is not None:
            batch = (experience, index, sft_batch)
            actor, by_role["actor"] = self.update_actor(actor, batch)
        learners = Learners(actor, critic, kl_coef)
        left_out = 0
        if skip is not None:
            norms = to_host({role: metrics["grad_norm"] for role, metrics in by_role.items()})
            for role in [role for role, norm in norms.items() if not math.isfinite(norm)]:
                rows = _taken(experience, index)
                seen = rows if role == "critic" else (rows, sft_batch)
                if skip(role, getattr(learners, role).model, seen):
                    del by_role[role]
                    left_out += 1
        found = {OF_CRITIC.get(name, name): x for name, x in by_role.pop("critic", {}).items()}
        found |= by_role.get("actor", {})
        return learners, found | ({"skipped": jnp.float32(left_out)} if left_out else {})

    def _far(self, metrics: Mapping[str, jax.Array]) -> bool:
        limit = self.config.stop_kl
        return limit is not None and float(metrics.get("approx_kl", 0.0)) > limit

    def concluded(
        self, learners: Learners, rolled_out: RolledOut, updates: Updates, actor_learns: bool
    ) -> tuple[Learners, dict[str, float], int]:
        """Return the result of the iteration: figures are means over its updates, the KL coefficient is adapted.

        The coefficient stays where the actor does not learn: it could not answer to it.
        """
        by_name: dict[str, list[jax.Array]] = {}
        for metrics in updates:
            for name, value in metrics.items():
                by_name.setdefault(name, []).append(value)
        skipped = sum(by_name.pop("skipped", []))
        means = {name: jnp.mean(jnp.stack(values)) for name, values in by_name.items()}
        figures = rolled_out.figures | to_host(means)
        # of a NaN the mean is NaN, so that one look is enough
        for where, loss, norm in (
            ("an update", "loss", "grad_norm"),
            ("an update of the critic", *OF_CRITIC.values()),
        ):
            if norm in figures:
                found = {"loss": figures[loss], "grad_norm": figures[norm]}
                require_finite(found, f"ppo: {where}")
        figures |= {"kl_coef": learners.kl_coef, "updates": float(len(updates))}
        if skipped:
            figures["skipped"] = float(skipped)
        if actor_learns:
            coef = adapted(learners.kl_coef, figures["kl"], self.config.kl, self.config.batch_size)
            learners = learners._replace(kl_coef=coef)
        return learners, figures, rolled_out.tokens


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

    return Iteration(
        config,
        sample,
        layout,
        jax.jit(partial(make_experience, config=config, stop_id=stop_id, layout=layout)),
        actor_update(config, optimizers[0], layout, actor_rows),
        critic_update(config, optimizers[1], layout, critic_rows),
        measure,
    )


def minibatches(key: jax.Array, config: PPOConfig) -> Iterator[np.ndarray]:
    """int32 row numbers of every minibatch of an iteration, reshuffled each epoch."""
    for epoch in range(config.epochs):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), config.batch_size)
        yield from np.split(np.asarray(order, np.int32), config.minibatches)
