"""Cases one after the other, each in a process of its own: what one of them breaks stops none of the others."""

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

from rlhf.bench.case import Case, Row, row_of
from sharding.errors import UserError

Tell = Callable[[str], None]
CHILD = (sys.executable, "-m", "rlhf.bench.measure")


def bench(cases: Iterable[Case], limit_s: float, tell: Tell) -> Iterator[Row]:
    """A row for every case, as they are done; one that takes longer than `limit_s` is ended.

    `tell` hears what is being done. This process does not touch the devices.
    """
    for case in cases:
        try:
            case.check()
        except UserError as error:
            yield Row(case.layout, case.job, str(error))
            continue
        yield _measured(case, limit_s, tell)


def _measured(case: Case, limit_s: float, tell: Tell) -> Row:
    command = [*CHILD, json.dumps(case.as_json())]
    row, late = None, threading.Event()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        tell("starting")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:

            def end() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(limit_s, end)
            timer.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    said = _answer(line)
                    if "row" in said:
                        row = row_of(said["row"])
                    elif "at" in said:
                        tell(said["at"])
            finally:
                timer.cancel()
                if row is None:
                    process.kill()
        if row is not None:
            return row
        if late.is_set():
            return Row(case.layout, case.job, f"took longer than {limit_s:g} s and was ended")
        return Row(case.layout, case.job, _how_it_ended(process.returncode, errors))


def _answer(line: str) -> Mapping[str, Any]:
    """What a line of the process says; nothing where a library printed it."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _how_it_ended(status: int, errors: IO[str]) -> str:
    """Why there is no row: the exit status or signal, and the last that was said."""
    errors.seek(0)
    said = [" ".join(line.split()) for line in errors if line.strip()]
    last = f": {said[-1][:300]}" if said else ""
    if status < 0:
        name = signal.Signals(-status).name
        hint = ", perhaps for want of host memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}{last}"
    return f"its process ended with status {status}{last}"
