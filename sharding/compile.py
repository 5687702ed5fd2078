"""What the compiler is asked to do: with which options, and the programs of this process."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.monitoring

# Beside the compilers' own choice, for the programs that train on TPUs. Products that wait for shards of their operands
# are not to be cut into loops of small ones: under tensor and pipeline axes that makes programs slower and their
# compilation longer.
WHOLE_PRODUCTS: Mapping[str, str] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
REDUCE_MEANWHILE: Mapping[str, str] = {
    # reduce a gradient while the products after it run, ...
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    # ... which one that is reduced together with the layer's last cannot
    "xla_jf_crs_combiner_threshold_in_bytes": str(2**21),
}


def compiler_options() -> dict[str, str]:
    """What `jax.jit` is to tell the compiler of the current mesh's devices, described ones too."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.platform != "tpu":
        return {}
    # v4 has no room on the chip for what runs meanwhile: its compiler gives up
    return {**WHOLE_PRODUCTS, **({} if "v4" in device.device_kind else REDUCE_MEANWHILE)}


_compiled: list[str] = []


def _listen(event: str, duration_secs: float, **facts: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(facts.get("fun_name", "a program"))


jax.monitoring.register_event_duration_secs_listener(_listen)


def compiled_programs() -> list[str]:
    """Names of the programs that this process has compiled so far, one found in the compilation cache included."""
    return list(_compiled)
