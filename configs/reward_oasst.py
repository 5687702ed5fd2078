"""A small reward model of OpenAssistant's Chinese rankings, from random weights, on a CPU, in minutes.

    glm-jax run configs/reward_oasst.py --data.preferences path/to/oaast_rm_zh.json

It sees 488 pairs, learns them by heart, and its card says so: "near chance", right in 50.2 % (40.5 to 58.8) of held-out
pairs, every prompt counting the same, where preferring the longer answer is in 78.0 %. Compare it with that of a run
with `--data.filters.no-balance`. 2 minutes on 2 cores.
"""

import dataclasses
from pathlib import Path

from rlhf.data.files.files import FilesData
from rlhf.data.mistakes import OnMistake
from rlhf.recipe_file import load_recipe

hh, _ = load_recipe(Path(__file__).with_name("reward_hh.py"))
config = dataclasses.replace(
    hh,
    output_dir=Path("runs/reward_oasst"),
    data=FilesData(
        preferences=Path("../shared/data/oasst1-zh/oaast_rm_zh.json"),
        heldout_fraction=0.2,
        mistakes=OnMistake.skip_all(),
    ),
)
