"""Where benchmarks/oracle.py makes its experiments: the models of one seed, and what is trained from them."""

import copy
import dataclasses
import json
import random
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.batch import Array, Prompts, Sequences
from glm_jax.metrics import Shares
from glm_jax.model import CausalLM
from glm_jax.optim import make_optimizer
from glm_jax.scalar import ScalarModel, scalar_model, sequence_scores
from glm_jax.train import init_state, make_update, train
from rlhf.data.batches import in_order, sft_rows, shuffled
from rlhf.data.oracle.oracle import OracleData, gold_reward, task_of
from rlhf.data.records import Example, prompt_text
from rlhf.dpo import sample_pairs, train_dpo
from rlhf.evaluate import heldout_nll
from rlhf.ppo import Models, score_answers
from rlhf.ppo_iteration import Inputs, Learners, make_iteration
from rlhf.recipe import Recipe
from rlhf.reference import draw_references
from rlhf.reward import RewardConfig
from rlhf.rollout import prompt_batches
from rlhf.run import Run
from rlhf.runlog import RunLog
from sharding.layout import Layout
from sharding.processes import fetch

History = list[dict[str, float]]


class Graded(NamedTuple):
    """Answers and the grade of each."""

    sequences: Sequences
    grade: Array  # float32 [B]


