"""A run of a recipe as far as PPO: its data, samplers, reward model, references and PPO itself."""

import dataclasses
import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from glm_jax.batch import Prompts, Sequences
from glm_jax.checkpoint import load_scalar
from glm_jax.companions import check_same_tokenizer
from glm_jax.config import Config
from glm_jax.generate import Generation
from glm_jax.model import CausalLM
from glm_jax.sampler import Sampler
from glm_jax.scalar import ScalarModel, scalar_model
from glm_jax.tokenizers import Tokenizer
from rlhf.base_run import BaseRun
from rlhf.card.page import write_card
from rlhf.data.accounts import Accounts
from rlhf.data.batches import prompt_rows, sft_rows, shuffled
from rlhf.data.records import Splits, prompt_text
from rlhf.doctor.doctor import Doctor, setting_of
from rlhf.doctor.evidence import Table
from rlhf.evaluate import Judge, load_judge
from rlhf.ppo import Models
from rlhf.ppo_iteration import Iteration, Measure
from rlhf.ppo_loop import train_ppo
from rlhf.progress import NOT_KEPT, Progress
from rlhf.recipe import Recipe
from rlhf.reference import References, draw_references
from rlhf.reward_stage import JudgedData, judged_data, reward_stage, summary_of
from rlhf.rollout import prompt_batches
from rlhf.runlog import RunLog
from rlhf.stage_keeper import Training
from rlhf.stored_references import read_references, write_references
from sharding.layout import Layout
from sharding.processes import fetch, on_first, together

MOMENTS = 10_000  # numbers of snapshots to an iteration: more than any has updates, whatever becomes of the recipe


@dataclasses.dataclass(frozen=True)
class Data:
    """The six splits as token arrays on the host, and the texts of the prompts."""

    sft: Sequences
    heldout_sft: Sequences
    judged: JudgedData | None  # None where the reward model comes from elsewhere
    prompts: Prompts
    texts: list[str]
    heldout_prompts: Prompts
    heldout_texts: list[str]


