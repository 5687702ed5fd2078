"""PPO in a world whose true reward is known: gold against proxy, on a CPU, in a few minutes.

    glm-jax run configs/oracle.py

The reward model learns from annotators who like length; every iteration of PPO says what the reward model (`score`) and
the gold reward (`judged`, 2 is best) make of its answers. On 2 cores, 2 min 46 s: the reward model gets 0.817 of the
held-out pairs right; over PPO its score rises from 0.3 to 2.2, and the gold reward from 0.58 to 0.72 and back to 0.6;
on held-out prompts SFT, PPO and DPO are worth 0.49, 0.53 and 1.15.
"""

from pathlib import Path

from glm_jax.config import GLMConfig
from glm_jax.generate import SamplingConfig
from glm_jax.optim import OptimConfig
from rlhf.data.oracle.oracle import OracleData
from rlhf.dpo import DPOConfig
from rlhf.evaluate import EvaluateConfig
from rlhf.kl import KLConfig
from rlhf.ppo import PPOConfig
from rlhf.recipe import Recipe
from rlhf.reward import RewardConfig
from rlhf.sft import SFTConfig

sampling = SamplingConfig(max_new_tokens=20)
config = Recipe(
    output_dir=Path("runs/oracle"),
    data=OracleData(prompts=1344, answers=8, length_bias=0.1),
    model=GLMConfig(
        vocab_size=448,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_groups=2,
        head_dim=16,
        ffn_size=128,
        max_length=64,
    ),
    length=32,
    prompt_length=12,
    sft=SFTConfig(steps=3000, batch_size=64, optim=OptimConfig(learning_rate=3e-3)),
    reward=RewardConfig(
        steps=600, batch_size=64, l2_weight=0.01, optim=OptimConfig(learning_rate=1e-3)
    ),
    ppo=PPOConfig(
        iterations=60,
        batch_size=64,
        minibatches=2,
        kl=KLConfig(coef=0.05),
        sft_batch_size=32,
        sft_weight=0.05,
        sampling=sampling,
        actor=OptimConfig(learning_rate=3e-4, weight_decay=0.0),
        critic=OptimConfig(learning_rate=1e-3, weight_decay=0.0),
    ),
    dpo=DPOConfig(
        prompts=512,
        samples=4,
        steps=100,
        batch_size=32,
        sft_batch_size=32,
        sampling=sampling,
        optim=OptimConfig(learning_rate=3e-4, weight_decay=0.0),
    ),
    evaluate=EvaluateConfig(judge="oracle", rollouts=True, num_prompts=96, batch_size=32),
)
