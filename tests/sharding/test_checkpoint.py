"""A checkpoint comes back bit for bit, also onto another layout; one that is damaged or of another model never does."""

import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sharding import checkpoint
from sharding.disk.directory import new_directory
from sharding.errors import UserError
from sharding.layout import Layout, get_layout

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
KINDS: dict[checkpoint.Keys, np.dtype] = {
    ("trunk", "blocks", "w"): BFLOAT16,  # [1, layer, D, F]
    ("trunk", "embedding"): np.dtype(np.float16),  # [V, D]
    ("scale",): np.dtype(np.float32),  # [D]
}
AXES: dict[checkpoint.Keys, tuple[str, ...]] = {
    ("trunk", "blocks", "w"): ("stage", "layer", "embed_weight", "ffn"),
    ("trunk", "embedding"): ("vocab", "embed_weight"),
    ("scale",): ("norm",),
}
SHAPES: dict[checkpoint.Keys, tuple[int, ...]] = {
    ("trunk", "blocks", "w"): (1, 3, 16, 8),
    ("trunk", "embedding"): (24, 16),
    ("scale",): (16,),
}
BLOCKS = ("trunk", "blocks", "w")
FILES = ("trunk.embedding", "trunk.blocks.w")


def _values() -> dict[checkpoint.Keys, np.ndarray]:
    """Any bits, not a number and infinity among them; `scale` is zero, which must be stored as well."""
    random = np.random.default_rng(0)
    values = {
        keys: random.integers(0, 256, (*SHAPES[keys], kind.itemsize), np.uint8).view(kind)[..., 0]
        for keys, kind in KINDS.items()
    }
    values[("scale",)][:] = 0
    return values


def _tree(leaf: Callable[[checkpoint.Keys], Any]) -> dict[str, Any]:
    return {
        "trunk": {"blocks": {"w": leaf(BLOCKS)}, "embedding": leaf(("trunk", "embedding"))},
        "scale": leaf(("scale",)),
        "head": None,
    }


def _like(layout: Layout, dtype: np.dtype | None = None) -> dict[str, Any]:
    """As KINDS, or all in `dtype`."""

    def leaf(keys: checkpoint.Keys) -> jax.ShapeDtypeStruct:
        sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), layout.spec(*AXES[keys]))
        return jax.ShapeDtypeStruct(SHAPES[keys], dtype or KINDS[keys], sharding=sharding)

    return _tree(leaf)


def _save(path: Path, layout: Layout) -> None:
    values = _values()
    with jax.set_mesh(layout.mesh()):
        like = _like(layout)
        tree = _tree(lambda keys: values[keys])
        checkpoint.save(path, jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), tree, like))


def _write(path: Path) -> None:
    """The same, layer after layer, from the last to the first."""
    values = _values()
    arrays = {keys: jax.ShapeDtypeStruct(SHAPES[keys], kind) for keys, kind in KINDS.items()}
    leaves = checkpoint.create(path, arrays, {BLOCKS})
    for keys, leaf in leaves.items():
        if keys != BLOCKS:
            leaf.write(values[keys])
    for layer in reversed(range(SHAPES[BLOCKS][1])):
        leaves[BLOCKS].write(values[BLOCKS][0, layer], 0, layer)


def _assert_same_bits(found: Any, wanted: np.ndarray) -> None:
    host = np.asarray(found)
    assert (host.dtype, host.shape) == (wanted.dtype, wanted.shape)
    assert host.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", ["single", "fsdp", "tp", "fsdp_tp", "pieces"])
@pytest.mark.parametrize("target", ["single", "fsdp", "dp_tp"])
def test_every_bit_comes_back_on_any_layout(tmp_path: Path, name: str, target: str) -> None:
    path = tmp_path / "step"
    if name == "pieces":
        _write(path)
    else:
        _save(path, get_layout(name, None))
    layout, values = get_layout(target, None), _values()
    with jax.set_mesh(layout.mesh()):
        like = _like(layout)
        restored = checkpoint.restore(path, like)
    jax.tree.map(_assert_same_bits, restored, _tree(lambda keys: values[keys]))
    jax.tree.map(lambda x, y: _assert_split_as(x, y.sharding), restored, like)


