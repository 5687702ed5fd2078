"""The best layout of a plan as a recipe that `glm-jax run` accepts."""

from pathlib import Path

from glm_jax.config import PRESETS
from rlhf.plan.plan import Plan
from sharding.chips import GIB
from sharding.disk.directory import explained, new_file
from sharding.layout import spell_layout

TEMPLATE = '''"""{job} of {model} on {pod}, which has {devices} devices.

    glm-jax run {file}

{how} a step of {job} takes {step:.3f} s and {memory:.2f} GiB of a device. Layout, batch and lengths are those of
the plan; say where weights and data are, and how long to train.
"""

import dataclasses
from pathlib import Path

from glm_jax.config import PRESETS
from glm_jax.generate import SamplingConfig
from rlhf.data.files.files import FilesData
from rlhf.dpo import DPOConfig
from rlhf.evaluate import EvaluateConfig
from rlhf.ppo import PPOConfig
from rlhf.recipe import Recipe
from rlhf.reward import RewardConfig
from rlhf.sft import SFTConfig

sampling = SamplingConfig(max_new_tokens={response})
config = Recipe(
    output_dir=Path("runs/{name}"),
    data=FilesData(sft=Path("sft.jsonl"), preferences=Path("preferences.jsonl")),
    {weights}
    layout="{layout}",
    remat="{remat}",
    generation_layout={generation},
    prompt_length={prompt},
    length={length},
    sft=SFTConfig(batch_size={batch}),
    reward=RewardConfig(batch_size={batch}),
    ppo=PPOConfig(batch_size={answers}, sft_batch_size={half}, sampling=sampling),
    dpo=DPOConfig(batch_size={batch}, sft_batch_size={batch}, sampling=sampling),
    evaluate=EvaluateConfig(batch_size={batch}),
)
'''


def write_recipe(plan: Plan, path: Path) -> None:
    """Write the recipe of the plan's best layout. Raises UserError where it cannot be written."""
    best = plan.best
    assert best is not None
    task, (layout, generation, _) = plan.task, best.candidate
    shape = f'dataclasses.replace(PRESETS["{task.model}"], compute_dtype="bfloat16")'
    preset = task.model in PRESETS
    # of PPO's two updates an iteration, each has as many rows as an update of another job
    answers = task.workload.batch * (1 if task.job == "ppo" else 2)
    text = TEMPLATE.format(
        job=task.job,
        model=task.model,
        pod=plan.pod.name,
        devices=plan.pod.num_devices,
        file=path,
        how="By the compiler" if plan.compiled else "Counted roughly,",
        step=best.step_s,
        memory=best.peak_bytes / GIB,
        name=path.stem,
        weights=f"model={shape},  # or pretrained=Path(...)"
        if preset
        else f'pretrained=Path("{task.model}"),',
        layout=spell_layout(layout),
        remat=layout.remat,
        generation=None if generation is None else f'"{spell_layout(generation)}"',
        prompt=task.workload.prompt_length,
        response=task.workload.response_length,
        length=task.workload.length,
        batch=task.workload.batch,
        answers=answers,
        half=answers // 2,
    )
    if not preset:
        text = text.replace("import dataclasses\n", "").replace(
            "from glm_jax.config import PRESETS\n", ""
        )
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        file.write(text.encode())
