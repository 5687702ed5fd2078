"""Write docs/layouts.md: the best layouts of GLM-4-9B and GLM-4-32B, SFT and PPO, on two pods, and the smallest pod.

    JAX_PLATFORMS=cpu python benchmarks/layouts.py [--only TEXT] [--top 10] [--jobs 1]

Programs are compiled once and kept in ~/.cache/glm-jax/programs; what is there is read. Every plan is written to
docs/layouts/NAME.json as it is done, and docs/layouts.md is made of those that are there.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_jax.config import PRESETS
from rlhf.plan.page import report
from rlhf.plan.plan import Task, plan, smallest
from rlhf.programs import Workload
from sharding.chips import CHIPS, GIB, Pod, find_pod
from sharding.described import compiler_version, missing_compiler
from sharding.disk.directory import write_json
from sharding.errors import UserError

DOCS = Path(__file__).parents[1] / "docs"
CACHE = Path("~/.cache/glm-jax/programs").expanduser()
MODELS = {"9B": "glm-4-9b-chat-hf", "32B": "glm-4-32b-0414"}
JOBS = {"sft": Workload(256, 1024, 1024), "ppo": Workload(256, 512, 512)}
PODS = ("v5e:16x16", "v5p:4x4x4")

INTRO = """# Layouts of GLM-4-9B and GLM-4-32B

Made by `JAX_PLATFORMS=cpu python benchmarks/layouts.py`, which asks the TPU compiler (libtpu {version}) about the ten
layouts that the rough count likes best. GiB are the compiler's peak for a device, with what else is in its memory
meanwhile; seconds are a walk of the compiled schedule (`sharding/schedule.py`); "roughly" is what shapes alone say, and
by it the place of the fastest among those that fit by this count. bfloat16 products, float32 weights and AdamW.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    if compiler_version(CHIPS["v5e"]) is None:
        raise UserError(missing_compiler(CHIPS["v5e"]))
    for name, task, pod in tasks():
        if args.only not in name:
            continue
        print(name, flush=True)
        found = plan(task, find_pod(pod), CACHE, args.top, args.jobs, heard=tell)
        leanest = smallest(
            dataclasses.replace(task, objective="smallest"), find_pod(pod), CACHE, args.jobs
        )
        (DOCS / "layouts").mkdir(exist_ok=True)
        write_json(
            DOCS / "layouts" / f"{name}.json", {**report(found), "smallest": report(leanest)}
        )
    sections = [INTRO.format(version=compiler_version(CHIPS["v5e"]))]
    for name, task, pod in tasks():
        path = DOCS / "layouts" / f"{name}.json"
        if path.exists():
            sections.append("\n".join(section(task, pod, json.loads(path.read_text()))))
    (DOCS / "layouts.md").write_text("\n".join(sections) + "\n")
    return 0


def tell(done: int, count: int, one: Any) -> None:
    said = f"{one.step_s:.3f} s" if one.fits else one.verdict.error or "does not fit"
    print(f"  {done} of {count}: {one.candidate.name}: {said}", flush=True)


def tasks() -> Iterator[tuple[str, Task, str]]:
    for short, model in MODELS.items():
        config = dataclasses.replace(PRESETS[model], compute_dtype="bfloat16")
        for job, work in JOBS.items():
            for pod in PODS:
                yield f"{short}-{job}-{pod.replace(':', '-')}", Task(job, model, config, work), pod


def section(task: Task, pod: str, found: Mapping[str, Any]) -> Iterator[str]:
    work, rows, samples = task.workload, found["layouts"], task.job == "ppo"
    yield f"\n## {task.job} of {task.model} on {pod}\n"
    yield f"{work.batch} x ({work.prompt_length} + {work.response_length}) tokens a step.\n"
    heads = ["layout", "remat", "step s", "MFU", "GiB", "roughly s", "roughly GiB"]
    heads += ["samples in", "rollout"] if samples else []
    yield _row(heads)
    yield _row(["---"] * len(heads))
    for row in rows:
        seconds, memory = (sum(row["rough"][kind].values()) for kind in ("seconds", "memory"))
        if row["compiled"]["error"] is not None:
            said = ["the compiler fails", "", ""]
        else:
            time = (
                [f"{row['step_s']:.3f}", f"{row['mfu']:.1%}"]
                if row["fits"]
                else ["does not fit", ""]
            )
            said = [*time, f"{row['peak_bytes'] / GIB:.2f}"]
        share = f"{row['rollout_share']:.0%}" if row["fits"] else ""
        yield _row(
            [row["layout"], row["remat"], *said, f"{seconds:.3f}", f"{memory / GIB:.2f}"]
            + ([row["generation_layout"] or "", share] if samples else [])
        )
    if rows and rows[0]["fits"]:
        yield f"\n{_place(rows, find_pod(pod))}"
    out = "; ".join(f"{reason} ({count})" for reason, count in found["ruled_out"].items())
    yield f"\nRuled out of {found['candidates'] + sum(found['ruled_out'].values())} layouts: {out}.\n"
    least = found["smallest"]
    first = next(row for row in least["layouts"] if row["fits"])
    yield (
        f"The smallest pod that fits it: {least['pod']}, with {first['layout']}, remat {first['remat']}: "
        f"{first['peak_bytes'] / GIB:.2f} GiB a device."
    )


def _place(rows: Sequence[Mapping[str, Any]], pod: Pod) -> str:
    """Of the first row, where no compiler is asked and what roughly does not fit is left out."""
    rough = [{kind: sum(of.values()) for kind, of in row["rough"].items()} for row in rows]
    fitting = [x["seconds"] for x in rough if x["memory"] <= pod.chip.memory_bytes]
    if (seconds := rough[0]["seconds"]) not in fitting:
        return "The fastest does not fit by the rough count."
    place = 1 + sum(x < seconds for x in fitting)
    return f"The fastest is number {place} of those that roughly fit, in their rough order."


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"layouts: {error}")
