"""What the compiler of GPUs has to be told of one that is not there: XLA's GpuTargetConfigProto as text."""

import dataclasses
from collections.abc import Mapping

from sharding.chips import Chip
from sharding.errors import UserError

KIB = 2**10


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """The figures of NVIDIA's data sheets and tuning guides that decide how a program is cut into kernels."""

    name: str  # as the driver calls it
    capability: int  # the major one
    cores: int  # streaming multiprocessors
    units: int  # for float32, of a core
    clock: float  # GHz
    cache: int  # bytes of L2
    shared: int  # bytes of memory that the blocks of a core share
    memory: int  # bytes, those that the driver keeps included


_GPUS: Mapping[str, _Gpu] = {
    "a100": _Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 40 * KIB**2, 164 * KIB, 80 * KIB**3),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 50 * KIB**2, 228 * KIB, 80 * KIB**3),
    "h200": _Gpu("NVIDIA H200", 9, 132, 128, 1.98, 50 * KIB**2, 228 * KIB, 141 * KIB**3),
    "b200": _Gpu("NVIDIA B200", 10, 148, 128, 1.965, 126 * KIB**2, 228 * KIB, 180 * KIB**3),
}


def target(chip: Chip) -> str:
    """The target of a compilation for `chip`. Raises UserError where its figures are not known."""
    gpu = _GPUS.get(chip.name)
    if gpu is None:
        raise UserError(f"{chip.name}: the compiler of GPUs knows {', '.join(_GPUS)}")
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * KIB}
  shared_memory_per_block_optin: {gpu.shared - KIB}
  shared_memory_per_core: {gpu.shared}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {gpu.units}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: {2**16}
  registers_per_block_limit: {2**16}
  memory_bandwidth: {int(chip.memory_bandwidth)}
  l2_cache_size: {gpu.cache}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {gpu.capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.name}"
"""
