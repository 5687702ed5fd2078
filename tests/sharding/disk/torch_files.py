"""Files as PyTorch writes them, made by hand."""

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {"float16": "HalfStorage", "bfloat16": "BFloat16Storage", "float32": "FloatStorage"}


class _Global:
    """Pickled as the name of something in a module."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _Storage:
    def __init__(self, key: str, array: np.ndarray) -> None:
        self.key, self.array = key, array


class _Tensor:
    def __init__(self, storage: _Storage, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.storage, self.shape, self.strides = storage, shape, strides


_PurePython: Any = pickle._Pickler


class _Pickler(_PurePython):
    """The pickler written in Python, which can be taught to write names of modules that do not exist here."""

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Storage):
            kind = _Global("torch", STORAGES[value.array.dtype.name])
            return ("storage", kind, value.key, "cpu", value.array.size)
        return None

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        if isinstance(value, _Global):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, _Tensor):
            self.save(_Global("torch._utils", "_rebuild_tensor_v2"))
            self.save((value.storage, 0, value.shape, value.strides, False, {}))
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


def pickled(tree: Any) -> bytes:
    """`tree` in protocol 2, as PyTorch writes it."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(tree)
    return buffer.getvalue()


def tensors(arrays: Mapping[str, np.ndarray], transposed: str = "") -> tuple[Any, dict[str, bytes]]:
    """The tree and the storages of a checkpoint; the tensor called `transposed` becomes a strided view."""
    tree, storages = {}, {}
    for number, (name, array) in enumerate(arrays.items()):
        strides = tuple(s // array.itemsize for s in array.strides)
        shape = array.shape
        if name == transposed:
            shape, strides = shape[::-1], strides[::-1]
        tree[name] = _Tensor(_Storage(str(number), array), shape, strides)
        storages[f"data/{number}"] = array.tobytes()
    return tree, storages


def write(
    path: Path, data: bytes, storages: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED
) -> None:
    """An archive with PyTorch's folder and entries."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"little")
        for name, content in storages.items():
            archive.writestr(f"archive/{name}", content)


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A whole checkpoint."""
    tree, storages = tensors(arrays)
    write(path, pickled(tree), storages)
