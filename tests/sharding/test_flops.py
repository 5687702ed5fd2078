"""Products are counted as by hand, however a compiler spells them."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.cost import cost
from sharding.flops import _real_places, flops
from sharding.hlo import Module, parse, read
from sharding.loops import walk


def total(module: Module) -> int:
    """Of a whole program."""
    return sum(flops(v.computation, v.instruction) * v.times for v in walk(module))


def compiled(f: Callable[..., Any], *shapes: tuple[int, ...]) -> Module:
    return read(jax.jit(f).lower(*(jnp.ones(shape) for shape in shapes)).compile())


def test_a_product_with_batch_dimensions() -> None:
    module = compiled(lambda a, b: jnp.einsum("BTNH,BSNH->BNTS", a, b), (2, 5, 3, 7), (2, 11, 3, 7))
    assert total(module) == 2 * 2 * 3 * 5 * 11 * 7


def test_a_product_in_a_loop_counts_as_often_as_it_runs() -> None:
    def f(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    forward = 6 * 2 * 4 * 16 * 16
    assert total(compiled(f, (4, 16), (6, 16, 16))) == forward

    def loss(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(f(x, weights))

    # of a product two in its gradient
    both = jax.grad(loss, argnums=(0, 1))
    assert total(compiled(both, (4, 16), (6, 16, 16))) == 3 * forward


# how the TPU compiler spells them; each is the product that stands beside it
SPELT = [
    # [4096, 256] x [256, 512]
    ("f32[4096,512]", "f32[4096,256]", "f32[256,512]", "dim_labels=bf_io->bf", 4096 * 256 * 512),
    # two halves of the contracted dimension as a window
    (
        "f32[64,32,1]",
        "f32[64,2,16]",
        "f32[2,16,32]",
        "window={size=2}, dim_labels=b0f_0io->bf0",
        64 * 32 * 32,
    ),
    # batch dimensions 2 x 3 as a window over an input with holes: attention's scores
    (
        "f32[2,3,4,10,20]",
        "f32[2,3,4,10,8]",
        "f32[2,3,20,8,1]",
        "window={size=2x3x1 stride=1x2x1 lhs_dilate=2x3x1}, dim_labels=012bf_01oi2->012bf",
        2 * 3 * 4 * 10 * 20 * 8,
    ),
    # the rows of each group of the batch see their own features
    (
        "f32[6,5]",
        "f32[12,7]",
        "f32[7,5]",
        "dim_labels=bf_io->bf, batch_group_count=2",
        6 * 7 * 5,
    ),
    # depthwise: as many groups as features
    (
        "f32[1,10,8]",
        "f32[1,12,8]",
        "f32[3,1,8]",
        "window={size=3}, dim_labels=b0f_0io->b0f, feature_group_count=8",
        10 * 3 * 8,
    ),
    # padding meets nothing
    (
        "f32[1,12,5]",
        "f32[1,12,8]",
        "f32[3,8,5]",
        "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
        (12 * 3 - 2) * 8 * 5,
    ),
]


@pytest.mark.parametrize(("out", "lhs", "rhs", "attributes", "products"), SPELT)
def test_a_product_spelt_as_a_convolution(
    out: str, lhs: str, rhs: str, attributes: str, products: int
) -> None:
    text = (
        f"HloModule m, num_partitions=1\n\nENTRY %main (a: {lhs}, b: {rhs}) -> {out} {{\n"
        f"  %a = {lhs} parameter(0)\n  %b = {rhs} parameter(1)\n"
        f"  ROOT %c = {out} convolution(%a, %b), {attributes}\n}}\n"
    )
    assert total(parse(text)) == 2 * products


def test_calls_of_kernels_are_counted_where_they_tell() -> None:
    text = """HloModule m, num_partitions=1

ENTRY %main (a: bf16[3,64,32], b: bf16[3,64,16]) -> bf16[3,32,16] {
  %a = bf16[3,64,32] parameter(0)
  %b = bf16[3,64,16] parameter(1)
  %gemm = (bf16[3,32,16], s8[4194304]) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  %out = bf16[3,32,16] get-tuple-element(%gemm), index=0
  %room = bf16[3,32,16] custom-call(), custom_call_target="AllocateBuffer"
  ROOT %kernel = bf16[3,32,16] custom-call(%out, %room), custom_call_target="tpu_custom_call"
}
"""  # noqa: E501
    found = cost(parse(text))
    assert found.flops == 2 * 3 * 32 * 16 * 64
    assert found.kernels == {"tpu_custom_call": 1}


@given(
    size=st.integers(1, 6),
    kernel=st.integers(1, 4),
    out=st.integers(1, 6),
    low=st.integers(0, 3),
    stride=st.integers(1, 3),
    lhs_dilate=st.integers(1, 3),
    rhs_dilate=st.integers(1, 3),
)
def test_places_that_meet_an_entry_are_counted_as_one_by_one(
    size: int, kernel: int, out: int, low: int, stride: int, lhs_dilate: int, rhs_dilate: int
) -> None:
    entries = {entry * lhs_dilate for entry in range(size)}
    met = sum(
        o * stride - low + k * rhs_dilate in entries
        for o, k in itertools.product(range(out), range(kernel))
    )
    assert _real_places(size, kernel, out, low, stride, lhs_dilate, rhs_dilate) == met
