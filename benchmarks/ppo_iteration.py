"""Seconds of one PPO iteration of the demo's size on this machine's CPU, against PPO of google-tunix.

    python3.12 -m venv /tmp/tunix && /tmp/tunix/bin/pip install google-tunix==0.1.7
    python benchmarks/ppo_iteration.py --tunix-python /tmp/tunix/bin/python

Shape, batch and lengths are those of configs/demo.py: 64 prompts of 14 tokens, 42 tokens sampled for each, scores of a
reward model, log-probabilities of policy and reference, values, advantages, then one epoch of clipped AdamW on actor
and critic in two halves of 32. float32 on one CPU device, all cores for any side, random weights. No answer stops
early: the stop token lies outside the vocabulary. Each side lives in a process and an interpreter of its own, they
take turns iteration by iteration, and nothing may compile in a turn that counts. All keep the memory that they have
freed, as `glm-jax run` does on a CPU. Prints medians and ranges of a side's seconds, of its seconds on all cores
together, which other programs change less, and of its seconds / ours over the turns.

We take the path of `glm-jax run`: a `Sampler` and the `Iteration` that `make_iteration` gives, with an SFT batch of one
row, which the update computes though its weight is 0.

tunix runs its PPOLearner on an RLCluster with its own ("vanilla") rollout, and what is fastest of its settings: its
Qwen2, which is the demo's ChatGLM3 but for rotating whole heads (its Llama3 does not take what its PPO passes), with a
scalar head for critic and reward model; a cache of 56 columns, no sorting for top-p, nothing in smaller pieces than an
update needs; no checkpoints, profiler, logging backend or progress bar. What it computes for its metrics has no switch.
The newest JAX that it installs with serves it better than ours (add jax==0.10.2 flax==0.12.8 to see). Its PPO samples
anew for every update, so that it has two ways to spend 64 prompts on two halves, and both run:

    whole   samples 64 answers and takes one step along the gradient of both halves: one update fewer than we do
    halves  samples 32 answers and takes a step, twice: as many updates as we do
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from sides import ROOT, answer, requests, spread, started, this_side

WARMUP = 4  # turns that compile and fill caches
TURNS = 15
COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Work:
    """One iteration, the same on every side."""

    batch_size: int
    minibatches: int
    prompt_length: int
    new_tokens: int
    learning_rates: tuple[float, float]  # of actor and critic
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_groups: int
    head_dim: int
    ffn_size: int

    @property
    def length(self) -> int:
        return self.prompt_length + self.new_tokens

    def prompts(self) -> np.ndarray:
        """int32 [B, P], without padding."""
        shape = (self.batch_size, self.prompt_length)
        return np.random.default_rng(0).integers(3, self.vocab_size, shape).astype(np.int32)


@dataclasses.dataclass
class Tally:
    """What a side has done so far."""

    answer_tokens: int = 0
    actor_updates: int = 0
    critic_updates: int = 0
    compilations: int = 0


def turns(tally: Tally, package: str) -> Iterator[None]:
    """A turn for every request but the first, which is told what runs here; of a turn its seconds and what it did."""
    import jax

    def count(event: str, seconds: float, **labels: Any) -> None:
        tally.compilations += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(count)
    asked = requests()
    next(asked)
    versions = (f"{name} {version(name)}" for name in (package, "jax", "flax"))
    answer(f"{', '.join(versions)}, Python {platform.python_version()}")
    for _ in asked:
        before, begin, cores = dataclasses.asdict(tally), time.perf_counter(), time.process_time()
        yield
        seconds, cores = time.perf_counter() - begin, time.process_time() - cores
        now = dataclasses.asdict(tally)
        answer((seconds, cores, {name: now[name] - before[name] for name in now}))


def demo() -> Any:
    import runpy

    return runpy.run_path(str(ROOT / "configs" / "demo.py"))["config"]


def run_ours(work: Work) -> None:
    """Iterations by the path that `glm-jax run` takes."""
    from functools import partial

    import jax

    from glm_jax.batch import Prompts, Sequences
    from glm_jax.model import init_model
    from glm_jax.sampler import Sampler
    from glm_jax.scalar import init_scalar
    from glm_jax.train import init_state
    from rlhf.ppo import Models
    from rlhf.ppo_iteration import Inputs, Learners, make_iteration
    from rlhf.ppo_loop import make_optimizers
    from sharding.layout import Layout

    recipe, layout, tally = demo(), Layout(), Tally()
    config = dataclasses.replace(recipe.ppo, sft_weight=0.0, sft_batch_size=1)
    everywhere = np.ones((work.batch_size, work.prompt_length), bool)
    prompts = Prompts(work.prompts(), everywhere, np.arange(work.batch_size, dtype=np.int32))
    row = np.ones((1, work.length), bool)
    sft_batches = iter(lambda: Sequences(row.astype(np.int32), row, row), None)
    inputs = Inputs(prompts, np.zeros(work.batch_size, np.float32), sft_batches)
    with jax.set_mesh(layout.mesh()):
        language_model = jax.jit(partial(init_model, recipe.model, layout))
        scalar = jax.jit(partial(init_scalar, recipe.model, layout))
        keys = jax.random.split(jax.random.key(0), 3)
        sft = language_model(keys[0])
        models = Models(actor=sft, critic=scalar(keys[1]), reference=sft, reward=scalar(keys[2]))
        actor, critic = make_optimizers(config)
        sample = Sampler(recipe.model, config.sampling, (work.vocab_size,), layout)
        iterate = make_iteration(config, (actor, critic), sample, stop_id=2, layout=layout)
        assert models.critic is not None
        learners = Learners(
            init_state(models.actor, actor), init_state(models.critic, critic), config.kl.coef
        )
        for number, _ in enumerate(turns(tally, "glm-jax")):
            key = jax.random.key(number)
            learners, _, tokens = iterate(learners, models, inputs, key)
            jax.block_until_ready(learners)
            tally.answer_tokens += tokens - prompts.ids.size
            tally.actor_updates = int(learners.actor.step)
            tally.critic_updates = int(learners.critic.step)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A tokenizer of numbers with spaces between them; its end and its padding are no tokens of the model."""

    vocab_size: int
    tally: Tally  # counts what is decoded

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        self.tally.answer_tokens += len(ids)
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # to tunix: none

    def eos_id(self) -> int:
        return self.vocab_size

    def pad_id(self) -> int:
        return self.vocab_size + 1


