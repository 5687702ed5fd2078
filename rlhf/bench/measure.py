"""One job under one layout, measured: a process of its own, so that what it breaks is its own.

    python -m rlhf.bench.measure CASE

CASE is `Case.as_json`. On standard output it says a line of JSON at a time: {"at": "what it does"}, and at last
{"row": ...}. What it cannot do is a row with a reason, too.
"""

import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from rlhf.bench.case import Case, Moved, ProgramRow, Row, case_of
from rlhf.bench.prediction import attached_pod, predicted_seconds, utilisation
from rlhf.bench.steps import Clocks, Step, step_of
from rlhf.programs import (
    Program,
    programs,
    residents,
    step_tokens,
)
from sharding.chips import Pod
from sharding.collectives import Collective
from sharding.cost import cost
from sharding.errors import UserError
from sharding.hlo import read
from sharding.host_memory import keep_freed_memory
from sharding.layout import use_devices

WARMUP = 2  # steps before those that count
TRACED = 3  # steps that --profile looks at
Tell = Callable[[str], None]


def measure(case: Case, tell: Tell) -> Row:
    """The row of a case on the devices of this process. Raises whatever goes wrong."""
    layout, generation = case.layouts
    mesh = layout.mesh()
    devices = list(mesh.devices.flat)
    pod = attached_pod(devices)
    with jax.set_mesh(mesh):
        listed = programs(case.job, case.model.config, layout, case.workload, generation)
        beside = residents(case.job, case.model.config, layout)
        compiled, rows = {}, []
        for program in listed:
            tell(f"compiling {program.name}")
            compiled[program.name], row = _compiled(program, beside, pod)
            rows.append(row)
        tell("drawing weights")
        clocks = Clocks(compiled)
        step = step_of(case, clocks)
        seconds = _timed(step, case.steps, tell)
        allocated = _allocated(devices)
        if case.profile is not None:
            _trace(step, case, tell)
        tell("timing its programs")
        clocks.running = True
        step()
    rows = [dataclasses.replace(row, step_s=clocks.median(row.name)) for row in rows]
    flops = sum(program.runs * program.flops for program in listed)
    return Row(
        layout=case.layout,
        job=case.job,
        programs=tuple(rows),
        tokens=step_tokens(case.job, case.workload),
        step_s=tuple(seconds),
        model_flops=flops,
        mfu=utilisation(flops, statistics.median(seconds), layout.num_devices, pod),
        allocated_bytes=allocated,
    )


def _compiled(
    program: Program, beside: Mapping[str, int], pod: Pod | None
) -> tuple[jax.stages.Compiled, ProgramRow]:
    begin = time.perf_counter()
    compiled = program.lower().compile()
    seconds = time.perf_counter() - begin
    module = read(compiled)
    found = cost(module)
    row = ProgramRow(
        name=program.name,
        runs=program.runs,
        compile_s=seconds,
        memory_bytes=peak_bytes(compiled) + sum(beside[role] for role in program.beside),
        flops=found.flops,
        collectives=moved(found.collectives),
        predicted_s=predicted_seconds(module, program.mesh.devices, pod),
    )
    return compiled, row


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """The most that a program holds on a device, arguments included."""
    memory: Any = compiled.memory_analysis()
    if jax.default_backend() != "cpu":
        return int(memory.peak_memory_in_bytes)
    # which leaves temporary arrays out there
    written = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(memory.argument_size_in_bytes + written + memory.temp_size_in_bytes)


def moved(collectives: tuple[Collective, ...]) -> dict[str, Moved]:
    """Collectives by kind."""
    found: dict[str, Moved] = {}
    for x in collectives:
        before = found.get(x.kind, Moved(0, 0))
        sent = before.sent_bytes + x.times * x.sent_bytes
        found[x.kind] = Moved(before.runs + x.times, sent)
    return found


def _allocated(devices: Sequence[Any]) -> int | None:
    """The most that was allocated on any device so far; None where the runtime does not tell."""
    stats = [device.memory_stats() for device in devices]
    peaks = [x["peak_bytes_in_use"] for x in stats if x and "peak_bytes_in_use" in x]
    return max(peaks) if peaks else None


def _timed(step: Step, count: int, tell: Tell) -> list[float]:
    """Seconds of `count` steps, after some that fill caches."""
    seconds = []
    for number in range(WARMUP + count):
        tell(f"step {number + 1} of {WARMUP + count}")
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return seconds[WARMUP:]


def _trace(step: Step, case: Case, tell: Tell) -> None:
    tell("tracing")
    assert case.profile is not None
    folder = Path(case.profile) / f"{case.layout.replace(':', '_')}-{case.job}"
    with jax.profiler.trace(str(folder)):
        for number in range(TRACED):
            with jax.profiler.StepTraceAnnotation(case.job, step_num=number):
                step()


def reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text[:300]}"


@contextlib.contextmanager
def _answering() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Says lines of JSON; what else is printed goes to standard error."""
    out = sys.stdout

    def answer(found: dict[str, Any]) -> None:
        out.write(json.dumps(found) + "\n")
        out.flush()

    with contextlib.redirect_stdout(sys.stderr):
        yield answer


def main(text: str) -> None:
    """Measure the case that `text` spells."""
    with _answering() as answer:
        case = case_of(json.loads(text))
        keep_freed_memory()
        use_devices(case.devices)
        jax.config.update("jax_enable_compilation_cache", False)  # compile times are to be real
        try:
            row = measure(case, lambda at: answer({"at": at}))
        except Exception as error:  # a row, whatever it is
            row = Row(case.layout, case.job, reason(error))
        answer({"row": row.as_json()})


if __name__ == "__main__":
    main(sys.argv[1])
