"""Ablation of the demo: PPO on the bare score, without subtracting that of the reference answer.

    glm-jax run configs/demo_no_baseline.py

Everything else is configs/demo.py; compare ppo.reward_start of the two summaries.
"""

import dataclasses
from pathlib import Path

from rlhf.recipe_file import load_recipe

demo, _ = load_recipe(Path(__file__).with_name("demo.py"))
config = dataclasses.replace(
    demo,
    output_dir=Path("runs/demo_no_baseline"),
    ppo=dataclasses.replace(demo.ppo, reference_baseline=False),
)
