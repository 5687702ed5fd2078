"""Rematerialisation: what a layer keeps of its forward pass, and what its gradient computes again."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from sharding.errors import UserError
from sharding.layout import Remat

KEPT = "kept"


def rematerialised(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`layer`, the body of a scan over layers, keeping only what `remat` says (Chen et al. 2016).

    none: everything. full: its inputs, and what was `kept`. matmuls: its inputs and the results of products with
    weights, not of those inside attention. offload: these, in the host's memory. The numbers stay the same. Raises
    UserError where the device cannot reach the host's memory.
    """
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    if remat == "full":
        policy = policies.save_only_these_names(KEPT)
    elif remat == "matmuls":
        policy = _in_stages(policies.dots_with_no_batch_dims_saveable)
    else:
        _check_host_memory()
        policy = _in_stages(policies.offload_dot_with_no_batch_dims("device", "pinned_host"))
    # within a scan the compiler cannot merge the second computation with the first
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def _in_stages(policy: Callable[..., Any]) -> Callable[..., Any]:
    """A policy about products without batch dimensions, where one is that of a pipeline's stages and no batch.

    A pipeline runs all of them under one vmap; products inside attention have two more.
    """

    def decide(primitive: Any, *operands: Any, **params: Any) -> Any:
        if primitive is jax.lax.dot_general_p:
            contracted, batch = params["dimension_numbers"]
            if len(batch[0]) == 1:
                params = {**params, "dimension_numbers": (contracted, ((), ()))}
        return policy(primitive, *operands, **params)

    return decide


def kept(x: jax.Array) -> jax.Array:
    """`x`, which is dear to make again: it is kept even where nothing but inputs is."""
    named: jax.Array = checkpoint_name(x, KEPT)
    return named


def _check_host_memory() -> None:
    device = jax.devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if "pinned_host" not in kinds:
        raise UserError(
            f"remat offload: a {device.device_kind} has no pinned host memory ({', '.join(kinds)}): "
            f"choose another remat"
        )
