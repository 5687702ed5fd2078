"""Runs as processes of their own, which can be killed, and what two of them are compared by."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
RECIPE = Path(__file__).with_name("tiny_recipe.py")
KILLED = Path(__file__).with_name("killed.py")
TIMES = ("wall_s", "tokens_per_s", "reshard_s")


def start(
    directory: Path,
    cache: Path,
    options: Sequence[str] = (),
    program: Sequence[str] = ("-m", "rlhf.cli"),
) -> subprocess.Popen[str]:
    """A run of the tiny recipe in `directory`; programs are compiled once for all that share `cache`."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, *program, "run", str(RECIPE), "--output-dir", str(directory)]
    return subprocess.Popen(
        [*command, *options],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill(directory: Path, cache: Path, place: str, count: int, seconds: float) -> bool:
    """Whether a run was killed `seconds` after its `count`-th time at a place of killed.py; else it is finished."""
    program = (str(KILLED), place, str(count), str(seconds))
    run = start(directory, cache, program=program)
    output, _ = run.communicate(timeout=600)
    assert run.returncode in (0, -signal.SIGKILL), output
    return run.returncode != 0


def finished(run: subprocess.Popen[str], status: int = 0) -> str:
    """What a run printed, which ends with `status`."""
    output, _ = run.communicate(timeout=600)
    assert run.returncode == status, output
    return output


def metrics(directory: Path) -> list[dict[str, Any]]:
    """Every line without its times."""
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in line.items() if name not in TIMES} for line in lines]


def bits(directory: Path) -> dict[str, Any]:
    """What a finished run must have to the bit: weights, metrics, samples, figures, scores, pairs; and of every
    second step the optimizers' states, critic, KL coefficient and places in the data."""
    found: dict[str, Any] = {"metrics": metrics(directory)}
    for path in sorted((directory / "state").glob("*/*/state/*/*")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(directory))] = digest
    for path in sorted((directory / "state").glob("*/*/facts/metadata")):
        told = json.loads(path.read_text())
        del told["facts"]["log"]
        found[str(path.relative_to(directory))] = told
    assert {"sft", "reward", "ppo", "dpo"} == {
        path.name for path in (directory / "state").glob("*/")
    }
    for path in sorted((directory / "checkpoints").glob("*/weights/*/*")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(directory))] = digest
    for name in ("samples.json", "references.jsonl", "hf/model.safetensors", "dpo_pairs.npz"):
        found[name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    summary = json.loads((directory / "summary.json").read_text())
    found["summary"] = {name: x for name, x in summary.items() if name not in TIMES}
    return found
