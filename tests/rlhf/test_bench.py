"""Layouts measured: real rows, rows that fail, and what is told of them."""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from rlhf import cli
from rlhf.bench.attached import Attached
from rlhf.bench.case import Case, Model, Moved, ProgramRow, Row, case_of, row_of
from rlhf.bench.measure import measure, reason
from rlhf.bench.page import cells, line, page
from rlhf.bench.prediction import attached_pod, utilisation
from rlhf.programs import Workload
from sharding.chips import CHIPS, Pod
from sharding.errors import UserError

REPOSITORY = Path(__file__).parents[2]
WORKLOAD = Workload(batch=8, prompt_length=3, response_length=5)
CASE = Case(
    layout="1x1x2x1",
    job="sft",
    model=Model("chatglm3-6b", tiny=True, dtype="float32", num_layers=None),
    devices=2,
    workload=WORKLOAD,
    steps=2,
    remat="none",
    generation=None,
    profile=None,
)
UPDATE = ProgramRow(
    name="critic update",
    runs=2,
    compile_s=1.5,
    memory_bytes=3 * 2**20,
    flops=100,
    collectives={"all-gather": Moved(7, 1024), "all-reduce": Moved(1, 512)},
    step_s=0.2,
    predicted_s=0.1,
)
ROW = Row(
    layout="fsdp",
    job="ppo",
    programs=(dataclasses.replace(UPDATE, runs=1, name="generate", predicted_s=0.3), UPDATE),
    tokens=1000,
    step_s=(0.5, 1.5, 1.0),
    model_flops=10**12,
    mfu=0.125,
    allocated_bytes=4 * 2**20,
)


def _bench(*options: str) -> int:
    return cli.main(["bench", *options])


