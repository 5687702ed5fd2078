"""The commands of `glm-jax` that tell what programs take on a pod: cost and plan."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tyro

from sharding.errors import UserError

if TYPE_CHECKING:  # slow to import, and --help has no use for them
    from rich.console import Console

    from glm_jax.config import Config
    from rlhf.plan.plan import Judged
    from sharding.chips import Pod
    from sharding.collectives import Collective
    from sharding.cost import Cost
    from sharding.hlo import Module
    from sharding.schedule import Estimate

Job = Callable[[], int | None]
WIDTH = 180  # columns of what is no terminal


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

    @app.command
    def plan(
        model: str,
        pod: str,
        job: Literal["sft", "reward", "dpo", "ppo"] = "sft",
        batch: int = 256,
        prompt_length: int = 1024,
        response_length: int = 1024,
        objective: Literal["time", "memory", "smallest"] = "time",
        top: int = 10,
        jobs: int = 1,
        rough: bool = False,
        cache: Path = Path("~/.cache/glm-jax/programs"),
        json: Path | None = None,
        html: Path | None = None,
        recipe: Path | None = None,
    ) -> Job:
        """Find the best layouts of a job on a pod that nobody has here, or the smallest pod that fits it.

        Every layout is counted roughly; the best are compiled by the real compiler, of TPUs or of GPUs, which says what
        memory they take, and their schedules are walked against the limits of the chip. Programs are compiled once:
        the next plan reads them. Interrupted, those that were compiled are kept.

        Args:
            model: A preset, or the directory of a model.
            pod: Such as v5e:16x16, v5p:4x4x4, v5e:16x16:2 (two slices) or h100:64.
            job: What is trained.
            batch: Sequences of an update (sft), pairs (reward, dpo), answers of an iteration (ppo).
            prompt_length: Tokens of a prompt.
            response_length: Tokens of an answer.
            objective: Shortest step, least memory, or the smallest pod of this kind of chip.
            top: Layouts that fit to find; those that turn out not to are shown beside them.
            jobs: Compilers at a time; each takes about 2 GB.
            rough: Ask no compiler.
            cache: Where compiled programs are kept.
            json: Write the plan there too.
            html: Write a page with pictures there.
            recipe: Write the best layout there as a recipe that `glm-jax run` accepts.
        """
        asked = _Asked(model, pod, job, batch, prompt_length, response_length, objective, top)
        return partial(
            _plan, asked, jobs, None if rough else cache.expanduser(), json, html, recipe
        )


class _Asked(NamedTuple):
    """What a plan is asked for."""

    model: str
    pod: str
    job: str
    batch: int
    prompt_length: int
    response_length: int
    objective: Literal["time", "memory", "smallest"]
    top: int


def _plan(
    asked: _Asked,
    workers: int,
    cache: Path | None,
    json: Path | None,
    page: Path | None,
    recipe: Path | None,
) -> None:
    from rich.console import Console

    from rlhf.plan.page import plan_table, report, write_page
    from rlhf.plan.plan import Task, plan, smallest
    from rlhf.plan.recipe import write_recipe
    from rlhf.programs import Workload
    from sharding.chips import find_pod
    from sharding.described import compiler_version, missing_compiler
    from sharding.disk.directory import write_json

    # a table's columns do not become narrower for a file
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    pod, config = find_pod(asked.pod), _model(asked.model)
    work = Workload(asked.batch, asked.prompt_length, asked.response_length)
    task = Task(asked.job, asked.model, config, work, asked.objective)
    for name, number in (("--top", asked.top), ("--jobs", workers)):
        if number < 1:
            raise UserError(f"{name} {number}: give a positive number")
    if cache is not None and compiler_version(pod.chip) is None:
        why = f"{missing_compiler(pod.chip)}: layouts are counted from shapes alone"
        console.print(why, markup=False)
        cache = None
    with _progress(console) as heard:
        if asked.objective == "smallest":
            found = smallest(task, pod, cache, workers, heard)
        else:
            found = plan(task, pod, cache, asked.top, workers, heard)
    console.print(plan_table(found))
    if json is not None:
        write_json(json, report(found))
    if page is not None:
        write_page(found, page)
    if found.best is None:
        raise UserError(
            f"of {len(found.judged)} layouts compiled none fits on {found.pod.name}: raise --top"
        )
    if recipe is not None:
        write_recipe(found, recipe)
        console.print(f"recipe: {recipe}")


@contextmanager
def _progress(console: "Console") -> "Iterator[Callable[[int, int, Judged], None]]":
    """A bar of the candidates compiled so far."""
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        shown = bar.add_task("compiling", total=None)
        yield lambda done, count, one: bar.update(
            shown, completed=done, total=count, description=one.candidate.name
        )


def _model(name: str) -> "Config":
    """A preset in bfloat16, or the shape of the model in a directory."""
    from glm_jax.checkpoint import read_shape
    from rlhf.layout_cli import preset
    from sharding.disk.paths import absolute

    config = read_shape(path) if (path := absolute(Path(name))).is_dir() else preset(name)
    return dataclasses.replace(config, compute_dtype="bfloat16")


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
        mfu = pod.chip.utilisation(model_flops, seconds.step_s, module.num_partitions)
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
        "estimated_cycles": found.cycles,
        "sent_bytes": found.sent_bytes,
        "custom_calls": dict(found.kernels),
        "while_loops": [dataclasses.asdict(loop) for loop in found.loops],
        "collectives": [one(x) for x in found.collectives],
    }
