"""Real processes on this host, over Gloo: the numbers of one process, each its own rows, and none waits in vain."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[2]
JOBS = Path(__file__).with_name("process_jobs.py")
Ended = tuple[int, str]  # exit status, what it printed


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port: int = server.getsockname()[1]
        return port


def launch(
    *command: str, cwd: Path = REPOSITORY, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
        | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def flags(count: int) -> list[list[str]]:
    """What tells each of `count` processes of the others."""
    if count == 1:
        return [[]]
    shared = ["--coordinator", f"localhost:{free_port()}", "--num-processes", str(count)]
    return [[*shared, "--process-id", str(number)] for number in range(count)]


def ended(processes: Sequence[subprocess.Popen[str]], seconds: float = 600) -> list[Ended]:
    """What came of each, within a time that only a hang takes."""
    try:
        texts = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


def train(directory: Path, count: int, jobs: str) -> dict[str, dict[str, np.ndarray]]:
    """Results by job, on 8 devices in all."""
    directory.mkdir()
    command = [str(JOBS), str(directory), jobs, "8"]
    for status, text in ended([launch(*command, *options) for options in flags(count)]):
        assert status == 0, text
    found = {}
    for job in jobs.split(","):
        with np.load(directory / f"{job}.npz") as arrays:
            found[job] = dict(arrays)
    return found


def assert_same_training(directory: Path, counts: Sequence[int], jobs: str) -> None:
    expected = train(directory / "1", 1, jobs)
    for count in counts:
        for job, results in train(directory / str(count), count, jobs).items():
            for name, values in results.items():
                message = f"{job} with {count} processes: {name}"
                np.testing.assert_allclose(
                    values, expected[job][name], rtol=1e-6, atol=1e-6, err_msg=message
                )


def test_two_processes_of_four_devices_train_and_answer_as_one_of_eight(tmp_path: Path) -> None:
    assert_same_training(tmp_path, [2], "sft:hsdp,reward:fsdp_tp,rollout:hsdp")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["hsdp", "fsdp_tp", "pp_dp_tp"])
def test_every_job_on_any_number_of_processes(layout: str, tmp_path: Path) -> None:
    jobs = ",".join(f"{job}:{layout}" for job in ("sft", "reward", "dpo", "ppo"))
    assert_same_training(tmp_path, [2, 4], jobs)


def test_a_process_looks_up_the_rows_of_its_own_devices(tmp_path: Path) -> None:
    command = [str(JOBS), str(tmp_path), "rows:hsdp,rows:pp_dp_tp,rows:tp", "8"]
    for status, text in ended([launch(*command, *options) for options in flags(4)]):
        assert status == 0, text
    seen = {
        layout: [json.loads((tmp_path / f"rows:{layout}.{p}.json").read_text()) for p in range(4)]
        for layout in ("hsdp", "pp_dp_tp", "tp")
    }
    first, second = list(range(8)), list(range(8, 16))
    # data 2 x fsdp 4, two devices a process
    assert seen["hsdp"] == [first[:4], first[4:], second[:4], second[4:]]
    # data 2 outermost, then two stages that need the same rows
    assert seen["pp_dp_tp"] == [first, first, second, second]
    assert seen["tp"] == [first + second] * 4


def test_examples_come_in_one_order_over_any_number_of_processes(tmp_path: Path) -> None:
    """Also after a restart in the middle of an epoch."""
    orders: list[list[list[int]]] = []
    for count in (1, 2, 4):
        out = tmp_path / str(count)
        out.mkdir()
        command = [str(JOBS), str(out), "order:hsdp", "8"]
        for status, text in ended([launch(*command, *options) for options in flags(count)]):
            assert status == 0, text
        held = [json.loads((out / f"order:hsdp.{p}.json").read_text()) for p in range(count)]
        assert all(len(batch) == 16 // count for process in held for batch in process)
        orders.append([[*chain(*batches)] for batches in zip(*held, strict=True)])
    assert orders[0] == orders[1] == orders[2]
    seen = [*chain(*orders[0])]
    assert sorted(seen[:44]) == sorted(seen[44:88]) == list(range(44)), (
        "every example once an epoch"
    )
    assert seen[:44] != list(range(44)) and seen[:44] != seen[44:88]


def test_slurm_says_it_all(tmp_path: Path) -> None:
    """As under `srun --ntasks 2`; the job's number chooses the port."""
    together = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    processes = [
        launch(
            *[str(JOBS), str(tmp_path), "rows:dp", "8"],
            environment=together | {"SLURM_PROCID": number, "SLURM_LOCALID": number},
        )
        for number in ("0", "1")
    ]
    for status, text in ended(processes):
        assert status == 0, text
    rows = [json.loads((tmp_path / f"rows:dp.{p}.json").read_text()) for p in range(2)]
    assert rows == [list(range(8)), list(range(8, 16))]


