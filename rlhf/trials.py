"""Every job in small: a few updates of a tiny model, the same numbers under every layout.

Weights and data come from NumPy by name, so that nothing of what is compared depends on the layout. Sizes are odd on
purpose: layers, vocabulary and kv groups divide over few meshes; rows are ragged and padded on either side.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding

from glm_jax.batch import Judged, Pairs, Prompts, Sequences
from glm_jax.config import Config, GLMV1Config
from glm_jax.generate import SamplingConfig
from glm_jax.model import CausalLM, init_model
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.sampler import Sampler
from glm_jax.scalar import ScalarModel
from glm_jax.train import TrainState, Update, init_state
from glm_jax.weights import kept_layout, named_weights, restack
from rlhf.dpo import DPOConfig, LabelledPairs, dpo_update
from rlhf.kl import KLConfig
from rlhf.ppo import Models, PPOConfig
from rlhf.ppo_loop import Inputs, Iteration, Learners, make_iteration
from rlhf.reward import RewardConfig, reward_update
from rlhf.sft import sft_update
from sharding.layout import Layout

VOCAB, LENGTH, PROMPT, ANSWER = 61, 12, 6, 6
STOP_IDS = (2, 7)
# AdamW's usual eps makes whole steps of gradients that are 0 but for rounding
OPTIM = OptimConfig(learning_rate=5e-3, warmup_fraction=0.0, eps=1e-3)


def tiny(config: Config) -> Config:
    """A model of this architecture with few and odd sizes; rotary base, norms and biases stay."""
    if isinstance(config, GLMV1Config):
        return GLMV1Config(
            vocab_size=VOCAB,
            hidden_size=64,
            num_layers=5,
            num_heads=8,
            ffn_size=64,
            max_length=64,
            mask_id=VOCAB - 3,
            gmask_id=VOCAB - 2,
            sop_id=VOCAB - 1,
        )
    return dataclasses.replace(
        config,
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=5,
        num_heads=8,
        num_kv_groups=2,
        head_dim=8,
        ffn_size=64,
        max_length=64,
    )


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

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Remembered]:
        updates, inner = optimizer.update(grads, state.inner, params)
        return updates, Remembered(inner, grads)

    return optax.GradientTransformation(init, update)


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def _value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights whose activations are about 1 in every layer; norms and biases that are not 1 and 0."""
    noise = _rng(name).normal(size=shape).astype(np.float32)
    last = name.rsplit(".", 1)[-1]
    if last.startswith("w_") or last == "embedding":
        return 0.2 * noise
    return 0.1 * noise + np.float32("norm" in last and "bias" not in last)


def place_model(config: Config, layout: Layout) -> CausalLM:
    """A model whose weights depend on their names and shapes alone."""
    kept = kept_layout(layout, config)
    mesh = jax.sharding.get_mesh()
    shapes = jax.eval_shape(partial(init_model, config, kept), jax.random.key(0))
    host = [
        jax.device_put(_value(name, x.shape), NamedSharding(mesh, x.sharding.spec))
        for name, x in named_weights(shapes).items()
    ]
    model: CausalLM = jax.tree.unflatten(jax.tree.structure(shapes), host)
    return jax.jit(partial(restack, source=kept, target=layout))(model)


def place_scorer(config: Config, layout: Layout) -> ScalarModel:
    """A scalar head on the same trunk."""
    head = _value("w_scalar", (config.hidden_size,))
    spec = NamedSharding(jax.sharding.get_mesh(), layout.spec("norm"))
    return ScalarModel(trunk=place_model(config, layout).trunk, w_scalar=jax.device_put(head, spec))


def sequences(config: Config, name: str, rows: int) -> Sequences:
    """Ragged rows, padded right and left in turn, so that a mean of means is not the mean."""
    rng = _rng(name)
    ids = rng.integers(3, VOCAB - 3, (rows, LENGTH)).astype(np.int32)
    lengths = rng.integers(4, LENGTH + 1, rows)[:, None]
    column = np.arange(LENGTH)
    left = np.arange(rows)[:, None] % 2 == 1
    start = np.where(left, LENGTH - lengths, 0)
    valid = (column >= start) & (column < start + lengths)
    if isinstance(config, GLMV1Config):
        ids = np.where(column == start + 1, config.gmask_id, ids)
        ids = np.where(column == start + 2, config.sop_id, ids)
    ids = np.where(valid, ids, 0).astype(np.int32)
    return Sequences(ids, valid, valid & (column >= start + 3))


def prompts(config: Config, name: str, rows: int) -> Prompts:
    """Left-padded prompts of 2 tokens and more."""
    rng = _rng(name)
    ids = rng.integers(3, VOCAB - 3, (rows, PROMPT)).astype(np.int32)
    valid = np.arange(PROMPT) >= rng.integers(0, PROMPT - 2, rows)[:, None]
    if isinstance(config, GLMV1Config):
        ids[:, -2:] = config.gmask_id, config.sop_id
    return Prompts(np.where(valid, ids, 0), valid, np.arange(rows, dtype=np.int32))


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


def _optimizer(steps: int) -> optax.GradientTransformation:
    return remembering(make_optimizer(OPTIM, steps))


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
        Judged(
            _pairs(config, i, rows), _rng(f"weight {i}").uniform(0.2, 1, rows).astype(np.float32)
        )
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
                _rng(f"reference {i}").normal(size=(rows, 2)).astype(np.float32),
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
    optimizers = (_optimizer(2 * steps), _optimizer(2 * steps))
    sample = Sampler(config, settings.sampling, STOP_IDS, layout)
    plain = make_iteration(settings, optimizers, sample, STOP_IDS[0], layout)
    has_critic = settings.advantage == "gae"
    names = ("experience_of", "update_actor", *(("update_critic",) if has_critic else ()))
    programs = {name: Watched(getattr(plain, name)) for name in names}
    iterate: Iteration = dataclasses.replace(plain, **programs)  # type: ignore[arg-type]
    num_prompts = 2 * rows // settings.samples

    def run() -> Iterator[Seen]:
        policy, scorer = place_model(config, layout), place_scorer(config, layout)
        critic = scorer if has_critic else None
        models = Models(actor=policy, critic=critic, reference=policy, reward=scorer)
        learners = Learners(
            init_state(policy, optimizers[0]),
            None if critic is None else init_state(critic, optimizers[1]),
            settings.kl.coef,
        )
        baseline = np.linspace(-0.1, 0.1, num_prompts, dtype=np.float32)
        for step in range(steps):
            sft = iter([sequences(config, f"sft {2 * step + i}", rows) for i in range(2)])
            inputs = Inputs(prompts(config, f"prompts {step}", num_prompts), baseline, sft)
            learners, metrics, _ = iterate(learners, models, inputs, jax.random.key(step))
            losses: dict[str, float] = {"loss": metrics["loss"]}
            if has_critic:
                losses["value_loss"] = metrics["value_loss"]
            seen = {"actor": _seen(learners.actor)}
            if learners.critic is not None:
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
