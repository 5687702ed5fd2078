"""The demo in small: a few updates of every stage, to compare layouts and to see that all of it runs.

    glm-jax run configs/demo_smoke.py --layout pp_dp_tp --devices 8

Its metrics equal those of `--layout single --devices 1` up to rounding; its answers are worth nothing.
"""

import dataclasses
from pathlib import Path

from rlhf.recipe_file import load_recipe

demo, _ = load_recipe(Path(__file__).with_name("demo.py"))
config = dataclasses.replace(
    demo,
    output_dir=Path("runs/demo_smoke"),
    model=dataclasses.replace(demo.model, hidden_size=64, num_layers=2, head_dim=16, ffn_size=128),
    sft=dataclasses.replace(demo.sft, steps=3),
    reward=dataclasses.replace(demo.reward, steps=3),
    max_prompts=64,
    ppo=dataclasses.replace(demo.ppo, iterations=2),
    # three updates do not teach to stop: without answers that were cut off no pair would be left
    dpo=dataclasses.replace(demo.dpo, prompts=64, samples=2, steps=3, truncated="keep"),
    evaluate=dataclasses.replace(demo.evaluate, num_prompts=64),
)
