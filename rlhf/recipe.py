"""A recipe: every setting of a run in one frozen dataclass."""

import dataclasses
from pathlib import Path

from glm_jax.config import GLMConfig
from rlhf.data.jsonl.jsonl import JsonlData
from rlhf.data.reviews.reviews import ReviewsData
from rlhf.dpo import DPOConfig
from rlhf.evaluate import EvaluateConfig
from rlhf.ppo import PPOConfig
from rlhf.reward import RewardConfig
from rlhf.sft import SFTConfig
from sharding.layout import Remat


@dataclasses.dataclass(frozen=True)
class Recipe:
    """SFT -> reward model -> PPO and DPO -> evaluation -> export, on one mesh."""

    seed: int = 0  # of everything random: data, weights, sampling
    output_dir: Path = Path("runs/default")
    layout: str = (
        "single"  # a name, or PIPExDATAxFSDPxTENSOR[:gpipe|circular[:MICROBATCHES[:REPEATS]]]
    )
    generation_layout: str | None = None  # to sample in; None: `layout` without its pipeline
    accumulate: int = 1  # pieces an update's batch is cut into, one after another, to save memory
    remat: Remat = "none"  # what layers keep for their gradients; the rest is computed again
    devices: int | None = None  # None: all there are; on a CPU, how many to simulate
    data: ReviewsData | JsonlData = ReviewsData()
    pretrained: Path | None = (
        None  # Hugging Face ChatGLM3 directory to start from; None: random weights
    )
    model: GLMConfig = GLMConfig(4096, 128, 4, 4, 2, 32, 352)  # shape without `pretrained`
    length: int = 64  # tokens of a training sequence, prompt and answer
    max_prompts: int | None = None  # training prompts used for RL; None: all
    prompt_length: int = 16  # tokens of a prompt, chat format included
    sft: SFTConfig = SFTConfig()
    reward: RewardConfig = RewardConfig()
    ppo: PPOConfig = PPOConfig()
    dpo: DPOConfig = DPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
