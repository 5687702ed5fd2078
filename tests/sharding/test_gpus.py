"""What the compiler of GPUs is told of one."""

import re

import pytest

from sharding.chips import CHIPS, Chip
from sharding.errors import UserError
from sharding.gpus import target

GPUS = [chip for chip in CHIPS.values() if not chip.dims]


@pytest.mark.parametrize("chip", GPUS, ids=lambda chip: chip.name)
def test_a_gpu_is_the_chip_that_plans_count_with(chip: Chip) -> None:
    text = target(chip)
    figures = {name: int(value) for name, value in re.findall(r"(\w+): (\d+)\n", text)}
    assert figures["memory_bandwidth"] == chip.memory_bandwidth
    assert figures["device_memory_size"] >= chip.memory_bytes
    assert figures["shared_memory_per_block_optin"] < figures["shared_memory_per_core"]
    assert chip.name.upper() in text


def test_a_tpu_is_none() -> None:
    with pytest.raises(UserError, match="v5e: the compiler of GPUs knows a100, h100"):
        target(CHIPS["v5e"])
