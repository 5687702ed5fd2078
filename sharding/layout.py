"""Where arrays live on a mesh of devices: sizes of the mesh axes and one table of logical axes.

Model code names the *logical* axes of its arrays ("batch", "heads", "ffn", ...). A `Layout` says which mesh
axes, if any, each of them is split over; nothing else in the project spells a mesh axis. JAX runs in explicit
sharding mode, so a wrong entry is an error while tracing, never a silent all-gather.
"""

import dataclasses
import math
import os
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from sharding.devices import device_mesh
from sharding.errors import UserError

# pipe: pipeline stages; data: replicas, the only axis meant to cross a slow network; fsdp: shards of batch and
# weights (ZeRO-3); tensor: shards of heads, feed-forward width and vocabulary.
MESH_AXES = ("pipe", "data", "fsdp", "tensor")

Rules = tuple[tuple[str, tuple[str, ...]], ...]

TRAINING_RULES: Rules = (
    # activations
    ("batch", ("data", "fsdp")),
    ("time", ()),
    # tokens between attention and MLP, which tensor parallelism alone would have every shard hold
    ("sequence", ("tensor",)),
    ("embed", ()),
    # weights; their width is its own axis, which is how FSDP and tensor parallelism share one table
    ("embed_weight", ("fsdp",)),
    ("stage", ("pipe",)),
    ("layer", ()),
    ("norm", ()),
    # both
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("head_dim", ()),
    ("ffn", ("tensor",)),
    # embedding and head belong to no stage: all stages share their work instead of repeating it
    ("vocab", ("tensor", "pipe")),
)

# Generation leaves a pipeline idle (arXiv 2404.00934, section 3): the same devices hold whole models instead and
# the pipe axis carries more of the batch. Last, so that every device keeps a part of the rows it had.
_GENERATION: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "pipe"),
    "sequence": (),  # of which there is one token at a time, once the prompt is read
    "stage": (),
    "vocab": ("tensor",),
}
GENERATION_RULES: Rules = tuple(
    (name, _GENERATION.get(name, axes)) for name, axes in TRAINING_RULES
)

