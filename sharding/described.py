"""Compile programs for pods that nobody has here: the compilers of TPUs and of NVIDIA's GPUs run without one.

JAX must not have started when `ENVIRONMENT` is set, so what compiles does so in a process of its own.
"""

import contextlib
import importlib.metadata
import re
from collections.abc import Mapping
from typing import Any

import jax

from sharding.chips import GIB, Chip, Pod
from sharding.errors import UserError
from sharding.gpus import target

# libtpu looks for its machine's metadata, asks for a TPU and a lock, and writes logs, unless it is told; CUDA's plugin
# takes GPUs that there are
ENVIRONMENT: Mapping[str, str] = {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "-1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}

_CUDAS = ("cuda13", "cuda12")  # that JAX has plugins for
_NEEDED = re.compile(r"\(?([\d.]+)([KMGT]?)\)? exceeds available HBM \(([\d.]+)([KMGT]?)\)")
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


class OutOfMemory(UserError):
    """The compiler's verdict that a program does not fit; bytes of one device."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(
            f"the program needs {needed / GIB:.2f} GiB of the {available / GIB:.2f} GiB of a device"
        )
        self.needed = needed
        self.available = available


def compiler_version(chip: Chip) -> str | None:
    """That of libtpu, or of JAX's plugin for CUDA after CUDA's own; None where it is not installed."""
    packages = {"libtpu": ""} if chip.dims else {f"jax-{x}-plugin": f"{x} " for x in _CUDAS}
    for package, cuda in packages.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return cuda + importlib.metadata.version(package)
    return None


def missing_compiler(chip: Chip) -> str:
    """What to tell where there is none for such devices."""
    kind, extra = ("TPUs", "plan") if chip.dims else ("GPUs", "cuda")
    return f"no compiler for {kind} here (pip install glm-jax[{extra}])"


def described_devices(pod: Pod) -> list[jax.Device]:
    """The devices of a pod, to lay a mesh over. Raises UserError without a compiler for them."""
    from jax.experimental import topologies

    if compiler_version(pod.chip) is None:
        raise UserError(missing_compiler(pod.chip))
    platform, options = _tpus(pod) if pod.chip.dims else _gpus(pod)
    try:
        found = topologies.get_topology_desc(platform=platform, **options)
    except Exception as error:  # whatever the compiler says
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{pod.name}: the compiler refuses it: {reason}") from error
    devices: list[jax.Device] = list(found.devices)
    return devices


def _tpus(pod: Pod) -> tuple[str, dict[str, Any]]:
    name = f"{pod.chip.name}:{'x'.join(str(side) for side in pod.sides)}"
    options: dict[str, Any] = {"topology_name": name}
    if pod.slices > 1:
        options["num_slices"] = pod.slices
    if pod.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip
    return "tpu", options


def _gpus(pod: Pod) -> tuple[str, dict[str, Any]]:
    hosts, devices = pod.sides
    return "cuda", {"topology": f"1x{hosts}x{devices}", "target_config": target(pod.chip)}


def compile_for_pod(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile what was lowered for described devices. Raises OutOfMemory where the compiler of TPUs finds no room."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        verdict = out_of_memory(str(error))
        if verdict is None:
            raise
        raise verdict from error


def out_of_memory(message: str) -> OutOfMemory | None:
    """The verdict in a compiler's message; None where it is about something else."""
    found = _NEEDED.search(message) or _USED.search(message)
    if found is None or "RESOURCE_EXHAUSTED" not in message:
        return None
    needed, unit, available, other = found.groups()
    return OutOfMemory(int(float(needed) * _UNITS[unit]), int(float(available) * _UNITS[other]))


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """The most that a program takes of a device at a time, arguments included: `compiled.memory_analysis()`."""
    found = compiled.memory_analysis()
    if found is None:
        raise UserError("the memory of a program is not known: its backend does not tell")
    return int(found.peak_memory_in_bytes)