def _assert_split_as(x: jax.Array, sharding: jax.sharding.NamedSharding) -> None:
    assert jax.typeof(x).sharding.spec == sharding.spec
    assert x.addressable_shards[0].data.shape == sharding.shard_shape(x.shape)


@pytest.mark.parametrize("pieces", [False, True])
def test_half_precision_becomes_the_same_numbers_in_float32(tmp_path: Path, pieces: bool) -> None:
    if pieces:
        _write(tmp_path / "step")
    else:
        _save(tmp_path / "step", Layout())
    layout = get_layout("fsdp_tp", None)
    with jax.set_mesh(layout.mesh()):
        like = _like(layout, np.dtype(np.float32))
        restored = checkpoint.restore(tmp_path / "step", like)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(restored):
        wanted = _values()[tuple(key.key for key in keys)].astype(np.float32)
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(leaf), wanted)


@pytest.mark.parametrize("pieces", [False, True])
def test_leaves_are_read_one_by_one(tmp_path: Path, pieces: bool) -> None:
    path, values = tmp_path / "step", _values()
    if pieces:
        _write(path)
    else:
        _save(path, get_layout("fsdp_tp", None))
    stored = checkpoint.shapes(path)
    assert {keys: (leaf.shape, leaf.dtype) for keys, leaf in stored.items()} == {
        keys: (SHAPES[keys], kind) for keys, kind in KINDS.items()
    }
    for keys, value in values.items():
        leaf = checkpoint.open_leaf(path, keys)
        assert (leaf.shape, leaf.dtype) == (SHAPES[keys], KINDS[keys])
        _assert_same_bits(leaf.read(), value)
    blocks = checkpoint.open_leaf(path, BLOCKS)
    _assert_same_bits(blocks.read(0, 2), values[BLOCKS][0, 2])
    _assert_same_bits(blocks.read(0, slice(1, 3), slice(4, 8)), values[BLOCKS][0, 1:3, 4:8])
    part = blocks.read(0, 1)
    part[:] = 0  # it is ours: the file does not see it
    _assert_same_bits(blocks.read(0, 1), values[BLOCKS][0, 1])


def test_a_tree_may_hold_lists_scalars_and_nothing(tmp_path: Path) -> None:
    with jax.set_mesh(Layout().mesh()):
        tree: dict[str, Any] = {
            "list": [jnp.ones((2, 3)), jnp.zeros(())],
            "empty": {},
            "none": None,
        }
        checkpoint.save(tmp_path / "step", tree)
        assert set(checkpoint.shapes(tmp_path / "step")) == {("list", "0"), ("list", "1")}
        restored = checkpoint.restore(tmp_path / "step", tree)
    assert isinstance(restored["list"], list) and (restored["empty"], restored["none"]) == (
        {},
        None,
    )
    jax.tree.map(np.testing.assert_array_equal, restored, tree)


def test_saving_again_replaces(tmp_path: Path) -> None:
    with jax.set_mesh(Layout().mesh()):
        checkpoint.save(tmp_path / "step", {"old": jnp.zeros(2)})
        checkpoint.save(tmp_path / "step", {"new": jnp.ones(3)})
    assert set(checkpoint.shapes(tmp_path / "step")) == {("new",)}


def test_chunks_are_rows_of_at_most_16_mib() -> None:
    def chunks(*shape: int, stacked: bool = False) -> tuple[int, ...]:
        return checkpoint.chunks_of(shape, BFLOAT16, stacked)

    assert chunks(1, 40, 4096, 32, 128, stacked=True) == (1, 1, 2048, 32, 128)
    assert chunks(1, 40, 4096, 2, 128, stacked=True) == (1, 1, 4096, 2, 128)
    assert chunks(1, 40, 4096, 13696, stacked=True) == (1, 1, 512, 13696)
    assert chunks(1, 40, stacked=True) == (1, 1)
    assert chunks(65024, 4096) == (2032, 4096)
    assert chunks(3, 1 << 30) == (1, 1 << 30)
    assert chunks(16) == (16,)
    assert chunks() == ()


