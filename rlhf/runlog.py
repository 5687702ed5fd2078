"""What a run tells while it goes: metrics on disk, TensorBoard events, progress on the screen."""

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from tensorboardX import SummaryWriter

from sharding.disk.directory import finite
from sharding.errors import UserError

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
PLAIN_LINE_SECONDS = 10.0  # between two progress lines where the output is not a terminal

# what of the metrics fits on one line of a screen, and how it is called there
SHOWN_METRICS = {"loss": "loss", "accuracy": "acc", "reward": "reward", "kl": "KL"}


def fresh_directory(path: Path, note: Callable[[str], None]) -> None:
    """Make `path` an empty folder; an earlier run in it moves to the first free of `path.1`, `path.2`, ...

    `note` receives one line about the move. Raises UserError where `path` is a file, cannot be written, or
    holds something other than a run.
    """
    advice = "choose another --output-dir"
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"output_dir {path} is a file: {advice}")
        if path.is_dir() and any(path.iterdir()):
            if not (path / METRICS_FILE).exists():
                raise UserError(f"output_dir {path} holds files that are no earlier run: {advice}")
            if Path.cwd().is_relative_to(path.resolve()):
                raise UserError(f"output_dir {path} is the folder you are in: {advice}")
            aside = _first_free(path)
            path.rename(aside)
            note(f"kept the earlier run: {path} is now {aside}")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir {path} cannot be made: {error.strerror}: {advice}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {path} is not writable: {advice}")


def _first_free(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return aside


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
    ) -> None:
        self.name = name
        self.total = total
        self.line = "starting"
        self.num_steps = 0
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
        if self.num_steps == 1:
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
        if self.total is not None and 1 < self.num_steps < self.total:
            seconds = (self._last - self._begin) / (self.num_steps - 1)
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

    def __init__(self, output_dir: Path | None, console: Console | None = None) -> None:
        """`output_dir` None: nothing is written or printed, as becomes a process that is not the first."""
        silent = output_dir is None
        self.console = Console(quiet=silent) if silent or console is None else console
        self.wall_s: dict[str, float] = {}
        self.tokens_per_s: dict[str, float] = {}
        self._begin = time.monotonic()
        # line-buffered: a run that is killed keeps every step it made
        metrics = Path(os.devnull) if output_dir is None else output_dir / METRICS_FILE
        self._metrics = metrics.open("a", buffering=1, encoding="utf-8")
        events = "" if output_dir is None else str(output_dir / TENSORBOARD_FOLDER)
        self._events = SummaryWriter(events, flush_secs=10, write_to_disk=not silent)

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
        self._metrics.close()
        self._events.close()

    def note(self, text: str) -> None:
        """Print one line, above the progress bar where there is one."""
        self.console.print(escape(text), soft_wrap=True, highlight=False)

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Time a stage of `total` steps and show how it goes; `total` None: not known, or nothing to count."""
        live = self.console.is_terminal and not self.console.is_dumb_terminal
        begin = time.monotonic()
        with self._bar(name, total) if live else self._plain_lines() as show:
            stage = Stage(name, total, functools.partial(self._record, name), show)
            try:
                yield stage
            finally:
                seconds = time.monotonic() - begin
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
        self._metrics.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self._events.add_scalar(f"{stage}/{name}".replace(" ", "_"), value, step)
