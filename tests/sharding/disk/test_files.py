"""Tensor files: what is written is read, by us and by the safetensors package; damage is named."""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from sharding.disk.directory import new_directory
from sharding.disk.find import find_tensors
from sharding.disk.manifest import check_manifest, differing, hash_tensors, write_manifest
from sharding.disk.safetensors_file import read_header
from sharding.disk.writer import ShardWriter, Spec, parse_size, plan_shards
from sharding.errors import UserError

DTYPES = [np.float16, np.float32, ml_dtypes.bfloat16, np.int64, np.uint8]
ARRAYS = {
    "w": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "b": np.arange(5).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.float16),
}


def _write(directory: Path, arrays: dict[str, np.ndarray], limit: int | None = None) -> ShardWriter:
    directory.mkdir(exist_ok=True)
    specs = [Spec(name, array.dtype, array.shape) for name, array in arrays.items()]
    with ShardWriter(directory, specs, limit) as writer:
        for name in reversed(arrays):  # any order
            writer.put(name, arrays[name])
    return writer


@settings(max_examples=40, deadline=None)
@given(
    drawn=st.lists(
        st.tuples(st.sampled_from(range(len(DTYPES))), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    limit=st.one_of(st.none(), st.integers(1, 300)),
)
def test_what_is_written_is_read_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, list[int]]], limit: int | None
) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        f"t.{n}": rng.integers(0, 255, shape).astype(DTYPES[kind])
        for n, (kind, shape) in enumerate(drawn)
    }
    directory = tmp_path_factory.mktemp("files")
    writer = _write(directory, arrays, limit)
    found = find_tensors(directory)
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].read().tobytes() == array.tobytes()
    assert differing(hash_tensors(found), writer.entries) == []
    assert list(writer.entries) == list(arrays)  # in the order of the specs, whoever came first


def test_the_safetensors_package_reads_our_files_and_we_read_its(tmp_path: Path) -> None:
    arrays = {k: v for k, v in ARRAYS.items() if v.dtype != ml_dtypes.bfloat16}
    _write(tmp_path / "ours", arrays)
    with safe_open(tmp_path / "ours" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)
    (tmp_path / "theirs").mkdir()
    save_file(arrays, tmp_path / "theirs" / "model.safetensors")
    for name, stored in find_tensors(tmp_path / "theirs").items():
        np.testing.assert_array_equal(stored.read(), arrays[name])


def test_only_ranges_without_gaps_are_read(tmp_path: Path) -> None:
    _write(tmp_path, ARRAYS)
    stored = find_tensors(tmp_path)["w"]
    with pytest.raises(ValueError, match="w: only ranges without gaps"):
        stored.read(slice(0, 4, 2))
    assert stored.read(slice(2, 1)).shape == (0, *stored.shape[1:])


def test_ranges_of_rows_and_columns(tmp_path: Path) -> None:
    _write(tmp_path, ARRAYS)
    stored = find_tensors(tmp_path)["w"]
    np.testing.assert_array_equal(stored.read(slice(1, 2)), ARRAYS["w"][1:2])
    np.testing.assert_array_equal(stored.read(None, slice(1, 3)), ARRAYS["w"][:, 1:3])
    np.testing.assert_array_equal(stored.read(slice(0, 1), slice(2, 3)), ARRAYS["w"][:1, 2:])


def test_shards_are_filled_in_order() -> None:
    specs = [
        Spec(name, np.dtype(np.uint8), (size,))
        for name, size in zip("abcd", (4, 4, 9, 1), strict=True)
    ]
    plan = plan_shards(specs, 8)
    assert {file: "".join(s.name for s in shard) for file, shard in plan.items()} == {
        "model-00001-of-00003.safetensors": "ab",
        "model-00002-of-00003.safetensors": "c",  # larger than the limit: a file of its own
        "model-00003-of-00003.safetensors": "d",
    }
    assert list(plan_shards(specs, None)) == ["model.safetensors"]


def test_the_index_names_every_tensor(tmp_path: Path) -> None:
    _write(tmp_path, ARRAYS, 90)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(a.nbytes for a in ARRAYS.values())}
    assert list(index["weight_map"]) == sorted(ARRAYS)


