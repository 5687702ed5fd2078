"""What is predicted of the programs that are measured, for devices whose figures are known."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sharding.chips import Pod, chip_of
from sharding.devices import num_slices, places
from sharding.hlo import Module
from sharding.schedule import estimate


def attached_pod(devices: Sequence[Any]) -> Pod | None:
    """The pod that these devices (jax.Device) are; None where their chip's figures are not known, as of a CPU's."""
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        return None
    if not chip.dims:
        hosts = len({device.process_index for device in devices})
        return Pod(chip, (hosts, len(devices) // hosts))
    coords = np.array([device.coords for device in devices])
    sides = coords.max(axis=0) - coords.min(axis=0) + 1
    return Pod(chip, tuple(sides.tolist()[: chip.dims]), num_slices(devices))


def predicted_seconds(module: Module, grid: np.ndarray, pod: Pod | None) -> float | None:
    """Seconds of one run of a program on a pod, on a mesh of these devices; None where nothing is known of it."""
    return None if pod is None else estimate(module, pod, places(grid, pod)).step_s


def utilisation(flops: int, seconds: float, devices: int, pod: Pod | None) -> float | None:
    """The share of the devices' peak that so many FLOPs in so many seconds are; None where no peak is known."""
    return None if pod is None else pod.chip.utilisation(flops, seconds, devices)
