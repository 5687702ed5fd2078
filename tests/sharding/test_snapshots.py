"""Snapshots are whole or not there, survive what comes after them, and tell when they are damaged."""

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sharding.snapshots
from sharding import checkpoint
from sharding.errors import UserError
from sharding.layout import get_layout
from sharding.retention import Retention
from sharding.snapshots import Snapshots, prune


@pytest.fixture(autouse=True)
def mesh() -> Iterator[None]:
    with jax.set_mesh(get_layout("fsdp", 4).mesh()):
        yield


def tree(value: int) -> dict[str, Any]:
    split = NamedSharding(jax.sharding.get_mesh(), PartitionSpec("fsdp"))
    return {
        "step": jnp.int32(value),
        "model": {"w": jax.device_put(jnp.full((8, 3), value, jnp.float32), split)},
        "nothing": None,
    }


def read(snapshots: Snapshots, step: int) -> dict[str, Any]:
    found: dict[str, Any] = checkpoint.restore(snapshots.state(step), tree(0))
    return found


def kept(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir())


def silent(_: str) -> None:
    pass


def test_a_snapshot_comes_back_with_its_facts(tmp_path: Path) -> None:
    facts = {"kl_coef": 0.1 + 0.2, "iterators": {"sft": [1, {"a": None}]}}
    with Snapshots(tmp_path / "sft") as snapshots:
        assert snapshots.newest(silent) is None
        snapshots.save(7, tree(7), facts)
    with Snapshots(tmp_path / "sft") as snapshots:
        assert snapshots.newest(silent) == 7
        assert snapshots.facts(7) == facts
        found = read(snapshots, 7)
        assert found["model"]["w"].sharding.spec == PartitionSpec("fsdp", None)
        jax.tree.map(np.testing.assert_array_equal, found, tree(7))


def test_the_last_ones_stay_and_every_so_manieth(tmp_path: Path) -> None:
    with Snapshots(tmp_path, Retention(2, every=4)) as snapshots:
        for step in range(1, 8):
            snapshots.save(step, tree(step), {})
        snapshots.wait()
        assert kept(tmp_path) == [4, 6, 7]


def test_the_best_stay_although_a_training_went_on_from_there(tmp_path: Path) -> None:
    worths = {1: 0.5, 2: 0.9, 3: None, 4: 0.7, 5: 0.9, 6: float("nan"), 7: 0.1, 8: None}
    retention = Retention(2, best=2)
    for steps in (range(1, 5), range(5, 9)):
        with Snapshots(tmp_path, retention) as snapshots:
            for step in steps:
                snapshots.save(step, tree(step), {"n": step}, worths[step])
    assert kept(tmp_path) == [2, 5, 7, 8]
    prune(tmp_path, Retention(0, every=8, best=1))
    assert kept(tmp_path) == [5, 8]
    prune(tmp_path, Retention(0))
    assert not tmp_path.exists()


@pytest.mark.parametrize("content", ['{"facts": {}}', "[]", "{", '{"worth": "x", "facts": {}}'])
def test_facts_that_are_damaged_do_not_keep_others_from_being_read(
    content: str, tmp_path: Path
) -> None:
    with Snapshots(tmp_path) as snapshots:
        snapshots.save(1, tree(1), {"n": 1})
        snapshots.save(2, tree(2), {"n": 2})
    (tmp_path / "2" / "facts" / "metadata").write_text(content)
    told: list[str] = []
    with Snapshots(tmp_path) as snapshots:
        assert snapshots.newest(told.append) == 1
        with pytest.raises(UserError, match=f"cannot read {tmp_path}/2/facts/metadata"):
            snapshots.facts(2)
    assert len(told) == 1


def test_a_clock_that_goes_back_does_not_make_a_snapshot_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour a look."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1.8e9 - 3600 * next(ticks))
    monkeypatch.setattr(time, "time_ns", lambda: int(1.8e18 - 3.6e12 * next(ticks)))
    for step in range(1, 6):
        with Snapshots(tmp_path) as snapshots:
            assert snapshots.newest(silent) == (step - 1 or None)
            snapshots.save(step, tree(step), {})
            snapshots.wait()
            os.utime(snapshots.path(step), (next(ticks), -3600 * step))
    assert next(ticks) > 5
    assert kept(tmp_path) == [4, 5]


def test_a_damaged_one_is_told_and_the_one_before_is_taken(tmp_path: Path) -> None:
    told: list[str] = []
    with Snapshots(tmp_path) as snapshots:
        for step in (1, 2):
            snapshots.save(step, tree(step), {})
        snapshots.wait()
        file = snapshots.state(2) / "model.w" / "1.0"
        content = bytearray(file.read_bytes())
        content[5] ^= 1
        file.write_bytes(content)
        assert snapshots.newest(told.append) == 1
        assert told == [f"{tmp_path / '2'} is damaged and is not used: {file} has changed"]
        snapshots.drop_after(1)
        snapshots.save(2, tree(3), {})
        snapshots.wait()
        assert snapshots.newest(silent) == 2
        assert read(snapshots, 2)["step"] == 3


def test_what_was_not_finished_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Path) -> None:
        raise OSError(28, "No space left on device")

    told: list[str] = []
    with Snapshots(tmp_path) as snapshots:
        snapshots.save(1, tree(1), {})
        snapshots.wait()
    snapshots = Snapshots(tmp_path)
    monkeypatch.setattr(sharding.snapshots, "seal", interrupted)
    snapshots.save(2, tree(2), {})
    with pytest.raises(UserError, match="the disk is full: make room or write elsewhere"):
        snapshots.wait()
    assert [path.name for path in tmp_path.iterdir()] != ["1"]  # a temporary folder is left
    with contextlib.suppress(UserError, OSError):
        snapshots.__exit__()
    monkeypatch.undo()
    with Snapshots(tmp_path) as snapshots:  # and cleared by the next one
        assert snapshots.newest(told.append) == 1
        assert told == []
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
