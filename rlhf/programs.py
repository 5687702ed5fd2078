"""The programs of every job, with the shapes of their arguments: what `glm-jax bench` runs and what plans are made of.

They are the functions that training itself calls, and nothing is allocated: the devices of the current mesh may be
described ones (`jax.experimental.topologies`) that nobody has.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from glm_jax.batch import Judged
from glm_jax.config import Config, check_context
from glm_jax.flops import forward_flops, training_flops
from glm_jax.generate import Generation
from glm_jax.model import CausalLM, init_model
from glm_jax.optim import make_optimizer
from glm_jax.sampler import Sampler
from glm_jax.scalar import init_scalar
from rlhf import shapes
from rlhf.dpo import DPOConfig, LabelledPairs, dpo_update
from rlhf.ppo import Models, PPOConfig
from rlhf.ppo_iteration import Iteration, make_iteration
from rlhf.reward import RewardConfig, reward_update
from rlhf.sft import SFTConfig, sft_update
from sharding.errors import UserError
from sharding.layout import Layout

JOBS = ("sft", "reward", "dpo", "ppo")
Optimizer: TypeAlias = optax.GradientTransformation
STOP_ID = 2  # what ends an answer for the reward model


@dataclasses.dataclass(frozen=True)
class Workload:
    """How much of what a step works on."""

    batch: int  # of an update: sequences of SFT, pairs of reward model and DPO; of an iteration of PPO: answers
    prompt_length: int
    response_length: int  # PPO draws as many tokens for every prompt: the longest iteration
    # SFT sequences mixed into an update of DPO or PPO; None: one for every pair or answer of it
    sft_batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "prompt_length", "response_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: give a positive number")

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.prompt_length + self.response_length

    def sft_rows(self, rows: int) -> int:
        """SFT sequences that an update on `rows` others has mixed in."""
        return rows if self.sft_batch is None else self.sft_batch


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a job."""

    name: str
    function: Any  # jitted, the one that training calls
    args: tuple[Any, ...]  # pytrees of jax.ShapeDtypeStruct, laid out as training lays them out
    mesh: Mesh  # that is set while it runs, of training or of generation
    runs: int  # in a step, which of PPO is an iteration
    tokens: int  # that one run works on; where it draws tokens, those; 0 where it moves weights
    flops: int  # of one run, those the model asks for (`glm_jax.flops`), all devices together
    takes: tuple[str, ...]  # roles among its arguments
    resident: tuple[str, ...]  # roles in memory while it runs

    def lower(self) -> jax.stages.Lowered:
        """The program for the devices of its mesh."""
        with jax.set_mesh(self.mesh):
            lowered: jax.stages.Lowered = self.function.lower(*self.args)
        return lowered

    @property
    def beside(self) -> tuple[str, ...]:
        """Roles in memory that are no arguments, hence not in what the compiler says of the program's memory."""
        return tuple(role for role in self.resident if role not in self.takes)


def programs(
    job: str,
    config: Config,
    layout: Layout,
    workload: Workload,
    generation: Layout | None = None,
    ppo: PPOConfig = PPOConfig(),
) -> tuple[Program, ...]:
    """The programs of a step of `job`, in order, on the current mesh, which is one of `layout`.

    `generation` is the layout in which PPO samples (default: `layout` without its pipeline); of `ppo` the batch and the
    length of answers are those of the workload. Raises UserError where job, layout, model and workload do not fit.
    """
    check(job, config, layout, workload, generation, ppo)
    roles = _roles(job, config, layout, ppo)
    if job == "ppo":
        return _ppo(config, workload, iteration(config, layout, workload, generation, ppo), roles)
    make = {"sft": _sft, "reward": _reward, "dpo": _dpo}[job]
    return (make(config, layout, workload, roles),)


def residents(
    job: str, config: Config, layout: Layout, ppo: PPOConfig = PPOConfig()
) -> Mapping[str, int]:
    """Role -> bytes on every device of what stays in memory from one program to the next.

    "start" is the model that training begins from: a copy of it learns, and who called for that still holds it.
    """
    roles = _roles(job, config, layout, ppo)
    return {role: shapes.num_bytes(tree) for role, tree in roles.items()}


def step_tokens(job: str, workload: Workload) -> int:
    """Tokens of a step, padding included: all that an update reads; of an iteration of PPO its prompts and answers."""
    rows = {"sft": 1, "reward": 2, "dpo": 2, "ppo": 1}[job] * workload.batch
    return (rows + (workload.sft_rows(workload.batch) if job == "dpo" else 0)) * workload.length


