"""What the compiler of GPUs is told of one."""

import pytest

from sharding.chips import CHIPS
from sharding.errors import UserError
from sharding.gpus import target


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("a100", ["core_count: 108", "major: 8 ", "shared_memory_per_block_optin: 166912"]),
        ("h100", ["core_count: 132", "major: 9 ", "l2_cache_size: 52428800"]),
        ("h200", ["core_count: 132", "memory_bandwidth: 4800000000000"]),
        ("b200", ["core_count: 148", "major: 10 "]),
    ],
)
def test_a_gpu_is_described(name: str, figures: list[str]) -> None:
    text = target(CHIPS[name])
    assert all(figure in text for figure in figures), text


def test_every_gpu_is_one_that_can_be_compiled_for() -> None:
    for chip in CHIPS.values():
        if chip.dims:
            with pytest.raises(UserError, match=f"{chip.name}: the compiler of GPUs knows a100"):
                target(chip)
        else:
            assert f"{chip.name.upper()}" in target(chip)
