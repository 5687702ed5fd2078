"""Directories and files that appear whole or not at all."""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sharding.disk.paths import absolute
from sharding.errors import UserError

ADVICE = {
    errno.ENOSPC: "the disk is full: make room or write elsewhere",
    errno.EDQUOT: "the quota is used up: make room or write elsewhere",
    errno.EROFS: "the file system is read-only: write elsewhere",
    errno.EACCES: "permission denied: write elsewhere",
    errno.EFBIG: "the file would exceed the largest size allowed: write smaller shards",
}


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename not in (None, str(path)) else ""
        reason = ADVICE.get(error.errno or 0, f"{error.strerror or error}: write elsewhere")
        raise UserError(f"cannot write {path}: {where}{reason}") from error


@contextlib.contextmanager
def new_directory(path: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its name when the block ends well, and vanishes when it fails.

    Raises UserError where `path` exists already and is not to be replaced, or cannot be written.
    """
    path = absolute(path)
    if path.exists() and not replace:
        raise UserError(f"{path} exists already: choose another name or remove it")
    if path.exists() and (path.is_symlink() or not path.is_dir()):
        raise UserError(f"{path} is no directory: choose another name or remove it")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    try:
        with explained(path):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            if replace and path.exists():
                os.replace(path, old)  # two renames, so that at no time both are gone
            elif path.exists():
                raise UserError(f"{path} appeared meanwhile: choose another name or remove it")
            os.replace(partial, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as UTF-8 JSON under a temporary name, then rename: readers see all of it or none.

    A number that is not finite becomes null (JSON has no name for it), a path its string. Raises UserError where it
    cannot be written.
    """
    _write_text(path, json.dumps(finite(value), ensure_ascii=False, indent=2, default=str) + "\n")


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """`write_json`, a value a line."""
    lines = (json.dumps(finite(value), ensure_ascii=False, default=str) for value in values)
    _write_text(path, "".join(f"{line}\n" for line in lines))


def _write_text(path: Path, text: str) -> None:
    with new_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file under a temporary name that takes its own when the block ends well. Raises UserError."""
    temporary = path.with_name(f".{path.name}.tmp")
    with explained(path):
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave the new name without its contents
        os.replace(temporary, path)


def finite(value: Any) -> Any:
    """`value` with None in place of numbers that are not finite, at any depth."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
