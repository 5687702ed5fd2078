"""The entries of JSON files: lines of .jsonl or members of a JSON array, gzipped or not, each with its place.

Lines are read one at a time, so that a file may be larger than memory; an array is read whole.
"""

import contextlib
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.data.mistakes import Mistake, Tally
from sharding.errors import UserError

GZIP = b"\x1f\x8b"


class Entry(NamedTuple):
    """One JSON object and where it stands."""

    where: str  # "file:line"
    fields: dict[str, Any]


def read_entries(path: Path, tally: Tally) -> Iterator[Entry]:
    """The JSON objects of a file, in order; those that cannot be read go to `tally`.

    A file whose first character is "[" is one JSON array. Raises UserError on a file that cannot be opened, and where
    the policy refuses.
    """
    with _opened(path) as file:
        if _starts_array(file):
            yield from _members(file, path, tally)
        else:
            yield from _lines(file, path, tally)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    try:
        with path.open("rb") as file:
            if file.peek(2)[:2] == GZIP:
                unzipped: Any = gzip.GzipFile(fileobj=file)
                with io.BufferedReader(unzipped) as plain:
                    yield plain
            else:
                yield file
    except (EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _starts_array(file: io.BufferedReader) -> bool:
    start: bytes = file.peek(64)[:64]
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _lines(file: io.BufferedReader, path: Path, tally: Tally) -> Iterator[Entry]:
    most = int(tally.policy.max_entry_mib * 2**20)
    number = 0
    while line := file.readline(most + 1):
        number += 1
        where = f"{path}:{number}"
        try:
            if len(line) > most and not line.endswith(b"\n"):
                size = len(line) + _skip_line(file)
                raise Mistake(
                    "unreadable",
                    f"a line of {size:,} bytes, more than {tally.policy.max_entry_mib:g} MiB",
                )
            text = _decoded(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            if text.strip():
                yield Entry(where, _object(_parsed(text)))
        except Mistake as mistake:
            tally.meet(mistake, where)


def _skip_line(file: io.BufferedReader) -> int:
    """Bytes up to the end of the line, which are read and forgotten."""
    size = 0
    while piece := file.readline(2**20):
        size += len(piece)
        if piece.endswith(b"\n"):
            break
    return size


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Mistake("unreadable", f"not UTF-8 (byte {error.start} of the line)") from None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Mistake("unreadable", f"malformed JSON ({error})") from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Mistake("unreadable", "not a JSON object: write {...} with its fields")
    return value


def _members(file: io.BufferedReader, path: Path, tally: Tally) -> Iterator[Entry]:
    """Members of an array, each at the line that it begins on. Raises UserError where the array itself is damaged."""
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 (byte {error.start}); convert the file to UTF-8"
        ) from None
    decoder = json.JSONDecoder()
    line, counted, at = 1, 0, text.index("[") + 1
    while True:
        at = _after_blanks(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            return
        try:
            value, at = decoder.raw_decode(text, at)
            ending = _after_blanks(text, at)
            if text[ending : ending + 1] not in (",", "]"):
                raise ValueError("no comma after a member of the array")
        except (ValueError, RecursionError) as error:
            message = f"{path}:{line}: malformed JSON ({error}); mend the file"
            raise UserError(message) from None
        at = ending + (text[ending] == ",")
        where = f"{path}:{line}"
        try:
            yield Entry(where, _object(value))
        except Mistake as mistake:
            tally.meet(mistake, where)


def _after_blanks(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t") and at < len(text):
        at += 1
    return at
