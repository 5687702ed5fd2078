"""A small reward model of Anthropic's harmlessness comparisons, from random weights, on a CPU, in minutes.

    glm-jax run configs/reward_hh.py --data.preferences path/to/harmless-base/test.jsonl.gz

It sees 1,400 pairs and no pre-training: its card says "no better than length", right in 58.1 % (52.9 to 62.9) of
held-out pairs where preferring the shorter answer is in 57.9 %. 2 minutes on 2 cores.
"""

from pathlib import Path

from glm_jax.config import GLMConfig
from glm_jax.optim import OptimConfig
from rlhf.data.files.files import FilesData
from rlhf.data.mistakes import OnMistake
from rlhf.recipe import RewardRecipe
from rlhf.reward import RewardConfig

config = RewardRecipe(
    output_dir=Path("runs/reward_hh"),
    data=FilesData(
        preferences=Path("../shared/data/hh-rlhf/harmless-base-test.jsonl.gz"),
        heldout_fraction=0.2,
        mistakes=OnMistake.skip_all(),
    ),
    model=GLMConfig(
        vocab_size=4096,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_groups=2,
        head_dim=32,
        ffn_size=352,
        max_length=512,
    ),
    length=384,
    reward=RewardConfig(
        steps=120,
        batch_size=8,
        pack_length=768,
        l2_weight=0.01,
        eval_every=30,
        optim=OptimConfig(learning_rate=5e-4),
    ),
)
