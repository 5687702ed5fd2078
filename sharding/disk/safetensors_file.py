"""The safetensors format: 8 bytes of length, a JSON header, the tensors' bytes.

The header is read here and not by the `safetensors` package, because byte ranges are wanted: the package maps the file
and hands out whole tensors.
"""

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sharding.disk.stored import Stored, possible
from sharding.errors import UserError

MAX_HEADER = 100_000_000  # bytes, the format's own limit
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file, by name in the order of their bytes. Raises UserError, naming file and tensor."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise UserError(f"{path}: no safetensors file, or a truncated one: fetch it again")
            header = json.loads(file.read(length).decode())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(
            f"{path}: the safetensors header is not valid: fetch the file again"
        ) from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: the safetensors header is not valid: fetch the file again")
    header.pop("__metadata__", None)
    start = 8 + length
    stored = [_entry(path, name, entry, start) for name, entry in header.items()]
    stored.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = start
    for tensor in stored:
        if tensor.offset != end:
            raise UserError(
                f"{path}: tensor {tensor.name} does not begin where the one before it ends: fetch the file again"
            )
        end += tensor.nbytes
    if end > size and stored:
        raise UserError(
            f"{path}: truncated: its header promises {end} bytes, it has {size} (tensor {stored[-1].name} is not whole)"
        )
    if end != size:
        raise UserError(f"{path}: {size - end} bytes follow the last tensor: fetch the file again")
    return {tensor.name: tensor for tensor in stored}


def _entry(path: Path, name: str, entry: Any, start: int) -> Stored:
    """One tensor of the header. Raises UserError where it contradicts itself."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or not possible(shape, begin, end) or begin > end:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: the header's entry of tensor {name} is not valid") from None
    if dtype not in DTYPES:
        raise UserError(f"{path}: tensor {name} has dtype {dtype!r}, which is not supported")
    stored = Stored(name, path, start + begin, DTYPES[dtype], tuple(shape))
    if stored.nbytes != end - begin:
        raise UserError(
            f"{path}: tensor {name} {dtype} {list(shape)} needs {stored.nbytes} bytes, its entry spans {end - begin}"
        )
    return stored


def make_header(tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]]) -> bytes:
    """Length and header of a file that holds `tensors` in this order, padded to a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