def check(
    job: str,
    config: Config,
    layout: Layout,
    workload: Workload,
    generation: Layout | None = None,
    ppo: PPOConfig = PPOConfig(),
) -> None:
    """Raise UserError where these do not fit each other, as `programs` does."""
    if job not in JOBS:
        raise UserError(f"unknown job {job!r}: choose some of {', '.join(JOBS)}")
    config.check(layout)
    if job == "ppo":  # of whose batch an update gets a part
        _settings(workload, ppo).check(layout, (generation or layout).for_generation())
    else:
        layout.check_batch(workload.batch, "batch")
    if job in ("dpo", "ppo") and workload.sft_batch is not None:
        layout.check_batch(workload.sft_batch, "sft_batch")
    appended = 1 if job == "ppo" else 0  # the stop token, at which the reward model reads its score
    check_context(config, "prompt_length + response_length", workload.length + appended)


def iteration(
    config: Config,
    layout: Layout,
    workload: Workload,
    generation: Layout | None = None,
    ppo: PPOConfig = PPOConfig(),
) -> Iteration:
    """The iteration of PPO that `programs` lists; no answer of it ends before `workload.response_length` tokens."""
    settings = _settings(workload, ppo)
    no_token = (config.vocab_size,)
    sample = Sampler(config, settings.sampling, no_token, layout, generation)
    return make_iteration(settings, ppo_optimizers(settings), sample, STOP_ID, layout)


def _settings(workload: Workload, ppo: PPOConfig) -> PPOConfig:
    sampling = dataclasses.replace(ppo.sampling, max_new_tokens=workload.response_length)
    return dataclasses.replace(ppo, batch_size=workload.batch, sampling=sampling)


def ppo_optimizers(ppo: PPOConfig) -> tuple[Optimizer, Optimizer]:
    """Those of actor and critic."""
    updates = ppo.iterations * ppo.epochs * ppo.minibatches
    return make_optimizer(ppo.actor, updates), make_optimizer(ppo.critic, updates)


def optimizer_of(settings: SFTConfig | RewardConfig | DPOConfig) -> Optimizer:
    """That of a job that is nothing but updates."""
    return make_optimizer(settings.optim, settings.steps)


def _roles(job: str, config: Config, layout: Layout, ppo: PPOConfig) -> shapes.Roles:
    """What lies in memory between the programs of a job; that which learns comes first."""
    policy, scorer = shapes.policy(config, layout), shapes.scorer(config, layout)
    learner = partial(shapes.learner, config=config, layout=layout)
    if job == "reward":
        optimizer = optimizer_of(RewardConfig())
        return {**learner("reward model", init_scalar, optimizer=optimizer), "start": scorer}
    if job in ("sft", "dpo"):
        optimizer = optimizer_of(SFTConfig() if job == "sft" else DPOConfig())
        return {**learner("policy", init_model, optimizer=optimizer), "start": policy}
    actor, critic = ppo_optimizers(ppo)
    learners = dict(learner("policy", init_model, optimizer=actor))
    if ppo.advantage == "gae":
        learners |= learner("critic", init_scalar, optimizer=critic)
    return {**learners, "reference": policy, "reward model": scorer}


def _sft(config: Config, layout: Layout, workload: Workload, roles: shapes.Roles) -> Program:
    rows, length = workload.batch, workload.length
    update = sft_update(optimizer_of(SFTConfig()), layout)
    batch = shapes.sequences(rows, length, layout)
    flops = training_flops(config, rows, length, length)
    return _update(roles, update, batch, rows * length, flops)


def _reward(config: Config, layout: Layout, workload: Workload, roles: shapes.Roles) -> Program:
    rows, length, settings = workload.batch, workload.length, RewardConfig()
    update = reward_update(settings, optimizer_of(settings), layout)
    weight = shapes.split((rows,), jnp.float32, layout)
    batch = Judged(shapes.pairs(rows, length, layout), weight)
    flops = training_flops(config, 2 * rows, length, 0)
    return _update(roles, update, batch, 2 * rows * length, flops)


def _dpo(config: Config, layout: Layout, workload: Workload, roles: shapes.Roles) -> Program:
    rows, length, settings = workload.batch, workload.length, DPOConfig()
    update = dpo_update(settings, optimizer_of(settings), layout)
    ref_logp = shapes.split((rows, 2), jnp.float32, layout)
    labelled = LabelledPairs(shapes.pairs(rows, length, layout), ref_logp)
    sft_rows = workload.sft_rows(rows)
    batch = (labelled, shapes.sequences(sft_rows, length, layout))
    flops = training_flops(config, 2 * rows + sft_rows, length, length)
    return _update(roles, update, batch, (2 * rows + sft_rows) * length, flops)