@pytest.mark.parametrize("size", [3 * 16 * 2, 8 * 8 * 2])  # bytes; 24 and 16 rows become 8 and 2
def test_arrays_cut_into_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(checkpoint, "CHUNK", size)
    _write(tmp_path / "step")
    counts = [len(list((tmp_path / "step" / name).glob("[0-9]*"))) for name in FILES]
    assert counts == ([8, 3 * 4] if size == 3 * 16 * 2 else [8, 3 * 2])
    layout = get_layout("fsdp_tp", None)
    with jax.set_mesh(layout.mesh()):
        restored = checkpoint.restore(tmp_path / "step", _like(layout))
    jax.tree.map(_assert_same_bits, restored, _tree(lambda keys: _values()[keys]))


# What must not be taken for a checkpoint --------------------------------------------------------------------------


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with jax.set_mesh(Layout().mesh()), pytest.raises(UserError, match="nowhere is no checkpoint"):
        checkpoint.restore(tmp_path / "nowhere", {"w": jnp.zeros(2)})
    with pytest.raises(UserError, match=r"nowhere: cannot open the array trunk\.w"):
        checkpoint.open_leaf(tmp_path / "nowhere", ("trunk", "w"))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"a": (2, 4)}, r"the shape of b\.c is \(3,\) there and none here"),
        ({"a": (2, 4), "b": {"c": (3,), "d": (1,)}}, r"b\.d is none there and \(1,\) here"),
        ({"a": (2, 5), "b": {"c": (3,)}}, r"a is \(2, 4\) there and \(2, 5\) here"),
        ({"a": (4, 2), "b": {"c": (3,)}}, r"a is \(2, 4\) there and \(4, 2\) here"),
        ({"a": (2, 4, 1), "b": {"c": (3,)}}, r"a is \(2, 4\) there and \(2, 4, 1\) here"),
        ({"a": (2, 4), "b": (3,)}, r"b is none there and \(3,\) here"),
        ({"a": {"x": (2, 4)}, "b": {"c": (3,)}}, r"a is \(2, 4\) there and none here"),
    ],
)
def test_a_tree_of_another_model(tmp_path: Path, wanted: Any, message: str) -> None:
    with jax.set_mesh(Layout().mesh()):
        checkpoint.save(tmp_path / "step", {"a": jnp.zeros((2, 4)), "b": {"c": jnp.zeros(3)}})
        like = jax.tree.map(jnp.zeros, wanted, is_leaf=lambda x: isinstance(x, tuple))
        with pytest.raises(UserError, match=message) as error:
            checkpoint.restore(tmp_path / "step", like)
    assert "\n" not in str(error.value)


def _unlink(file: Path) -> None:
    file.unlink()


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [_unlink, _cut])
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("array", ["trunk.blocks.w", "scale"])
def test_a_file_missing_or_cut_short(
    tmp_path: Path, pieces: bool, array: str, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "step"
    if pieces:
        _write(path)
    else:
        _save(path, get_layout("fsdp_tp", None))
    file = max((path / array).glob("[0-9]*"))
    damage(file)
    with jax.set_mesh(Layout().mesh()):
        like = _like(Layout())
        for read in (lambda: checkpoint.restore(path, like), lambda: checkpoint.shapes(path)):
            with pytest.raises(
                UserError,
                match=re.escape(f"{file} {'is missing' if damage is _unlink else 'has '}"),
            ):
                read()
    with pytest.raises(UserError, match=re.escape(f"cannot read {file.parent}")) as error:
        checkpoint.open_leaf(path, tuple(array.split("."))).read()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "message"),
    [("_METADATA", "_METADATA is no listing"), ("scale/.zarray", "cannot open the array scale")],
)
@pytest.mark.parametrize(
    "text", ["", "{", "{}", "[]", '{"tree_metadata": [1]}', '{"tree_metadata": {"a": 1}}']
)
def test_damaged_metadata(tmp_path: Path, file: str, message: str, text: str) -> None:
    path = tmp_path / "step"
    _write(path)
    (path / file).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        checkpoint.shapes(path)
    assert "\n" not in str(error.value)


