"""The command of `glm-jax` that measures layouts: bench."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from sharding.errors import UserError

if TYPE_CHECKING:  # slow to import, and --help has no use for them
    from rlhf.bench.attached import Attached
    from rlhf.bench.case import Case, Row

Job = Callable[[], int | None]
ROWS_A_DEVICE = 4  # of a batch, so that the halves of PPO's divide as well


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What is measured."""

    # names, PIPExDATAxFSDPxTENSOR[:gpipe|circular[:MICROBATCHES[:REPEATS]]], all (every factorisation of the devices
    # with both schedules), or named (every name)
    layouts: tuple[str, ...] = ("named",)
    jobs: str = "sft,reward,dpo,ppo"  # some of them
    model: str = "chatglm3-6b"  # a preset
    # few and odd sizes of its architecture instead of its own; where devices are CPUs there is no other
    tiny: bool = False
    num_layers: int | None = None  # instead of as many as it has
    dtype: str | None = None  # of products; default: bfloat16, on CPUs float32
    devices: int | None = None  # default: all there are; of CPUs so many are simulated, default 8
    # sequences or pairs of an update, answers of an iteration of PPO; default: 4 a device
    batch: int | None = None
    prompt_length: int | None = None  # tokens; default: 512, of a tiny model 16
    response_length: int | None = None  # tokens, as many are drawn; default: as prompt_length
    remat: str = "none"  # what layers keep for their gradients: none, full, matmuls or offload
    generation_layout: str | None = (
        None  # PPO samples in it; default: the layout without its pipeline
    )
    steps: int = 10  # that are timed, after two that are not
    limit_s: float = 1800.0  # seconds after which a row is given up
    json: Path | None = None  # the table as JSON, written again after every row
    html: Path | None = None  # the same as a page
    profile: Path | None = None  # folder of traces, one a row, for xprof or TensorBoard


def add_commands(app: tyro.extras.SubcommandApp) -> None:
    """Add the command; its docstring is what --help prints."""

    @app.command
    def bench(config: tyro.conf.OmitArgPrefixes[BenchConfig] = BenchConfig()) -> Job:
        """Measure every job under every layout on the devices that there are, beside what is predicted of it.

        Each row is a process of its own: one that does not fit, is refused or crashes says why, and the others go on.
        Ctrl-C keeps what is done. Exit 1 where no row has numbers.
        """
        return partial(_bench, config)


def _bench(config: BenchConfig) -> int:
    from rich.console import Console

    from rlhf.bench.attached import attached
    from rlhf.bench.page import heading, line, page
    from rlhf.bench.run import bench
    from sharding.disk.directory import new_file, write_json

    found = attached(config.devices)
    cases = _cases(config, found)
    facts = _facts(config, found, cases[0])
    for path in (config.json, config.html):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for name, fact in facts.items():
        console.print(f"{name}: {fact}")
    console.print(heading())
    with console.status("") as status:

        def tell(doing: str) -> None:
            case = cases[len(rows)]
            status.update(f"{len(rows) + 1} of {len(cases)}: {case.layout} {case.job}: {doing}")

        for row in bench(cases, config.limit_s, tell):
            rows.append(row)
            console.print(line(row), style="bold red" if row.failure else None)
            if config.json is not None:
                write_json(config.json, _report(config, found, cases, rows))
            if config.html is not None:
                with new_file(config.html) as file:
                    file.write(page(facts, rows).encode())
    return 1 if all(row.failure for row in rows) else 0


def _cases(config: BenchConfig, found: "Attached") -> "list[Case]":
    """A case a layout and job. Raises UserError on an option that fits none of them."""
    from rlhf.bench.case import Case, Model
    from rlhf.layout_cli import find_layouts, preset
    from rlhf.programs import JOBS, Workload
    from sharding.layout import REMATS, get_layout

    jobs = config.jobs.split(",")
    for job in jobs:
        if job not in JOBS:
            raise UserError(
                f"--jobs {config.jobs}: unknown job {job!r}: choose some of {', '.join(JOBS)}"
            )
    preset(config.model)
    on_cpu = found.platform == "cpu"
    count = config.devices or found.count
    if count > found.count:
        raise UserError(f"--devices {count}: there are {found.count}")
    if config.steps < 1:
        raise UserError(f"--steps {config.steps}: give a positive number")
    remat = next((x for x in REMATS if x == config.remat), None)
    if remat is None:
        raise UserError(f"--remat {config.remat}: choose one of {', '.join(REMATS)}")
    if config.generation_layout is not None:
        get_layout(config.generation_layout, count)
    small = config.tiny or on_cpu
    dtype = config.dtype or ("float32" if on_cpu else "bfloat16")
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: choose float32 or bfloat16")
    prompt_length = config.prompt_length or (16 if small else 512)
    workload = Workload(
        ROWS_A_DEVICE * count if config.batch is None else config.batch,
        prompt_length,
        prompt_length if config.response_length is None else config.response_length,
    )
    model = Model(config.model, small, dtype, config.num_layers)
    return [
        Case(
            layout=name,
            job=job,
            model=model,
            devices=layout.num_devices,
            workload=workload,
            steps=config.steps,
            remat=remat,
            generation=config.generation_layout,
            profile=None if config.profile is None else str(config.profile.absolute()),
        )
        for name, layout in find_layouts(config.layouts, count).items()
        for job in jobs
    ]


def _facts(config: BenchConfig, found: "Attached", case: "Case") -> Mapping[str, str]:
    work = case.workload
    return {
        "Devices": f"{config.devices or found.count} x {found.kind} ({found.platform})",
        "Model": case.model.name,
        "Batch": f"{work.batch} x ({work.prompt_length} + {work.response_length}) tokens",
        "Remat": config.remat,
        "JAX": found.jax_version,
    }


def _report(
    config: BenchConfig, found: "Attached", cases: "Sequence[Case]", rows: "Sequence[Row]"
) -> dict[str, Any]:
    work = cases[0].workload
    return {
        "devices": dataclasses.asdict(found) | {"used": config.devices or found.count},
        "model": dataclasses.asdict(cases[0].model),
        "batch": work.batch,
        "prompt_length": work.prompt_length,
        "response_length": work.response_length,
        "remat": config.remat,
        "generation_layout": config.generation_layout,
        "rows": [row.as_json() for row in rows],
        "planned": len(cases),
    }