def _update(roles: shapes.Roles, update: Any, batch: Any, tokens: int, flops: int) -> Program:
    """The one program of a job that is nothing but updates."""
    learner = next(iter(roles))
    return Program(
        name="update",
        function=update,
        args=(shapes.state(roles, learner), batch),
        mesh=jax.sharding.get_mesh(),
        runs=1,
        tokens=tokens,
        flops=flops,
        takes=(learner, f"{learner} optimizer"),
        resident=tuple(roles),
    )


def _ppo(
    config: Config, workload: Workload, iterate: Iteration, roles: shapes.Roles
) -> tuple[Program, ...]:
    """The programs of `Iteration` in the order in which it calls them."""
    drawn, answers = _rollout(config, workload, iterate, roles)
    rows, length, layout = workload.batch, workload.length, iterate.layout
    whole = partial(Program, mesh=jax.sharding.get_mesh(), resident=tuple(roles))
    has_critic = "critic" in roles
    models = Models(roles["policy"], roles.get("critic"), roles["reference"], roles["reward model"])
    baseline, kl_coef = shapes.split((rows,), jnp.float32, layout), shapes.whole((), jnp.float32)
    scored = (models, answers, baseline, kl_coef)
    experience, _, _ = jax.eval_shape(iterate.experience_of, *scored)
    scalar = forward_flops(config, rows, length + 1, 0)  # of the reward model, with the stop token
    if has_critic:
        scalar += forward_flops(config, rows, length, 0)
    found = [
        whole(
            name="experience",
            function=iterate.experience_of,
            args=scored,
            runs=1,
            tokens=rows * length,
            flops=2 * forward_flops(config, rows, length, length) + scalar,
            takes=tuple(role for role in roles if not role.endswith("optimizer")),
        )
    ]
    learning = rows // iterate.config.minibatches
    sft_rows = workload.sft_rows(learning)
    of_rows = (shapes.placed(experience), shapes.whole((learning,), jnp.int32))
    runs = iterate.config.epochs * iterate.config.minibatches
    if has_critic:
        found.append(
            whole(
                name="critic update",
                function=iterate.update_critic,
                args=(shapes.state(roles, "critic"), of_rows),
                runs=runs,
                tokens=learning * length,
                flops=training_flops(config, learning, length, 0),
                takes=("critic", "critic optimizer"),
            )
        )
    with_sft = (*of_rows, shapes.sequences(sft_rows, length, layout))
    found.append(
        whole(
            name="actor update",
            function=iterate.update_actor,
            args=(shapes.state(roles, "policy"), with_sft),
            runs=runs,
            tokens=(learning + sft_rows) * length,
            flops=training_flops(config, learning + sft_rows, length, length),
            takes=("policy", "policy optimizer"),
        )
    )
    return (*drawn, *found)


def _rollout(
    config: Config, workload: Workload, iterate: Iteration, roles: shapes.Roles
) -> tuple[list[Program], Generation]:
    """The programs of `glm_jax.sampler` that an iteration calls, and its answers where training has them."""
    sample, layout, count = iterate.sample, iterate.layout, iterate.config.samples
    rows, length, room = workload.batch, workload.length, workload.response_length
    policy: CausalLM = roles["policy"]
    moves, stays = sample.to_generation is not None, sample.to_training is None
    lent = shapes.lent_policy(config, sample.generation, sample.mesh) if moves else policy
    there = (sample.generation, sample.mesh)
    asked = (
        lent,
        shapes.prompts(rows // count, workload.prompt_length, *there),
        shapes.split((rows // count, count), jnp.int32, *there),
        shapes.key(sample.mesh),
    )
    with jax.set_mesh(sample.mesh):
        drawn = jax.eval_shape(sample.generate, *asked)
    answers = jax.tree.map(lambda x: shapes.split(x.shape, x.dtype, layout), drawn)
    program = partial(Program, runs=1, resident=tuple(roles))
    move = partial(program, tokens=0, flops=0, takes=("policy",))
    draw = program(
        name="generate",
        function=sample.generate,
        args=asked,
        mesh=sample.mesh,
        tokens=rows * room,
        flops=forward_flops(config, rows, length, room),
        takes=() if moves and stays else ("policy",),  # of a copy the policy itself lies beside
    )
    if not moves:
        return [draw], answers
    home = jax.sharding.get_mesh()
    found = [move("to generation", sample.to_generation, (policy,), home), draw]
    if not stays:
        found.append(move("to training", sample.to_training, (lent,), sample.mesh))
    return found, answers
