"""Metrics on disk, progress lines, and the folder of a run."""

import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from rlhf import runlog
from rlhf.runlog import METRICS_FILE, RunLog
from sharding.disk.directory import write_json
from sharding.errors import UserError


class Clock:
    """Stands in for the clock: a test says how much time passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(runlog.time, "monotonic", lambda: self.now)


def plain_console() -> tuple[Console, io.StringIO]:
    screen = io.StringIO()
    return Console(file=screen, force_terminal=False, width=40), screen


def records(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / METRICS_FILE).read_text().splitlines()]


def test_every_step_is_a_line_of_json_at_once(tmp_path: Path) -> None:
    with RunLog(tmp_path, plain_console()[0]) as log, log.stage("sft", total=2) as stage:
        stage.step(1, {"loss": np.float32(0.5), "lr": 1}, tokens=10)
        (first,) = records(tmp_path)  # before the stage ends: a killed run keeps its steps
        assert first | {"wall_s": 0} == {
            "stage": "sft",
            "step": 1,
            "wall_s": 0,
            "loss": 0.5,
            "lr": 1.0,
        }
        stage.step(2, {"loss": 0.25}, tokens=10)
    assert [record["step"] for record in records(tmp_path)] == [1, 2]


def test_seconds_and_speed_by_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with RunLog(tmp_path, plain_console()[0]) as log:
        with log.stage("data"):
            clock.now += 3.0
        with log.stage("sft", total=3) as stage:
            clock.now += 60.0  # compiles
            stage.step(1, {"loss": 1.0}, tokens=500)
            for step in (2, 3):
                clock.now += 2.0
                stage.step(step, {"loss": 1.0}, tokens=500)
            clock.now += 5.0  # saves; no step's time
        with log.stage("data"):
            clock.now += 1.0
    assert log.wall_s == {"data": 4.0, "sft": 69.0}
    assert log.tokens_per_s == {"sft": 250.0}
    assert [record["wall_s"] for record in records(tmp_path)] == [63.0, 65.0, 67.0]


def test_a_pipe_gets_a_line_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    console, screen = plain_console()
    with RunLog(tmp_path, console) as log, log.stage("ppo", total=30) as stage:
        for step in range(1, 31):
            clock.now += 1.0
            stage.step(step, {"loss": 0.125, "reward": 2.0, "kl": 0.01, "lr": 1.0}, tokens=1500)
        log.note("[saved]")
    assert screen.getvalue().splitlines() == [
        "ppo 1/30 loss 0.125 reward 2 KL 0.01",
        "ppo 11/30 loss 0.125 reward 2 KL 0.01 1,500 tok/s 0:19 left",
        "ppo 21/30 loss 0.125 reward 2 KL 0.01 1,500 tok/s 0:09 left",
        "[saved]",
        "ppo 30/30 loss 0.125 reward 2 KL 0.01 1,500 tok/s in 0:30",
    ]


def test_a_terminal_gets_a_bar_that_fits_it(tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None, _environ={})
    with RunLog(tmp_path, console) as log:
        with log.stage("ppo", total=4) as stage:
            for step in range(1, 5):
                stage.step(step, {"loss": -0.125, "reward": 1.234, "kl": 0.0123}, tokens=1)
        with log.stage("export"):
            pass
    text = screen.getvalue()
    assert "starting" in text
    assert "4/4 loss -0.125 reward 1.23 KL 0.0123" in text
    assert "done in 0:00" in text


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    with RunLog(tmp_path, plain_console()[0]) as log, log.stage("dpo pairs", total=1) as stage:
        stage.step(7, {"loss": 0.5})
    (path,) = (tmp_path / "tensorboard").iterdir()
    values = [(e.step, v.tag, v.simple_value) for e in read_events(path) for v in e.summary.value]
    assert values == [(7, "dpo_pairs/loss", 0.5)]


def test_a_log_that_goes_on_does_not_fork(tmp_path: Path) -> None:
    with RunLog(tmp_path, plain_console()[0]) as log, log.stage("sft", total=4) as stage:
        stage.step(1, {"loss": 3.0})
        position = log.position()
        stage.step(2, {"loss": 2.0})
    assert position.counts == {"sft": 1}
    with (
        RunLog(tmp_path, plain_console()[0], position) as log,
        log.stage("sft", total=4, before=1) as stage,
    ):
        assert stage.count == "1/4"
        stage.step(2, {"loss": 1.5})
        assert stage.count == "2/4"
    assert [(line["step"], line["loss"]) for line in records(tmp_path)] == [(1, 3.0), (2, 1.5)]
    (path,) = (tmp_path / "tensorboard").iterdir()
    values = [(e.step, v.simple_value) for e in read_events(path) for v in e.summary.value]
    assert values == [(1, 3.0), (2, 1.5)]


def test_a_clock_that_goes_back_changes_nothing_but_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with RunLog(tmp_path, plain_console()[0]) as log, log.stage("sft", total=3) as stage:
        for step in (1, 2, 3):
            clock.now -= 50.0
            stage.step(step, {"loss": 1.0}, tokens=10)
    assert [line["step"] for line in records(tmp_path)] == [1, 2, 3]


def read_events(path: Path) -> list[Event]:
    """TFRecord: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    data, events = path.read_bytes(), []
    while data:
        end = 12 + int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12:end]))
        data = data[end + 4 :]
    return events


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, loss: float) -> None:
    with RunLog(tmp_path, plain_console()[0]) as log, log.stage("sft", total=9) as stage:
        stage.step(1, {"loss": 2.0})
        with pytest.raises(UserError, match=f"sft: loss is {loss} at step 2: try a smaller"):
            stage.step(2, {"loss": loss, "lr": 0.5})
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [(1, 2.0), (2, None)]


def test_a_stage_that_fails_still_counts_its_seconds(tmp_path: Path) -> None:
    with RunLog(tmp_path, plain_console()[0]) as log:
        with pytest.raises(UserError, match="no"), log.stage("sft", total=9):
            raise UserError("no")
        assert list(log.wall_s) == ["sft"]


def test_write_json_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"a": (1, math.nan), "名": Path("x")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, None], "名": "x"}
    assert "名" in path.read_text(encoding="utf-8")

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(UserError, match="no space"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text(encoding="utf-8"))["a"] == [1, None]