def tunix_model(work: Work, seed: int) -> Any:
    """A Qwen2 of the demo's shape with random weights."""
    import jax
    from flax import nnx
    from tunix.models.qwen2.model import ModelConfig, Qwen2

    config = ModelConfig(
        num_layers=work.num_layers,
        vocab_size=work.vocab_size,
        embed_dim=work.hidden_size,
        hidden_dim=work.ffn_size,
        num_heads=work.num_heads,
        head_dim=work.head_dim,
        num_kv_heads=work.num_kv_groups,
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    model = Qwen2(config, rngs=nnx.Rngs(seed))
    weights, treedef = jax.tree.flatten(nnx.state(model, nnx.Param))
    keys = jax.random.split(jax.random.key(seed), len(weights))
    drawn = [  # its MLPs are born 0
        w if w.ndim == 1 else 0.02 * jax.random.normal(key, w.shape)
        for w, key in zip(weights, keys, strict=True)
    ]
    nnx.update(model, jax.tree.unflatten(treedef, drawn))
    return model


def tunix_cluster(work: Work, rows: int, tally: Tally) -> Any:
    """The models and programs of tunix; it samples `rows` answers for every update."""
    import jax
    import optax
    from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
    from tunix.rl.rollout.base_rollout import RolloutConfig
    from tunix.rl.utils import create_critic_model

    def optimizer(learning_rate: float) -> optax.GradientTransformation:
        adamw = optax.adamw(learning_rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0)
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)

    minibatch = work.batch_size // work.minibatches
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1), ("fsdp", "tp"))
    training = RLTrainingConfig(
        actor_optimizer=optimizer(work.learning_rates[0]),
        critic_optimizer=optimizer(work.learning_rates[1]),
        mini_batch_size=rows,
        train_micro_batch_size=minibatch if rows > minibatch else None,
        rollout_micro_batch_size=rows,
        compute_logps_micro_batch_size=rows,
        eval_every_n_steps=1_000_000,
        max_steps=1_000_000,
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=work.new_tokens,
        max_prompt_length=work.prompt_length,
        kv_cache_size=work.length,
        temperature=1.0,
        top_p=1.0,
    )
    return RLCluster(
        actor=tunix_model(work, 0),
        critic=create_critic_model(tunix_model(work, 1)),
        reference=tunix_model(work, 0),
        reward=create_critic_model(tunix_model(work, 2)),
        tokenizer=Numbers(work.vocab_size, tally),
        cluster_config=ClusterConfig(
            role_to_mesh=dict.fromkeys(Role, mesh), training_config=training, rollout_config=rollout
        ),
    )


def run_tunix(work: Work, rows: int) -> None:
    """Iterations of tunix's learner, which asks for the next batch when it has done with the last one."""
    import jax
    from flax import nnx
    from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner

    tally = Tally()
    cluster = tunix_cluster(work, rows, tally)
    learner = PPOLearner(
        cluster, PPOConfig(beta=0.03, kl_method="kl")
    )  # at 0 no reference is asked
    texts = np.array([" ".join(map(str, ids)) for ids in work.prompts()])

    def batches() -> Iterator[dict[str, np.ndarray]]:
        actor, critic = cluster.actor_trainer, cluster.critic_trainer
        for _ in turns(tally, "google-tunix"):
            yield {"prompts": texts}
            learned = (actor.model, actor.optimizer, critic.model, critic.optimizer)
            jax.block_until_ready([nnx.state(x) for x in learned])
            tally.actor_updates, tally.critic_updates = actor.train_steps, critic.train_steps

    # its progress bars ask whether stderr is a terminal
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        learner.train(batches())


