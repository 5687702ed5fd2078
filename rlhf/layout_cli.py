"""The commands of `glm-jax` that concern layouts: certify and explain."""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from sharding.errors import UserError

if TYPE_CHECKING:  # slow to import, and --help has no use for them
    from glm_jax.config import Config
    from glm_jax.explain import Explanation, Placed
    from rlhf.certify import Row
    from sharding.layout import Layout

Job = Callable[[], int | None]


def add_commands(app: tyro.extras.SubcommandApp) -> None:
    """Add the commands; their docstrings are what --help prints."""

    @app.command
    def certify(
        layouts: tuple[str, ...] = ("named",),
        jobs: str = "sft,reward,dpo,ppo,grpo",
        model: str = "chatglm3-6b",
        devices: int = 8,
        json: Path | None = None,
    ) -> Job:
        """Prove that training does not depend on the layout: three steps against one device, in float32.

        Exit 1 unless losses agree within 1e-6, gradients within 5e-5, weights within 1e-5, and nothing recompiles.

        Args:
            layouts: Names, PIPExDATAxFSDPxTENSOR[:gpipe|circular[:MICROBATCHES[:REPEATS]]], all (every factorisation
                of the devices with both schedules), or named (every name).
            jobs: Some of sft, reward, dpo, ppo, grpo.
            model: A preset; a tiny model of its architecture is trained.
            devices: On a CPU, how many devices to simulate.
            json: Write the table there too.
        """
        return partial(_certify, layouts, jobs, model, devices, json)

    @app.command
    def explain(
        model: str,
        layout: str,
        devices: int | None = None,
        batch: int | None = None,
        length: int = 2048,
        json: Path | None = None,
    ) -> Job:
        """Tell where every parameter and main activation lies, and the bytes of it on a device.

        Args:
            model: A preset.
            layout: A name or PIPExDATAxFSDPxTENSOR[:gpipe|circular[:MICROBATCHES[:REPEATS]]].
            devices: How many to lay it out on; they need not exist.
            batch: Rows of an update; default: one a batch shard and microbatch.
            length: Tokens of a row.
            json: Write it there too.
        """
        return partial(_explain, model, layout, devices, batch, length, json)


def preset(name: str) -> "Config":
    """The preset of this name. Raises UserError with the nearest names where there is none."""
    import difflib

    from glm_jax.config import PRESETS

    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 3) or list(PRESETS)
        raise UserError(f"unknown model {name!r}: did you mean {', '.join(near)}?")
    return PRESETS[name]


def find_layouts(names: Sequence[str], devices: int) -> "dict[str, Layout]":
    """The layouts that --layouts names, all and named included, as they are to be called. Raises UserError."""
    from sharding.layout import LAYOUTS, factorisations, get_layout, spell_layout

    found: dict[str, Layout] = {}
    for name in names:
        if name == "all":
            found |= {spell_layout(layout): layout for layout in factorisations(devices)}
        elif name == "named":
            found |= {n: get_layout(n, devices) for n in LAYOUTS if n != "single"}
        else:
            found[name] = get_layout(name, devices)
    return found


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


def _certify(names: Sequence[str], jobs: str, model: str, devices: int, json: Path | None) -> int:
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
    config = tiny(preset(model))
    use_devices(devices)
    layouts = find_layouts(names, devices)
    console = Console()
    rows = []
    with _programs_kept():
        console.print(_line(*HEADINGS), soft_wrap=True, highlight=False)
        for row in certify(config, layouts, chosen):
            rows.append(row)
            style = None if row.passed else "bold red"
            console.print(_cells(row), style=style, soft_wrap=True, highlight=False, markup=False)
    passed = sum(row.passed for row in rows)
    console.print(f"{passed} of {len(rows)} pass", highlight=False)
    if json is not None:
        report = {"model": model, "rows": [_row(row) for row in rows], "pass": passed == len(rows)}
        write_json(json, report)
    return 0 if passed == len(rows) else 1


HEADINGS = (
    "layout",
    "job",
    "loss",
    "gradient",
    "weights",
    "recompiled",
    "MiB",
    "bubble",
    "collectives",
    "",
    "largest gradient error in",
)


def _line(*cells: str) -> str:
    widths = (20, 7, 8, 8, 8, 10, 6, 6, 40, 5, 0)
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
        str(row.recompiles),
        f"{row.temp_bytes / 2**20:.2f}",
        f"{row.bubble:.3f}",
        collectives,
        "pass" if row.passed else "FAIL",
        row.failure or row.grad_worst.lstrip("."),
    )


def _row(row: "Row") -> dict[str, Any]:
    fields = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in dataclasses.asdict(row).items()
    }
    return {**fields, "pass": row.passed}


def _explain(
    model: str, name: str, devices: int | None, batch: int | None, length: int, json: Path | None
) -> None:
    from rich.console import Console
    from rich.table import Table

    from glm_jax.explain import explain
    from sharding.disk.directory import write_json
    from sharding.layout import get_layout

    config = preset(model)
    layout = get_layout(name, devices)
    rows = batch or layout.ways("batch") * layout.microbatches
    found = explain(config, layout, rows, length)
    console = Console(soft_wrap=True)
    table = Table("array", "dimensions: logical axis > mesh axes", "bytes a device", "replicas")
    for array in (*found.parameters, *found.activations):
        sizes = zip(array.shape, array.axes, strict=True)
        dimensions = ", ".join(_dimension(size, axis, array) for size, axis in sizes)
        cells = (array.name.lstrip("."), dimensions, f"{array.bytes_per_device:,}")
        table.add_row(*cells, str(array.replicas))
    console.print(table)
    for what, count in _totals(found).items():
        console.print(
            f"{what:10} {count:16,} bytes a device  {count / 2**30:8.2f} GiB", highlight=False
        )
    if json is not None:
        write_json(
            json,
            {
                "model": model,
                "layout": name,
                "devices": layout.num_devices,
                "batch": rows,
                "length": length,
                "parameters": [_array(x) for x in found.parameters],
                "activations": [_array(x) for x in found.activations],
                "bytes_per_device": _totals(found),
            },
        )


def _dimension(size: int, axis: str | None, array: "Placed") -> str:
    split = f" > {'.'.join(array.rules[axis])}" if axis and axis in array.rules else ""
    return f"{size} {axis}{split}" if axis else str(size)


def _totals(found: "Explanation") -> dict[str, int]:
    return {
        "weights": found.weights,
        "gradients": found.gradients,
        "optimizer": found.optimizer,
        "together": found.weights + found.gradients + found.optimizer,
    }


def _array(array: "Placed") -> dict[str, Any]:
    return {**dataclasses.asdict(array), "spec": [str(part) for part in array.spec]}
