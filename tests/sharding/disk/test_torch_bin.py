"""PyTorch files are read as PyTorch would, and nothing they name is ever run."""

import importlib.util
import pickle
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sharding.disk import torch_bin
from sharding.disk.find import find_tensors
from sharding.disk.torch_bin import read_index
from sharding.errors import UserError


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


torch_files: Any = _load("torch_files")
ARRAYS = {
    "a": np.arange(12, dtype=np.float16).reshape(3, 4),
    "b": np.linspace(-1, 1, 7).astype(ml_dtypes.bfloat16),
    "c": np.full((1, 1), 1.5, np.float32),
}


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    torch_files.save(tmp_path / "pytorch_model.bin", ARRAYS)
    found = find_tensors(tmp_path)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name].read(), array)
        assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found["a"].read(slice(1, 3)), ARRAYS["a"][1:3])
    np.testing.assert_array_equal(found["a"].read(slice(1, 3), slice(1, 2)), ARRAYS["a"][1:3, 1:2])


class _Evil:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        (_Evil(exec, "import pathlib; pathlib.Path('owned').touch()"), r"builtins\.exec"),
        (_Evil(eval, "1"), r"builtins\.eval"),
        (_Evil(__import__("os").system, "touch owned"), r"(posix|os)\.system"),
        (_Evil(__import__("subprocess").run, ["touch", "owned"]), r"subprocess\.run"),
        (_Evil(getattr, 1, "real"), r"builtins\.getattr"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_what_a_pickle_calls_is_refused_by_name_and_never_run(
    tmp_path: Path, payload: _Evil, name: str, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch_files.write(path, pickle.dumps({"w": payload}, protocol, fix_imports=False), {})
    with pytest.raises(
        UserError, match=rf"pytorch_model\.bin: refuses to load '{name}': a checkpoint"
    ):
        read_index(path)
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_model.bin"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"ctorch.storage\n_load_from_bytes\n(C\x03abctR.", r"torch\.storage\._load_from_bytes"),
        (b"ctorch.hub\nload\n.", r"torch\.hub\.load"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02tR.", "data.pkl is no checkpoint"),
        (b"ctorch\nHalfStorage\n(tR.", "data.pkl is no checkpoint"),
        (b"(lp0\nI1\na.", "holds a list"),
        (b"}.", "holds a dict, expected a dictionary of tensors"),
        (b"(dp0\nVx\nI1\ns.", "entry 'x' is a int"),
        (b"\x80\x02garbage", "data.pkl is no checkpoint"),
        (b"", "data.pkl is no checkpoint"),
        (b"I1\nQ.", "data.pkl is no checkpoint"),
        (b"\x80\x04\x8c\x04o\n\x1bs\x8c\x01x\x93.", r"refuses to load 'o\\n\\x1bs\.x'"),
        (
            b"\x80\x02Nr\xff\xff\xff\x07.",
            "data.pkl is no checkpoint: memo place 134217727",
        ),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    torch_files.write(tmp_path / "x.bin", data, {})
    with pytest.raises(UserError, match=message):
        read_index(tmp_path / "x.bin")


def test_a_view_that_is_not_row_major_is_named(tmp_path: Path) -> None:
    tree, storages = torch_files.tensors(ARRAYS, transposed="a")
    torch_files.write(tmp_path / "x.bin", torch_files.pickled(tree), storages)
    with pytest.raises(UserError, match="tensor a is a transposed or strided view"):
        read_index(tmp_path / "x.bin")


def test_a_pickle_cannot_reach_beyond_a_storage(tmp_path: Path) -> None:
    tree, storages = torch_files.tensors(ARRAYS)
    storages["data/0"] = storages["data/0"][:-2]
    torch_files.write(tmp_path / "x.bin", torch_files.pickled(tree), storages)
    with pytest.raises(UserError, match="tensor a reaches beyond its storage"):
        read_index(tmp_path / "x.bin")
    del storages["data/0"]
    torch_files.write(tmp_path / "x.bin", torch_files.pickled(tree), storages)
    with pytest.raises(UserError, match="tensor a: its storage is not in the archive"):
        read_index(tmp_path / "x.bin")


def test_a_pickle_cannot_change_what_rebuilds_tensors(tmp_path: Path) -> None:
    """BUILD sets attributes of any object; were it the function itself, later files would be misread."""
    before = torch_bin._tensor.__defaults__, dict(torch_bin._tensor.__dict__)
    build = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\0\0\0__defaults__K\x05\x85s\x86b."
    torch_files.write(tmp_path / "x.bin", build, {})
    with pytest.raises(UserError, match="holds a function, expected a dictionary of tensors"):
        read_index(tmp_path / "x.bin")
    assert (torch_bin._tensor.__defaults__, torch_bin._tensor.__dict__) == before


def test_names_are_text_and_empty_tensors_have_any_strides(tmp_path: Path) -> None:
    tree, storages = torch_files.tensors({"a": np.zeros((3, 0), np.float32)})
    tree["a"].strides = (1, 1)
    torch_files.write(tmp_path / "x.bin", torch_files.pickled(tree), storages)
    assert read_index(tmp_path / "x.bin")["a"].read().shape == (3, 0)
    torch_files.write(tmp_path / "x.bin", torch_files.pickled({1: tree["a"]}), storages)
    with pytest.raises(UserError, match="a key is a int, expected names of tensors"):
        read_index(tmp_path / "x.bin")


def test_damage_anywhere_is_a_user_error_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch_files.save(path, {"a": np.arange(12, dtype=np.float16).reshape(3, 4)})
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [good[:size] for size in range(len(good))]
    for place in range(len(good)):
        for value in (good[place] ^ 1 << int(rng.integers(8)), 0, 255):
            damaged.append(good[:place] + bytes([value]) + good[place + 1 :])
    messages = []
    for data in damaged:
        path.write_bytes(data)
        try:
            for stored in read_index(path).values():
                stored.read()
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > len(damaged) / 2
    assert all(str(path) in message and "\n" not in message for message in messages)


def test_compressed_old_and_broken_files_are_told_apart(tmp_path: Path) -> None:
    tree, storages = torch_files.tensors(ARRAYS)
    data, path = torch_files.pickled(tree), tmp_path / "x.bin"
    torch_files.write(path, data, storages, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="tensor a is compressed"):
        read_index(path)
    path.write_bytes(pickle.dumps(119547037146038801333356, protocol=2))
    with pytest.raises(UserError, match=r"not PyTorch's zip format \(of PyTorch before 1\.6"):
        read_index(path)
    torch_files.write(path, data, storages)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="no whole zip archive"):
        read_index(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/readme", b"")
    with pytest.raises(UserError, match=r"holds no data\.pkl"):
        read_index(path)


def test_torch_is_not_needed() -> None:
    assert "torch" not in sys.modules
