"""The run of a recipe, from data to the exported policy."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from glm_jax.batch import Prompts, Sequences
from glm_jax.config import Config
from glm_jax.convert import export_hf
from glm_jax.model import CausalLM
from glm_jax.sampler import Sampler
from glm_jax.scalar import ScalarModel, scalar_model
from glm_jax.tokenizers import Tokenizer
from rlhf.base_run import BaseRun
from rlhf.card.page import write_card
from rlhf.data.batches import in_order, prompt_rows, sft_rows, shuffled
from rlhf.data.records import Splits, prompt_text
from rlhf.dpo import sample_pairs, train_dpo
from rlhf.evaluate import Answers, answer, heldout_nll, load_judge, win_tie_lose
from rlhf.ppo import Models
from rlhf.ppo_loop import reference_scores, train_ppo
from rlhf.recipe import Recipe, check
from rlhf.reward_stage import JudgedData, judged_data, reward_stage, summary_of
from rlhf.runlog import RunLog
from rlhf.sft import train_sft
from sharding.disk.directory import write_json
from sharding.layout import Layout
from sharding.processes import on_first, together


@dataclasses.dataclass(frozen=True)
class Data:
    """The six splits as token arrays on the host, and the texts of the held-out prompts."""

    sft: Sequences
    heldout_sft: Sequences
    judged: JudgedData
    prompts: Prompts
    heldout_prompts: Prompts
    heldout_texts: list[str]


def run(recipe: Recipe, log: RunLog) -> dict[str, Any]:
    """Run a recipe; returns what it writes to `summary.json`. Raises UserError for whatever the user can mend."""
    layout, generation = check(recipe)
    with jax.set_mesh(layout.mesh()):
        return _Run(recipe, layout, generation, log).run()


class _Run(BaseRun):
    """The stages of one run, in order; each leaves its checkpoint behind before the next begins."""

    recipe: Recipe

    def __init__(self, recipe: Recipe, layout: Layout, generation: Layout, log: RunLog) -> None:
        super().__init__(recipe, layout, log)
        self.generation = generation
        self.judge = together(partial(load_judge, recipe.evaluate.judge))

    def run(self) -> dict[str, Any]:
        recipe, log = self.recipe, self.log
        with log.stage("data"):
            splits = self.prepare("sft", "preferences", "prompts")
            texts = (prompt_text(r.prompt) + r.response for r in splits.sft.train)
            self.tokenizer = together(partial(self.load_tokenizer, texts))
            self.data = together(partial(tokenized, splits, self.tokenizer, recipe))
        self.note_left_out(splits)
        with log.stage("model"):
            model = together(self.load_model)
        self.samplers = self.make_samplers(model.trunk.config)
        sft = self.train_sft(model)
        reward, reward_summary = self.train_reward(sft)
        ppo, ppo_summary = self.train_ppo(sft, reward)
        dpo = self.train_dpo(sft, reward)
        with log.stage("export"):
            on_first(self.export)
        policies, samples = self.evaluate({"sft": sft, "ppo": ppo, "dpo": dpo})
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
        return summary

    def export(self) -> None:
        """The PPO policy as a Hugging Face directory."""
        policy = self.directory / "checkpoints" / "ppo"
        export_hf(policy, self.directory / "hf", None, "keep", None, self.log.note)

    def note_left_out(self, splits: Splits) -> None:
        """Say how many training examples were too long."""
        for name, left_out, records in (
            ("SFT examples", len(splits.sft.train) - len(self.data.sft.ids), splits.sft.train),
            ("pairs", self.data.judged.left_out, splits.preferences.train),
        ):
            if left_out:
                self.log.note(
                    f"data: {left_out} of {len(records)} {name} are longer than "
                    f"length = {self.recipe.length} tokens and are left out"
                )

    def make_samplers(self, config: Config) -> dict[str, Any]:
        """Sampling programs by purpose; equal settings share one, so that it compiles once."""
        stop_ids = self.tokenizer.stop_ids
        make = partial(
            Sampler,
            config,
            stop_ids=stop_ids,
            layout=self.layout,
            generation=self.generation,
            rollout=self.recipe.rollout,
        )
        settings = {
            "ppo": self.recipe.ppo.sampling,
            "dpo": self.recipe.dpo.sampling,
            "greedy": dataclasses.replace(self.recipe.ppo.sampling, temperature=0.0),
        }
        programs = {sampling: make(sampling) for sampling in settings.values()}
        return {purpose: programs[sampling] for purpose, sampling in settings.items()}

    def train_sft(self, model: CausalLM) -> CausalLM:
        config = self.recipe.sft
        with self.log.stage("sft", total=config.steps) as stage:
            batches = shuffled(self.data.sft, config.batch_size, self.recipe.seed)
            model = train_sft(model, config, batches, self.layout, stage.step)
            self.save("sft", model)
        return model

    def train_reward(self, sft: CausalLM) -> tuple[ScalarModel, dict[str, Any]]:
        config, layout = self.recipe.reward, self.layout
        with self.log.stage("reward", total=config.steps) as stage:
            start = scalar_model(sft.trunk, layout, self.key("reward"))
            seed, judged = self.recipe.seed, self.data.judged
            model, card = reward_stage(start, config, judged, seed, layout, stage.step)
            self.save("reward", model)
            on_first(partial(write_card, card, self.directory / "reward"))
            return model, summary_of(card)

    def train_ppo(self, sft: CausalLM, reward: ScalarModel) -> tuple[CausalLM, dict[str, float]]:
        """PPO from the SFT model; the critic starts from the SFT trunk."""
        config, layout, stop_id = self.recipe.ppo, self.layout, self.tokenizer.eos_id
        prompts, sample = self.data.prompts, self.samplers["ppo"]
        baseline = np.zeros(len(prompts.row), np.float32)
        if config.reference_baseline:
            with self.log.stage(
                "baseline", total=-(-len(prompts.row) // config.batch_size)
            ) as stage:
                baseline = reference_scores(
                    reward,
                    sft,
                    sample,
                    in_order(prompts, config.batch_size),
                    len(prompts.row),
                    config,
                    stop_id,
                    self.key("reference answers"),
                    layout,
                    stage.step,
                )
        history: list[Mapping[str, float]] = []
        with self.log.stage("ppo", total=config.iterations) as stage:

            def report(step: int, metrics: Mapping[str, float], tokens: int) -> None:
                history.append(metrics)
                stage.step(step, metrics, tokens)

            critic = scalar_model(sft.trunk, layout, self.key("critic"))
            actor, critic = train_ppo(
                Models(actor=sft, critic=critic, reference=sft, reward=reward),
                config,
                shuffled(prompts, config.batch_size, self.recipe.seed),
                shuffled(self.data.sft, config.sft_batch_size, self.recipe.seed + 1),
                baseline,
                sample,
                stop_id,
                self.key("ppo"),
                layout,
                report,
            )
            self.save("ppo", actor)
            self.save("critic", critic)
        last = history[-max(1, len(history) // 10) :]
        return actor, {
            "kl": float(np.mean([m["kl"] for m in last])),
            "kl_exact": float(np.mean([m["kl_exact"] for m in last])),
            "reward_start": history[0]["reward"],
            "reward_start_se": history[0]["reward_se"],
            "reward_end": float(np.mean([m["reward"] for m in last])),
        }

    def train_dpo(self, sft: CausalLM, reward: ScalarModel) -> CausalLM:
        """DPO from the SFT model, on its own answers labelled by the reward model."""
        config, layout = self.recipe.dpo, self.layout
        prompts = jax.tree.map(lambda x: x[: config.prompts], self.data.prompts)
        batches = list(in_order(prompts, self.recipe.ppo.batch_size))
        with self.log.stage("dpo pairs", total=len(batches)) as stage:
            pairs = sample_pairs(
                sft,
                reward,
                config,
                batches,
                self.samplers["dpo"],
                self.tokenizer.eos_id,
                self.key("dpo"),
                layout,
                stage.step,
            )
        with self.log.stage("dpo", total=config.steps) as stage:
            model = train_dpo(
                sft,
                config,
                shuffled(pairs, config.batch_size, self.recipe.seed),
                shuffled(self.data.sft, config.sft_batch_size, self.recipe.seed + 2),
                layout,
                stage.step,
            )
            self.save("dpo", model)
        return model

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
                stage.step(stage.num_steps + 1, {"heldout_nll": nll, **sampled[name].summary})
        samples = []
        for row, prompt in enumerate(data.heldout_texts[: config.num_samples]):
            sample: dict[str, Any] = {"prompt": prompt}
            for name, answers in sampled.items():
                sample |= {name: answers.texts[row], f"{name}_sentiment": answers.judged[row]}
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


def tokenized(splits: Splits, tokenizer: Tokenizer, recipe: Recipe) -> Data:
    """The splits as token arrays. Raises UserError on a record that is too long."""
    heldout = splits.prompts.heldout[: recipe.evaluate.num_prompts]
    sft = partial(sft_rows, tokenizer=tokenizer, length=recipe.length)
    prompts = partial(prompt_rows, tokenizer=tokenizer, prompt_length=recipe.prompt_length)
    return Data(
        sft=sft(splits.sft.train),
        heldout_sft=sft(splits.sft.heldout),
        judged=judged_data(splits.preferences, tokenizer, recipe.length, recipe.reward),
        prompts=prompts(splits.prompts.train[: recipe.max_prompts]),
        heldout_prompts=prompts(heldout),
        heldout_texts=[prompt_text(record.prompt) for record in heldout],
    )
