"""Products of attention kernels, each by hand."""

import pytest

from sharding.hlo import parse
from sharding.kernels import kernel, kernel_flops

B, N, K, T, H = 2, 8, 2, 1024, 128
WHOLE = 2 * B * N * T * T * H  # one product over all pairs of tokens
Q, KV = f"bf16[{B},{N},{T},{H}]{{3,2,1,0}}", f"bf16[{B},{K},{T},{H}]{{3,2,1,0}}"


def call(name: str, grid: str = "s8[1,4,4]{2,1,0}", more: str = "") -> str:
    return f"""HloModule jit_f

ENTRY %main (m: s8[1,4,4], q: bf16[2,8,1024,128], k: bf16[2,2,1024,128], v: bf16[2,2,1024,128]) -> bf16[2,8,1024,128] {{
  %m = {grid} parameter(0)
  %q = {Q} parameter(1)
  %k = {KV} parameter(2)
  %v = {KV} parameter(3)
  ROOT %{name} = {Q} custom-call(%m, %q, %k, %v), custom_call_target="tpu_custom_call"{more}
}}
"""


def found(text: str) -> int:
    module = parse(text)
    return kernel_flops(module.entry, module.entry.root)


@pytest.mark.parametrize(
    ("name", "products"),
    [
        ("splash_mha_fwd_segmented_residuals.3", 2),
        ("splash_mqa_fwd_no_residuals", 2),
        ("splash_mha_dkv_segmented_no_residuals.1", 4),
        ("splash_mha_dq_no_residuals.2", 3),
    ],
)
def test_a_causal_mask_leaves_out_blocks(name: str, products: int) -> None:
    # of 4 x 4 blocks 1 + 2 + 3 + 4
    assert found(call(name)) == products * WHOLE * 10 // 16
    # of 4 x 8: 2 + 4 + 6 + 8
    assert found(call(name, "s8[1,4,8]{2,1,0}")) == products * WHOLE * 20 // 32
    # nothing is known of the blocks
    assert found(call(name, "s32[1,4,4]{2,1,0}")) == products * WHOLE // 2


def test_one_kernel_for_all_gradients_makes_five_products() -> None:
    # that of queries in a piece for every block of keys; beside them what the kernel works in
    work = "f32[2,512,128]{2,1,0}"
    every = f"({work}, bf16[{B},4,{N},{T},{H}]{{4,3,2,1,0}}, {KV}, {KV})"
    text = call("splash_mha_dkv_no_residuals").replace(f"residuals = {Q}", f"residuals = {every}")
    assert found(text) == 5 * WHOLE * 10 // 16


def test_a_kernel_is_known_by_what_it_was_called_in_the_program() -> None:
    note = ', metadata={op_name="jit(f)/flash_attention_kernel/pallas_call"}'
    assert found(call("closed_call.1", more=note)) == 2 * WHOLE * 10 // 16


def test_what_its_author_says_of_a_kernel_counts() -> None:
    note = ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"12345","bytes":"1"}}}'
    assert found(call("own_kernel", more=note)) == 12345


def test_of_another_kernel_nothing_is_known() -> None:
    text = call("own_kernel")
    assert found(text) == 0
    assert kernel(parse(text).entry.root) == "tpu_custom_call"


@pytest.mark.parametrize("kind", ["Softmax", "ScaleBiasSoftmax"])
def test_cudnn_leaves_out_what_a_causal_mask_hides(kind: str) -> None:
    q, kv = f"bf16[{B},{T},{N},{H}]{{3,2,1,0}}", f"bf16[{B},{T},{K},{H}]{{3,2,1,0}}"
    config = (
        f'{{"cudnn_fmha_backend_config": {{"intermediate_tensor_shape": {{"element_type": "BF16", '
        f'"dimensions": ["{B}", "{N}", "{T}", "{T}"], "tuple_shapes": []}}, "mask_type": "NO_MASK"}}}}'
    )
    text = f"""HloModule jit_f

ENTRY %main (q: bf16[2,1024,8,128], k: bf16[2,1024,2,128], v: bf16[2,1024,2,128]) -> bf16[2,8,1024,128] {{
  %q = {q} parameter(0)
  %k = {kv} parameter(1)
  %v = {kv} parameter(2)
  ROOT %o = {Q} custom-call(%q, %k, %v), custom_call_target="__cudnn$fmha{kind}", backend_config={config}
}}
"""
    assert found(text) == 2 * WHOLE
    assert found(text.replace("NO_MASK", "CAUSAL")) == WHOLE
    assert found(text.replace("NO_MASK", "PADDING_CAUSAL")) == WHOLE
    assert found(text.replace(kind, f"{kind}Backward")) == 5 * WHOLE