def test_a_writer_takes_each_announced_tensor_once(tmp_path: Path) -> None:
    spec = Spec("w", np.dtype(np.float32), (2,))
    with (
        pytest.raises(ValueError, match="1 tensors were never written, w among them"),
        ShardWriter(tmp_path, [spec]),
    ):
        pass
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="announced twice: w"):
        ShardWriter(tmp_path, [spec, spec])
    with ShardWriter(tmp_path, [spec]) as writer:
        with pytest.raises(ValueError, match="v: was not announced"):
            writer.put("v", np.zeros(2, np.float32))
        for wrong in (np.zeros(3, np.float32), np.zeros(2, np.float16)):
            with pytest.raises(ValueError, match="is not what was announced"):
                writer.put("w", wrong)
        writer.put("w", np.zeros(2, np.float32))
        with pytest.raises(ValueError, match="is not what was announced"):
            writer.put("w", np.zeros(2, np.float32))


def _raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{]", b"", "the safetensors header is not valid"),
        (b"[1]", b"", "the safetensors header is not valid"),
        ({"w": {"dtype": "F32"}}, b"", "entry of tensor w is not valid"),
        (
            {"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
            b"",
            "tensor w is not valid",
        ),
        ({"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"", "w is not valid"),
        ({"w": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}, b"", "dtype 'F4', which"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234", "needs 8 bytes"),
        ({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"123", "tensor w is not w"),
        ({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"12345", "1 bytes follow"),
        ({"w": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}, b"1234", "does not begin"),
        ({"w": {"dtype": [], "shape": [1], "data_offsets": [0, 1]}}, b"1", "tensor w is not valid"),
        ({"w": {"dtype": "U8", "shape": [1] * 65, "data_offsets": [0, 1]}}, b"1", "w is not valid"),
        (
            {"w": {"dtype": "U8", "shape": [0, 1 << 61], "data_offsets": [0, 0]}},
            b"",
            "w is not valid",
        ),
    ],
)
def test_damaged_headers_are_named(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_header(_raw(tmp_path / "x.safetensors", header, data))
    assert "x.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused_or_found_by_the_manifest(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    directory = tmp_path_factory.mktemp("flip")
    writer = _write(directory, ARRAYS)
    write_manifest(directory, writer.entries)
    assert check_manifest(directory) == []
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        problems = check_manifest(directory)
    except UserError:
        return
    if not problems:  # white space after the header, or metadata that means nothing to a tensor
        assert read_header(path).keys() == ARRAYS.keys()
        assert place % len(data) < struct.unpack("<Q", bytes(data[:8]))[0] + 8


def test_a_file_cut_off_later_names_the_tensor(tmp_path: Path) -> None:
    _write(tmp_path, ARRAYS)
    found = find_tensors(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="ends within tensor b: the file is truncated"):
        found["b"].read()
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        found["b"].read()


def test_indexes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights in"):
        find_tensors(tmp_path)
    _write(tmp_path, ARRAYS, 90)
    index = tmp_path / "model.safetensors.index.json"
    fields = json.loads(index.read_text())

    def refused(change: dict[str, str], drop: str = "") -> str:
        kept = {k: v for k, v in (fields["weight_map"] | change).items() if k != drop}
        index.write_text(json.dumps({"weight_map": kept}))
        with pytest.raises(UserError) as caught:
            find_tensors(tmp_path)
        return str(caught.value)

    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    assert (
        f"{second}: tensor w is missing, model.safetensors.index.json places it there"
        in refused({"w": second})
        or "tensor w is not placed there" in refused({"w": second})
    )
    assert "tensor b is not placed there by" in refused({}, drop="b")
    assert "tensor new is missing" in refused({"new": first})
    assert "tensor w is placed outside the directory: ../x" in refused({"w": "../x"})
    assert "shard gone.safetensors, which holds tensor w, is missing" in refused(
        {"w": "gone.safetensors"}
    )
    index.write_text("{}")
    with pytest.raises(UserError, match="not an index of weight files"):
        find_tensors(tmp_path)
    index.unlink()
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / first).read_bytes())
    with pytest.raises(UserError, match=r"tensor w is in .* and in .*: keep one"):
        find_tensors(tmp_path)


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a" / "out"

    def fail_half_way() -> None:
        with new_directory(target) as partial:
            (partial / "x").write_text("1")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert list(target.parent.iterdir()) == []
    with new_directory(target) as partial:
        (partial / "x").write_text("1")
        assert not target.exists()
    assert (target / "x").read_text() == "1"
    with pytest.raises(UserError, match="exists already"), new_directory(target):
        pass
    with new_directory(target, replace=True) as partial:
        (partial / "y").write_text("2")
    assert [path.name for path in target.iterdir()] == ["y"]
    with pytest.raises(UserError, match="appeared meanwhile"), new_directory(tmp_path / "b"):
        (tmp_path / "b").mkdir()
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="is no directory"),
        new_directory(tmp_path / "file", replace=True),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "file"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("200kb", 200_000), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "5 apples", "nan"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="is no size"):
        parse_size(text)
