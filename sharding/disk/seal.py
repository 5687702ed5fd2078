"""A hash of every file of a directory, written into it when it is complete: whether it still is can be seen later."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from sharding.disk.directory import write_json
from sharding.disk.manifest import hash_file
from sharding.errors import UserError

NAME = "seal.json"
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")  # what Orbax writes when all else is there


def seal(directory: Path) -> None:
    """Write `seal.json` with the size and SHA-256 of every file.

    Raises UserError where it cannot be written, OSError where a file cannot be read.
    """
    files = {
        str(path.relative_to(directory)): [path.stat().st_size, hash_file(path)]
        for path in _files(directory)
    }
    write_json(directory / NAME, files)


def digest(directory: Path, pattern: str = "*") -> str:
    """SHA-256 of the names and contents of every file whose name matches, for a directory that is not ours to seal.

    Raises UserError.
    """
    found = hashlib.sha256()
    try:
        for path in _files(directory, pattern):
            found.update(f"{path.relative_to(directory)} {hash_file(path)}\n".encode())
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    return found.hexdigest()


def is_sealed(directory: Path) -> bool:
    """Whether it was complete once."""
    return (directory / NAME).is_file()


def broken(directory: Path) -> list[str]:
    """What is no longer as the seal says, a line each; empty where all is. Raises UserError where there is no seal."""
    path = directory / NAME
    try:
        sealed: dict[str, list[object]] = json.loads(path.read_text(encoding="utf-8"))
        wanted = {name: (int(str(size)), str(digest)) for name, (size, digest) in sealed.items()}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: it was never complete") from None
    except (AttributeError, TypeError, ValueError) as error:
        return [f"{path} cannot be read: {error}"]
    problems = []
    for name, (size, digest) in wanted.items():
        file = directory / name
        try:
            if (found := file.stat().st_size) != size:
                problems.append(f"{file} has {found:,} bytes instead of {size:,}")
            elif hash_file(file) != digest:
                problems.append(f"{file} has changed")
        except OSError as error:
            problems.append(f"{file}: {error.strerror}")
    new = [
        str(file) for file in _files(directory) if str(file.relative_to(directory)) not in wanted
    ]
    return [*problems, *(f"{file} does not belong there" for file in new)]


def _files(directory: Path, pattern: str = "*") -> Iterator[Path]:
    for path in sorted(directory.rglob(pattern)):
        if path.is_file() and path.name not in (NAME, *LATER):
            yield path