# What a layer keeps of its forward pass for its gradient: everything; nothing but its input and what is dearest to make
# again; the results of the matrix products too; or these, but in the host's memory.
Remat = Literal["none", "full", "matmuls", "offload"]
REMATS: tuple[Remat, ...] = typing.get_args(Remat)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a program is laid out in space and time.

    Sizes of the mesh axes, the table logical axis -> mesh axes, and what is done in turn rather than at once. One size
    may be -1: whatever is left.
    """

    pipe: int = 1
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    microbatches: int = 1  # pieces a batch is cut into while it runs through the pipeline
    repeats: int = 1  # times a batch runs around the pipeline; > 1 is the circular schedule
    accumulate: int = 1  # pieces of an update's batch, one after another; gradients add up
    remat: Remat = "none"
    rules: Rules = TRAINING_RULES

    def __post_init__(self) -> None:
        for name in ("microbatches", "repeats", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"layout: {name} = {getattr(self, name)}: give a positive number")
        if self.remat not in REMATS:
            raise UserError(f"layout: remat = {self.remat!r}: choose one of {', '.join(REMATS)}")

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> size."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    @property
    def num_devices(self) -> int:
        """Devices the layout covers (after `on`)."""
        return math.prod(self.sizes.values())

    def on(self, num_devices: int) -> "Layout":
        """This layout with its -1 filled in for `num_devices`. Raises UserError where it does not fit."""
        fixed = math.prod(size for size in self.sizes.values() if size != -1)
        shape = " x ".join(f"{axis} {size}" for axis, size in self.sizes.items() if size != 1)
        if num_devices % fixed or (-1 not in self.sizes.values() and num_devices != fixed):
            need = f"a multiple of {fixed}" if -1 in self.sizes.values() else str(fixed)
            raise UserError(
                f"layout ({shape or 'one device'}) needs {need} devices but has {num_devices}: "
                f"choose another --layout or --devices"
            )
        rest = num_devices // fixed
        pipe, data, fsdp, tensor = (rest if n == -1 else n for n in self.sizes.values())
        return dataclasses.replace(self, pipe=pipe, data=data, fsdp=fsdp, tensor=tensor)

    def for_generation(self) -> "Layout":
        """The layout in which the same devices sample: no pipeline, `pipe` carries batch."""
        return self.with_rules(dict(GENERATION_RULES))

    def with_rules(self, changes: Mapping[str, tuple[str, ...]]) -> "Layout":
        """This layout with other mesh axes for some logical ones, and nothing done in turn."""
        rules = tuple((name, tuple(changes.get(name, axes))) for name, axes in self.rules)
        return dataclasses.replace(
            self, rules=rules, microbatches=1, repeats=1, accumulate=1, remat="none"
        )

    def with_whole(self, *logical: str) -> "Layout":
        """This layout with these logical axes not split."""
        rules = tuple((name, () if name in logical else axes) for name, axes in self.rules)
        return dataclasses.replace(self, rules=rules)

    def axes(self, logical: str) -> tuple[str, ...]:
        """Mesh axes of size > 1 that `logical` is split over. Raises ValueError on an unknown name."""
        for name, axes in self.rules:
            if name == logical:
                return tuple(axis for axis in axes if self.sizes[axis] > 1)
        raise ValueError(
            f"unknown logical axis {logical!r}; the table has {[name for name, _ in self.rules]}"
        )

    def ways(self, logical: str) -> int:
        """Number of pieces that `logical` is split into."""
        return math.prod(self.sizes[axis] for axis in self.axes(logical))

    def padded(self, size: int, logical: str) -> int:
        """`size` rounded up to what divides over the axes of `logical`."""
        return -(-size // self.ways(logical)) * self.ways(logical)

    def spec(self, *logical: str | None) -> PartitionSpec:
        """PartitionSpec of an array whose dimensions are named `logical` (None: not split).

        Raises ValueError on an unknown name and where two dimensions land on one mesh axis.
        """
        parts = [() if name is None else self.axes(name) for name in logical]
        flat = [axis for part in parts for axis in part]
        if len(flat) != len(set(flat)):
            raise ValueError(f"{logical} puts two dimensions on one mesh axis: {parts}")
        return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in parts))

    def mesh(self, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The mesh over `devices` (default: the first ones of the platform, those of all processes).

        Raises UserError if too few exist, or if some of several processes would stand idle.
        """
        available = jax.devices() if devices is None else devices
        if self.num_devices > len(available):
            raise UserError(
                f"the layout asks for {self.num_devices} devices but {len(available)} exist here: "
                f"lower --devices or choose another --layout"
            )
        return device_mesh(available, self.sizes)

    def put(self, tree: Any) -> Any:
        """Host arrays onto the current mesh, split along their leading "batch" dimension.

        Of each array - or whatever has a shape and answers x[slices] - a process asks for the shards of its own
        devices alone, so that what it does not hold need not be in its memory.
        """
        mesh = jax.sharding.get_mesh()

        def place(x: Any) -> jax.Array:
            spec = self.spec("batch", *[None] * (len(x.shape) - 1))
            return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), x.__getitem__)

        return jax.tree.map(place, tree)

    def pieces(self, tree: Any, count: int) -> Any:
        """Arrays [B, ...] on the current mesh, split over "batch", as `count` pieces of rows [count, B / count, ...].

        Piece i has rows i, i + count, ...: so rows stay on their device, and there is no all-to-all.
        """

        def split(x: jax.Array) -> jax.Array:
            shape = (x.shape[0] // count, count, *x.shape[1:])
            spec = PartitionSpec(*self.spec("batch", None), *jax.typeof(x).sharding.spec[1:])
            rows = jnp.reshape(x, shape, out_sharding=spec)
            return jnp.moveaxis(rows, 1, 0)

        return jax.tree.map(split, tree)

    def check_batch(self, size: int, name: str) -> None:
        """Raise UserError unless a batch of `size` rows divides over replicas, shards and microbatches."""
        if size < 1:
            raise UserError(f"{name} = {size} is out of range: give 1 or more")
        pieces = self.ways("batch") * self.microbatches * self.accumulate
        if size % pieces:
            added = f" x {self.accumulate} accumulated pieces" if self.accumulate > 1 else ""
            raise UserError(
                f"{name} = {size} does not divide over {self.ways('batch')} batch shards x {self.microbatches} "
                f"microbatches{added}: make it a multiple of {pieces}"
            )


LAYOUTS: Mapping[str, Layout] = {
    "single": Layout(),
    "dp": Layout(data=-1),
    "fsdp": Layout(fsdp=-1),
    "tp": Layout(tensor=-1),
    "dp_tp": Layout(data=-1, tensor=2),
    "fsdp_tp": Layout(fsdp=-1, tensor=2),
    "hsdp": Layout(data=2, fsdp=-1),
    "pp_dp_tp": Layout(pipe=2, data=-1, tensor=2, microbatches=2),
}


def get_layout(name: str, num_devices: int | None) -> Layout:
    """The entry `name` of LAYOUTS, or the layout that `name` spells, sized for `num_devices`.

    None: as many as it can use of those there are. Raises UserError on an unknown name or a misfit.
    """
    try:
        layout = LAYOUTS[name] if name in LAYOUTS else parse_layout(name)
        if num_devices is None:
            open_ended = -1 in layout.sizes.values()
            num_devices = len(jax.devices()) if open_ended else layout.num_devices
        return layout.on(num_devices)
    except UserError as error:
        raise UserError(f"--layout {name}: {error}") from None


def parse_layout(text: str) -> Layout:
    """The layout spelt PIPExDATAxFSDPxTENSOR[:SCHEDULE[:MICROBATCHES[:REPEATS]]], such as 2x1x2x2:circular:4:2.

    SCHEDULE is gpipe or circular; there are as many microbatches as stages, and two repeats of the circular
    schedule, where the spelling does not say. Raises UserError.
    """
    sizes, *options = text.split(":")
    try:
        pipe, data, fsdp, tensor = (int(size) for size in sizes.split("x"))
        schedule = options[0] if options else "gpipe"
        numbers = [int(number) for number in options[1:]]
        if schedule not in ("gpipe", "circular") or len(numbers) > 2:
            raise ValueError
    except ValueError:
        raise UserError(
            f"unknown layout {text!r}: choose one of {', '.join(LAYOUTS)}, or spell it "
            f"PIPExDATAxFSDPxTENSOR[:gpipe|circular[:MICROBATCHES[:REPEATS]]]"
        ) from None
    if min(pipe, data, fsdp, tensor) < 1:
        raise UserError("the sizes of the mesh axes must be positive")
    microbatches, repeats = (*numbers, *(pipe, 2 if schedule == "circular" else 1)[len(numbers) :])
    if (schedule == "circular") != (repeats > 1):
        raise UserError(
            f"{schedule} with {repeats} repeats: gpipe goes around once, circular more often"
        )
    return Layout(pipe, data, fsdp, tensor, microbatches=microbatches, repeats=repeats)


def spell_layout(layout: Layout) -> str:
    """What `parse_layout` reads as this layout; schedules only where there is a pipeline."""
    sizes = "x".join(str(size) for size in layout.sizes.values())
    if layout.pipe == 1:
        return sizes
    schedule = "circular" if layout.repeats > 1 else "gpipe"
    return ":".join([sizes, schedule, str(layout.microbatches), str(layout.repeats)])


def factorisations(num_devices: int) -> Iterator[Layout]:
    """Every layout of the four axes over `num_devices` devices, with both schedules where there is a pipeline."""

    def divisors(n: int) -> list[int]:
        return [size for size in range(1, n + 1) if n % size == 0]

    for pipe in divisors(num_devices):
        for data in divisors(num_devices // pipe):
            for fsdp in divisors(num_devices // (pipe * data)):
                tensor = num_devices // (pipe * data * fsdp)
                yield Layout(pipe, data, fsdp, tensor, microbatches=pipe)
                if pipe > 1:
                    yield Layout(pipe, data, fsdp, tensor, microbatches=pipe, repeats=2)


THREADS_PER_DEVICE = 4  # collectives that may wait at a time on a simulated device


def use_devices(count: int | None, processes: int = 1) -> None:
    """Simulate `count` devices in all `processes` where JAX runs on CPU; None leaves what the platform has.

    XLA has as many threads as there are processors or simulated devices, and a collective holds one of each device's
    until the other devices come. Where two collectives do not depend on each other, the devices may begin with
    different ones, and then nobody comes: with 8 devices on 2 processors it was seen to end in a time-out. NPROC is
    XLA's own name for how many threads to make.

    Raises UserError where `count` is not positive or does not divide over the processes, or where JAX has already
    counted its devices.
    """
    if count is None or count == jax.config.values["jax_num_cpu_devices"]:
        return
    if count < 1:
        raise UserError(f"--devices {count}: give a positive number")
    if count % processes:
        raise UserError(
            f"--devices {count} does not divide over {processes} processes: it counts those of all of them"
        )
    os.environ.setdefault(
        "NPROC", str(max(THREADS_PER_DEVICE * count // processes, os.cpu_count() or 1))
    )
    try:
        jax.config.update("jax_num_cpu_devices", count // processes)
    except RuntimeError as error:
        raise UserError(
            f"--devices {count}: JAX has counted its devices already (a recipe must not use it while it is read)"
        ) from error
