"""A run of every stage in a few seconds, saved as often as can be."""

from pathlib import Path

from glm_jax.config import GLMConfig
from glm_jax.generate import SamplingConfig
from glm_jax.optim import OptimConfig
from rlhf.data.oracle.oracle import OracleData
from rlhf.dpo import DPOConfig
from rlhf.evaluate import EvaluateConfig
from rlhf.kl import KLConfig
from rlhf.ppo import PPOConfig
from rlhf.progress import SavingConfig
from rlhf.recipe import Recipe
from rlhf.reward import RewardConfig
from rlhf.sft import SFTConfig

sampling = SamplingConfig(max_new_tokens=6)
config = Recipe(
    output_dir=Path("runs/tiny"),
    devices=1,
    data=OracleData(prompts=48, answers=3),
    model=GLMConfig(448, 32, 2, 4, 2, 8, 64, max_length=64),
    length=32,
    prompt_length=16,
    saving=SavingConfig(every=2, every_iterations=1, keep_every=2, keep_best=1),
    sft=SFTConfig(steps=8, batch_size=8),
    reward=RewardConfig(steps=8, batch_size=8, eval_every=3),
    ppo=PPOConfig(
        iterations=4,
        batch_size=16,
        minibatches=2,
        epochs=2,
        sft_batch_size=8,
        kl=KLConfig(target=0.01, horizon=100),
        sampling=sampling,
        actor=OptimConfig(learning_rate=1e-3),
        critic=OptimConfig(learning_rate=1e-3),
    ),
    dpo=DPOConfig(
        prompts=24,
        samples=2,
        steps=6,
        batch_size=8,
        sft_batch_size=8,
        sampling=sampling,
        truncated="keep",
    ),
    evaluate=EvaluateConfig(judge="oracle", num_prompts=6, batch_size=8, num_samples=2),
)
