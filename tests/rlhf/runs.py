"""Runs as processes of their own, which can be killed, and what two of them are compared by."""

import fnmatch
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event

REPOSITORY = Path(__file__).parents[2]
RECIPE = Path(__file__).with_name("tiny_recipe.py")
KILLED = Path(__file__).with_name("killed.py")
NOTED = ("facts/metadata",)  # its hash, for it has the times of the log
STAMPS = ("init_timestamp_nsecs", "commit_timestamp_nsecs")  # Orbax's
OF_THE_COMMAND = (".lock", "recipe.json", "report.html", "submission.json")
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


def kill(
    directory: Path,
    cache: Path,
    place: str,
    count: int,
    seconds: float,
    options: Sequence[str] = (),
) -> bool:
    """Whether a run was killed `seconds` after its `count`-th time at a place of killed.py; else it is finished."""
    program = (str(KILLED), place, str(count), str(seconds))
    run = start(directory, cache, options, program)
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


# What of a run's files is no function of recipe, data and seed: names of files by pattern, and what of each is a time,
# a number that follows from times, a process or the place where the run lies.
TIMED: tuple[tuple[str, Callable[[Path, Path], Any]], ...] = (
    (".lock", lambda path, _: None),  # the process
    ("metrics.jsonl", lambda path, _: metrics(path.parent)),
    ("summary.json", lambda path, _: without(json.loads(path.read_text()), TIMES)),
    ("recipe.json", lambda path, _: without(json.loads(path.read_text()), ("output_dir",))),
    ("report.html", lambda path, directory: page(path, directory)),
    ("tensorboard/events.*", lambda path, _: scalars(path)),  # the name: a time and the host
    ("state/journal.json", lambda path, _: without(json.loads(path.read_text()), ("log",))),
    ("state/*/facts/metadata", lambda path, _: facts(path)),
    ("state/*/seal.json", lambda path, _: without(json.loads(path.read_text()), NOTED)),
    ("*/_CHECKPOINT_METADATA", lambda path, _: without(json.loads(path.read_text()), STAMPS)),
    ("*/commit_success.txt", lambda path, _: re.sub(" to .*", "", path.read_text())),
)


def without(fields: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The others of these fields."""
    return {name: value for name, value in fields.items() if name not in names}


def facts(path: Path) -> dict[str, Any]:
    """Facts of a snapshot beside its arrays, without the times of the log."""
    noted: dict[str, Any] = json.loads(path.read_text())
    return {**noted, "facts": without(noted["facts"], ("log",))}


def page(path: Path, directory: Path) -> str:
    """The report without its seconds and without the run's place and name."""
    text = path.read_text(encoding="utf-8")
    text = text.replace(json.dumps(str(directory), ensure_ascii=False)[1:-1], "")
    text = text.replace(f"glm-jax: {directory.name}<", "glm-jax: <")
    text = re.sub("<dt>Time</dt><dd>[^<]*</dd>", "", text)
    return re.sub("<h2>Time</h2>.*?<h2>", "<h2>", text, flags=re.DOTALL)


def scalars(path: Path) -> list[tuple[str, int, float]]:
    """Tag, step and value of TensorBoard's events, in order."""
    data, found = path.read_bytes(), list[tuple[str, int, float]]()
    while data:  # length, its checksum, the event, its checksum
        end = 12 + int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12:end])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[end + 4 :]
    return found


def contents(directory: Path) -> dict[str, str]:
    """A digest of every file of a finished run, without what `TIMED` names."""
    found: dict[str, str] = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = str(path.relative_to(directory))
        if path.parent.name == "tensorboard":
            name = "tensorboard/events.*"
        for pattern, read in TIMED:
            if fnmatch.fnmatch(name, pattern):
                content = json.dumps(read(path, directory), sort_keys=True).encode()
                break
        else:
            content = path.read_bytes()
        assert name not in found
        found[name] = hashlib.sha256(content).hexdigest()
    stages = {path.name for path in (directory / "state").glob("*/")}
    assert stages == {"sft", "reward", "ppo", "dpo"}
    assert sum(name.startswith("checkpoints/ppo/weights/") for name in found) > 10
    return found


def bits(directory: Path) -> dict[str, str]:
    """`contents`, without the files that the command alone writes: what a run must have to the bit."""
    found = contents(directory)
    return {name: digest for name, digest in found.items() if name not in OF_THE_COMMAND}
