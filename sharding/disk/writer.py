"""Safetensors shards, filled in any order."""

import contextlib
import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from sharding.disk.directory import explained, write_json
from sharding.disk.manifest import Entry
from sharding.disk.safetensors_file import make_header
from sharding.disk.stored import CHUNK
from sharding.errors import UserError

INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Spec:
    """A tensor that is to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(specs: Sequence[Spec], max_bytes: int | None) -> dict[str, list[Spec]]:
    """File name -> its tensors, in the given order; a tensor that would exceed `max_bytes` begins a new file."""
    shards: list[list[Spec]] = [[]]
    for spec in specs:
        full = sum(other.nbytes for other in shards[-1]) + spec.nbytes > (max_bytes or math.inf)
        if shards[-1] and full:
            shards.append([])
        shards[-1].append(spec)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


class ShardWriter:
    """Writes headers and index at once, tensors as they come; a context manager.

    `put` may be called by several threads. Raises UserError where the disk refuses.
    """

    def __init__(
        self, directory: Path, specs: Sequence[Spec], max_bytes: int | None = None
    ) -> None:
        self.directory = directory
        self._entries: dict[str, Entry] = {}
        self._places: dict[str, tuple[Spec, str, int]] = {}
        self._descriptors: dict[str, int] = {}
        names = [spec.name for spec in specs]
        if len(set(names)) < len(names):
            raise ValueError(f"announced twice: {max(names, key=names.count)}")
        shards = plan_shards(specs, max_bytes)
        try:
            for file, shard in shards.items():
                self._begin(file, shard)
        except BaseException:
            self._close()
            raise
        if len(shards) > 1:
            total = sum(spec.nbytes for spec in specs)
            weight_map = {name: file for name, (_, file, _) in sorted(self._places.items())}
            write_json(
                directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
            )

    def _begin(self, file: str, shard: Sequence[Spec]) -> None:
        header = make_header([(spec.name, spec.dtype, spec.shape) for spec in shard])
        path = self.directory / file
        offset = len(header)
        for spec in shard:
            self._places[spec.name] = (spec, file, offset)
            offset += spec.nbytes
        with explained(path):
            self._descriptors[file] = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o644)
            _write(self._descriptors[file], memoryview(header), 0)

    @property
    def entries(self) -> dict[str, Entry]:
        """Hashes of the tensors written so far by name, in the order of the specs: threads `put` in any order."""
        return {name: self._entries[name] for name in self._places if name in self._entries}

    def put(self, name: str, array: np.ndarray) -> None:
        """Write one tensor. Raises ValueError unless it is the announced one, for the first time."""
        if name not in self._places:
            raise ValueError(f"{name}: was not announced")
        spec, file, offset = self._places[name]
        if array.shape != spec.shape or array.dtype != spec.dtype or name in self._entries:
            raise ValueError(
                f"{name}: {array.dtype} {array.shape} is not what was announced: {spec}"
            )
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        digest = hashlib.sha256()
        # a write keeps other threads from the file: none for long
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            with explained(self.directory / file):
                _write(self._descriptors[file], chunk, offset + start)
            digest.update(chunk)
        self._entries[name] = Entry(file, spec.dtype.name, spec.shape, digest.hexdigest())

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            for file in list(self._descriptors):
                with explained(self.directory / file):  # a network disk may tell only now
                    os.close(self._descriptors.pop(file))
        self._close()
        lacking = set(self._places) - set(self._entries)
        if kind is None and lacking:
            raise ValueError(
                f"{len(lacking)} tensors were never written, {min(lacking)} among them"
            )

    def _close(self) -> None:
        for descriptor in self._descriptors.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB" (5 * 10^9) or "5GiB" (5 * 2^30). Raises UserError on anything else."""
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", 1):
        units |= {f"{letter}B": 1000**power, f"{letter}IB": 1024**power}
    number = text.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz ")
    try:
        size = int(float(number) * units[text[len(number) :].strip().upper()])
        if size < 1:
            raise ValueError
    except (KeyError, OverflowError, ValueError):
        raise UserError(f"{text!r} is no size: write 5GB, 500MB or 2GiB") from None
    return size
