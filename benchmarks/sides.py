"""Sides of a comparison, each in a process of its own that does a turn when it is asked to.

A request is a line of JSON on a side's stdin, the answer one on its stdout. So sides take turns, and what else the
machine does hits all alike. Every process keeps the memory that it has freed, as `glm-jax run` does on a CPU.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sharding.host_memory import keep_freed_memory

ROOT = Path(__file__).parents[1]
FLAG = "--side"  # the first argument of a script that is started as a side
Side = Callable[[Any], Any]  # a request -> its answer


def started(name: str, *arguments: str, python: str = sys.executable) -> Side:
    """The running script once more, as the side `name`, under the interpreter `python`."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [python, sys.argv[0], FLAG, name, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(path)},
    )
    assert process.stdin and process.stdout
    stdin, stdout = process.stdin, process.stdout

    def ask(request: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        if line := stdout.readline():
            return json.loads(line)
        sys.exit(f"{name} stopped: see above")

    return ask


def this_side() -> list[str] | None:
    """The side's name and arguments where the script was started as a side."""
    if sys.argv[1:2] != [FLAG]:
        return None
    keep_freed_memory()
    return sys.argv[2:]


def requests() -> Iterator[Any]:
    """What a side is asked; every request wants an `answer`."""
    return map(json.loads, sys.stdin)


def answer(told: Any) -> None:
    """Answer the last request, also where stdout has been redirected."""
    print(json.dumps(told), file=sys.__stdout__, flush=True)


def serve(side: Side) -> None:
    """Answer all requests."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
        for request in requests():
            answer(side(request))


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median and range."""
    median, low, high = (
        f"{x:.{digits}f}" for x in (statistics.median(values), min(values), max(values))
    )
    return f"{median} ({low} to {high})"
