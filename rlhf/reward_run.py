"""The run of a reward model alone: judged pairs -> training -> report card."""

from functools import partial

import jax

from rlhf.base_run import BaseRun
from rlhf.card.card import Card
from rlhf.card.page import write_card
from rlhf.data.records import prompt_text
from rlhf.progress import NOT_KEPT, Progress
from rlhf.recipe import RewardRecipe, check_reward
from rlhf.reward_stage import judged_data, reward_stage, summary_of
from rlhf.runlog import RunLog
from sharding.disk.directory import write_json
from sharding.processes import on_first, together


def run_reward(recipe: RewardRecipe, log: RunLog, progress: Progress = NOT_KEPT) -> Card:
    """Train and grade; leaves the checkpoint `reward`, `card.html` and `summary.json` behind. Raises UserError."""
    layout = check_reward(recipe)
    with jax.set_mesh(layout.mesh()):
        return _RewardRun(recipe, layout, log, progress).run()


class _RewardRun(BaseRun):
    recipe: RewardRecipe

    def run(self) -> Card:
        recipe, log, config = self.recipe, self.log, self.recipe.reward
        self.require_same_models(pretrained=recipe.pretrained)
        with log.stage("data"):
            split = self.prepare("preferences").preferences
            texts = (f"{prompt_text(r.prompt)}\n{r.chosen}\n{r.rejected}" for r in split.train)
            self.tokenizer = together(partial(self.load_tokenizer, texts))
            data = together(
                partial(
                    judged_data,
                    split,
                    self.tokenizer,
                    recipe.length,
                    config,
                    recipe.data.debiasing(),
                    self.accounts,
                    recipe.unfit,
                )
            )
        self.note_accounts()
        with log.stage("model"):
            trunk = together(self.load_model).trunk
        model, card = reward_stage(self, trunk, config, data)
        summary = {
            **self.facts(model),
            "reward_model": summary_of(card),
            "wall_s": log.wall_s,
            "tokens_per_s": log.tokens_per_s,
        }
        on_first(lambda: write_json(self.directory / "summary.json", summary))
        on_first(partial(write_card, card, self.directory))
        self.progress.finish("reward")
        return card
