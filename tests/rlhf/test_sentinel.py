"""Programs that the compiler makes something else of are named."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from glm_jax.config import GLMConfig
from rlhf.plan.sentinel import as_json, changes, figures, read
from rlhf.plan.verdict import ProgramVerdict, Request, Verdict, ask
from rlhf.programs import Workload
from sharding.chips import GIB, find_pod
from sharding.errors import UserError
from sharding.layout import Layout

PODS = Path(__file__).parents[2] / "benchmarks" / "pods.json"
KEPT = {"update": {"peak_bytes": 1000, "cycles": 500, "bytes sent: fsdp all-gather": 80}}


@pytest.mark.parametrize(
    ("figure", "value", "line"),
    [
        ("peak_bytes", 1021, "update: peak_bytes: 1,000 -> 1,021 (+2.1%)"),
        ("cycles", 489, "update: cycles: 500 -> 489 (-2.2%)"),
        ("bytes sent: fsdp all-gather", 0, "bytes sent: fsdp all-gather: 80 -> 0 (-100.0%)"),
        ("bytes sent: fsdp all-reduce", 7, "bytes sent: fsdp all-reduce: 0 -> 7 (new)"),
    ],
)
def test_a_change_above_two_percent_is_named(figure: str, value: int, line: str) -> None:
    now = {"update": {**KEPT["update"], figure: value}}
    (found,) = changes(KEPT, now)
    assert line in found


def test_what_does_not_fit_is_no_figure() -> None:
    program = ProgramVerdict("update", 1, 1, 1, True, GIB, GIB)
    fitting = Verdict((program,), {})
    assert figures(fitting)["update"]["peak_bytes"] == GIB
    large = dataclasses.replace(program, name="critic update", fits=False)
    with pytest.raises(UserError, match=r"critic update does not fit: it needs 2\.00 GiB"):
        figures(Verdict((program, large), {}))


def test_less_is_no_change() -> None:
    assert not list(
        changes(KEPT, {"update": {**KEPT["update"], "peak_bytes": 1019, "cycles": 491}})
    )
    assert list(changes(KEPT, {})) and list(changes({}, KEPT))


def test_a_dozen_programs_are_watched() -> None:
    watched = read(PODS)
    assert sum(len(found) for _, found in watched.values()) >= 12
    for what, _ in watched.values():
        request = what.request()
        assert request.layout.num_devices == request.pod.num_devices
    assert as_json(watched) == json.loads(PODS.read_text())


def test_another_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "pods.json"
    path.write_text('{"a": {"what": {"job": "sft"}}}')
    with pytest.raises(UserError, match="is no list of watched programs"):
        read(path)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler, is not installed"
)
def test_a_removal_of_remat_is_caught(tmp_path: Path) -> None:
    config = GLMConfig(512, 128, 4, 4, 2, 32, 256, compute_dtype="bfloat16")
    layout = Layout(fsdp=4, remat="full")
    request = Request("sft", config, layout, None, Workload(64, 64, 64), find_pod("v5e:2x2"))
    removed = dataclasses.replace(request, layout=dataclasses.replace(layout, remat="none"))
    kept, now = (figures(ask(x, tmp_path)) for x in (request, removed))
    assert not list(changes(kept, kept))
    found = list(changes(kept, now))
    assert any("peak_bytes" in line for line in found), found
    assert any("flops" in line for line in found), found