def test_what_one_process_runs_into_ends_all(tmp_path: Path) -> None:
    command = [str(JOBS), str(tmp_path), "fail", "8"]
    begin = time.monotonic()
    texts = [text for _, text in ended([launch(*command, *options) for options in flags(2)])]
    assert "UserError: process 1: a disk is full" in texts[0]
    assert "UserError: a disk is full" in texts[1]
    assert time.monotonic() - begin < 60


def run(recipe: Path, options: Sequence[str], cwd: Path = REPOSITORY) -> subprocess.Popen[str]:
    return launch("-m", "rlhf.cli", "run", str(recipe), *options, cwd=cwd)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A run of every stage in seconds, on data of its own."""
    prompts = [{"prompt": f"第{number}个房间怎么样"} for number in range(60)]
    tables: dict[str, dict[str, str]] = {
        "sft": {"response": "房间很亮"},
        "preferences": {"chosen": "房间很亮", "rejected": "太旧太暗"},
        "prompts": {},
    }
    for name, answer in tables.items():
        # either answer wins half of the pairs, so that lengths balance in any unit
        sides = [answer, dict(zip(answer, reversed(answer.values()), strict=True))]
        lines = [json.dumps(prompt | sides[n % 2]) for n, prompt in enumerate(prompts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(folder=str(tmp_path)), encoding="utf-8")
    return path


RECIPE = """
from pathlib import Path
from glm_jax.config import GLMConfig
from glm_jax.generate import SamplingConfig
from rlhf.data.files.files import FilesData
from rlhf.dpo import DPOConfig
from rlhf.evaluate import EvaluateConfig
from rlhf.ppo import PPOConfig
from rlhf.recipe import Recipe
from rlhf.reward import RewardConfig
from rlhf.sft import SFTConfig

