"""The doctor on demand: two iterations of a recipe's PPO on copies of its models, and nothing is kept of them."""

import dataclasses

import jax
import numpy as np

from glm_jax.batch import Prompts
from glm_jax.model import CausalLM
from glm_jax.scalar import ScalarModel, scalar_model
from glm_jax.train import init_state
from rlhf.data.batches import shuffled
from rlhf.doctor.doctor import Doctor, setting_of
from rlhf.doctor.finding import Finding
from rlhf.ppo import Models
from rlhf.ppo_iteration import Inputs, Learners, make_iteration
from rlhf.ppo_loop import make_optimizers
from rlhf.ppo_run import PPORun
from rlhf.recipe import Recipe, check
from rlhf.reference import draw_references
from rlhf.rollout import prompt_batches
from rlhf.runlog import RunLog
from sharding.processes import together

ITERATIONS = 2


def visit(recipe: Recipe, log: RunLog) -> dict[str, Finding]:
    """What the checks find, by name. Raises UserError for whatever the user can mend.

    The SFT and reward models are those of the run in `output_dir` where it has got to them, else as they would start:
    untrained, of which the doctor does not expect that answers stop.
    """
    layout, generation = check(recipe)
    with jax.set_mesh(layout.mesh()):
        return _Visit(recipe, layout, generation, log).examine()


class _Visit(PPORun):
    """A run that goes straight to its first iterations of PPO."""

    def examine(self) -> dict[str, Finding]:
        """The findings."""
        recipe, layout = self.recipe, self.layout
        # every model learns from the first iteration here
        config = dataclasses.replace(recipe.ppo, critic_warmup=0)
        self.load_data()
        with self.log.stage("model"):
            sft, sft_trained = self.sft_model()
            reward, reward_trained = self.scorer(sft)
        self.samplers = self.make_samplers(sft.trunk.config)
        optimizers = make_optimizers(config)
        iterate = make_iteration(
            config,
            optimizers,
            self.samplers["ppo"],
            self.tokenizer.eos_id,
            layout,
        )
        trained = sft_trained and reward_trained
        stream = self.key("ppo")
        setting = setting_of(config, self.tokenizer, trained, key=stream)
        doctor = Doctor(iterate, setting, strict=False)
        critic = self.new_critic(sft)
        models = Models(actor=sft, critic=critic, reference=sft, reward=reward)
        learners = Learners(
            init_state(sft, optimizers[0]),
            None if critic is None else init_state(critic, optimizers[1]),
            config.kl.coef,
        )
        sft_batches = shuffled(self.data.sft, config.sft_batch_size, recipe.seed + 1)
        prompts = shuffled(self.data.prompts, config.batch_size // config.samples, recipe.seed)
        with self.log.stage("doctor", total=ITERATIONS) as stage:
            for number in range(1, ITERATIONS + 1):
                batch = next(prompts)
                inputs = Inputs(batch, self.baseline(sft, reward, batch), sft_batches)
                key = jax.random.fold_in(stream, number)
                learners, metrics, tokens = doctor(learners, models, inputs, key, number=number)
                stage.step(number, metrics, tokens)
        return doctor.findings

    def sft_model(self) -> tuple[CausalLM, bool]:
        """The SFT model and whether it is trained."""
        path = self.directory / "checkpoints" / "sft"
        if path.exists():
            return self.saved_model("sft"), True
        return together(self.load_model), self.recipe.pretrained is not None

    def scorer(self, sft: CausalLM) -> tuple[ScalarModel, bool]:
        """The reward model and whether it is trained."""
        path = self.directory / "checkpoints" / "reward"
        if self.recipe.reward_model is None and not path.exists():
            return scalar_model(sft.trunk, self.layout, self.key("reward")), False
        if self.recipe.reward_model is None:
            return self.saved_scalar("reward"), True
        return self.reward_model(sft)[0], True

    def baseline(self, sft: CausalLM, reward: ScalarModel, batch: Prompts) -> np.ndarray:
        """The score of a reference answer to every prompt of a batch, or 0."""
        config, count = self.recipe.ppo, len(batch.row)
        if not config.subtracts_reference:
            return np.zeros(count, np.float32)
        rows = Prompts(
            np.asarray(batch.ids), np.asarray(batch.valid), np.arange(count, dtype=np.int32)
        )
        references = draw_references(
            reward,
            sft,
            self.samplers["ppo"],
            prompt_batches(rows, count, 1, self.samplers["ppo"]),
            count,
            1,
            config,
            self.tokenizer.eos_id,
            self.key("reference answers"),
            self.layout,
            lambda *_: None,
        )
        return references.baseline
