"""A recipe: every setting of a run in one frozen dataclass, and whether it can run on the devices there are."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from glm_jax.checkpoint import check_weights
from glm_jax.companions import check_same_tokenizer, tokenizer_of
from glm_jax.config import Config, GLMConfig, Head, check_context
from glm_jax.continuous import RolloutConfig
from rlhf.data.accounts import Unfit
from rlhf.data.files.files import FilesData
from rlhf.data.oracle.oracle import OracleData
from rlhf.data.public import PublicData
from rlhf.data.reviews.reviews import ReviewsData
from rlhf.dpo import DPOConfig
from rlhf.evaluate import EvaluateConfig, require_judge
from rlhf.outdir import RECIPE_FILE
from rlhf.ppo import PPOConfig
from rlhf.progress import SavingConfig
from rlhf.reference import SelectionConfig
from rlhf.reward import RewardConfig
from rlhf.sft import SFTConfig
from sharding.layout import Layout, Remat, get_layout
from sharding.ranges import NonNegative, Positive, check_ranges


@dataclasses.dataclass(frozen=True)
class BaseRecipe:
    """What every run is told."""

    seed: NonNegative = 0  # of everything random: data, weights, sampling
    output_dir: Path = Path("runs/default")
    layout: str = (
        "single"  # a name, or PIPExDATAxFSDPxTENSOR[:gpipe|circular[:MICROBATCHES[:REPEATS]]]
    )
    accumulate: Positive = (
        1  # pieces an update's batch is cut into, one after another, to save memory
    )
    remat: Remat = "none"  # what layers keep for their gradients; the rest is computed again
    devices: Positive | None = None  # None: all there are; on a CPU, how many to simulate
    data: ReviewsData | FilesData | PublicData | OracleData = ReviewsData()
    pretrained: Path | None = None  # directory of a model to start from; None: random weights
    model: GLMConfig = GLMConfig(4096, 128, 4, 4, 2, 32, 352)  # shape without `pretrained`
    length: Positive = 64  # tokens of a training sequence, prompt and answer
    # a record that is too long or that the model's chat format has no words for: leave it out and name it, or refuse
    unfit: Unfit = "skip"
    # updates that are left out, as their gradient is not finite, before a stage stops
    max_skipped: NonNegative = 0
    saving: SavingConfig = SavingConfig()  # of what a run needs to go on after it was ended

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class Recipe(BaseRecipe):
    """SFT -> reward model -> PPO and DPO -> evaluation -> export, on one mesh."""

    generation_layout: str | None = None  # to sample in; None: `layout` without its pipeline
    max_prompts: Positive | None = None  # training prompts used for RL; None: all
    doctor: bool = True  # check PPO (ppo.doctor_every), and stop where something is wrong
    prompt_length: Positive = 16  # tokens of a prompt, chat format included
    rollout: RolloutConfig = (
        RolloutConfig()
    )  # how answers are drawn; which ones does not depend on it
    sft: SFTConfig = SFTConfig()
    reward: RewardConfig = RewardConfig()
    reward_model: Path | None = None  # one trained elsewhere, with this tokenizer; None: train one
    selection: SelectionConfig = SelectionConfig()
    ppo: PPOConfig = PPOConfig()
    dpo: DPOConfig = DPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


@dataclasses.dataclass(frozen=True)
class RewardRecipe(BaseRecipe):
    """A reward model alone -> its report card, on one mesh."""

    reward: RewardConfig = RewardConfig()


def remarks(recipe: Recipe) -> list[str]:
    """Lines to print before a run: stages that are left out, and answers that the reward model was not trained on."""
    lines = []
    if not recipe.sft.steps:
        lines.append("sft.steps = 0: SFT is left out, PPO and DPO start from the model as it is")
    if not recipe.dpo.steps:
        lines.append("dpo.steps = 0: DPO is left out")
    trained = reward_length(recipe)
    stages = {"ppo": recipe.ppo.sampling, "dpo": recipe.dpo.sampling}
    for stage, sampling in stages.items() if recipe.dpo.steps else [("ppo", recipe.ppo.sampling)]:
        total = recipe.prompt_length + sampling.max_new_tokens + 1  # and the appended stop token
        if trained is not None and total > trained.tokens:
            lines.append(
                f"{stage}: prompt_length + {stage}.sampling.max_new_tokens + 1 = {total} tokens are more than "
                f"{trained.name} = {trained.tokens}, the longest that the reward model is trained on: it scores longer "
                f"answers untrained"
            )
    return lines


class TrainedLength(NamedTuple):
    """The longest sequence that a reward model was trained on."""

    tokens: int
    name: str  # field that it is from


def reward_length(recipe: Recipe) -> TrainedLength | None:
    """That of the recipe's reward model; None where it comes from elsewhere and does not lie in its run's directory."""
    if recipe.reward_model is None:
        return TrainedLength(recipe.length, "length")
    path = recipe.reward_model.resolve().parent.parent / RECIPE_FILE
    try:
        tokens = json.loads(path.read_text(encoding="utf-8"))["length"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return TrainedLength(tokens, f"length of {path}") if isinstance(tokens, int) else None


def check_reward(recipe: RewardRecipe) -> Layout:
    """The recipe's layout on the devices there are. Raises UserError, before any work, for what cannot run."""
    layout, _ = check_training(recipe)
    layout.check_batch(recipe.reward.batch_size, "reward.batch_size")
    return layout


