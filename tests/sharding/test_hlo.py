"""HLO text is read as it was meant, of every compiler; what is no HLO is told with its line."""

import jax
import jax.numpy as jnp
import pytest

from sharding.errors import UserError
from sharding.hlo import Shape, arrays, bits, parse, read

# as the TPU compiler prints: memory spaces, index comments, quoted braces, tuples within tuples
TPU = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[8]{0}}, num_partitions=16

%fused (p.0: f32[8,4], p.1: s32[]) -> f32[8,1] {
  %p.0 = f32[8,4]{1,0:T(8,128)S(1)} parameter(0)
  %p.1 = s32[]{:T(128)S(6)} parameter(1)
  %c = s32[]{:T(128)} constant(0)
  ROOT %cut = f32[8,1]{1,0:T(8,128)} dynamic-slice(%p.0, /*index=1*/%c, %p.1), dynamic_slice_sizes={8,1}
}

ENTRY %main (x: f32[8,4]) -> f32[8] {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0), metadata={op_name="x[\\"{a}\\"]"}
  %one = s32[]{:T(128)} constant(1)
  %start = ((bf16[256,2]{1,0}), bf16[64,2]{1,0:S(1)}, /*index=2*/s32[]{:S(2)}) slice-start(%x), slice={[0:64], [0:2]}
  %text = pred[3]{0:T(512)} custom-call(%x, %one), custom_call_target="a(b{c", backend_config={"note":"calls=%none, )"}
  %fusion.1 = f32[8,1]{1,0:T(8,128)} fusion(%x, %one), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/slice"}
  ROOT %out = f32[8]{0:T(256)} bitcast(%fusion.1)
}
"""


def test_the_grammar_of_the_tpu_compiler_is_read() -> None:
    module = parse(TPU)
    assert (module.name, module.num_partitions, module.entry.name) == ("jit_f", 16, "main")
    assert list(module.computations) == ["fused", "main"]
    main, fused = module.entry, module["fused"]
    assert main.root.name == "out" and fused.root.operands == ("p.0", "c", "p.1")
    assert main["start"].type == (
        (Shape("bf16", (256, 2), 0, (1, 0)),),
        Shape("bf16", (64, 2), 1, (1, 0)),
        Shape("s32", (), 2),
    )
    assert [shape.num_bytes for shape in main["start"].arrays] == [1024, 256, 4]
    assert main["start"].attribute("slice") == "{[0:64], [0:2]}"
    assert main["text"].operands == ("x", "one") and main["text"].called == ()
    assert main["text"].attribute("custom_call_target") == "a(b{c"
    assert main["text"].attribute("calls") is None
    assert main["fusion.1"].called == ("fused",) and main["out"].called == ()
    assert fused["cut"].numbers("dynamic_slice_sizes") == (8, 1)


def test_an_array_takes_the_tiles_that_it_lies_in() -> None:
    main = parse(TPU).entry
    (x,), (scalar,), (out,) = (main[name].arrays for name in ("x", "one", "out"))
    assert (x.order, x.tile) == ((1, 0), (8, 128))
    assert (x.num_bytes, x.stored_bytes) == (8 * 4 * 4, 8 * 128 * 4)
    assert scalar.stored_bytes == 4 and out.stored_bytes == 256 * 4
    # dimension 0 varies fastest
    assert Shape("bf16", (3, 100), 0, (0, 1), (8, 128)).stored_bytes == 128 * 104 * 2


def test_an_instruction_may_go_on_in_further_lines() -> None:
    text = TPU.replace(
        'custom_call_target="a(b{c",',
        'custom_call_target="a(b{c", frontend_attributes={note={\n"depth": "{1"\n}},',
    )
    module = parse(text)
    assert list(module.entry.instructions) == list(parse(TPU).entry.instructions)
    assert '"depth": "{1"' in module.entry["text"].attributes


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("pred", 8), ("bf16", 16), ("f8e4m3fn", 8), ("s4", 4), ("c64", 64), ("token", 0)],
)
def test_bits_of_an_element(dtype: str, expected: int) -> None:
    assert bits(dtype) == expected


def test_what_this_jax_compiles_is_read_whole() -> None:
    def f(x: jax.Array) -> jax.Array:
        y, _ = jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), jnp.sum(y)), x, jnp.ones((5, 16, 16)))
        return jax.lax.cond(jnp.sum(y) > 0, lambda y: y + 1, lambda y: y - 1, y)

    compiled = jax.jit(f).lower(jnp.ones((4, 16))).compile()
    module, text = read(compiled), compiled.as_text()
    assert text is not None
    lines = [line for line in text.splitlines() if " = " in line and line.startswith("  ")]
    found = [x for c in module.computations.values() for x in c.instructions.values()]
    assert len(found) == len(lines)
    for computation in module.computations.values():
        for x in computation.instructions.values():
            if x.opcode not in ("constant", "parameter"):
                assert all(name in computation.instructions for name in x.operands), x
            assert all(name in module.computations for name in x.called), x
            assert list(arrays(x.type)) or x.type == ()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "f.hlo is no HLO module: give what compiled.as_text"),
        ("<html></html>", "f.hlo is no HLO module"),
        (TPU.replace("dynamic-slice(", "dynamic-slice"), "f.hlo:7: no HLO instruction: ROOT %cut"),
        (TPU.replace("s32[]{:T(128)} constant(1)", "s32 constant(1)"), "f.hlo:12: no HLO"),
        (TPU[: TPU.rindex("}")], "f.hlo: the text ends within computation main"),
        (TPU[: TPU.index("ENTRY")], "f.hlo is no HLO module"),
    ],
)
def test_what_is_no_hlo_is_told_with_its_line(text: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        parse(text, "f.hlo")
    assert line in str(error.value)