SIDES: dict[str, Callable[[Work], None]] = {
    "glm-jax": run_ours,
    "tunix whole": lambda work: run_tunix(work, work.batch_size),
    "tunix halves": lambda work: run_tunix(work, work.batch_size // work.minibatches),
}


def gflop(work: Work, ours: bool) -> float:
    """1e9 operations of an iteration's matrix products; a backward pass counts as two forward ones."""
    width, heads = work.hidden_size, work.num_heads * work.head_dim
    attention = width * (2 * heads + 2 * work.num_kv_groups * work.head_dim)
    weights = work.num_layers * (attention + 3 * width * work.ffn_size)

    def trunk(tokens: int, keys: int) -> int:
        return tokens * (2 * weights + work.num_layers * 4 * heads * keys)

    def head(tokens: int) -> int:
        return tokens * 2 * width * work.vocab_size

    rows, length = work.batch_size, work.length
    prompts, answers, all_tokens = (rows * n for n in (work.prompt_length, work.new_tokens, length))
    values = trunk(all_tokens, length)
    logits = values + head(all_tokens)
    decode = trunk(answers, length) + head(answers)
    common = decode + 2 * logits + values + 3 * (logits + values)
    if not ours:  # a prompt attends to all of the cache and has logits at every token
        return (trunk(prompts, length) + head(prompts) + values + common) / 1e9
    prefill = trunk(prompts, work.prompt_length) + head(rows)
    scores = trunk(rows * (length + 1), length + 1)  # with a stop token appended
    sft = 3 * work.minibatches * (trunk(length, length) + head(length))
    return (prefill + scores + sft + common) / 1e9


def product_speed(size: int = 2048) -> float:
    """GFLOP/s of a large matrix product: what no program of matrix products here goes beyond."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        jax.block_until_ready(product(x, x))
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds) / 1e9


def work_of(recipe: Any) -> Work:
    ppo, model = recipe.ppo, dataclasses.asdict(recipe.model)
    assert ppo.epochs == 1
    return Work(
        batch_size=ppo.batch_size,
        minibatches=ppo.minibatches,
        prompt_length=recipe.prompt_length,
        new_tokens=ppo.sampling.max_new_tokens,
        learning_rates=(ppo.actor.learning_rate, ppo.critic.learning_rate),
        **{
            field.name: model[field.name]
            for field in dataclasses.fields(Work)
            if field.name in model
        },
    )


def main() -> None:
    """Start the sides and let them take turns."""
    if side := this_side():
        return SIDES[side[0]](Work(**json.loads(side[1])))
    parser = argparse.ArgumentParser()
    parser.add_argument("--tunix-python", required=True, help="an interpreter with google-tunix")
    python = {name: parser.parse_args().tunix_python for name in SIDES} | {
        "glm-jax": sys.executable
    }
    os.environ["JAX_PLATFORMS"] = "cpu"
    print(f"a large product runs at {product_speed():.0f} GFLOP/s")
    work = work_of(demo())
    print(f"{work}, {os.cpu_count()} cores, {TURNS} turns after {WARMUP} to warm up")
    shape = json.dumps(dataclasses.asdict(work))
    sides = {name: started(name, shape, python=python[name]) for name in SIDES}
    runs = {name: ask(None) for name, ask in sides.items()}
    rounds = [{name: ask(None) for name, ask in sides.items()} for _ in range(WARMUP + TURNS)]
    times: dict[str, list[Sequence[float]]] = {}  # seconds of turns, and on all cores
    for name in SIDES:
        *times[name], done = zip(*(turn[name] for turn in rounds[WARMUP:]), strict=True)
        assert all(turn == done[0] for turn in done), f"{name}: not every turn did the same"
        assert done[0]["compilations"] == 0, f"{name} compiles in every turn"
        assert done[0]["answer_tokens"] == work.batch_size * work.new_tokens, f"{name}: {done[0]}"
        print(f"{name}: {runs[name]}, {gflop(work, name == 'glm-jax'):.1f} GFLOP a turn, {done[0]}")
    for name, (seconds, cores) in times.items():
        ratios = [b / a for a, b in zip(times["glm-jax"][0], seconds, strict=True)]
        print(
            f"{name:12}  {spread(seconds)} s, {spread(cores)} s on all cores, {spread(ratios)} x ours"
        )


if __name__ == "__main__":
    main()