def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children find this code, and no accelerator."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def test_real_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layouts that work, and one that is refused."""
    _environment(monkeypatch)
    report = tmp_path / "report.json"
    layouts = ["dp", "1x1x1x2", "2x1x1x1:gpipe:3"]
    options = ["--jobs", "sft", "--devices", "2", "--batch", "8", "--steps", "2"]
    assert _bench("--layouts", *layouts, *options, "--json", str(report)) == 0
    found = json.loads(report.read_text())
    rows = [row_of(row) for row in found["rows"]]
    assert [row.layout for row in rows] == layouts
    dp, tp, refused = rows
    assert refused.failure.startswith("batch = 8 does not divide over 1 batch shards x 3")
    for row in (dp, tp):
        assert row.failure == "" and len(row.step_s) == 2 and row.tokens == 8 * 32
        assert min(row.step_s) > 0 and row.compile_s > 0 and row.memory_bytes > 0
        assert row.predicted_s is None and row.mfu is None  # of a CPU no peak is known
        (update,) = row.programs
        assert update.step_s and row.model_flops < 2 * update.flops * 1.5
    # nothing but gradients and sums of losses goes from one to the other
    assert set(dp.collectives) == {"all-reduce"}
    assert tp.collectives["all-reduce"].runs > dp.collectives["all-reduce"].runs
    assert found["devices"] | {"jax_version": ""} == {
        "platform": "cpu",
        "kind": "cpu",
        "count": 2,
        "used": 2,
        "jax_version": "",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layout"), [("chatglm-6b", "2x1x2x2:circular"), ("glm-4-9b-0414", "hsdp")]
)
def test_every_job(
    model: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _environment(monkeypatch)
    report, traces = tmp_path / "report.json", tmp_path / "traces"
    options = ["--generation-layout", "1x4x1x2", "--remat", "full", "--steps", "2"]
    files = ["--json", str(report), "--html", str(tmp_path / "page.html")]
    named = ["--model", model, "--layouts", layout]
    command = [*named, *options, *files, "--profile", str(traces)]
    assert _bench(*command) == 0
    rows = [row_of(row) for row in json.loads(report.read_text())["rows"]]
    assert len(rows) == 4 and not [row.failure for row in rows if row.failure]
    by_name = {program.name: program for program in rows[-1].programs}
    assert list(by_name)[:3] == ["to generation", "generate", "to training"]
    assert all(program.step_s for program in by_name.values())
    assert len(list(traces.glob("*/plugins/profile/*/*.xplane.pb"))) == 4


def test_a_measured_row_beside_its_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on devices whose figures are known."""
    pod = Pod(CHIPS["v5e"], (1, 2))
    monkeypatch.setattr("rlhf.bench.measure.attached_pod", lambda devices: pod)
    told: list[str] = []
    row = measure(CASE, told.append)
    assert row.predicted_s and row.predicted_s > 0
    assert row.ratio == pytest.approx((row.median_s or 0) / row.predicted_s)
    peak = 2 * 197e12
    assert row.mfu == pytest.approx(row.model_flops / peak / (row.median_s or 0))
    assert told[0] == "compiling update" and "step 4 of 4" in told
    assert row_of(json.loads(json.dumps(row.as_json()))) == row


# stands for the process that measures: what it does depends on the job
CHILD = """
import json, os, signal, sys, time
case = json.loads(sys.argv[1])
done = len(json.load(open(os.environ["REPORT"]))["rows"]) if os.path.exists(os.environ["REPORT"]) else 0
job = os.environ.get("BEHAVE", case["job"])
if job == "sft":
    print("a library says something")
    print(json.dumps({"at": "step 1 of 3"}), flush=True)
    print(json.dumps({"row": json.loads(os.environ["ROW"])}), flush=True)
elif job == "reward":
    os.kill(os.getpid(), signal.SIGKILL)
elif job == "dpo":
    sys.exit(f"F0000 check failed after {done} rows")
elif job == "interrupt":
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
else:
    time.sleep(60)
"""


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a bench of such processes writes, on eight devices that nobody asks for."""
    path = tmp_path / "out" / "report.json"
    monkeypatch.setattr("rlhf.bench.run.CHILD", (sys.executable, "-c", CHILD))
    found = Attached("cpu", "cpu", 8, jax.__version__)
    monkeypatch.setattr("rlhf.bench.attached.attached", lambda devices: found)
    monkeypatch.setenv("REPORT", str(path))
    monkeypatch.setenv("ROW", json.dumps(ROW.as_json()))
    return path


def test_a_row_that_fails_stops_no_other(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = report.with_suffix(".html")
    options = ["--jobs", "reward,sft,dpo,ppo", "--limit-s", "1", "--html", str(html)]
    assert _bench("--layouts", "fsdp", *options, "--json", str(report)) == 0
    rows = [row_of(row) for row in json.loads(report.read_text())["rows"]]
    assert [row.failure for row in rows] == [
        "its process was ended by SIGKILL, perhaps for want of host memory",
        "",
        "its process ended with status 1: F0000 check failed after 2 rows",
        "took longer than 1 s and was ended",
    ]
    assert rows[1] == ROW
    screen = capsys.readouterr().out
    assert "took longer than 1 s" in screen and "1,000" in screen
    text = html.read_text()
    assert "F0000 check failed after 2 rows" in text and text.count("data:image/png") == 1


def test_ctrl_c_keeps_what_is_done(
    report: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--layouts", "fsdp", "--json", str(report)]
    assert _bench(*options, "--jobs", "sft") == 0
    monkeypatch.setenv("BEHAVE", "interrupt")
    report.unlink()
    assert _bench(*options, "--jobs", "sft") == 130
    assert not report.exists() and "interrupted" in capsys.readouterr().err
    monkeypatch.delenv("BEHAVE")
    monkeypatch.setattr("rlhf.bench.run.CHILD", (sys.executable, "-c", INTERRUPTED_LATER))
    assert _bench(*options, "--jobs", "sft,dpo") == 130
    assert len(json.loads(report.read_text())["rows"]) == 1


INTERRUPTED_LATER = CHILD.replace('job == "dpo"', 'job == "never"').replace(
    'job == "interrupt"', 'job == "dpo"'
)


def test_a_bench_without_any_numbers_fails(report: Path) -> None:
    assert _bench("--layouts", "fsdp", "--jobs", "dpo", "--json", str(report)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "sft,kto"], "unknown job 'kto': choose some of sft, reward, dpo, ppo"),
        (["--layouts", "ddp"], "unknown layout 'ddp'"),
        (["--layouts", "2x2x2x2"], "needs 16 devices but has 8"),
        (["--model", "chatglm3-6"], "unknown model 'chatglm3-6': did you mean chatglm3-6b"),
        (["--batch", "0"], "batch = 0: give a positive number"),
        (["--steps", "0"], "--steps 0: give a positive number"),
        (["--devices", "16"], "--devices 16: there are 8"),
        (["--remat", "some"], "--remat some: choose one of none, full, matmuls, offload"),
        (["--dtype", "float16"], "--dtype float16: choose float32 or bfloat16"),
        (["--generation-layout", "1x1x1x3"], "needs 3 devices but has 8"),
    ],
)
def test_wrong_options_are_one_clear_line(
    options: list[str], message: str, report: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _bench(*options) == 1
    error = capsys.readouterr().err
    assert error.startswith("glm-jax: error:") and error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "12"], "batch = 12 does not divide over 8 batch shards"),
        (["--batch", "8", "--jobs", "ppo"], "ppo.batch_size / ppo.minibatches = 4 does not divide"),
        (["--prompt-length", "40"], "80 tokens exceed the context of model.max_length = 64"),
    ],
)
def test_what_is_refused_is_a_row(
    options: list[str], message: str, report: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _bench("--layouts", "fsdp", "--jobs", "sft", *options) == 1
    assert message in capsys.readouterr().out


def test_figures_of_a_row() -> None:
    assert ROW.median_s == 1.0 and ROW.tokens_per_s == 1000
    assert ROW.compile_s == 3.0 and ROW.memory_bytes == 3 * 2**20
    assert ROW.predicted_s == pytest.approx(0.3 + 2 * 0.1)
    assert ROW.ratio == pytest.approx(2.0)
    assert ROW.collectives == {"all-gather": Moved(21, 3072), "all-reduce": Moved(3, 1536)}
    unknown = dataclasses.replace(UPDATE, predicted_s=None)
    assert dataclasses.replace(ROW, programs=(UPDATE, unknown)).predicted_s is None


def test_a_row_for_people() -> None:
    assert cells(ROW) == [
        "fsdp",
        "ppo",
        "3.0",
        "1.00",
        "0.500 to 1.50",
        "1,000",
        "12.5%",
        "0.500",
        "2.00",
        "3.0 (4.0)",
        "21 gather, 3 reduce: 4.5 KiB",
    ]
    failed = Row("tp", "sft", "refused <here>")
    assert re.fullmatch(r"tp +sft +refused <here>", line(failed))
    text = page({"Model": "a & b"}, [ROW, failed])
    assert "a &amp; b" in text and "refused &lt;here&gt;" in text and "critic update" in text
    assert page({}, [failed]).count("<img") == 0


def test_what_goes_to_a_process_comes_back() -> None:
    assert case_of(json.loads(json.dumps(CASE.as_json()))) == CASE
    assert row_of(json.loads(json.dumps(ROW.as_json()))) == ROW


def test_reasons_are_one_line() -> None:
    assert reason(UserError("too few")) == "too few"
    assert reason(RuntimeError("RESOURCE_EXHAUSTED:\n  out of memory")) == (
        "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    )


def _device(kind: str, **more: Any) -> Any:
    return SimpleNamespace(device_kind=kind, process_index=0, platform="tpu", **more)


def test_the_pod_that_devices_are() -> None:
    square = [_device("TPU v5 lite", coords=(x, y, 0)) for x in range(4) for y in range(2)]
    assert attached_pod(square) == Pod(CHIPS["v5e"], (4, 2))
    cube = [_device("TPU v5", coords=(x, y, z)) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    assert attached_pod(cube) == Pod(CHIPS["v5p"], (2, 2, 2))
    gpus = [_device("NVIDIA H100 80GB HBM3") for _ in range(8)]
    assert attached_pod(gpus) == Pod(CHIPS["h100"], (1, 8))
    assert attached_pod([_device("cpu")]) is None
    assert utilisation(197 * 10**12, 2.0, 4, attached_pod(square)) == pytest.approx(1 / 8)
    assert utilisation(1, 1.0, 1, None) is None


def test_the_process_that_asks_for_rows_does_not_start_jax() -> None:
    """Who starts it holds an accelerator, and its children would find none."""
    script = """
import jax, sys
from jax._src import xla_bridge
from rlhf import cli
import rlhf.bench.run as run
run.CHILD = (sys.executable, "-c", "import sys; sys.exit('no')")
assert cli.main(["bench", "--layouts", "fsdp", "tp", "--jobs", "sft,ppo"]) == 1
assert not xla_bridge.backends_are_initialized()
"""
    import subprocess

    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
