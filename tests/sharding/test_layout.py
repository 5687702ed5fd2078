"""The table of logical axes, and what is refused."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sharding.errors import UserError
from sharding.layout import LAYOUTS, Layout, get_layout


def test_spec_drops_axes_of_size_one_and_joins_the_others() -> None:
    layout = Layout(data=2, fsdp=2, tensor=2)
    assert layout.spec("batch", None, "heads") == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert Layout(tensor=4).spec("batch", "vocab") == PartitionSpec(None, "tensor")
    assert Layout().spec("batch", "embed_weight") == PartitionSpec(None, None)


def test_spec_refuses_what_would_be_silently_wrong() -> None:
    layout = Layout(tensor=2)
    with pytest.raises(ValueError, match="unknown logical axis 'head'"):
        layout.spec("head")
    with pytest.raises(ValueError, match="two dimensions on one mesh axis"):
        layout.spec("heads", "ffn")


def test_generation_gives_the_pipe_axis_to_the_batch() -> None:
    layout = Layout(pipe=2, data=2, tensor=2, microbatches=4).for_generation()
    assert layout.ways("stage") == 1
    assert layout.spec("batch") == PartitionSpec(("data", "pipe"))
    assert layout.spec("vocab") == PartitionSpec("tensor")
    assert layout.num_devices == 8


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_entry_covers_eight_devices_or_one(name: str) -> None:
    layout = get_layout(name, 1 if name == "single" else 8)
    assert layout.num_devices == (1 if name == "single" else 8)
    assert layout.mesh().size == layout.num_devices


@pytest.mark.parametrize(
    ("name", "devices", "message"),
    [
        ("single", 2, "needs 1 devices but has 2"),
        ("pp_dp_tp", 6, "needs a multiple of 4 devices but has 6"),
        ("ddp", 8, "unknown layout 'ddp'.*dp_tp"),
    ],
)
def test_a_layout_that_does_not_fit_is_one_clear_line(
    name: str, devices: int, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        get_layout(name, devices)
    assert "\n" not in str(error.value)


def test_more_devices_than_exist() -> None:
    with pytest.raises(UserError, match="asks for 16 devices but 8 exist"):
        get_layout("dp", 16).mesh()


def test_batch_that_does_not_divide_names_the_multiple() -> None:
    layout = dataclasses.replace(Layout(pipe=2, data=4), microbatches=2)
    with pytest.raises(UserError, match=r"sft.batch_size = 12 .* multiple of 8"):
        layout.check_batch(12, "sft.batch_size")
    layout.check_batch(16, "sft.batch_size")


def test_put_splits_rows_over_the_batch_axes() -> None:
    layout = get_layout("hsdp", 8)
    with jax.set_mesh(layout.mesh()):
        x = layout.put(np.arange(32).reshape(16, 2))
        assert jax.typeof(x).sharding.spec == PartitionSpec(("data", "fsdp"), None)
        assert {s.data.shape for s in x.addressable_shards} == {(2, 2)}


def test_simulated_devices_get_threads_enough_for_collectives_that_wait() -> None:
    """In a process of its own, whose JAX has not counted anything; without it XLA has one thread a device."""
    code = (
        "import os, jax; from sharding.layout import use_devices; use_devices(8); jax.devices();"
        "names = [open(f'/proc/self/task/{t}/comm').read() for t in os.listdir('/proc/self/task')];"
        "print(sum('XLAEigen' in name for name in names))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NPROC"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) >= 32
