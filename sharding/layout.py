"""Where arrays live on a mesh of devices: sizes of the mesh axes and one table of logical axes.

Model code names the *logical* axes of its arrays ("batch", "heads", "ffn", ...). A `Layout` says which mesh
axes, if any, each of them is split over; nothing else in the project spells a mesh axis. JAX runs in explicit
sharding mode, so a wrong entry is an error while tracing, never a silent all-gather.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
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
# the pipe axis carries more of the batch.
GENERATION_RULES: Rules = tuple(
    (name, {"batch": ("pipe", "data", "fsdp"), "stage": (), "vocab": ("tensor",)}.get(name, axes))
    for name, axes in TRAINING_RULES
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes, and the table logical axis -> mesh axes. One size may be -1: whatever is left."""

    pipe: int = 1
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    microbatches: int = 1  # pieces a batch is cut into while it runs through the pipeline
    rules: Rules = TRAINING_RULES

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
        return dataclasses.replace(self, rules=GENERATION_RULES, microbatches=1)

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

    def check_batch(self, size: int, name: str) -> None:
        """Raise UserError unless a batch of `size` rows divides over replicas, shards and microbatches."""
        pieces = self.ways("batch") * self.microbatches
        if size % pieces:
            raise UserError(
                f"{name} = {size} does not divide over {self.ways('batch')} batch shards x {self.microbatches} "
                f"microbatches: make it a multiple of {pieces}"
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
    """The entry `name` of LAYOUTS, sized for `num_devices` (None: all there are, if it can use them).

    Raises UserError on an unknown name or a misfit.
    """
    if name not in LAYOUTS:
        raise UserError(f"unknown layout {name!r}: choose one of {', '.join(LAYOUTS)}")
    layout = LAYOUTS[name]
    if num_devices is None:
        num_devices = len(jax.devices()) if -1 in layout.sizes.values() else layout.num_devices
    try:
        return layout.on(num_devices)
    except UserError as error:
        raise UserError(f"--layout {name}: {error}") from None


def use_devices(count: int | None, processes: int = 1) -> None:
    """Simulate `count` devices in all `processes` where JAX runs on CPU; None leaves what the platform has.

    Raises UserError where `count` is not positive or does not divide over the processes, or where JAX has already
    counted its devices.
    """
    if count is None:
        return
    if count < 1:
        raise UserError(f"--devices {count}: give a positive number")
    if count % processes:
        raise UserError(
            f"--devices {count} does not divide over {processes} processes: it counts those of all of them"
        )
    try:
        jax.config.update("jax_num_cpu_devices", count // processes)
    except RuntimeError as error:
        raise UserError(
            f"--devices {count}: JAX has counted its devices already (a recipe must not use it while it is read)"
        ) from error
