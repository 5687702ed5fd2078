"""Which device stands where in a mesh, so that the axes that talk most stay within a host or slice."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from sharding.errors import UserError

Devices = Sequence[Any]  # jax.Device, or what has its attributes


def device_mesh(devices: Devices, sizes: Mapping[str, int]) -> Mesh:
    """The mesh of `sizes` (axis -> size, pipe, data, fsdp and tensor) over the first of `devices`.

    On one host, and in one TPU slice, JAX knows the best order; elsewhere it is that of `device_grid`. Raises UserError
    as `device_grid` does, and where some of several processes would stand idle.
    """
    count = math.prod(sizes.values())
    processes = len({device.process_index for device in devices})
    if processes > 1 and count < len(devices):
        raise UserError(
            f"the layout covers {count} of the {len(devices)} devices of {processes} processes: "
            f"choose a --layout that covers all, or start fewer processes"
        )
    devices = devices[:count]
    if num_slices(devices) > 1 or (processes > 1 and devices[0].platform != "tpu"):
        types = (AxisType.Explicit,) * len(sizes)
        return Mesh(device_grid(devices, sizes), tuple(sizes), axis_types=types)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices)


def mesh_platform() -> str | None:
    """What the current mesh's devices are, described ones too: "cpu", "tpu", "cuda", ...; None where it has none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return None
    # JAX calls the GPUs of both makers by one name
    is_cuda = device.platform == "gpu" and "AMD" not in device.device_kind
    return "cuda" if is_cuda else device.platform


def num_slices(devices: Devices) -> int:
    """TPU slices, between which there is only the data centre's network; 1 for other devices."""
    # on GPUs JAX numbers something else by this name, and described TPUs may have none
    tpus = [d for d in devices if d.platform == "tpu" and hasattr(d, "slice_index")]
    return len({d.slice_index for d in tpus}) or 1


def device_grid(devices: Devices, sizes: Mapping[str, int]) -> np.ndarray:
    """Devices [pipe, data, fsdp, tensor] of several hosts or slices: `data` crosses them first, `tensor` last.

    Raises UserError where `data` cannot be what crosses slices, or where hosts have different numbers of devices.
    """
    per_process = Counter(d.process_index for d in devices)
    if len(set(per_process.values())) > 1:
        counts = ", ".join(f"{count} on process {p}" for p, count in sorted(per_process.items()))
        raise UserError(
            f"the processes have different numbers of devices: {counts}: make them equal"
        )
    slices = num_slices(devices)
    if slices == 1:
        # processes in turn, and in each its devices: what varies slowest crosses hosts
        ordered = np.array(sorted(devices, key=lambda d: (d.process_index, d.id)))
        outermost = ("data", "pipe", "fsdp", "tensor")
        grid = ordered.reshape([sizes[axis] for axis in outermost])
        return grid.transpose([outermost.index(axis) for axis in sizes])
    if sizes["data"] % slices:
        raise UserError(
            f"{slices} TPU slices but data {sizes['data']}: only the data axis may cross slices, choose a layout whose "
            f"data is a multiple of {slices}"
        )
    across = {axis: slices if axis == "data" else 1 for axis in sizes}
    within = [size // across[axis] for axis, size in sizes.items()]
    # as jax.make_mesh does: this generation's slices are meshes without wrap-around in one dimension
    split = "v5 lite" in devices[0].device_kind or "v5e" in devices[0].device_kind
    return mesh_utils.create_hybrid_device_mesh(
        within, list(across.values()), devices, allow_split_physical_axes=split
    )
