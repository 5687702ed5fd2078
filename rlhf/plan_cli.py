"""The commands of `glm-jax` that tell what programs take: cost."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from sharding.errors import UserError

if TYPE_CHECKING:  # slow to import, and --help has no use for them
    from rich.console import Console

    from sharding.chips import Pod
    from sharding.collectives import Collective
    from sharding.cost import Cost
    from sharding.hlo import Module
    from sharding.schedule import Estimate

Job = Callable[[], int | None]


def add_commands(app: tyro.extras.SubcommandApp) -> None:
    """Add the commands; their docstrings are what --help prints."""

    @app.command
    def cost(
        program: tyro.conf.Positional[Path],
        pod: str | None = None,
        model_flops: float | None = None,
        mesh: str | None = None,
        json: Path | None = None,
    ) -> Job:
        """Tell what a compiled program takes of every device: products, memory traffic, collectives, and seconds.

        All of it is read from the text of any program, for TPUs, GPUs or CPUs, of any stack; nothing is run. Every
        loop's body counts as often as it runs. With --pod its schedule is walked against the limits of the chip.

        Args:
            program: A file with what `compiled.as_text()` prints, compressed with gzip or not.
            pod: The pod it was compiled for, such as v5e:16x16, v5p:4x4x4, v5e:16x16:2 (two slices) or h100:64.
            model_flops: Floating point operations that the model asks for, of all devices together: gives the MFU.
            mesh: Axes of its mesh and their sizes in order, such as data=2,fsdp=128, to name those of collectives.
            json: Write it there too.
        """
        return partial(_cost, program, pod, model_flops, mesh, json)


def _cost(
    path: Path, pod_name: str | None, model_flops: float | None, mesh: str | None, json: Path | None
) -> None:
    from rich.console import Console

    from sharding.chips import find_pod
    from sharding.cost import cost, read_file
    from sharding.disk.directory import write_json
    from sharding.schedule import estimate

    pod = None if pod_name is None else find_pod(pod_name)
    if model_flops is not None and pod is None:
        raise UserError("--model-flops asks for the share of a chip's peak: give its --pod too")
    module = read_file(path)
    sizes = None if mesh is None else _mesh(mesh, module.num_partitions)
    found = cost(module)
    seconds = None if pod is None else estimate(module, pod)
    mfu = None
    if pod is not None and seconds is not None and model_flops is not None:
        mfu = model_flops / (seconds.step_s * pod.chip.flops * module.num_partitions)
    _print(Console(soft_wrap=True, highlight=False), module, found, pod, seconds, mfu)
    if json is not None:
        write_json(json, _report(module, found, pod, seconds, mfu, sizes))


def _mesh(text: str, devices: int) -> dict[str, int]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        sizes = {name: int(size) for name, size in pairs}
    except ValueError:
        raise UserError(f"--mesh {text}: spell it NAME=SIZE,NAME=SIZE") from None
    count = math.prod(sizes.values())
    if count != devices:
        raise UserError(f"--mesh {text} has {count} devices but the program runs on {devices}")
    return sizes


def _print(
    console: "Console",
    module: "Module",
    found: "Cost",
    pod: "Pod | None",
    seconds: "Estimate | None",
    mfu: float | None,
) -> None:
    from rich.table import Table

    if found.loops:
        loops = Table("loop", "rounds", "begun")
        for loop in found.loops:
            rounds = "?" if loop.trips is None else str(loop.trips)
            loops.add_row(loop.name, rounds, str(loop.times))
        console.print(loops)
    if found.collectives:
        timed = {x.collective.name: x for x in seconds.collectives} if seconds else {}
        rows: dict[tuple[str, int], list[Any]] = {}
        for x in found.collectives:
            row = rows.setdefault((x.kind, x.group_size), [0, 0, 0, 0.0, 0.0])
            row[0] += 1
            row[1] += x.times
            row[2] += x.times * x.sent_bytes
            if x.name in timed:
                row[3] += timed[x.name].seconds
                row[4] += timed[x.name].exposed_seconds
        headings = ["collective", "group", "instructions", "runs", "bytes sent"]
        table = Table(*headings, *(["seconds", "exposed"] if seconds else []))
        for (kind, size), (count, runs, sent, *times) in sorted(rows.items()):
            cells = [str(size), f"{count:,}", f"{runs:,}", f"{sent:,}"]
            table.add_row(kind, *cells, *(f"{time:.4f}" for time in times if seconds))
        console.print(table)
    console.print(
        f"{module.name} on {module.num_partitions} devices: of each {found.flops:,} FLOPs of products, "
        f"{found.memory_bytes:,} bytes through memory, {found.sent_bytes:,} bytes sent"
    )
    if unknown := [loop.name for loop in found.loops if loop.trips is None]:
        console.print(f"rounds not known, counted once: {', '.join(unknown)}")
    if found.kernels:
        runs = ", ".join(f"{target} ({runs:,})" for target, runs in found.kernels.items())
        console.print(f"custom calls (runs), whose products are not known: {runs}")
    if seconds is not None and pod is not None:
        console.print(
            f"predicted on {pod.name}: {seconds.step_s:.4f} s = products {seconds.products_s:.4f} + attention kernels "
            f"{seconds.kernels_s:.4f} + waiting for memory {seconds.memory_s:.4f} + for others {seconds.exposed_s:.4f}"
        )
    if mfu is not None:
        console.print(f"model FLOPs utilisation: {mfu:.1%}")


def _report(
    module: "Module",
    found: "Cost",
    pod: "Pod | None",
    seconds: "Estimate | None",
    mfu: float | None,
    sizes: Mapping[str, int] | None,
) -> dict[str, Any]:
    timed = {x.collective.name: x for x in seconds.collectives} if seconds else {}

    def one(x: "Collective") -> dict[str, Any]:
        times = timed.get(x.name)
        return {
            "kind": x.kind,
            "name": x.name,
            "group": x.group_size,
            "axes": None if sizes is None else list(x.axes(sizes)),
            "times": x.times,
            "bytes": x.num_bytes,
            "sent_bytes": x.sent_bytes,
            "seconds": times and times.seconds,
            "exposed_seconds": times and times.exposed_seconds,
        }

    return {
        "program": module.name,
        "devices": module.num_partitions,
        "pod": pod and pod.name,
        "step_s": seconds and seconds.step_s,
        "products_s": seconds and seconds.products_s,
        "kernels_s": seconds and seconds.kernels_s,
        "memory_s": seconds and seconds.memory_s,
        "exposed_s": seconds and seconds.exposed_s,
        "mfu": mfu,
        "flops": found.flops,
        "hbm_bytes": found.memory_bytes,
        "sent_bytes": found.sent_bytes,
        "custom_calls": dict(found.kernels),
        "while_loops": [dataclasses.asdict(loop) for loop in found.loops],
        "collectives": [one(x) for x in found.collectives],
    }
