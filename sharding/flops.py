"""Floating point operations of matrix products, which is what devices are rated by: a multiply and an add are two."""

import functools
import math
import re

import numpy as np

from sharding.hlo import Computation, Instruction, Shape

_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_WINDOW = re.compile(r"(\w+)=([\d_x\-]+)")


def flops(computation: Computation, x: Instruction) -> int:
    """Of a `dot`, a `convolution` or a call of cuBLAS once; 0 of anything else, what it calls not counted."""
    if x.opcode == "dot":
        lhs = _shape(computation, x.operands[0])
        contracted = (lhs.dims[d] for d in x.numbers("lhs_contracting_dims"))
        return 2 * _result(x).size * math.prod(contracted)
    if x.opcode == "convolution":
        return _convolution(computation, x)
    if is_cublas(x):
        numbers = _CONTRACTED.search(x.attributes)
        places = re.findall(r"\d+", numbers[1]) if numbers else []
        lhs = _shape(computation, x.operands[0])
        return 2 * x.arrays[0].size * math.prod(lhs.dims[int(d)] for d in places)
    return 0


def is_cublas(x: Instruction) -> bool:
    """Whether it is a product by cuBLAS."""
    return (x.attribute("custom_call_target") or "").startswith("__cublas$")


def _convolution(computation: Computation, x: Instruction) -> int:
    """A product a place of the window that lies on a real entry of the input, as XLA's HloCostAnalysis counts.

    Padding and the holes of a dilated input take part in none: so compilers write products with batch dimensions.
    """
    lhs, rhs, result = (
        _shape(computation, x.operands[0]),
        _shape(computation, x.operands[1]),
        _result(x),
    )
    labels, _, out = (x.attribute("dim_labels") or "").partition("->")
    left, _, right = labels.partition("_")
    window = dict(_WINDOW.findall(x.attribute("window") or ""))
    groups = int(x.attribute("batch_group_count") or 1)
    places = 1
    for d in range(len(left) - 2):
        at = str(d)
        low = int(window["pad"].split("x")[d].split("_")[0]) if "pad" in window else 0
        stride, lhs_dilate, rhs_dilate = (
            int(window[name].split("x")[d]) if name in window else 1
            for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        places *= _real_places(
            lhs.dims[left.index(at)],
            rhs.dims[right.index(at)],
            result.dims[out.index(at)],
            low,
            stride,
            lhs_dilate,
            rhs_dilate,
        )
    features = rhs.dims[right.index("i")] * rhs.dims[right.index("o")]
    return 2 * places * features * lhs.dims[left.index("b")] // groups


@functools.cache
def _real_places(
    size: int, kernel: int, out: int, low: int, stride: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Pairs of a place in the output and one in the window that meet an entry of the input, along one dimension."""
    starts = np.arange(out, dtype=np.int64) * stride - low
    count = 0
    for k in range(kernel):
        at = starts + k * rhs_dilate
        inside = (at >= 0) & (at % lhs_dilate == 0) & (at // lhs_dilate < size)
        count += int(np.count_nonzero(inside))
    return count


def _shape(computation: Computation, name: str) -> Shape:
    return _result(computation[name])


def _result(x: Instruction) -> Shape:
    (shape,) = x.arrays
    return shape
