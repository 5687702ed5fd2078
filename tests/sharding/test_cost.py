"""What a program takes of every device, from its text alone."""

import gzip
from pathlib import Path

import pytest

from sharding.cost import Loop, cost, read_file
from sharding.errors import UserError

# three rounds of a product whose partial sums two devices add up
TEXT = """HloModule jit_f, num_partitions=2

%condition (s: (s32[], f32[4,8], f32[8,8])) -> pred[] {
  %s = (s32[], f32[4,8], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (s: (s32[], f32[4,8], f32[8,8])) -> (s32[], f32[4,8], f32[8,8]) {
  %s = (s32[], f32[4,8], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[4,8] get-tuple-element(%s), index=1
  %w = f32[8,8] get-tuple-element(%s), index=2
  %y = f32[4,8] dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sum = f32[4,8] all-reduce(%y), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (s32[], f32[4,8], f32[8,8]) tuple(%next, %sum, %w)
}

ENTRY %main (x: f32[4,8], w: f32[8,8]) -> f32[4,8] {
  %x = f32[4,8] parameter(0)
  %w = f32[8,8] parameter(1)
  %zero = s32[] constant(0)
  %t = (s32[], f32[4,8], f32[8,8]) tuple(%zero, %x, %w)
  %loop = (s32[], f32[4,8], f32[8,8]) while(%t), condition=%condition, body=%body
  ROOT %out = f32[4,8] get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize("name", ["f.hlo", "f.hlo.gz"])
def test_a_file_is_read_and_counted(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(TEXT.encode()) if name.endswith("gz") else TEXT.encode())
    found = cost(read_file(path))
    assert found.flops == 3 * 2 * 4 * 8 * 8
    assert found.loops == (Loop("loop", 3, 1),)
    assert found.sent_bytes == 3 * (2 * 4 * 8 * 4 // 2)


def test_a_loop_that_is_not_known_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "f.hlo"
    path.write_text(TEXT.replace("constant(0)", "parameter(2)"))
    found = cost(read_file(path))
    assert found.loops == (Loop("loop", None, 1),)
    assert found.flops == 2 * 4 * 8 * 8


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "cannot read"),
        (gzip.compress(TEXT.encode(), mtime=0)[:-20], "cannot read"),
        (b"\x1f\x8bnothing", "cannot read"),
        (b"\xff\xfe\x00", "is no HLO text: give what compiled.as_text() prints"),
        (b"text", "is no HLO module"),
    ],
)
def test_what_is_no_program_is_one_clear_line(
    content: bytes | None, line: str, tmp_path: Path
) -> None:
    path = tmp_path / "f.hlo"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_file(path)
    assert line in str(error.value) and str(path) in str(error.value)
