"""The command `glm-jax certify`."""

import dataclasses
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from rlhf.layout_cli import find_layouts, preset
from sharding.errors import UserError

if TYPE_CHECKING:  # slow to import, and --help has no use for them
    from rlhf.certify import Case, Row
    from sharding.layout import Layout

Job = Callable[[], int | None]


def add_commands(app: tyro.extras.SubcommandApp) -> None:
    """Add the command; its docstring is what --help prints."""

    @app.command
    def certify(
        layouts: tuple[str, ...] = ("default",),
        jobs: str = "sft,reward,dpo,ppo,grpo",
        model: tuple[str, ...] = ("chatglm3-6b", "chatglm-6b"),
        accumulate: tuple[int, ...] = (1,),
        remat: tuple[Literal["none", "full", "matmuls", "offload"], ...] = ("none",),
        generation_layout: tuple[str, ...] = (),
        compute_dtype: Literal["float32", "bfloat16"] = "float32",
        devices: int = 8,
        json: Path | None = None,
    ) -> Job:
        """Prove that training does not depend on the layout: three steps against one device.

        Exit 1 unless data and sampled tokens are equal, losses agree within 2e-6, gradients within 7e-5, weights within
        2e-6 and with NumPy's AdamW within 5e-7, and nothing recompiles. In bfloat16 a layout may be four times as far
        from float32 as one device is.

        Args:
            layouts: Names, PIPExDATAxFSDPxTENSOR[:gpipe|circular[:MICROBATCHES[:REPEATS]]], all (every factorisation
                of the devices with both schedules), named (every name), or default (every name, a circular schedule,
                and pipeline stages with fsdp shards).
            jobs: Some of sft, reward, dpo, ppo, grpo.
            model: Presets; a tiny model of each one's architecture is trained. ChatGLM-6B is the one with biases on the
                outputs of attention and MLP.
            accumulate: Pieces that an update's batch is cut into; every number is tried with every layout.
            remat: What layers save for their gradients; each is tried with every layout.
            generation_layout: Layouts to sample in; each is tried with every layout that ppo and grpo train in.
                Default: the training layout without its pipeline.
            compute_dtype: dtype of matrix products.
            devices: On a CPU, how many devices to simulate.
            json: Write the table there too.
        """
        return partial(
            _certify,
            layouts,
            jobs,
            model,
            (accumulate, remat, generation_layout),
            compute_dtype,
            devices,
            json,
        )


@contextmanager
def _programs_kept() -> Iterator[None]:
    """Compiled programs are kept, so that reading one does not compile it again."""
    import jax

    settings = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in settings}
    with tempfile.TemporaryDirectory() as directory:
        for name, value in zip(settings, (directory, 0.0), strict=True):
            jax.config.update(name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)


Varied = tuple[Sequence[int], Sequence[Any], Sequence[str]]  # accumulate, remat, generation layouts


def _cases(layouts: "Mapping[str, Layout]", varied: Varied, devices: int) -> "dict[str, Case]":
    """Every layout with every choice of what --accumulate, --remat and --generation-layout vary."""
    from rlhf.certify import Case
    from sharding.layout import get_layout

    accumulates, remats, names = varied
    generations = {name: get_layout(name, devices) for name in names}
    found = {}
    for (name, layout), accumulate, remat, generation in itertools.product(
        layouts.items(), accumulates, remats, names or (None,)
    ):
        changed = dataclasses.replace(layout, accumulate=accumulate, remat=remat)
        words = [
            name,
            f"accumulate={accumulate}" if accumulate > 1 else "",
            f"remat={remat}" if remat != "none" else "",
            f"generation={generation}" if generation else "",
        ]
        in_words = " ".join(word for word in words if word)
        found[in_words] = Case(changed, generations[generation] if generation else None)
    return found


def _certify(
    names: Sequence[str],
    jobs: str,
    models: Sequence[str],
    varied: Varied,
    compute_dtype: str,
    devices: int,
    json: Path | None,
) -> int:
    from rich.console import Console

    from rlhf.certify import certify
    from rlhf.trials.jobs import JOBS
    from rlhf.trials.models import tiny
    from sharding.disk.directory import write_json
    from sharding.layout import use_devices

    chosen = jobs.split(",")
    for job in chosen:
        if job not in JOBS:
            raise UserError(f"--jobs {jobs}: unknown job {job!r}: choose some of {', '.join(JOBS)}")
    configs = {
        name: dataclasses.replace(tiny(preset(name)), compute_dtype=compute_dtype)
        for name in models
    }
    use_devices(devices)
    cases = _cases(find_layouts(names, devices), varied, devices)
    console = Console()
    rows = []
    with _programs_kept():
        for model, config in configs.items():
            console.print(f"{model}, {compute_dtype}", highlight=False)
            console.print(_line(*HEADINGS), soft_wrap=True, highlight=False)
            for row in certify(config, cases, chosen):
                rows.append({"model": model, **_row(row)})
                style = None if row.passed else "bold red"
                cells = _cells(row)
                console.print(cells, style=style, soft_wrap=True, highlight=False, markup=False)
    passed = sum(row["pass"] for row in rows)
    console.print(f"{passed} of {len(rows)} pass", highlight=False)
    if json is not None:
        report = {"models": list(models), "compute_dtype": compute_dtype, "rows": rows}
        write_json(json, {**report, "pass": passed == len(rows)})
    return 0 if passed == len(rows) else 1


HEADINGS = (
    "layout",
    "job",
    "loss",
    "gradient",
    "weights",
    "AdamW",
    "recompiled",
    "MiB",
    "bubble",
    "collectives",
    "",
    "first difference",
)


def _line(*cells: str) -> str:
    widths = (20, 7, 8, 8, 8, 8, 10, 6, 6, 40, 5, 0)
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _cells(row: "Row") -> str:
    short = {
        "all-gather": "gather",
        "all-reduce": "reduce",
        "reduce-scatter": "scatter",
        "all-to-all": "all-to-all",
        "collective-permute": "permute",
    }
    counts = row.collectives
    collectives = ", ".join(
        f"{counts[kind]} {word}" for kind, word in short.items() if kind in counts
    )
    return _line(
        row.layout,
        row.job,
        f"{row.loss_error:.1e}",
        f"{row.grad_error:.1e}",
        f"{row.weight_error:.1e}",
        f"{row.adam_error:.1e}",
        str(row.recompiles),
        f"{row.temp_bytes / 2**20:.2f}",
        f"{row.bubble:.3f}",
        collectives,
        "pass" if row.passed else "FAIL",
        row.failure or row.difference,
    )


def _row(row: "Row") -> dict[str, Any]:
    fields = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in dataclasses.asdict(row).items()
    }
    return {**fields, "difference": row.difference, "pass": row.passed}
