"""A hash of every tensor and file of a directory, to find out later what changed."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sharding.disk.directory import write_json
from sharding.disk.find import find_tensors, weight_files
from sharding.disk.stored import CHUNK, Stored
from sharding.errors import UserError

NAME = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: its hash is that of its little-endian row-major bytes, whatever file they stand in."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str

    def same(self, other: "Entry") -> bool:
        """Whether both are the same tensor, byte for byte."""
        return dataclasses.replace(self, file="") == dataclasses.replace(other, file="")


Entries = Mapping[str, Entry]


def hash_tensor(stored: Stored) -> Entry:
    """Entry of a tensor, read a few MiB at a time. Raises UserError where it cannot be read."""
    digest = hashlib.sha256()
    for part in stored.chunks():
        digest.update(part.data)
    return Entry(stored.path.name, stored.dtype.name, stored.shape, digest.hexdigest())


def hash_tensors(tensors: Mapping[str, Stored], threads: int = 1) -> dict[str, Entry]:
    """Entries of many tensors, by name."""
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(tensors, pool.map(hash_tensor, tensors.values()), strict=True))


def write_manifest(directory: Path, tensors: Entries) -> None:
    """Write `manifest.json`: the tensors, and a hash of every other file of the directory."""
    weights = {entry.file for entry in tensors.values()}
    files = {
        path.name: hash_file(path)
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name not in weights and path.name != NAME
    }
    write_json(directory / NAME, {"tensors": _fields(tensors), "files": files})


def write_entries(path: Path, tensors: Entries) -> None:
    """Write hashes of tensors alone."""
    write_json(path, {"tensors": _fields(tensors), "files": {}})


def _fields(tensors: Entries) -> dict[str, dict[str, object]]:
    return {name: dataclasses.asdict(entry) for name, entry in tensors.items()}


def read_entries(path: Path) -> dict[str, Entry]:
    """The tensors of a manifest. Raises UserError where there is none."""
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors and other files of a manifest. Raises UserError where there is none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        tensors = {
            name: Entry(**{**entry, "shape": tuple(entry["shape"])})
            for name, entry in fields["tensors"].items()
        }
        return tensors, dict(fields["files"])
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; export writes it, other directories have none"
        ) from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{path}: not a manifest that export wrote") from None


def check_manifest(directory: Path) -> list[str]:
    """What is no longer as the manifest says, one line each; empty where all is."""
    tensors, files = _read(directory / NAME)
    found = find_tensors(directory)
    problems = [f"tensor {name} is missing" for name in tensors if name not in found]
    problems += [f"tensor {name} is not in the manifest" for name in found if name not in tensors]
    both = {name: stored for name, stored in found.items() if name in tensors}
    for name, entry in hash_tensors(both, threads=2).items():
        if not entry.same(tensors[name]):
            problems.append(f"{entry.file}: tensor {name} has changed")
    weights = {path.name for path in weight_files(directory)}
    for name, digest in files.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif name not in weights and hash_file(path) != digest:
            problems.append(f"{name} has changed")
    return problems


def differing(ours: Entries, theirs: Entries) -> list[str]:
    """Names of the tensors that are not the same in both, in order."""
    names: Iterable[str] = dict.fromkeys([*ours, *theirs])
    return [
        name
        for name in names
        if name not in ours or name not in theirs or not ours[name].same(theirs[name])
    ]


def hash_file(path: Path) -> str:
    """SHA-256 of its bytes, hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()
