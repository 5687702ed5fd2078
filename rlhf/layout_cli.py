"""The command `glm-jax explain`, and layouts and presets by name."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from sharding.errors import UserError

if TYPE_CHECKING:  # slow to import, and --help has no use for them
    from glm_jax.config import Config
    from glm_jax.explain import Explanation, Placed
    from sharding.layout import Layout

Job = Callable[[], int | None]


def add_commands(app: tyro.extras.SubcommandApp) -> None:
    """Add the command; its docstring is what --help prints."""

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
    """The layouts that --layouts names, by the names to print; all, named and default are lists. Raises UserError."""
    from sharding.layout import LAYOUTS, Layout, factorisations, get_layout, spell_layout

    found: dict[str, Layout] = {}
    for name in names:
        if name == "all":
            found |= {spell_layout(layout): layout for layout in factorisations(devices)}
        elif name in ("named", "default"):
            found |= {n: get_layout(n, devices) for n in LAYOUTS if n != "single"}
            if name == "default":
                stages = Layout(pipe=2, fsdp=-1, microbatches=2).on(devices)
                around = Layout(pipe=2, data=-1, tensor=2, microbatches=2, repeats=2).on(devices)
                found |= {spell_layout(layout): layout for layout in (stages, around)}
        else:
            found[name] = get_layout(name, devices)
    return found


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
