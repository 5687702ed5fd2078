"""What a run tells while it goes: metrics on disk, TensorBoard events, progress on the screen."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from tensorboardX import SummaryWriter

from sharding.disk.directory import explained, finite
from sharding.errors import UserError

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
PLAIN_LINE_SECONDS = 10.0  # between two progress lines where the output is not a terminal

# what of the metrics fits on one line of a screen, and how it is called there
SHOWN_METRICS = {"loss": "loss", "accuracy": "acc", "reward": "reward", "kl": "KL"}


@dataclasses.dataclass(frozen=True)
class Position:
    """How much of a log there is, so that one that goes on from there does not fork."""

    metrics_bytes: int = 0  # of metrics.jsonl
    elapsed_s: float = 0.0  # since the run began, without the time it did not run
    wall_s: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by stage
    tokens_per_s: Mapping[str, float] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)  # steps by stage


class Stage:
    """One stage of a run: counts its steps, tokens and seconds. Made by `RunLog.stage`.

    Attributes:
        line: how the stage goes, as a person reads it, e.g. "loss 3.21 1,204 tok/s 0:42 left".
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        record: Callable[[int, Mapping[str, float]], None],
        show: Callable[["Stage"], None],
        before: int = 0,
    ) -> None:
        self.name = name
        self.total = total
        self.line = "starting"
        self.num_steps = before  # those before the run went on from there included
        self._before = before
        self.num_tokens = 0
        self.done = False
        self._record = record
        self._show = show
        self._begin = self._last = time.monotonic()

    def step(self, step: int, metrics: Mapping[str, Any], tokens: int = 0) -> None:
        """Record step number `step`, which worked on `tokens` tokens since the step before.

        `metrics` are numbers, or arrays of one element. Raises UserError where "loss" is not finite, after
        this step stands in the files.
        """
        values = {name: float(value) for name, value in metrics.items()}
        self._record(step, values)
        self.num_steps += 1
        self._last = time.monotonic()
        if self.num_steps == self._before + 1:
            self._begin = self._last  # the first step compiles: speed counts from its end
        else:
            self.num_tokens += tokens
        self.line = self._describe(values)
        self._show(self)
        if not math.isfinite(values.get("loss", 0.0)):
            raise UserError(
                f"{self.name}: loss is {values['loss']} at step {step}: try a smaller learning rate "
                f"(the steps so far are in {METRICS_FILE} of the output folder)"
            )

    @property
    def count(self) -> str:
        """Steps made, e.g. "12/400"; empty for a stage that has none to count."""
        if self.total is not None:
            return f"{self.num_steps}/{self.total}"
        return str(self.num_steps or "")

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second from the second step on; 0 before that."""
        seconds = self._last - self._begin
        return self.num_tokens / seconds if seconds > 0 else 0.0

    def _describe(self, values: Mapping[str, float]) -> str:
        shown = [(short, values[name]) for name, short in SHOWN_METRICS.items() if name in values]
        parts = [f"{short} {value:.3g}" for short, value in shown]
        if self.tokens_per_s:
            parts.append(f"{self.tokens_per_s:,.0f} tok/s")
        timed = self.num_steps - self._before - 1
        if self.total is not None and timed > 0 and self.num_steps < self.total:
            seconds = (self._last - self._begin) / timed
            left = round(seconds * (self.total - self.num_steps))
            parts.append(f"{_minutes(left)} left")
        return " ".join(parts)


def _minutes(seconds: int) -> str:
    return f"{seconds // 60}:{seconds % 60:02d}"


class RunLog:
    """Owns `metrics.jsonl`, the TensorBoard events and the screen of one run. Close it, or use it in `with`.

    Attributes:
        wall_s: stage -> seconds between its begin and end.
        tokens_per_s: stage -> tokens/s of its steps, the first one (which compiles) left out.
    """

    def __init__(
        self,
        output_dir: Path | None,
        console: Console | None = None,
        position: Position = Position(),
    ) -> None:
        """`output_dir` None: nothing is written or printed, as becomes a process that is not the first.

        What an earlier log has beyond `position` is cut off, in TensorBoard's events as well: those are written anew.
        """
        self._silent = silent = output_dir is None
        self.console = Console(quiet=silent) if silent or console is None else console
        self.wall_s = dict(position.wall_s)
        self.tokens_per_s = dict(position.tokens_per_s)
        self._counts = dict(position.counts)
        self._begin = time.monotonic() - position.elapsed_s
        self._running: tuple[str, float] | None = None  # a stage, and when it began
        # line-buffered: a run that is killed keeps every step it made
        self._path = metrics = Path(os.devnull) if output_dir is None else output_dir / METRICS_FILE
        self._metrics = metrics.open("a", buffering=1, encoding="utf-8")
        events = "" if output_dir is None else str(output_dir / TENSORBOARD_FOLDER)
        if output_dir is not None:
            self._metrics.truncate(position.metrics_bytes)
            shutil.rmtree(events, ignore_errors=True)
        self._events = SummaryWriter(events, flush_secs=10, write_to_disk=not silent)
        if output_dir is not None:
            for line in metrics.read_text(encoding="utf-8").splitlines():
                self._show_event(json.loads(line))

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Flush and close the files."""
        with explained(self._path):
            self._metrics.close()
        self._events.close()

    def note(self, text: str) -> None:
        """Print one line, above the progress bar where there is one."""
        self.console.print(escape(text), soft_wrap=True, highlight=False)

    def position(self) -> Position:
        """How much there is at the moment, on disk as well; nothing where nothing is written."""
        if self._silent:
            return Position()
        wall_s = dict(self.wall_s)
        if self._running is not None:
            name, begin = self._running
            wall_s[name] = wall_s.get(name, 0.0) + time.monotonic() - begin
        with explained(self._path):
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
        elapsed = time.monotonic() - self._begin
        size = os.fstat(self._metrics.fileno()).st_size
        return Position(size, elapsed, wall_s, dict(self.tokens_per_s), dict(self._counts))

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None, before: int = 0) -> Iterator[Stage]:
        """Time a stage of `total` steps, `before` of which were made earlier, and show how it goes.

        `total` None: not known, or nothing to count.
        """
        live = self.console.is_terminal and not self.console.is_dumb_terminal
        begin = time.monotonic()
        self._running = name, begin
        with self._bar(name, total) if live else self._plain_lines() as show:
            stage = Stage(name, total, functools.partial(self._record, name), show, before)
            try:
                yield stage
            finally:
                seconds = time.monotonic() - begin
                self._running = None
                # += : a stage may come in several pieces
                self.wall_s[name] = self.wall_s.get(name, 0.0) + seconds
                if stage.tokens_per_s:
                    self.tokens_per_s[name] = stage.tokens_per_s
            stage.line = (
                f"{stage.line if stage.num_steps else 'done'} in {_minutes(round(seconds))}"
            )
            stage.done = True
            show(stage)

    @contextlib.contextmanager
    def _bar(self, name: str, total: int | None) -> Iterator[Callable[[Stage], None]]:
        progress = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("[bold]{task.description:<8}"),
            BarColumn(bar_width=min(40, max(5, self.console.width - 78))),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[line]}"),
            console=self.console,
        )
        with progress:
            task = progress.add_task(name, total=total, count="", line="starting")

            def show(stage: Stage) -> None:
                # a bar of unknown length is full when its stage is done
                full = 1 if stage.done and total is None else total
                steps = full if stage.done else stage.num_steps
                progress.update(
                    task, total=full, completed=steps, count=stage.count, line=stage.line
                )

            yield show

    @contextlib.contextmanager
    def _plain_lines(self) -> Iterator[Callable[[Stage], None]]:
        told_at = -math.inf

        def show(stage: Stage) -> None:
            nonlocal told_at
            now = time.monotonic()
            due = now - told_at >= PLAIN_LINE_SECONDS and stage.num_steps != stage.total
            if stage.done or due:
                told_at = now
                self.note(" ".join(filter(None, (stage.name, stage.count, stage.line))))

        yield show

    def _record(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        wall_s = round(time.monotonic() - self._begin, 3)
        line = {"stage": stage, "step": step, "wall_s": wall_s, **finite(values)}
        with explained(self._path):
            self._metrics.write(json.dumps(line) + "\n")
        self._counts[stage] = step
        self._show_event(line)

    def _show_event(self, line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if name not in ("stage", "step", "wall_s"):
                shown = math.nan if value is None else value
                tag = f"{line['stage']}/{name}".replace(" ", "_")
                self._events.add_scalar(tag, shown, line["step"])
