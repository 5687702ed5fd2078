"""The loop of PPO around its iterations, and what of it is saved on the way."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glm_jax.batch import Prompts, Sequences
from glm_jax.generate import Generation
from glm_jax.keeper import NOTHING_KEPT, Keeper
from glm_jax.model import CausalLM
from glm_jax.optim import make_optimizer
from glm_jax.sampler import Sampler
from glm_jax.scalar import ScalarModel
from glm_jax.train import Report, init_state, to_host
from rlhf.ppo import Models, PPOConfig
from rlhf.ppo_iteration import (
    UNHEARD,
    Inputs,
    Iteration,
    Learners,
    Listener,
    Measure,
    Midway,
    RolledOut,
    make_iteration,
)
from sharding.layout import Layout

Optimizers = tuple[optax.GradientTransformation, optax.GradientTransformation]


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
    watched: Callable[[Iteration], "Watch"] | None = None,
    measure: Measure | None = None,
    keeper: Keeper = NOTHING_KEPT,
) -> tuple[CausalLM, ScalarModel | None]:
    """Actor and critic after `config.iterations` iterations; `baseline` holds r(x, y_ref) by prompt index (or 0).

    Batches of `prompts` have config.batch_size / config.samples rows. What `watched` makes of the iteration runs those
    that are due in its place. `keeper` hears of every iteration, and within those that are not watched of every update;
    it may leave updates out whose gradient is not finite, which are numbered through all iterations.
    """
    config.check(layout, sample.generation)
    optimizers = make_optimizers(config)
    iterate = make_iteration(config, optimizers, sample, stop_id, layout, measure)
    watch = None if watched is None else watched(iterate)
    saves = _Saves(keeper, iterate, models, optimizers)
    learners, midway = saves.restored()
    for number in range(keeper.count + 1, config.iterations + 1):
        learns = number > config.critic_warmup
        stream = jax.random.fold_in(key, number)
        listener = _Saving(saves, number)
        if midway is not None:
            done = iterate.finish(learners, midway, sft_batches, stream, learns, listener)
            midway = None
        else:
            batch = next(prompts)
            inputs = Inputs(batch, baseline[np.asarray(batch.row)], sft_batches)
            if watch is not None and watch.due(number):
                skipping = _Skipping(saves, number)
                done = watch(learners, models, inputs, stream, learns, skipping, number)
            else:
                done = iterate(learners, models, inputs, stream, learns, listener)
        learners, metrics, tokens = done
        report(number, metrics, tokens)
        saves.keep(number, learners, metrics)
    return learners.actor.model, None if learners.critic is None else learners.critic.model


class Watch(Protocol):
    """Runs iterations under observation."""

    def due(self, number: int) -> bool:
        """Tell whether to observe iteration `number`."""

    def __call__(
        self,
        learners: Learners,
        models: Models,
        inputs: Inputs,
        key: jax.Array,
        actor_learns: bool = True,
        listener: Listener = UNHEARD,
        number: int | None = None,
    ) -> tuple[Learners, dict[str, float], int]:
        """Run iteration `number` as `Iteration` does."""


def make_optimizers(config: PPOConfig) -> Optimizers:
    """The optimizers of actor and critic, whose schedules span the iterations in which each learns."""
    updates = config.epochs * config.minibatches
    actor = make_optimizer(config.actor, (config.iterations - config.critic_warmup) * updates)
    return actor, make_optimizer(config.critic, config.iterations * updates)


class _Skipping(Listener):
    """Says whether to leave updates of iteration `number` out."""

    def __init__(self, saves: "_Saves", number: int) -> None:
        self._saves = saves
        self._number = number

    def skip(self, update: int, role: str, model: Any, batch: Any) -> bool:
        return self._saves.skip(self._number, update, role, model, batch)


class _Saving(_Skipping):
    """The same, and saves the iteration on its way."""

    def midway(self, learners: Learners, midway: Midway) -> None:
        self._saves.keep_midway(self._number, learners, midway)


class _Saves:
    """What of PPO is saved: the learners, and within an iteration its experience and the updates that are done."""

    def __init__(
        self,
        keeper: Keeper,
        iterate: Iteration,
        models: Models,
        optimizers: Optimizers,
    ) -> None:
        self._keeper = keeper
        self._iterate = iterate
        self._models = models
        self._optimizers = optimizers

    def restored(self) -> tuple[Learners, Midway | None]:
        """Where PPO begins, or goes on."""
        facts = self._keeper.facts or {"kl_coef": self._iterate.config.kl.coef, "midway": None}
        found = facts["midway"]
        blank = None if found is None else self._blank(found["columns"])
        arrays = self._keeper.restore(partial(self._begin, blank))
        learners = Learners(arrays["actor"], arrays["critic"], facts["kl_coef"])
        if found is None:
            return learners, None
        updates = [{name: jnp.float32(x) for name, x in u.items()} for u in found["updates"]]
        rolled_out = RolledOut(None, arrays["experience"], found["figures"], found["tokens"])
        return learners, Midway(rolled_out, updates)

    def keep(self, number: int, learners: Learners, metrics: Mapping[str, float]) -> None:
        """After iteration `number`."""
        arrays = {"actor": learners.actor, "critic": learners.critic}
        facts = {"kl_coef": learners.kl_coef, "midway": None}
        self._keeper.keep(arrays, number, facts, metrics=metrics)

    def keep_midway(self, number: int, learners: Learners, midway: Midway) -> None:
        """Within iteration `number`."""
        rolled_out, updates = midway
        experience = rolled_out.experience

        def facts() -> dict[str, Any]:
            found = {
                "columns": experience.counts.shape[1],
                "figures": rolled_out.figures,
                "tokens": rolled_out.tokens,
                "updates": [to_host(metrics) for metrics in updates],
            }
            return {"kl_coef": learners.kl_coef, "midway": found}

        arrays = {"actor": learners.actor, "critic": learners.critic, "experience": experience}
        self._keeper.keep(arrays, number - 1, facts, 1 + len(updates))

    def skip(self, number: int, update: int, role: str, model: Any, batch: Any) -> bool:
        """Whether to leave an update of iteration `number` out."""
        config = self._iterate.config
        before = (number - 1) * config.epochs * config.minibatches
        return self._keeper.skip(before + update, model, batch, role)

    def _begin(self, blank: tuple[Generation, jax.Array] | None) -> dict[str, Any]:
        """The arrays at the beginning; with `blank`, also an experience of such answers and baselines."""
        models, optimizers = self._models, self._optimizers
        critic = None if models.critic is None else init_state(models.critic, optimizers[1])
        arrays: dict[str, Any] = {
            "actor": init_state(models.actor, optimizers[0]),
            "critic": critic,
        }
        if blank is not None:
            arrays["experience"], _, _ = self._iterate.experience_of(
                models, *blank, np.float32(0.0)
            )
        return arrays

    def _blank(self, columns: int) -> tuple[Generation, jax.Array]:
        """Answers and baselines in the shapes of an iteration."""
        layout, count = self._iterate.layout, self._iterate.config.batch_size
        shape = (count, columns)
        empty = np.zeros(shape, bool)
        answers = Generation(
            Sequences(np.zeros(shape, np.int32), empty, empty),
            np.zeros(shape, np.float32),
            np.zeros(count, bool),
        )
        put: tuple[Generation, jax.Array] = layout.put((answers, np.zeros(count, np.float32)))
        return put