class Lab(Run):
    """The models of one seed, and PPO of any settings from them."""

    sft: CausalLM
    proxy: ScalarModel

    def make_models(self) -> None:
        """SFT and reward model, as the recipe has them."""
        self.load_data()
        self.sft = self.train_sft()
        self.samplers = self.make_samplers(self.sft.trunk.config)
        self.proxy, _ = self.reward_model(self.sft)

    def with_proxy(self, name: str, reward: RewardConfig) -> "Lab":
        """The same lab with another reward model."""
        lab = copy.copy(self)
        lab.directory = self.directory / name
        lab.recipe = dataclasses.replace(self.recipe, reward=reward, output_dir=lab.directory)
        lab.proxy, _ = lab.reward_model(self.sft)
        return lab

    def with_grades(self, name: str, offsets: Mapping[str, float]) -> "Lab":
        """The same lab with a reward model of absolute grades, task -> what its annotators add to all of theirs.

        The answers are those that SFT imitates; the grades have the data's liking for length and its noise.
        """
        config, data, layout = self.recipe.reward, self.recipe.data, self.layout
        assert isinstance(data, OracleData)
        records = [x for x in self.prepare("sft").sft.train if self.fits(x)]
        rng = random.Random(self.recipe.seed)
        grades = []
        for record in records:
            text = prompt_text(record.prompt)
            told = gold_reward(text + record.response) + offsets[task_of(text)]
            bias = data.length_bias * len(record.response.split())
            grades.append(told + bias + rng.gauss(0.0, data.noise))
        rows = sft_rows(records, self.tokenizer, self.recipe.length)

        def loss(
            model: ScalarModel, batch: Graded, count: int, layout: Layout
        ) -> tuple[jax.Array, Shares]:
            error = sequence_scores(model, batch.sequences, layout) - batch.grade
            return jnp.sum(error**2) / count, {}

        optimizer = make_optimizer(config.optim, config.steps)
        update = make_update(
            partial(loss, layout=layout), lambda batch: len(batch.grade), optimizer, layout
        )
        start = init_state(scalar_model(self.sft.trunk, layout, self.key("graded")), optimizer)
        graded = Graded(rows, np.array(grades, np.float32))
        batches = shuffled(graded, config.batch_size, self.recipe.seed)
        lab = copy.copy(self)
        lab.directory = self.directory / name
        lab.recipe = dataclasses.replace(self.recipe, output_dir=lab.directory)
        lab.proxy = train(start, update, batches, config.steps, layout, silent).model
        return lab

    def fits(self, record: Example) -> bool:
        """Whether prompt and answer are no longer than `length` tokens."""
        said = [*record.prompt, {"role": "assistant", "content": record.response}]
        return len(self.tokenizer.chat_example(said)[0]) <= self.recipe.length

    def ppo(self, name: str, **changes: Any) -> tuple[CausalLM, History]:
        """A policy and the metrics of every iteration; `changes` are of `Recipe` fields."""
        before = self.recipe, self.log, self.directory
        self.directory = before[2] / name
        self.directory.mkdir(parents=True)
        self.recipe = dataclasses.replace(before[0], output_dir=self.directory, **changes)
        with RunLog(self.directory) as self.log:
            policy, _ = self.train_ppo(self.sft, self.proxy)
        lines = map(json.loads, (self.directory / "metrics.jsonl").read_text().splitlines())
        self.recipe, self.log, self.directory = before
        return policy, [line for line in lines if line["stage"] == "ppo"]

    def nll(self, policy: CausalLM) -> float:
        """Held-out NLL, nats/token."""
        return heldout_nll(policy, in_order(self.data.heldout_sft, 32), self.layout)

    def seen(self, policy: CausalLM) -> dict[str, float]:
        """Proxy, gold and KL of a policy's answers to two batches of training prompts, as PPO's metrics have them."""
        config = self.recipe.ppo
        optimizers = (make_optimizer(config.actor, 1), make_optimizer(config.critic, 1))
        iterate = make_iteration(
            config,
            optimizers,
            self.samplers["ppo"],
            self.tokenizer.eos_id,
            self.layout,
            self.measure(),
        )
        critic = self.new_critic(self.sft)
        assert critic is not None
        models = Models(policy, critic, self.sft, self.proxy)
        learners = Learners(
            init_state(policy, optimizers[0]), init_state(critic, optimizers[1]), config.kl.coef
        )
        found = []
        for number, batch in enumerate(self.batches(2)):
            inputs = Inputs(batch, np.zeros(len(batch.row), np.float32), iter(()))
            learners, rolled_out = iterate.roll_out(
                learners, models, inputs, jax.random.fold_in(self.key("seen"), number)
            )
            found.append(rolled_out.figures)
        return {name: statistics.fmean(x[name] for x in found) for name in found[0]}

    def batches(self, count: int) -> list[Prompts]:
        """The first batches of the training prompts."""
        every = in_order(self.data.prompts, self.recipe.ppo.batch_size)
        return [next(every) for _ in range(count)]

    def two_scores(self) -> np.ndarray:
        """The proxy's scores of two answers of the SFT model to every training prompt, [prompts, 2]."""
        config, prompts, sample = self.recipe.ppo, self.data.prompts, self.samplers["ppo"]
        return draw_references(
            self.proxy,
            self.sft,
            sample,
            prompt_batches(prompts, config.batch_size, 2, sample),
            len(prompts.row),
            2,
            config,
            self.tokenizer.eos_id,
            self.key("two scores"),
            self.layout,
            silent,
        ).scores

    def answers(self, samples: int) -> tuple[np.ndarray, np.ndarray]:
        """Proxy and gold [prompts, samples] of the SFT model's answers to a batch of prompts."""
        (batch,) = self.batches(1)
        config, put = self.recipe.ppo, self.layout.put
        score = jax.jit(
            partial(score_answers, config=config, stop_id=self.tokenizer.eos_id, layout=self.layout)
        )
        texts = [self.data.texts[row] for row in np.asarray(batch.row)]
        proxy, gold = [], []
        for number in range(samples):
            key = jax.random.fold_in(self.key("answers"), number)
            drawn = self.samplers["ppo"](self.sft, put(batch), key)
            proxy.append(fetch(score(self.proxy, drawn)))
            ids, _, target = fetch(drawn.sequences)
            said = [self.tokenizer.decode_answer(i[t]) for i, t in zip(ids, target, strict=True)]
            gold.append(
                [gold_reward(text + answer) for text, answer in zip(texts, said, strict=True)]
            )
        return np.stack(proxy, axis=1), np.array(gold).T

    def dpo(self, betas: Sequence[float]) -> list[CausalLM]:
        """A policy for each beta, from the same pairs."""
        config, layout, sample = self.recipe.dpo, self.layout, self.samplers["dpo"]
        prompts = jax.tree.map(lambda x: x[: config.prompts], self.data.prompts)
        pairs = sample_pairs(
            self.sft,
            self.proxy,
            config,
            prompt_batches(prompts, self.recipe.ppo.batch_size, config.samples, sample),
            sample,
            self.tokenizer.eos_id,
            self.key("dpo"),
            layout,
            silent,
        )
        return [
            train_dpo(
                self.sft,
                dataclasses.replace(config, beta=beta),
                shuffled(pairs, config.batch_size, self.recipe.seed),
                shuffled(self.data.sft, config.sft_batch_size, self.recipe.seed + 2),
                layout,
                silent,
            )
            for beta in betas
        ]


def silent(*_: Any) -> None:
    """Report nothing."""


def new_lab(recipe: Recipe, layout: Layout, generation: Layout) -> Lab:
    """A lab with its models."""
    recipe.output_dir.mkdir(parents=True)
    lab = Lab(recipe, layout, generation, RunLog(None))
    lab.make_models()
    return lab
