"""Align a small ChatGLM3 on Chinese product reviews, on a CPU, in minutes."""

from pathlib import Path

from glm_jax.config import GLMConfig
from glm_jax.generate import SamplingConfig
from glm_jax.optim import OptimConfig
from rlhf.data.reviews.reviews import ReviewsData
from rlhf.dpo import DPOConfig
from rlhf.kl import KLConfig
from rlhf.ppo import PPOConfig
from rlhf.recipe import Recipe
from rlhf.reward import RewardConfig
from rlhf.sft import SFTConfig

sampling = SamplingConfig(max_new_tokens=42)
config = Recipe(
    output_dir=Path("runs/demo"),
    model=GLMConfig(
        vocab_size=2048,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_groups=2,
        head_dim=32,
        ffn_size=256,
        max_length=128,
    ),
    data=ReviewsData(max_chars=50),
    length=56,
    prompt_length=14,
    sft=SFTConfig(steps=600, batch_size=32, optim=OptimConfig(learning_rate=2e-3)),
    reward=RewardConfig(
        steps=200, batch_size=32, l2_weight=0.01, optim=OptimConfig(learning_rate=5e-4)
    ),
    ppo=PPOConfig(
        iterations=80,
        batch_size=64,
        minibatches=2,
        kl=KLConfig(coef=0.03),
        sft_batch_size=32,
        sft_weight=0.3,
        sampling=sampling,
        actor=OptimConfig(learning_rate=3e-4, weight_decay=0.0),
        critic=OptimConfig(learning_rate=5e-4, weight_decay=0.0),
    ),
    dpo=DPOConfig(
        prompts=1024,
        samples=4,
        steps=100,
        batch_size=32,
        sft_batch_size=32,
        sampling=sampling,
        optim=OptimConfig(learning_rate=1e-4, weight_decay=0.0),
    ),
)
