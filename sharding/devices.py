"""Which device stands where in a mesh, so that the axes that talk most stay within a host or slice."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from sharding.chips import Pod
from sharding.errors import UserError

Devices = Sequence[Any]  # jax.Device, or what has its attributes


def device_mesh(devices: Devices, sizes: Mapping[str, int]) -> Mesh:
    """The mesh of `sizes` (axis -> size, pipe, data, fsdp and tensor) over the first of `devices`.

    On one host without TPUs JAX knows the best order; elsewhere it is that of `device_grid`. Raises UserError as
    `device_grid` does, and where some of several processes would stand idle.
    """
    count = math.prod(sizes.values())
    processes = len({device.process_index for device in devices})
    if processes > 1 and count < len(devices):
        raise UserError(
            f"the layout covers {count} of the {len(devices)} devices of {processes} processes: "
            f"choose a --layout that covers all, or start fewer processes"
        )
    devices = devices[:count]
    if processes > 1 or devices[0].platform == "tpu":
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


def places(grid: np.ndarray, pod: Pod) -> list[int]:
    """Where on the pod each device of a program stands, as `sharding.network` numbers them.

    A program's devices are those of the mesh `grid` in order, those of a slice before the next one's.
    """
    devices = grid.reshape(-1).tolist()
    if devices[0].platform != "tpu":
        hosts = sorted(devices, key=lambda device: (device.process_index, device.id))
        return [hosts.index(device) for device in devices]
    if pod.slices > 1:
        devices.sort(key=lambda device: device.slice_index)
    corner = np.min([device.coords for device in devices], axis=0)
    return [_place(device, corner, pod) for device in devices]


def _place(device: Any, corner: np.ndarray, pod: Pod) -> int:
    coordinates = (np.array(device.coords) - corner)[: len(pod.sides)]
    chip = int(np.ravel_multi_index(coordinates, pod.sides))
    within = chip * pod.chip.per_chip + device.core_on_chip % pod.chip.per_chip
    return within + (device.slice_index * pod.slice_devices if pod.slices > 1 else 0)


def device_grid(devices: Devices, sizes: Mapping[str, int]) -> np.ndarray:
    """Devices [pipe, data, fsdp, tensor] of several hosts or TPU slices: `data` crosses them first, `tensor` last.

    Raises UserError where `data` cannot be what crosses slices, where hosts have different numbers of devices, and
    where the TPUs are no box of a torus.
    """
    per_process = Counter(d.process_index for d in devices)
    if len(set(per_process.values())) > 1:
        counts = ", ".join(f"{count} on process {p}" for p, count in sorted(per_process.items()))
        raise UserError(
            f"the processes have different numbers of devices: {counts}: make them equal"
        )
    if devices[0].platform == "tpu":
        return _torus_grid(devices, sizes)
    # processes in turn, and in each its devices: what varies slowest crosses hosts
    ordered = np.array(sorted(devices, key=lambda d: (d.process_index, d.id)))
    outermost = ("data", "pipe", "fsdp", "tensor")
    grid = ordered.reshape([sizes[axis] for axis in outermost])
    return grid.transpose([outermost.index(axis) for axis in sizes])


def _torus_grid(devices: Devices, sizes: Mapping[str, int]) -> np.ndarray:
    """As JAX lays axes over the torus of a slice, those that talk most last."""
    slices = num_slices(devices)
    if sizes["data"] % slices:
        raise UserError(
            f"{slices} TPU slices but data {sizes['data']}: only the data axis may cross slices, choose a layout whose "
            f"data is a multiple of {slices}"
        )
    order = tuple(sizes)
    if sizes["tensor"] > 1:
        # vocabularies are split over pipe and tensor: with others between them on one side of the torus, the compiler
        # of TPUs has no way for what they gather
        order = ("data", "fsdp", "pipe", "tensor")
    across = [slices if axis == "data" else 1 for axis in order]
    within = [sizes[axis] // over for axis, over in zip(order, across, strict=True)]
    try:
        if slices == 1:
            grid = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
        else:
            grid = mesh_utils.create_hybrid_device_mesh(
                within, across, devices, allow_split_physical_axes=True
            )
    except AssertionError:
        raise UserError(
            f"the {len(devices)} TPUs of the layout are no box of their torus: choose a --layout that covers all"
        ) from None
    return grid.transpose([order.index(axis) for axis in sizes])
