"""From a configured source to random-access records on disk, once."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from rlhf.data.files.builder import Files
from rlhf.data.files.files import FilesData, Tell, silent
from rlhf.data.oracle.builder import Oracle
from rlhf.data.oracle.oracle import OracleData
from rlhf.data.public import PublicData
from rlhf.data.records import Split, Splits, require_examples
from rlhf.data.reviews.builder import Reviews
from rlhf.data.reviews.reviews import ReviewsData
from rlhf.data.storage import RECORD_TYPES, RecordsBuilder, StoredRecords
from sharding.disk.directory import write_json
from sharding.disk.seal import broken, is_sealed, seal
from sharding.errors import UserError

NOTES = "notes.json"  # what was left out when the tables were built


def prepare(
    data: ReviewsData | FilesData | PublicData | OracleData,
    directory: Path,
    tables: Sequence[str] = tuple(RECORD_TYPES),
    tell: Tell = silent,
) -> Splits:
    """Build the splits of some tables of `data` under `directory`, unless they are there, and open them.

    A table that is not asked for is empty. `tell` receives a line for whatever was left out, also where it was built
    before.

    The folder's name is a digest of the configuration and of what the files say: another seed or
    an edited file gives another folder, and what is there is never stale. A table appears whole or
    not at all; one that is no longer as it was written is built again, which `tell` hears of.

    Raises:
        UserError: a file is missing or says what it should not; a split would be empty.
    """
    builder = builder_of(data)
    root = directory / fingerprint(data, builder)
    notes: list[str] = []
    splits = functools.cache(lambda: require_examples(data.splits(notes.append), tables))
    found = {name: _open(builder, name, root, splits, tell) for name in tables}
    if notes:
        write_json(root / NOTES, notes)
    for line in json.loads((root / NOTES).read_text("utf-8")) if (root / NOTES).exists() else ():
        tell(f"data: {line}")
    return Splits(**{name: found.get(name, Split((), ())) for name in RECORD_TYPES})


def builder_of(data: ReviewsData | FilesData | PublicData | OracleData) -> type[RecordsBuilder]:
    """What builds the tables of `data`."""
    if isinstance(data, ReviewsData):
        return Reviews
    return Oracle if isinstance(data, OracleData) else Files


def fingerprint(
    data: ReviewsData | FilesData | PublicData | OracleData, builder: type[RecordsBuilder]
) -> str:
    """Twelve hexadecimal digits that name the data set."""
    paths = data.paths()
    read = {name.split()[0] for name in paths}  # by content, wherever they are
    fields = {name: value for name, value in dataclasses.asdict(data).items() if name not in read}
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


def _open(
    builder: type[RecordsBuilder],
    name: str,
    root: Path,
    splits: Callable[[], Splits],
    tell: Tell,
) -> Split:
    """One table, built first if need be, without the bars and lines that TFDS shows."""
    tfds.disable_progress_bar()
    make = functools.partial(builder, splits=splits, config=name, data_dir=root)
    directory = Path(make().data_path)
    problems = broken(directory) if is_sealed(directory) else []
    if problems:
        tell(f"data: {problems[0]}: it is built again")
    if problems or not is_sealed(directory):
        shutil.rmtree(directory, ignore_errors=True)
    table = make()  # which looks at what is there
    if not is_sealed(directory):
        with contextlib.redirect_stdout(io.StringIO()):
            table.download_and_prepare()
        seal(directory)
    return Split(
        *(StoredRecords(table.as_data_source(side), RECORD_TYPES[name]) for side in Split._fields)
    )
