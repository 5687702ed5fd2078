"""Products within kernels, which a program's text shows as calls only."""

import math
import re

from sharding.flops import is_cublas
from sharding.hlo import Computation, Instruction, Shape

# calls of the compilers' own that multiply nothing
PLAIN_CALLS = (
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "AsyncCollectiveDone",
    "AsyncCollectiveStart",
    "ConcatBitcast",
    "PrepareAsyncCallDone",
    "PrepareAsyncCallStart",
    "ZeroCrop",
)
_SAID = re.compile(r'"flops":\s*"?(\d+)')
# JAX's attention kernels for TPUs (jax.experimental.pallas.ops.tpu) -> products over [T, S] that each makes: scores
# and values; for the gradients of keys and values the scores again and three more; for that of queries two more
_ATTENTION = (
    (re.compile(r"splash_m[hq]a_fwd|flash_attention_kernel|flash_attention_fwd"), 2),
    (re.compile(r"splash_m[hq]a_dkv|flash_attention_bwd_dkv|flash_mha_bwd_dkv"), 4),
    (re.compile(r"splash_m[hq]a_dq|flash_attention_bwd_dq|flash_mha_bwd_dq"), 3),
)
_SCORES = re.compile(r'"intermediate_tensor_shape":\s*\{[^}]*?"dimensions":\s*\[([^\]]*)\]')
_CAUSAL = re.compile(r'"mask_type":\s*"(PADDING_)?CAUSAL"')
_FUSED_BACKWARD = 5  # all gradients in the kernel for keys and values


def kernel(x: Instruction) -> str | None:
    """The target of a custom call whose products its text does not tell; None of anything else."""
    if x.opcode != "custom-call" or is_cublas(x):
        return None
    target = x.attribute("custom_call_target") or "?"
    return None if target in PLAIN_CALLS else target


def kernel_flops(computation: Computation, x: Instruction) -> int:
    """Of a Pallas kernel: what its author says (`pl.CostEstimate`); of attention from its shapes; else 0.

    JAX's attention for TPUs is taken to be causal: the text does not tell, and language models are trained so.
    """
    target = kernel(x) or ""
    if target.startswith("__cudnn$fmha"):
        return _cudnn(computation, x)
    if target != "tpu_custom_call":
        return 0
    said = _SAID.search(x.attributes)
    if said:
        return int(said[1])
    names = f"{x.name} {x.attribute('metadata')}"
    products = next((count for pattern, count in _ATTENTION if pattern.search(names)), 0)
    return _attention(computation, x, products)


def _cudnn(computation: Computation, x: Instruction) -> int:
    """Of scores [B, N, T, S], which the text tells; a mask that is added leaves nothing out."""
    scores = _SCORES.search(x.attributes)
    if scores is None:
        return 0
    width = computation[x.operands[0]].arrays[0].dims[-1]
    products = _FUSED_BACKWARD if "Backward" in (kernel(x) or "") else 2
    whole = products * 2 * math.prod(map(int, re.findall(r"\d+", scores[1]))) * width
    return whole // 2 if _CAUSAL.search(x.attributes) else whole


def _attention(computation: Computation, x: Instruction, products: int) -> int:
    operands = [shape for name in x.operands for shape in computation[name].arrays]
    arrays = [s for s in operands if len(s.dims) >= 3 and s.dtype in ("bf16", "f16", "f32")]
    if len(arrays) < 2:
        return 0
    *heads, length, width = arrays[0].dims
    keys = arrays[1].dims[-2]
    gradients = [s for s in x.arrays if len(s.dims) >= len(arrays[0].dims) and s.dims[-1] == width]
    if products == 4 and len(gradients) == 3:
        products = _FUSED_BACKWARD
    whole = products * 2 * math.prod(heads) * length * keys * width
    return int(whole * _share(operands, length, keys))


def _share(operands: list[Shape], length: int, keys: int) -> float:
    """Of the blocks of [T, S] those that a causal mask does not leave out; a block that it cuts is made whole."""
    if length != keys:
        return 1.0
    # a splash kernel's map from [rows, columns] of blocks to those that it makes
    grids = [s.dims[-2:] for s in operands if s.dtype == "s8" and len(s.dims) == 3]
    rows, columns = grids[0] if grids else (1, 1)
    if min(rows, columns) == 1:
        return 0.5
    made = sum(min(-(-(row + 1) * columns // rows), columns) for row in range(rows))
    return made / (rows * columns)
