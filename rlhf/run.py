"""The run of a recipe, from data to the exported policy."""

import shutil
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from glm_jax.convert import export_hf
from glm_jax.model import CausalLM
from glm_jax.scalar import ScalarModel
from rlhf.data.batches import in_order, shuffled
from rlhf.dpo import PAIRS, LabelledPairs, sample_pairs, train_dpo
from rlhf.evaluate import Answers, answer, heldout_nll, win_tie_lose
from rlhf.ppo_run import PPORun
from rlhf.progress import NOT_KEPT, Progress
from rlhf.recipe import Recipe, check, remarks
from rlhf.rollout import prompt_batches
from rlhf.runlog import RunLog
from rlhf.sft import train_sft
from rlhf.stage_keeper import Training
from sharding.disk.arrays import read_arrays, write_arrays
from sharding.disk.directory import write_json
from sharding.processes import on_first, together


def run(recipe: Recipe, log: RunLog, progress: Progress = NOT_KEPT) -> dict[str, Any]:
    """Run a recipe, or what `progress` says is left of it; returns what it writes to `summary.json`.

    Raises UserError for whatever the user can mend, and Stopped where the run was asked to stop.
    """
    layout, generation = check(recipe)
    with jax.set_mesh(layout.mesh()):
        return Run(recipe, layout, generation, log, progress).run()


class Run(PPORun):
    """The stages of one run, in order; each leaves its checkpoint behind before the next begins."""

    def run(self) -> dict[str, Any]:
        """All stages; what `summary.json` says."""
        for line in remarks(self.recipe):
            self.log.note(line)
        log, _ = self.log, self.judge  # a judge that is missing is missed now, not after hours
        self.load_data()
        sft = self.train_sft()
        self.samplers = self.make_samplers(sft.trunk.config)
        reward, reward_summary = self.reward_model(sft)
        ppo, ppo_summary = self.train_ppo(sft, reward)
        trained = {"sft": sft, "ppo": ppo}
        if self.recipe.dpo.steps:
            trained["dpo"] = self.train_dpo(sft, reward)
        if self.progress.done("export") is None:
            with log.stage("export"):
                on_first(self.export)
            self.progress.finish("export")
        policies, samples = self.evaluate(trained)
        policies["ppo"] |= ppo_summary
        summary = {
            **self.facts(sft),
            "reward_model": reward_summary,
            **policies,
            "wall_s": log.wall_s,
            "tokens_per_s": log.tokens_per_s,
        }
        on_first(lambda: write_json(self.directory / "samples.json", samples))
        on_first(lambda: write_json(self.directory / "summary.json", summary))
        self.progress.finish("evaluate")
        return summary

    def export(self) -> None:
        """The PPO policy as a Hugging Face directory."""
        directory = self.directory / "hf"
        if (
            directory.exists()
        ):  # of a run that was killed before it could note that it had got so far
            shutil.rmtree(directory)
        export_hf(self.checkpoint("ppo"), directory, None, "keep", None, self.log.note)

    def train_sft(self) -> CausalLM:
        """Supervised fine-tuning of the model that the run starts from."""
        if self.progress.done("sft") is not None:
            return self.saved_model("sft")
        with self.log.stage("model"):
            model = together(self.load_model)
        config = self.recipe.sft
        batches = shuffled(self.data.sft, config.batch_size, self.recipe.seed)
        training = Training("sft", {"batches": batches}, self.recipe.saving.every)
        with self.train(training, config.steps) as (stage, keeper):
            model = train_sft(model, config, batches, self.layout, stage.step, keeper)
            self.save("sft", model)
        self.progress.finish("sft")
        return model

    def train_dpo(self, sft: CausalLM, reward: ScalarModel) -> CausalLM:
        """DPO from the SFT model, on its own answers labelled by the reward model."""
        if self.progress.done("dpo") is not None:
            return self.saved_model("dpo")
        config, seed = self.recipe.dpo, self.recipe.seed
        pairs = self.dpo_pairs(sft, reward)
        iterators = {
            "pairs": shuffled(pairs, config.batch_size, seed),
            "sft": shuffled(self.data.sft, config.sft_batch_size, seed + 2),
        }
        training = Training("dpo", iterators, self.recipe.saving.every)
        with self.train(training, config.steps) as (stage, keeper):
            model = train_dpo(
                sft, config, iterators["pairs"], iterators["sft"], self.layout, stage.step, keeper
            )
            self.save("dpo", model)
        self.progress.finish("dpo")
        return model

    def dpo_pairs(self, sft: CausalLM, reward: ScalarModel) -> LabelledPairs:
        """Answers of the SFT model, labelled by the reward model; kept until DPO is done."""
        path = self.directory / "dpo_pairs.npz"
        if self.progress.done("dpo pairs") is not None:
            return together(partial(read_arrays, path, PAIRS))
        config, layout = self.recipe.dpo, self.layout
        prompts = jax.tree.map(lambda x: x[: config.prompts], self.data.prompts)
        sample = self.samplers["dpo"]
        batches = prompt_batches(prompts, self.recipe.ppo.batch_size, config.samples, sample)
        with self.log.stage("dpo pairs", total=len(batches)) as stage:
            pairs = sample_pairs(
                sft,
                reward,
                config,
                batches,
                sample,
                self.tokenizer.eos_id,
                self.key("dpo"),
                layout,
                self.pausing("dpo pairs", stage.step),
            )
        on_first(partial(write_arrays, path, pairs))
        self.progress.finish("dpo pairs")
        return pairs

    def evaluate(
        self, policies: Mapping[str, CausalLM]
    ) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
        """Figures of each policy, and three samples side by side."""
        config, data = self.recipe.evaluate, self.data
        sampled: dict[str, Answers] = {}
        figures: dict[str, dict[str, Any]] = {}
        with self.log.stage("evaluate", total=len(policies)) as stage:
            for name, model in policies.items():
                greedy = self.answers(model, "greedy")
                sampled[name] = self.answers(model, "ppo")
                nll = heldout_nll(model, in_order(data.heldout_sft, config.batch_size), self.layout)
                figures[name] = {
                    "heldout_nll": nll,
                    **sampled[name].summary,
                    "greedy": greedy.summary,
                }
                if name == "sft":
                    greedy_sft = greedy
                else:
                    compare = partial(win_tie_lose, margin=config.tie_margin)
                    figures[name] |= compare(sampled[name].judged, sampled["sft"].judged)
                    figures[name]["greedy"] |= compare(greedy.judged, greedy_sft.judged)
                told = {"heldout_nll": nll, **sampled[name].summary}
                self.pausing("evaluate", stage.step)(stage.num_steps + 1, told, 0)
        samples = []
        for row, prompt in enumerate(data.heldout_texts[: config.num_samples]):
            sample: dict[str, Any] = {"prompt": prompt}
            for name, answers in sampled.items():
                sample |= {name: answers.texts[row], f"{name}_judged": answers.judged[row]}
            samples.append(sample)
        return figures, samples

    def answers(self, model: CausalLM, purpose: str) -> Answers:
        """Judged answers to the held-out prompts; every policy draws from the same random stream."""
        config, data = self.recipe.evaluate, self.data
        return answer(
            model,
            in_order(data.heldout_prompts, config.batch_size),
            data.heldout_texts,
            self.samplers[purpose],
            self.judge,
            self.tokenizer,
            self.key("evaluate"),
            self.layout,
        )
