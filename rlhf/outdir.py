"""The folder of a run: a new one, or one whose run goes on."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.progress import FOLDER, JOURNAL
from rlhf.runlog import METRICS_FILE, TENSORBOARD_FOLDER
from rlhf.submission import require_submission, submission
from sharding.disk.directory import finite, write_json
from sharding.disk.lock import NAME as LOCK
from sharding.disk.lock import locked
from sharding.disk.paths import same
from sharding.errors import UserError

RECIPE_FILE = "recipe.json"
SUBMISSION_FILE = "submission.json"
DATA = "data"  # folder of tables, which are found by their contents
ADVICE = "choose another --output-dir"
# of what was being written when a run was killed
LEFTOVERS = (".*.partial-*", ".*.old-*", ".*.tmp")


@dataclasses.dataclass(frozen=True)
class Resume:
    """What becomes of a run in output_dir: by default one of this recipe goes on, one of another is an error."""

    resume: bool = False  # go on with a run; an error where there is none
    resume_with_changes: bool = False  # go on with it although the recipe has changed
    # move an earlier run in output_dir aside and begin anew, once for each submission: a requeued job resumes its own
    restart: bool = False

    def __post_init__(self) -> None:
        if self.restart and (self.resume or self.resume_with_changes):
            raise UserError("--restart and --resume exclude each other")


@contextlib.contextmanager
def run_directory(
    path: Path, recipe: Mapping[str, Any], how: Resume, note: Callable[[str], None]
) -> Iterator[bool]:
    """Keep other runs out of `path`, which is a new folder, or one whose run goes on: True.

    A run that has made no step is worth nothing: it begins anew in its folder, whatever recipe it had.

    `note` receives a line where an earlier run moves to the first free of `path.1`, `path.2`, ... Raises UserError
    where `path` cannot be written, is in use, or holds what is not to be touched.
    """
    empty, restart = _is_empty(path), _restarts(path, how, note)
    with contextlib.ExitStack() as held:
        if not empty:
            held.enter_context(locked(path, ADVICE))
        if not empty and holds_run(path) and not restart:
            _compare(path, recipe, how, note)
            _clear_leftovers(path)
            yield True
            return
        if (how.resume or how.resume_with_changes) and not holds_run(path):
            raise UserError(f"--resume: output_dir {path} holds no run that can go on")
        with _explained(path):
            if not empty:
                aside = _first_free(path)
                path.rename(aside)
                note(f"kept the earlier run: {path} is now {aside}")
            path.mkdir(parents=True, exist_ok=True)
        _require_writable(path)
        held.enter_context(locked(path, ADVICE))
        if holds_run(path) and _is_barely_begun(path):
            shutil.rmtree(path / FOLDER)
        _clear_leftovers(path)
        if name := submission().name:
            write_json(path / SUBMISSION_FILE, {"name": name})
        yield False


def _restarts(path: Path, how: Resume, note: Callable[[str], None]) -> bool:
    """Tell whether to restart the run in `path`: --restart is given, and another submission began the run."""
    if not how.restart:
        return False
    require_submission()
    file, ours = path / SUBMISSION_FILE, submission()
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))["name"] if file.exists() else ""
    except (OSError, ValueError, KeyError, TypeError):
        theirs = ""
    if ours.repeats and ours.name == theirs and holds_run(path):
        note(f"--restart: this submission ({ours.name}) has begun the run: it resumes")
        return False
    return True


def _is_empty(path: Path) -> bool:
    """Whether `path` is a folder yet to be made or filled. Raises UserError where it is no folder of a run."""
    with _explained(path):
        if path.exists() and not path.is_dir():
            raise UserError(f"output_dir {path} is a file: {ADVICE}")
        if not path.exists() or _is_barely_begun(path):
            return True
        if not (path / METRICS_FILE).exists() and not holds_run(path):
            raise UserError(f"output_dir {path} holds files that are no earlier run: {ADVICE}")
        if Path.cwd().is_relative_to(path.resolve()):
            raise UserError(f"output_dir {path} is the folder you are in: {ADVICE}")
    _require_writable(path)
    return False


def _is_barely_begun(path: Path) -> bool:
    """Tell whether a run ended before its first step, so that its files may be replaced."""
    names = {x.name.removeprefix(".").removesuffix(".tmp") for x in path.iterdir()}
    names = {name for name in names if not name.startswith("shared-")}  # of `check_shared`
    metrics = path / METRICS_FILE
    nothing_told = not metrics.exists() or metrics.stat().st_size == 0
    nothing_saved = not any(x.name.isdecimal() for x in path.glob(f"{FOLDER}/*/*"))
    known = {LOCK[1:], RECIPE_FILE, METRICS_FILE, TENSORBOARD_FOLDER, SUBMISSION_FILE}
    if holds_run(path):  # else folders of these names are a user's
        known |= {FOLDER, DATA}
    elif _holds_tables(path / DATA):  # as the doctor leaves them
        known |= {DATA}
    return nothing_told and nothing_saved and names <= known


def _holds_tables(data: Path) -> bool:
    """Tell whether a folder holds nothing but data sets named by their fingerprints."""
    return data.is_dir() and all(re.fullmatch("[0-9a-f]{12}", x.name) for x in data.iterdir())


def _require_writable(path: Path) -> None:
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {path} is not writable: {ADVICE}")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"output_dir {path} cannot be made: {error.strerror}: {ADVICE}") from error


def _first_free(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return aside


def _compare(
    path: Path, recipe: Mapping[str, Any], how: Resume, note: Callable[[str], None]
) -> None:
    different = changes(path, recipe)
    if not different:
        return
    told = "; ".join(different[:8]) + ("; ..." if len(different) > 8 else "")
    if not how.resume_with_changes:
        raise UserError(
            f"output_dir {path} holds a run of another recipe ({told}): --resume-with-changes goes on with it, "
            f"--restart moves it aside and begins anew, --output-dir takes another folder"
        )
    note(f"the recipe has changed: {told}")


def holds_run(path: Path) -> bool:
    """Whether there is a run that can go on."""
    return (path / FOLDER / JOURNAL).is_file() and (path / RECIPE_FILE).is_file()


def changes(path: Path, recipe: Mapping[str, Any]) -> list[str]:
    """Where `recipe` differs from that of the run in `path`, a line a field. Raises UserError where that is damaged."""
    file = path / RECIPE_FILE
    try:
        before = _flat(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file} ({error}): --restart begins anew") from None
    after = _flat(recipe)
    return [
        f"{name}: {before.get(name, 'none')} -> {_stored(after.get(name, 'none'))}"
        for name in dict.fromkeys([*before, *after])
        if name != "output_dir" and not _alike(before.get(name, "none"), after.get(name, "none"))
    ]


def _alike(stored: Any, now: Any) -> bool:
    """Tell whether a field of recipe.json has the value `now`; paths are equal if they resolve to one place."""
    if isinstance(now, Path):
        return isinstance(stored, str) and same(Path(stored), now)
    if isinstance(now, tuple | list):
        return (
            isinstance(stored, list) and len(stored) == len(now) and all(map(_alike, stored, now))
        )
    return bool(stored == _stored(now))


def _stored(value: Any) -> Any:
    """`value` as `write_json` writes it and JSON reads it."""
    return json.loads(json.dumps(finite(value), default=str))


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{name}.{key}".lstrip("."))
    return found


def _clear_leftovers(path: Path) -> None:
    """Delete what a process that was killed had not finished writing; nobody else may be at work in `path`."""
    for pattern in LEFTOVERS:
        for leftover in (*path.glob(pattern), *path.glob(f"checkpoints/{pattern}")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
