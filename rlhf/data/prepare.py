"""From a configured source to random-access records on disk, once."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from rlhf.data.accounts import Accounts
from rlhf.data.files.builder import Files
from rlhf.data.files.files import FilesData, Tell, silent
from rlhf.data.oracle.builder import Oracle
from rlhf.data.oracle.oracle import OracleData
from rlhf.data.public import PublicData
from rlhf.data.records import Split, Splits, require_examples
from rlhf.data.reviews.builder import Reviews
from rlhf.data.reviews.reviews import ReviewsData
from rlhf.data.storage import RECORD_TYPES, RecordsBuilder, StoredRecords
from sharding.disk.directory import explained, write_json
from sharding.disk.seal import broken, is_sealed, seal
from sharding.errors import UserError

NOTES = "notes.json"  # entries that were skipped when the tables were built
ACCOUNTS = "accounts.json"  # records that were left out then


Data = ReviewsData | FilesData | PublicData | OracleData


def prepare(
    data: Data,
    directory: Path,
    tables: Sequence[str] = tuple(RECORD_TYPES),
    tell: Tell = silent,
) -> Splits:
    """`build_tables`, then `open_tables`, in a folder of `directory`.

    Its name is a digest of the configuration and of what the files say: another seed or an edited file
    gives another folder, and what is there is never stale.
    """
    root = directory / fingerprint(data)
    build_tables(data, root, tables, tell)
    for line in open_accounts(root, tables).lines():
        tell(f"data: {line}")
    return open_tables(data, root, tables)


def build_tables(data: Data, root: Path, tables: Sequence[str], tell: Tell = silent) -> None:
    """Build the splits of some tables of `data` in `root`, unless they are there.

    Nobody else may be at work there. `tell` receives a line for whatever was skipped, also where it was built before.
    A table appears whole or not at all; one that is no longer as it was written is built again, which `tell` hears of.

    Raises:
        UserError: a file is missing or says what it should not; a split would be empty.
    """
    builder = builder_of(data)
    notes: list[str] = []

    @functools.cache
    def splits() -> Splits:
        if isinstance(data, FilesData | PublicData):
            found, accounts = data.accounted(notes.append)
        else:
            found, accounts = data.splits(notes.append), Accounts()
        require_examples(found, tables)
        accounts.write(root / ACCOUNTS)
        write_json(root / NOTES, notes)
        return found

    for name in tables:
        _build(builder, name, root, splits, tell)
    if not (root / ACCOUNTS).exists():
        splits()
    for line in json.loads((root / NOTES).read_text("utf-8")) if (root / NOTES).exists() else ():
        tell(f"data: {line}")


def open_tables(data: Data, root: Path, tables: Sequence[str]) -> Splits:
    """What `build_tables` has built; a table that is not asked for is empty."""
    builder = builder_of(data)
    found = {name: _open(builder, name, root) for name in tables}
    return Splits(**{name: found.get(name, Split((), ())) for name in RECORD_TYPES})


def open_accounts(root: Path, tables: Sequence[str]) -> Accounts:
    """Accounts of what was left out when `build_tables` built these tables."""
    return Accounts([found for found in Accounts.read(root / ACCOUNTS) if found.table in tables])


def builder_of(data: Data) -> type[RecordsBuilder]:
    """What builds the tables of `data`."""
    if isinstance(data, ReviewsData):
        return Reviews
    return Oracle if isinstance(data, OracleData) else Files


def fingerprint(data: Data) -> str:
    """Twelve hexadecimal digits that name the data set. Raises UserError where a file of it cannot be read."""
    builder = builder_of(data)
    paths = data.paths()
    fields = _without_paths(dataclasses.asdict(data))  # files count by content, wherever they are
    digest = hashlib.sha256(
        f"{builder.__name__} {builder.VERSION} {sorted(fields.items())}".encode()
    )
    for name, path in paths.items():
        try:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
        digest.update(f"{name} {content}".encode())
    return digest.hexdigest()[:12]


def _without_paths(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, nested ones too, whose value is neither a path nor a sequence of paths."""
    return {
        name: _without_paths(value) if isinstance(value, Mapping) else value
        for name, value in fields.items()
        if not isinstance(value, Path)
        and not (isinstance(value, tuple) and any(isinstance(x, Path) for x in value))
    }


def _build(
    builder: type[RecordsBuilder],
    name: str,
    root: Path,
    splits: Callable[[], Splits],
    tell: Tell,
) -> None:
    """One table, unless it is there and whole, without the bars and lines that TFDS shows."""
    directory = root / builder.name / name / str(builder.VERSION)
    sealed = is_sealed(directory)
    problems = broken(directory) if sealed else []
    if sealed and not problems:
        return
    if problems:
        tell(f"data: {problems[0]}: it is built again")
    with explained(directory):
        if directory.exists():
            shutil.rmtree(directory)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder(splits=splits, config=name, data_dir=root).download_and_prepare()
    seal(directory)


def _open(builder: type[RecordsBuilder], name: str, root: Path) -> Split:
    table = builder(splits=_built, config=name, data_dir=root)
    return Split(
        *(StoredRecords(table.as_data_source(side), RECORD_TYPES[name]) for side in Split._fields)
    )


def _built() -> Splits:
    raise AssertionError("a table that is to be opened has not been built")