def check_training(recipe: BaseRecipe) -> tuple[Layout, Config]:
    """The layout of training, and the model's shape, which fits it. Raises UserError for what cannot run."""
    named = get_layout(recipe.layout, recipe.devices)
    layout = dataclasses.replace(named, accumulate=recipe.accumulate, remat=recipe.remat)
    layout.mesh()  # enough devices?
    shape: Config = recipe.model
    if recipe.pretrained is not None:
        shape = check_weights(recipe.pretrained, Head.VOCABULARY).config
        tokenizer_of(recipe.pretrained)
    shape.check(layout)
    check_context(shape, "length", recipe.length)
    return layout, shape


def check(recipe: Recipe) -> tuple[Layout, Layout]:
    """The recipe's layouts of training and generation on the devices there are.

    Raises UserError, before any work, for what cannot run.
    """
    layout, shape = check_training(recipe)
    generation = layout.for_generation()
    if recipe.generation_layout is not None:
        generation = get_layout(recipe.generation_layout, layout.num_devices).for_generation()
    shape.check(generation)
    for sampling in (recipe.ppo.sampling, recipe.dpo.sampling):
        total = recipe.prompt_length + sampling.max_new_tokens + 1  # and the appended stop token
        check_context(shape, "prompt_length + sampling.max_new_tokens + 1", total)
    if recipe.reward_model is not None:
        _check_scorer(recipe, recipe.reward_model, layout)
    require_judge(recipe.evaluate.judge)
    layout.check_batch(recipe.sft.batch_size, "sft.batch_size")
    layout.check_batch(recipe.reward.batch_size, "reward.batch_size")
    layout.check_batch(recipe.dpo.batch_size, "dpo.batch_size")
    layout.check_batch(recipe.ppo.sft_batch_size, "ppo.sft_batch_size")
    layout.check_batch(recipe.dpo.sft_batch_size, "dpo.sft_batch_size")
    layout.check_batch(recipe.evaluate.batch_size, "evaluate.batch_size")
    generation.check_batch(recipe.evaluate.batch_size, "evaluate.batch_size")
    recipe.ppo.check(layout, generation)
    if recipe.rollout.slots is not None:
        recipe.rollout.check(generation, recipe.prompt_length)
    return layout, generation


def _check_scorer(recipe: Recipe, directory: Path, layout: Layout) -> None:
    """Raise UserError where a reward model from elsewhere cannot score what the recipe samples.

    Its tokens are compared with the policy's once there is data (`check_same_tokenizer`).
    """
    scorer = check_weights(directory, Head.SCALAR).config
    tokenizer_of(directory)
    scorer.check(layout)
    for name, sampling in (("ppo", recipe.ppo.sampling), ("dpo", recipe.dpo.sampling)):
        total = recipe.prompt_length + sampling.max_new_tokens + 1
        what = f"reward_model = {directory}: prompt_length + {name}.sampling.max_new_tokens + 1"
        check_context(scorer, what, total)
    if recipe.pretrained is not None:
        check_same_tokenizer(directory, tokenizer_of(recipe.pretrained), ())