folder = Path({folder!r})
sampling = SamplingConfig(max_new_tokens=6)
config = Recipe(
    output_dir=folder / "run",
    layout="dp",
    devices=2,
    data=FilesData(folder / "sft.jsonl", folder / "preferences.jsonl", folder / "prompts.jsonl", 0.3),
    model=GLMConfig(296, 16, 2, 2, 2, 8, 32, max_length=64),
    length=40,
    prompt_length=24,
    sft=SFTConfig(steps=3, batch_size=8),
    reward=RewardConfig(steps=3, batch_size=8),
    ppo=PPOConfig(iterations=2, batch_size=16, sft_batch_size=8, sampling=sampling),
    dpo=DPOConfig(
        prompts=32,
        samples=2,
        steps=3,
        batch_size=8,
        sft_batch_size=8,
        sampling=sampling,
        truncated="keep",
    ),
    evaluate=EvaluateConfig(num_prompts=16, batch_size=16),
)
"""


@pytest.mark.slow
def test_a_whole_run_writes_what_one_process_writes(recipe: Path) -> None:
    metrics, files = [], []
    for count in (1, 2):
        out = recipe.parent / str(count)
        options = ["--output-dir", str(out)]
        for number, (status, text) in enumerate(
            ended([run(recipe, [*options, *more]) for more in flags(count)])
        ):
            assert status == 0, text
            assert ("report: " in text) == (number == 0)
        metrics.append(lines_of(out))
        files.append({str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()})
        assert json.loads((out / "summary.json").read_text())["processes"] == count
    # Orbax and TensorBoard put processes and times into the names of their files
    ours, theirs = ({f for f in names if not f.startswith(("c", "tens"))} for names in files)
    assert ours == theirs and "hf/model.safetensors" in ours and "report.html" in ours
    assert_same_metrics(*metrics)


def assert_same_metrics(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for expected, told in zip(ours, theirs, strict=True):
        assert (told.keys(), told["stage"]) == (expected.keys(), expected["stage"])
        for name, value in expected.items():
            if name not in ("stage", "wall_s", "drift"):
                assert told[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (expected, name)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_one_goes_on(recipe: Path) -> None:
    long = ["--sft.steps", "60"]
    whole, stopped = recipe.parent / "whole", recipe.parent / "stopped"
    ((status, text),) = ended([run(recipe, [*long, "--output-dir", str(whole)])])
    assert status == 0, text
    options = [*long, "--output-dir", str(stopped)]
    processes = [run(recipe, [*options, *more]) for more in flags(2)]
    wait_for_lines(stopped / "metrics.jsonl", 5, processes)
    processes[1].terminate()
    (first, told), (second, _) = ended(processes)
    assert (first, second) == (0, 0), told
    assert "stopped at sft " in told and "everything is saved. Resume with: glm-jax run " in told
    ((status, text),) = ended([run(recipe, options)])
    assert status == 0, text
    assert "going on from sft " in text
    assert_same_metrics(lines_of(whole), lines_of(stopped))


def lines_of(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def wait_for_lines(metrics: Path, count: int, processes: Sequence[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 300
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert all(process.poll() is None for process in processes), ended(processes)
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_processes_that_were_started_unlike_each_other(recipe: Path) -> None:
    first, second = flags(2)
    processes = [run(recipe, first), run(recipe, [*second, "--seed", "1"])]
    for status, text in ended(processes):
        assert status == 1
        assert "the recipe differs between processes 0 and 1: start all alike" in text
    assert not (recipe.parent / "run").exists()


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    command, processes = [str(JOBS), str(tmp_path), "folder", "8"], []
    for number, options in enumerate(flags(2)):
        (tmp_path / f"of {number}").mkdir()
        processes.append(launch(*command, *options, cwd=tmp_path / f"of {number}"))
    for status, text in ended(processes):
        assert status == 1
        assert "is not the folder of that name that process 0 sees" in text


def test_a_folder_that_is_another_one_in_each_process(recipe: Path) -> None:
    first, second = flags(2)
    (recipe.parent / "elsewhere").mkdir()
    relative = ["--output-dir", "run"]
    processes = [
        run(recipe, [*first, *relative], cwd=recipe.parent),
        run(recipe, [*second, *relative], cwd=recipe.parent / "elsewhere"),
    ]
    for status, text in ended(processes):
        assert status == 1
        assert "output_dir differs between processes 0 and 1: start all alike" in text


def test_processes_that_do_not_come(recipe: Path) -> None:
    waits = [[*options, "--start-timeout", "2"] for options in flags(2)]
    ((status, first),) = ended([run(recipe, waits[0])], seconds=60)
    assert status == 1
    assert "not all of the 2 processes have come at localhost:" in first
    ((status, second),) = ended([run(recipe, waits[1])], seconds=60)
    assert (status, second.count("\n")) == (1, 1)
    assert "process 0 does not answer at localhost:" in second


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_dies_takes_the_others_along(killed: int, recipe: Path) -> None:
    processes = [run(recipe, [*more, "--sft.steps", "1000000"]) for more in flags(2)]
    wait_for_lines(recipe.parent / "run" / "metrics.jsonl", 3, processes)
    processes[killed].kill()
    begin = time.monotonic()
    status, text = ended(processes, seconds=200)[1 - killed]
    assert time.monotonic() - begin < 30
    assert status not in (0, -9)
    if killed:
        assert status == 1
        assert "where another process has ended, its output says why" in text
    else:  # with the coordinator gone, JAX may abort before we come to speak
        assert "another" in text
