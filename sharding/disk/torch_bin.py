"""PyTorch's .bin checkpoints, read without PyTorch and without running what they hold.

The format is a zip archive of uncompressed entries: a pickle that says which tensor lies in which storage, and the
storages. A pickle can name any function to be called while it is read; here the few names that rebuild tensors are
answered by stand-ins, and every other name is refused.
"""

import collections
import io
import lzma
import math
import pickle
import pickletools
import struct
import types
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sharding.disk.stored import Stored, possible
from sharding.errors import UserError

MAX_PICKLE = 1 << 26  # bytes; that of ChatGLM-6B has some ten thousand
DAMAGE = (  # what zipfile raises when bytes of an archive are not what they were
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    ValueError,
)
STORAGES: Mapping[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    length: int  # elements


class _Tensor(NamedTuple):
    storage: _Storage
    first: int  # element of the storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StorageType(NamedTuple):
    """What a pickle gets for a name such as torch.HalfStorage."""

    dtype: np.dtype


def _tensor(storage: Any, first: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    """Stands in for torch._utils._rebuild_tensor_v2; `rest` is whether it wants gradients, and hooks."""
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor without a storage")
    if not possible(shape, first, *strides):
        raise pickle.UnpicklingError("a tensor with an impossible shape")
    return _Tensor(storage, first, tuple(shape), tuple(strides))


def _parameter(tensor: Any, *rest: Any) -> _Tensor:
    """Stands in for torch._utils._rebuild_parameter."""
    if not isinstance(tensor, _Tensor):
        raise pickle.UnpicklingError("a parameter without a tensor")
    return tensor


ALLOWED: Mapping[tuple[str, str], Callable[..., Any] | _StorageType] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{("torch", name): _StorageType(dtype) for name, dtype in STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Knows the names that rebuild tensors and no other."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data))
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        try:
            known = ALLOWED[module, name]
        except KeyError:
            raise UserError(
                f"{self.path}: refuses to load {f'{module}.{name}'!r}: "
                "a checkpoint needs no such thing, do not trust the file"
            ) from None
        if not isinstance(known, types.FunctionType):
            return known
        return lambda *arguments: known(*arguments)  # a pickle may set attributes of what it gets

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, length = pid
        known = isinstance(storage_type, _StorageType) and type(length) is int and length >= 0
        if kind != "storage" or not known or not isinstance(key, str):
            raise pickle.UnpicklingError("a storage that is none")
        return _Storage(key, storage_type.dtype, length)


def read_index(path: Path) -> dict[str, Stored]:
    """The tensors of a .bin file, by name in the pickle's order. Raises UserError, naming file and tensor."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise UserError(
                    f"{path}: not PyTorch's zip format (of PyTorch before 1.6, or truncated): load it with PyTorch and "
                    f"save it again, or convert it to safetensors"
                )
            with zipfile.ZipFile(file) as archive:
                entries = {_key(info.filename): info for info in archive.infolist()}
                tensors = _read_pickle(path, archive, entries)
                return {
                    name: _locate(path, file, entries, name, tensor)
                    for name, tensor in tensors.items()
                }
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except DAMAGE:
        raise UserError(f"{path}: no whole zip archive: fetch it again") from None


def _key(name: str) -> str:
    """Entry name without the archive's own folder."""
    return name.partition("/")[2]


def _read_pickle(
    path: Path, archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo]
) -> dict[str, _Tensor]:
    info = entries.get("data.pkl")
    if info is None:
        raise UserError(f"{path}: holds no data.pkl: not a PyTorch checkpoint")
    if info.file_size > MAX_PICKLE:
        raise UserError(
            f"{path}: data.pkl has {info.file_size} bytes, more than a checkpoint needs"
        )
    order = entries.get("byteorder")
    if order and (order.file_size != len(b"little") or archive.read(order) != b"little"):
        raise UserError(f"{path}: was written on a big-endian machine, which is not supported")
    try:
        data = archive.read(info)
        _check_memo(data)
        tree = _Unpickler(data, path).load()
    except (UserError, zipfile.BadZipFile):
        raise
    except Exception as error:  # a damaged pickle can raise whatever its opcodes run into
        raise UserError(f"{path}: data.pkl is no checkpoint: {error}") from None
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{path}: holds a {type(tree).__name__}, expected a dictionary of tensors")
    for name, value in tree.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: a key is a {type(name).__name__}, expected names of tensors")
        if not isinstance(value, _Tensor):
            raise UserError(
                f"{path}: entry {name!r} is a {type(value).__name__}, expected a dictionary of tensors"
            )
    return dict(tree)


def _check_memo(data: bytes) -> None:
    """Refuse places in the memo that no pickle of this size needs: the list of them grows to the largest."""
    for opcode, place, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "LONG_BINPUT") and place is not None and int(place) > len(data):
            raise pickle.UnpicklingError(f"memo place {place}")


def _locate(
    path: Path,
    file: io.BufferedReader,
    entries: Mapping[str, zipfile.ZipInfo],
    name: str,
    tensor: _Tensor,
) -> Stored:
    """Where the tensor's bytes lie in the file."""
    info = entries.get(f"data/{tensor.storage.key}")
    if info is None:
        raise UserError(f"{path}: tensor {name}: its storage is not in the archive")
    if info.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{path}: tensor {name} is compressed, which PyTorch never does")
    dtype = tensor.storage.dtype
    contiguous = tuple(math.prod(tensor.shape[d + 1 :]) for d in range(len(tensor.shape)))
    moved = [d for d, size in enumerate(tensor.shape) if size > 1]
    if math.prod(tensor.shape) and any(tensor.strides[d] != contiguous[d] for d in moved):
        raise UserError(
            f"{path}: tensor {name} is a transposed or strided view: save it contiguous"
        )
    end = (tensor.first + math.prod(tensor.shape)) * dtype.itemsize
    if end > min(info.file_size, tensor.storage.length * dtype.itemsize):
        raise UserError(f"{path}: tensor {name} reaches beyond its storage")
    # the local header may be longer than the one in the archive's directory says
    file.seek(info.header_offset)
    header = file.read(30)
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    if header[:4] != b"PK\x03\x04" or file.read(name_length) != info.orig_filename.encode():
        raise UserError(f"{path}: tensor {name}: no whole zip archive: fetch it again")
    start = info.header_offset + 30 + name_length + extra_length
    following = [o.header_offset for o in entries.values() if o.header_offset > info.header_offset]
    if following and start + info.file_size > min(following):
        raise UserError(
            f"{path}: tensor {name}: its storage reaches into the next: fetch the file again"
        )
    return Stored(name, path, start + tensor.first * dtype.itemsize, dtype, tensor.shape)