def test_an_array_that_is_gone(tmp_path: Path) -> None:
    _write(tmp_path / "step")
    shutil.rmtree(tmp_path / "step" / "scale")
    with (
        jax.set_mesh(Layout().mesh()),
        pytest.raises(UserError, match="cannot open the array scale"),
    ):
        checkpoint.restore(tmp_path / "step", _like(Layout()))


def test_a_checkpoint_that_is_not_full_is_refused(tmp_path: Path) -> None:
    leaves = checkpoint.create(
        tmp_path / "step", {BLOCKS: jax.ShapeDtypeStruct((1, 2, 4, 4), BFLOAT16)}, {BLOCKS}
    )
    leaves[BLOCKS].write(np.zeros((4, 4), BFLOAT16), 0, 0)
    with pytest.raises(UserError, match=r"trunk\.blocks\.w/0\.1\.0\.0 is missing"):
        checkpoint.shapes(tmp_path / "step")
    leaves[BLOCKS].write(np.zeros((4, 4), BFLOAT16), 0, 1)
    assert checkpoint.shapes(tmp_path / "step")[BLOCKS].shape == (1, 2, 4, 4)


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(path: Path) -> None:
        with new_directory(path) as partial:
            _write(partial / "weights")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "step")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_files() -> Any:
    """No file may grow beyond 64 KiB: to a writer that is a disk that fills."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_while_saving(tmp_path: Path, small_files: None) -> None:
    path = tmp_path / "step"
    with (
        jax.set_mesh(Layout().mesh()),
        pytest.raises(UserError, match=f"cannot write {path}: the file would exceed"),
    ):
        checkpoint.save(path, {"w": jnp.ones((256, 256))})
    assert not path.exists()


def test_a_disk_that_fills_while_writing_a_piece(tmp_path: Path, small_files: None) -> None:
    arrays: dict[checkpoint.Keys, Any] = {
        ("w",): jax.ShapeDtypeStruct((256, 256), np.dtype(np.float32))
    }
    leaf = checkpoint.create(tmp_path / "step", arrays, set())[("w",)]
    with pytest.raises(UserError, match=f"cannot write {tmp_path / 'step' / 'w'}: the file would"):
        leaf.write(np.ones((256, 256), np.float32))


def test_a_wrong_piece_is_our_fault_not_the_users(tmp_path: Path) -> None:
    arrays: dict[checkpoint.Keys, Any] = {
        ("w",): jax.ShapeDtypeStruct((4, 4), np.dtype(np.float32))
    }
    leaf = checkpoint.create(tmp_path / "step", arrays, set())[("w",)]
    with pytest.raises(ValueError, match="mismatch"):
        leaf.write(np.ones((2, 3), np.float32))
    with pytest.raises(TypeError, match="Cannot cast"):
        leaf.write(np.ones((4, 4), np.float64))


# Memory -----------------------------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
import jax
import numpy as np
from sharding import checkpoint

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

layer = np.ones((2048, 4096), np.float16)
arrays = {("w",): jax.ShapeDtypeStruct((1, 24, 2048, 4096), layer.dtype)}
leaf = checkpoint.create(Path(sys.argv[1]), arrays, {("w",)})["w",]
before = peak()
for i in range(24):
    leaf.write(layer, 0, i)
for i in range(24):
    assert (leaf.read(0, i) == 1).all()
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_pieces_do_not_pile_up_in_memory(tmp_path: Path) -> None:
    """384 MiB in layers of 16 MiB: a few of these at a time."""
    command = [sys.executable, "-c", PEAK, str(tmp_path / "step")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 192  # MiB
