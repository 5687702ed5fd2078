"""Bytes through memory, each by hand."""

import pytest

from sharding.hlo import parse
from sharding.traffic import memory_bytes

BIG = "f32[64,1024]{1,0:T(8,128)}"
ROW = "f32[1,1024]{1,0:T(1,128)}"
CHIP = "f32[64,1024]{1,0:T(8,128)S(1)}"
HOSTED = "f32[64,1024]{1,0:T(8,128)S(5)}"
WHOLE = 64 * 1024 * 4
PART = 1024 * 4

FUSED = f"""
%cuts (p: f32[64,1024], i: s32[]) -> f32[1,1024] {{
  %p = {BIG} parameter(0)
  %i = s32[]{{:S(6)}} parameter(1)
  %b = {BIG} bitcast(%p)
  %s = {ROW} dynamic-slice(%b, %i, %i), dynamic_slice_sizes={{1,1024}}
  ROOT %n = {ROW} negate(%s)
}}

%writes (p: f32[64,1024], r: f32[1,1024], i: s32[]) -> f32[64,1024] {{
  %p = {BIG} parameter(0)
  %r = {ROW} parameter(1)
  %i = s32[]{{:S(6)}} parameter(2)
  %n = {ROW} negate(%r)
  ROOT %u = {BIG} dynamic-update-slice(%p, %n, %i, %i)
}}

%both (p: f32[64,1024], i: s32[]) -> (f32[1,1024], f32[64,1024]) {{
  %p = {BIG} parameter(0)
  %i = s32[]{{:S(6)}} parameter(1)
  %s = {ROW} fusion(%p, %i), kind=kLoop, calls=%cuts
  %m = {CHIP} negate(%p)
  ROOT %t = ({ROW}, {CHIP}) tuple(%s, %m)
}}
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"{BIG} negate(%x)", 2 * WHOLE),
        (f"{CHIP} negate(%x)", WHOLE),
        (f"{BIG} add(%x, %c)", 2 * WHOLE),
        (f"{BIG} bitcast(%x)", 0),
        # tiles of 8 rows are moved whole
        (
            "f32[1,1024]{1,0:T(8,128)} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,1024}",
            16 * PART,
        ),
        (f"{ROW} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={{1,1024}}", 2 * PART),
        (f"{ROW} dynamic-slice(%c, %i, %i), dynamic_slice_sizes={{1,1024}}", PART),
        (f"{BIG} dynamic-update-slice(%x, %r, %i, %i)", 2 * PART),
        (f"({CHIP}, {BIG}, u32[]{{:S(2)}}) copy-start(%x)", WHOLE),
        (f"({BIG}, {CHIP}, u32[]{{:S(2)}}) copy-start(%c)", WHOLE),
        (
            f"(({BIG}), f32[1,1024]{{1,0:T(1,128)S(1)}}, s32[]{{:S(2)}}) slice-start(%x), slice={{[0:1], [0:1024]}}",
            PART,
        ),
        (
            f"(({HOSTED}, {ROW}, s32[]), {HOSTED}, u32[]) dynamic-update-slice-start(%x, %r, %i)",
            PART,
        ),
        (f"(({HOSTED}, s32[]), {ROW}, u32[]) dynamic-slice-start(%x, %i)", PART),
        (f"{BIG} copy-done(%x)", 0),
        (f"{ROW} fusion(%x, %i), kind=kLoop, calls=%cuts", 2 * PART),
        (f"{BIG} fusion(%x, %r, %i), kind=kLoop, calls=%writes", 2 * PART),
        (f"({ROW}, {CHIP}) fusion(%x, %i), kind=kLoop, calls=%both", WHOLE + PART),
    ],
)
def test_what_is_moved(line: str, expected: int) -> None:
    text = f"""HloModule jit_f
{FUSED}
ENTRY %main (x: f32[64,1024], c: f32[64,1024], r: f32[1,1024], i: s32[]) -> f32[64,1024] {{
  %x = {BIG} parameter(0)
  %c = {CHIP} parameter(1)
  %r = {ROW} parameter(2)
  %i = s32[]{{:S(6)}} parameter(3)
  ROOT %it = {line}
}}
"""
    module = parse(text)
    assert memory_bytes(module, module.entry, module.entry.root) == expected
