"""A step of every job as training makes it, by programs that are compiled already, on weights and tokens made up."""

import dataclasses
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.batch import Judged, Pairs, Prompts, Sequences
from glm_jax.config import Config, GLMV1Config
from glm_jax.train import init_state, train
from rlhf import shapes
from rlhf.bench.case import Case
from rlhf.dpo import DPOConfig, LabelledPairs
from rlhf.ppo import Models
from rlhf.ppo_iteration import Inputs, Learners
from rlhf.programs import iteration, optimizer_of, ppo_optimizers
from rlhf.reward import RewardConfig
from rlhf.sft import SFTConfig
from sharding.errors import UserError

Step = Callable[[], None]
Tree = TypeVar("Tree")


class Clocks:
    """The compiled programs as functions, whose runs are timed once `running`: each is then waited for."""

    def __init__(self, compiled: Mapping[str, jax.stages.Compiled]) -> None:
        self.running = False
        self._compiled = compiled
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def __contains__(self, name: str) -> bool:
        return name in self._compiled

    def __getitem__(self, name: str) -> Any:
        return partial(self._run, name)

    def median(self, name: str) -> float | None:
        """Seconds of a run; None where there was none."""
        return statistics.median(self._seconds[name]) if self._seconds[name] else None

    def _run(self, name: str, *args: Any) -> Any:
        if not self.running:
            return self._compiled[name](*args)
        jax.block_until_ready(args)
        begin = time.perf_counter()
        found = jax.block_until_ready(self._compiled[name](*args))
        self._seconds[name].append(time.perf_counter() - begin)
        return found


def step_of(case: Case, clocks: Clocks) -> Step:
    """What makes a step of the case whenever it is called."""
    return iterations(case, clocks) if case.job == "ppo" else Updates(case, clocks)


SETTINGS: Mapping[str, SFTConfig | RewardConfig | DPOConfig] = {
    "sft": SFTConfig(),
    "reward": RewardConfig(),
    "dpo": DPOConfig(),
}


class Updates:
    """Updates as `glm_jax.train.train` does them."""

    def __init__(self, case: Case, clocks: Clocks) -> None:
        config, (self._layout, _) = case.model.config, case.layouts
        settings = SETTINGS[case.job]
        shape = shapes.scorer if case.job == "reward" else shapes.policy
        self._start = filled(shape(config, self._layout))  # held, as who begins a training does
        self._state = init_state(self._start, optimizer_of(settings))
        self._update = clocks["update"]
        self._batches = (_batch(case, np.random.default_rng(n)) for n in itertools.count())
        self._count = 0

    def __call__(self) -> None:
        """One more."""
        self._count += 1
        layout, batches = self._layout, self._batches
        self._state = train(self._state, self._update, batches, self._count, layout, _unheard)


def _unheard(step: int, metrics: Mapping[str, float], tokens: int) -> None:
    """A report that nobody reads."""


def iterations(case: Case, clocks: Clocks) -> Step:
    """An iteration of PPO as `rlhf.ppo_loop` does it."""
    config, (layout, generation) = case.model.config, case.layouts
    iterate = iteration(config, layout, case.workload, generation)
    sample: Any = iterate.sample
    for name in ("to generation", "generate", "to training"):
        if name in clocks:
            setattr(sample, name.replace(" ", "_"), clocks[name])
    iterate = dataclasses.replace(
        iterate,
        experience_of=clocks["experience"],
        update_critic=clocks["critic update"],
        update_actor=clocks["actor update"],
    )
    policy, scorer = filled(shapes.policy(config, layout)), filled(shapes.scorer(config, layout))
    actor, critic = ppo_optimizers(iterate.config)
    learners = Learners(init_state(policy, actor), init_state(scorer, critic), 0.1)
    models = Models(actor=policy, critic=None, reference=policy, reward=scorer)
    learning = case.workload.batch // iterate.config.minibatches
    sft_rows = case.workload.sft_rows(learning)
    numbers = itertools.count()

    def step() -> None:
        nonlocal learners
        rng = np.random.default_rng(number := next(numbers))
        sft = (_sequences(case, sft_rows, rng) for _ in itertools.count())
        prompts = _prompts(case, case.workload.batch // iterate.config.samples, rng)
        inputs = Inputs(prompts, np.zeros(len(prompts.row), np.float32), sft)
        learners, _, _ = iterate(learners, models, inputs, jax.random.key(number))

    return step


def filled(model: Tree) -> Tree:
    """Arrays of a model's shapes, where it lies: waves of 0.02, scales of norms 1. Compiled sooner than it is drawn."""

    def wave(path: tuple[jax.tree_util.KeyEntry, ...], x: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "norm" in name and not name.endswith("bias"):
            return jnp.ones(x.shape, x.dtype, out_sharding=x.sharding.spec)
        places = (
            jax.lax.broadcasted_iota(x.dtype, x.shape, axis, out_sharding=x.sharding.spec)
            for axis in range(len(x.shape))
        )
        return 0.02 * jnp.sin(sum(number**2 * place for number, place in enumerate(places, 1)))

    found: Tree = jax.jit(lambda: jax.tree_util.tree_map_with_path(wave, model))()
    return found


def _batch(case: Case, rng: np.random.Generator) -> Any:
    """What an update is given, on the host."""
    rows = case.workload.batch
    if case.job == "sft":
        return _sequences(case, rows, rng)
    pairs = Pairs(_sequences(case, rows, rng), _sequences(case, rows, rng))
    if case.job == "reward":
        return Judged(pairs, np.ones(rows, np.float32))
    labelled = LabelledPairs(pairs, np.zeros((rows, 2), np.float32))
    return labelled, _sequences(case, case.workload.sft_rows(rows), rng)


def _sequences(case: Case, rows: int, rng: np.random.Generator) -> Sequences:
    """Random tokens without padding."""
    work = case.workload
    shape = (rows, work.length)
    ids = _tokens(case.model.config, shape, work.prompt_length, rng)
    answer = np.broadcast_to(np.arange(work.length) >= work.prompt_length, shape)
    return Sequences(ids, np.ones(shape, bool), answer)


def _prompts(case: Case, rows: int, rng: np.random.Generator) -> Prompts:
    shape = (rows, case.workload.prompt_length)
    ids = _tokens(case.model.config, shape, shape[1], rng)
    return Prompts(ids, np.ones(shape, bool), np.arange(rows, dtype=np.int32))


def _tokens(
    config: Config, shape: tuple[int, int], prompt_length: int, rng: np.random.Generator
) -> np.ndarray:
    """int32 ids; ChatGLM-6B reads off them where the prompt ends."""
    ids = rng.integers(3, config.vocab_size - 5, shape).astype(np.int32)
    if isinstance(config, GLMV1Config):
        if prompt_length < 2:
            raise UserError("prompt_length = 1: a prompt of ChatGLM-6B has two tokens of its own")
        ids[:, prompt_length - 2 : prompt_length] = config.gmask_id, config.sop_id
    return ids
