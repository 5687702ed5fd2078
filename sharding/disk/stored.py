"""Tensors in files, found by reading headers alone and read by byte range."""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from sharding.errors import UserError

MAX_DIMENSIONS = 64  # what NumPy can hold
CHUNK = 1 << 23  # bytes: what is read at a time where a whole tensor need not be held


def possible(sizes: Iterable[object], *others: object) -> bool:
    """Whether a header's numbers are sizes and offsets that an array in memory can have."""
    sizes = tuple(sizes)
    numbers = [*sizes, *others]
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        return False
    return len(sizes) <= MAX_DIMENSIONS and math.prod(n or 1 for n in sizes) < 1 << 58  # type: ignore[misc]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A row-major tensor in a file, not yet read."""

    name: str
    path: Path
    offset: int  # of its first byte in the file
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, rows: slice | None = None, columns: slice | None = None) -> np.ndarray:
        """The tensor, or a range of its rows and columns, in memory of its own.

        Only the bytes of what is asked for are read. The file is not mapped, so that nothing but the result is
        resident. Raises UserError where the file is shorter than its header says, ValueError for steps other than 1.
        """
        if rows is None and columns is None:
            return self._read_bytes(0, self.nbytes).view(self.dtype).reshape(self.shape)
        width = math.prod(self.shape[1:]) * self.dtype.itemsize
        start, stop, step = (rows or slice(None)).indices(self.shape[0])
        if step != 1 or (columns is not None and columns.step not in (None, 1)):
            raise ValueError(f"{self.name}: only ranges without gaps are read: {rows}, {columns}")
        stop = max(start, stop)
        if columns is None or columns.indices(self.shape[1]) == (0, self.shape[1], 1):
            data = self._read_bytes(start * width, (stop - start) * width)
            return data.view(self.dtype).reshape(stop - start, *self.shape[1:])
        first, last, _ = columns.indices(self.shape[1])
        last = max(first, last)
        inner = width // max(self.shape[1], 1)
        out = np.empty((stop - start, (last - first) * inner), np.uint8)
        with self._open() as descriptor:
            for number, row in enumerate(range(start, stop)):
                self._fill(descriptor, out[number], row * width + first * inner)
        return out.view(self.dtype).reshape(stop - start, last - first, *self.shape[2:])

    def strips(self, first: int, last: int, height: int) -> Iterator[np.ndarray]:
        """Rows `first` to `last` of a matrix, `height` at a time, in memory that the next strip takes over."""
        width = math.prod(self.shape[1:])
        rows = np.empty((height, width), self.dtype)
        flat = rows.reshape(-1).view(np.uint8)
        with self._open() as descriptor:
            for start in range(first, last, height):
                count = min(height, last - start)
                size = count * width * self.dtype.itemsize
                self._fill(descriptor, flat[:size], start * width * self.dtype.itemsize)
                yield rows[:count]

    def chunks(self) -> Iterator[np.ndarray]:
        """The tensor's bytes, a few MiB at a time."""
        buffer = np.empty(min(CHUNK, self.nbytes), np.uint8)
        with self._open() as descriptor:
            for start in range(0, self.nbytes, CHUNK):
                part = buffer[: min(CHUNK, self.nbytes - start)]
                self._fill(descriptor, part, start)
                yield part

    def _open(self) -> "_Descriptor":
        return _Descriptor(self.path)

    def _read_bytes(self, start: int, count: int) -> np.ndarray:
        data = np.empty(count, np.uint8)
        with self._open() as descriptor:
            self._fill(descriptor, data, start)
        return data

    def _fill(self, descriptor: int, into: np.ndarray, start: int) -> None:
        view, done = into.data, 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], self.offset + start + done)
            except OSError as error:
                raise UserError(
                    f"{self.path}: cannot read tensor {self.name}: {error.strerror}"
                ) from None
            if count == 0:
                raise UserError(
                    f"{self.path}: ends within tensor {self.name}: the file is truncated, fetch it again"
                )
            done += count


class _Descriptor:
    """A file opened for reading at offsets; closed at the end of its block."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> int:
        try:
            self.descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None
        return self.descriptor

    def __exit__(self, *exception: object) -> None:
        os.close(self.descriptor)