class PPORun(BaseRun):
    """What a run of SFT, PPO and DPO shares with a visit of the doctor."""

    recipe: Recipe
    samplers: dict[str, Sampler]  # by purpose; made once the model's shape is known

    def __init__(
        self,
        recipe: Recipe,
        layout: Layout,
        generation: Layout,
        log: RunLog,
        progress: Progress = NOT_KEPT,
    ) -> None:
        super().__init__(recipe, layout, log, progress)
        self.generation = generation

    @functools.cached_property
    def judge(self) -> Judge:
        """What compares answers, loaded when it is first asked for. Raises UserError where its package is missing."""
        return together(partial(load_judge, self.recipe.evaluate.judge))

    def load_data(self) -> None:
        """The splits of the recipe, read by its tokenizer."""
        recipe = self.recipe
        self.require_same_models(pretrained=recipe.pretrained, reward_model=recipe.reward_model)
        judged = () if recipe.reward_model else ("preferences",)
        with self.log.stage("data"):
            splits = self.prepare("sft", *judged, "prompts")
            texts = (prompt_text(r.prompt) + r.response for r in splits.sft.train)
            self.tokenizer = together(partial(self.load_tokenizer, texts))
            self.data = together(partial(tokenized, splits, self.tokenizer, recipe, self.accounts))
            if recipe.reward_model is not None:
                alike = partial(check_same_tokenizer, recipe.reward_model, self.tokenizer)
                together(partial(alike, self.data.texts))
        self.note_accounts()

    def make_samplers(self, config: Config) -> dict[str, Sampler]:
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

    def reward_model(self, sft: CausalLM) -> tuple[ScalarModel, dict[str, Any]]:
        """The reward model and what the summary says of it: trained from the SFT model, or from elsewhere."""
        config, layout, path = self.recipe.reward, self.layout, self.recipe.reward_model
        if path is not None:
            load = partial(load_scalar, path, layout, self.recipe.model.compute_dtype)
            return together(load), {"from": str(path)}
        found = self.progress.done("reward")
        if found is not None:
            return self.saved_scalar("reward"), dict(found)
        judged = self.data.judged
        assert judged is not None
        model, card = reward_stage(self, sft.trunk, config, judged)
        on_first(partial(write_card, card, self.directory / "reward"))
        summary = summary_of(card)
        self.progress.finish("reward", summary)
        return model, summary

    def draw_references(self, sft: CausalLM, reward: ScalarModel) -> References | None:
        """Answers of the SFT model to the training prompts, kept beside the run's other data; None where not needed."""
        recipe, prompts = self.recipe, self.data.prompts
        config, num_prompts = recipe.ppo, len(prompts.row)
        samples = max(recipe.selection.samples, int(config.subtracts_reference))
        if config.reference_baseline and not config.subtracts_reference:
            self.log.note(
                f"ppo: no reference answers: their scores cancel in ppo.advantage = {config.advantage}; "
                f"`reward` is the score itself"
            )
        if not samples:
            return None
        sample = self.samplers["ppo"]
        batches = prompt_batches(prompts, config.batch_size, samples, sample)
        path = self.directory / "references.jsonl"
        if self.progress.done("references") is not None:
            return together(partial(read_references, path, self.data.texts))
        with self.log.stage("references", total=len(batches)) as stage:
            references = draw_references(
                reward,
                sft,
                sample,
                batches,
                num_prompts,
                samples,
                config,
                self.tokenizer.eos_id,
                self.key("reference answers"),
                self.layout,
                self.pausing("references", stage.step),
            )
        kept = set(references.selected(recipe.selection).tolist())
        on_first(lambda: write_references(path, references, self.data.texts, kept, self.tokenizer))
        self.progress.finish("references")
        return references

    def ppo_prompts(self, references: References | None) -> Prompts:
        """The prompts that PPO trains on, each with its row number among all."""
        config, prompts = self.recipe.ppo, self.data.prompts
        if references is not None and self.recipe.selection.samples:
            rows = references.selected(self.recipe.selection)
            self.log.note(
                f"selection: {len(rows)} of {len(prompts.row)} prompts have scores that differ"
            )
            prompts = jax.tree.map(lambda x: x[rows], prompts)
        wanted = config.batch_size // config.samples
        if len(prompts.row) < wanted:
            self.log.note(
                f"ppo: {len(prompts.row)} prompts are fewer than the {wanted} of an iteration: it has some of them "
                f"several times, with different answers"
            )
        return prompts

    def new_critic(self, sft: CausalLM) -> ScalarModel | None:
        """A critic that starts from the SFT trunk; None where the advantages need none."""
        if self.recipe.ppo.advantage != "gae":
            return None
        return scalar_model(sft.trunk, self.layout, self.key("critic"))

    def measure(self) -> Measure | None:
        """The judge's mean of an iteration's answers, where the recipe asks for it."""
        if not self.recipe.evaluate.rollouts:
            return None
        judge = self.judge

        def judged(rows: np.ndarray, answers: Generation) -> Mapping[str, float]:
            ids, _, target = fetch(answers.sequences)
            texts = [
                self.data.texts[row] + self.tokenizer.decode_answer(ids[place][target[place]])
                for place, row in enumerate(rows)
            ]
            return {"judged": float(np.mean([judge(text) for text in texts]))}

        return judged

    def train_ppo(self, sft: CausalLM, reward: ScalarModel) -> tuple[CausalLM, dict[str, float]]:
        """PPO from the SFT model; the critic, where there is one, starts from the SFT trunk."""
        found = self.progress.done("ppo")
        if found is not None:
            return self.saved_model("ppo"), dict(found)
        config, seed = self.recipe.ppo, self.recipe.seed
        references = self.draw_references(sft, reward)
        prompts = self.ppo_prompts(references)
        baseline = np.zeros(len(self.data.prompts.row), np.float32)
        if references is not None and config.subtracts_reference:
            baseline = references.baseline
        iterators = {
            "prompts": shuffled(prompts, config.batch_size // config.samples, seed),
            "sft": shuffled(self.data.sft, config.sft_batch_size, seed + 1),
        }
        history: list[Mapping[str, float]] = list(self.progress.history("ppo"))
        every = self.recipe.saving.every_iterations
        training = Training("ppo", iterators, every, MOMENTS, best="reward")
        with self.train(training, config.iterations) as (stage, keeper):
            doctors: list[Doctor] = []
            key = self.key("ppo")

            def report(step: int, metrics: Mapping[str, float], tokens: int) -> None:
                history.append(metrics)
                stage.step(step, metrics, tokens)
                last = (
                    step == config.iterations or not doctors[0].due(step + 1) if doctors else False
                )
                if last and doctors[0].due(step):
                    self.log.note(doctors[0].summary)

            def watched(iterate: Iteration) -> Doctor:
                every = self.data.prompts
                answers = None if references is None else references.answers
                table = Table(every.ids, every.valid, np.asarray(prompts.row), baseline, answers)
                setting = setting_of(config, self.tokenizer, table=table, key=key)
                doctors.append(Doctor(iterate, setting, strict=True))
                return doctors[0]

            actor, critic = train_ppo(
                Models(actor=sft, critic=self.new_critic(sft), reference=sft, reward=reward),
                config,
                iterators["prompts"],
                iterators["sft"],
                baseline,
                self.samplers["ppo"],
                self.tokenizer.eos_id,
                key,
                self.layout,
                report,
                watched if self.recipe.doctor else None,
                self.measure(),
                keeper,
            )
            self.save("ppo", actor)
            if (engine := self.samplers["ppo"].engine) is not None:
                self.log.note(f"rollouts: {engine.counts}")
            if critic is not None:
                self.save("critic", critic)
        last = history[-max(1, len(history) // 10) :]
        summary = {
            "kl": float(np.mean([m["kl"] for m in last])),
            "kl_exact": float(np.mean([m["kl_exact"] for m in last])),
            "reward_start": history[0]["reward"],
            "reward_start_se": history[0]["reward_se"],
            "reward_end": float(np.mean([m["reward"] for m in last])),
        }
        self.progress.finish("ppo", summary)
        return actor, summary


def tokenized(splits: Splits, tokenizer: Tokenizer, recipe: Recipe, accounts: Accounts) -> Data:
    """The splits as token arrays; `accounts` receives what does not fit. Raises UserError where nothing is left."""
    unfit = recipe.unfit
    sft = {
        side: sft_rows(records, tokenizer, recipe.length, accounts.of("sft", side), unfit)
        for side, records in splits.sft._asdict().items()
    }
    judged = None
    if not recipe.reward_model:
        debiasing, pairs = recipe.data.debiasing(), splits.preferences
        judged = judged_data(
            pairs, tokenizer, recipe.length, recipe.reward, debiasing, accounts, unfit
        )
    most = {"train": recipe.max_prompts, "heldout": recipe.evaluate.num_prompts}
    prompts, texts = {}, {}
    for side, records in splits.prompts._asdict().items():
        account, records = accounts.of("prompts", side), list(records)
        found = prompt_rows(records, tokenizer, recipe.prompt_length, account, unfit, most[side])
        texts[side] = [prompt_text(records[row].prompt) for row in found.row]
        prompts[side] = found._replace(row=np.arange(len(found.row), dtype=np.int32))
    return Data(
        sft=sft["train"],
        heldout_sft=sft["heldout"],
        judged=judged,
        prompts=prompts["train"],
        texts=texts["train"],
        heldout_prompts=prompts["heldout"],
        heldout_texts=texts["heldout"],
    )
