"""What comes in from Hugging Face goes out byte for byte; what cannot is told in one line."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from glm_jax.checkpoint import DTYPES, Card, card_of, load_model, open_source, save_model
from glm_jax.config import GLMConfig, GLMV1Config
from glm_jax.convert import companions, export_hf, import_hf
from glm_jax.hf.config import Form, Tokens, read_fields
from glm_jax.hf.tables import BUFFERS, transposed
from glm_jax.hf.tensors import check_finite, read_shard
from glm_jax.model import init_model
from glm_jax.tokenizers import ChatGLM3Tokenizer
from glm_jax.weights import host_weights
from sharding.disk.find import find_tensors
from sharding.disk.manifest import check_manifest, differing, hash_tensors
from sharding.errors import UserError
from sharding.layout import Layout, get_layout
from sharding.pipeline import layer_slots

FOLDERS = (
    "chatglm-6b",
    "chatglm-6b-3l",
    "chatglm2-6b",
    "chatglm3-6b",
    "chatglm3-6b-32k",
    "glm-4-9b-chat",
    "glm-4-9b-chat-hf",
    "GLM-4-9B-0414",
)


def _quiet(line: str) -> None:
    pass


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("layout", [None, "pp_dp_tp"])
def test_in_and_out_again_is_byte_identical(
    shared: Path, tmp_path: Path, folder: str, layout: str | None
) -> None:
    source = shared / "golden" / folder
    lines: list[str] = []
    if layout is None:
        import_hf(source, tmp_path / "checkpoint", "keep", None, lines.append)
    else:
        if card_of(source).config.num_layers % 2:
            layout = "fsdp_tp"
        split = get_layout(layout, 8)
        with jax.set_mesh(split.mesh()):
            import_hf(source, tmp_path / "checkpoint", "keep", split, lines.append)
    export_hf(tmp_path / "checkpoint", tmp_path / "out", None, "keep", 200_000, lines.append)
    ours, theirs = (hash_tensors(find_tensors(path)) for path in (tmp_path / "out", source))
    assert differing(ours, theirs) == [] and len(ours) == len(theirs)
    assert lines[-1] == (
        f"{len(theirs)} of {len(theirs)} tensors are byte for byte those that were imported"
    )
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert check_manifest(tmp_path / "out") == []
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_dtype_is_the_rounded_value(shared: Path, tmp_path: Path, dtype: str) -> None:
    source = shared / "golden" / "chatglm3-6b"
    import_hf(source, tmp_path / "checkpoint", dtype, None, _quiet)
    export_hf(tmp_path / "checkpoint", tmp_path / "out", None, "keep", None, _quiet)
    original = load_file(source / "model.safetensors")
    for name, stored in find_tensors(tmp_path / "out").items():
        if not BUFFERS.fullmatch(name):
            assert stored.dtype.name == dtype
            np.testing.assert_array_equal(stored.read(), original[name].astype(stored.dtype))
    fields = read_fields(tmp_path / "out")
    assert fields == read_fields(source) | {"torch_dtype": dtype}
    assert list(fields) == list(read_fields(source))
    # what was written comes in and out as it is
    import_hf(tmp_path / "out", tmp_path / "again", "keep", None, _quiet)
    export_hf(tmp_path / "again", tmp_path / "same", None, "keep", None, _quiet)
    ours, theirs = (hash_tensors(find_tensors(tmp_path / name)) for name in ("same", "out"))
    assert differing(ours, theirs) == []
    # and at the door out
    import_hf(source, tmp_path / "kept", "keep", None, _quiet)
    export_hf(tmp_path / "kept", tmp_path / "out2", None, dtype, None, _quiet)
    ours, theirs = (hash_tensors(find_tensors(tmp_path / name)) for name in ("out", "out2"))
    assert differing(ours, theirs) == []


@pytest.mark.parametrize(
    ("source", "form", "twin"),
    [
        ("glm-4-9b-chat", Form.GLM, "glm-4-9b-chat-hf"),
        ("glm-4-9b-chat-hf", Form.GLM4_REMOTE, "glm-4-9b-chat"),
    ],
)
def test_glm_4_goes_out_in_either_form(
    shared: Path, tmp_path: Path, source: str, form: Form, twin: str
) -> None:
    import_hf(shared / "golden" / source, tmp_path / "checkpoint", "keep", None, _quiet)
    export_hf(tmp_path / "checkpoint", tmp_path / "out", form, "keep", None, _quiet)
    other = shared / "golden" / twin
    ours, theirs = (hash_tensors(find_tensors(path)) for path in (tmp_path / "out", other))
    assert differing(ours, theirs) == []
    ours_fields, fields = read_fields(tmp_path / "out"), read_fields(other)
    assert {**ours_fields, "_name_or_path": None} == {**fields, "_name_or_path": None} or (
        ours_fields == fields
    )


@pytest.mark.parametrize("name", ["single", "fsdp_tp", "pp_dp_tp"])
def test_a_checkpoint_loads_onto_every_layout(
    small: GLMConfig, small_v1: GLMV1Config, tmp_path: Path, name: str
) -> None:
    for config in (small, small_v1):
        directory = tmp_path / type(config).__name__
        split = get_layout("fsdp_tp", 8)
        with jax.set_mesh(split.mesh()):
            model = jax.jit(partial(init_model, config, split))(jax.random.key(0))
            form = Form.CHATGLM if isinstance(config, GLMV1Config) else Form.CHATGLM3
            card = Card(config, form, Tokens(2, 0))
            save_model(model, split, card, directory, lambda folder: None)
            expected = host_weights(model, split)
        layout = get_layout(name, 1 if name == "single" else 8)
        with jax.set_mesh(layout.mesh()):
            restored = load_model(directory, layout, "float32")
            assert restored.trunk.blocks.w_q.shape[0] == layout.pipe
            for path, weight in host_weights(restored, layout).items():
                np.testing.assert_array_equal(weight, expected[path], err_msg=path)
            # saved from a pipeline it is the same checkpoint again
            save_model(restored, layout, card, tmp_path / "again", lambda folder: None)
        export_hf(tmp_path / "again", tmp_path / "out", None, "keep", None, _quiet)
        with jax.set_mesh(Layout().mesh()):
            for path, weight in host_weights(
                load_model(tmp_path / "out", Layout(), "float32"), Layout()
            ).items():
                np.testing.assert_array_equal(weight, expected[path], err_msg=path)
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("folder", ["chatglm-6b", "chatglm2-6b", "glm-4-9b-chat-hf"])
def test_pieces_of_any_size_make_the_same_tensors(
    shared: Path, tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Golden models are smaller than what is moved at once: strips and chunks of a few rows stand for large ones."""
    monkeypatch.setattr("glm_jax.hf.tensors.TILE", 24)
    monkeypatch.setattr("glm_jax.hf.tables.TILE", 20)
    monkeypatch.setattr("sharding.checkpoint.CHUNK", 1500)
    monkeypatch.setattr("sharding.disk.writer.CHUNK", 999)
    source = shared / "golden" / folder
    import_hf(source, tmp_path / "checkpoint", "keep", None, _quiet)
    assert len(list((tmp_path / "checkpoint" / "weights" / "trunk.embedding").iterdir())) > 4
    export_hf(tmp_path / "checkpoint", tmp_path / "out", None, "keep", None, _quiet)
    ours, theirs = (hash_tensors(find_tensors(path)) for path in (tmp_path / "out", source))
    assert differing(ours, theirs) == [] and len(ours) == len(theirs)


@pytest.mark.parametrize("folder", ["chatglm-6b", "chatglm3-6b"])
@pytest.mark.parametrize("name", ["single", "fsdp_tp"])
def test_a_streamed_checkpoint_is_the_model_of_its_directory(
    shared: Path, tmp_path: Path, folder: str, name: str
) -> None:
    source = shared / "golden" / folder
    import_hf(source, tmp_path / "checkpoint", "keep", None, _quiet)
    layout = Layout() if name == "single" else Layout(fsdp=4, tensor=2)
    with jax.set_mesh(layout.mesh()):
        expected = host_weights(load_model(source, layout, "float32"), layout)
        restored = load_model(tmp_path / "checkpoint", layout, "float32")
        assert restored.trunk.blocks.w_q.dtype == np.float32
        for path, weight in host_weights(restored, layout).items():
            np.testing.assert_array_equal(weight, expected[path], err_msg=path)


@pytest.mark.parametrize("folder", ["glm-4-9b-chat", "GLM-4-9B-0414", "chatglm2-6b"])
def test_a_shard_reads_its_own_bytes_and_no_others(
    shared: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(shared / "golden" / folder)
    count = 0
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal count
        got = preadv(descriptor, buffers, offset)
        count += got
        return got

    monkeypatch.setattr(os, "preadv", counted)
    layout = Layout(fsdp=4, tensor=2)
    with jax.set_mesh(layout.mesh()):
        shapes = jax.eval_shape(partial(init_model, source.config, layout), jax.random.key(0))
        slots = layer_slots(source.config.num_layers, layout)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes):
            sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
            index = sharding.devices_indices_map(leaf.shape)[jax.devices()[5]]
            name = jax.tree_util.keystr(keys)
            count = 0
            piece = read_shard(source, name, None, leaf.shape, slots, index)
            assert count == piece.nbytes, name
            assert piece.shape == sharding.shard_shape(leaf.shape)


def test_companions_travel_and_weights_do_not(shared: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(shared / "golden" / "chatglm3-6b", source)
    for path in (shared / "tokenizers" / "chatglm3-6b").iterdir():
        shutil.copyfile(path, source / path.name)
    # a tokenizer that the model has rows for
    ChatGLM3Tokenizer.train((f"say {n} good things" for n in range(300)), 300).save(source)
    (source / "modeling_chatglm.py").write_text("raise SystemExit('never run')\n")
    import_hf(source, tmp_path / "checkpoint", "keep", None, _quiet)
    export_hf(tmp_path / "checkpoint", tmp_path / "out", None, "keep", None, _quiet)
    names = {path.name for path in companions(source)}
    assert {"config.json", "tokenizer.model", "modeling_chatglm.py", "MODEL_LICENSE"} <= names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "golden.npz").exists()


@pytest.fixture
def writable(shared: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(shared / "golden" / "chatglm3-6b", directory)
    directory.chmod(0o755)
    for path in directory.iterdir():
        path.chmod(0o644)
    return directory


def _refused(directory: Path, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        import_hf(directory, out, "keep", None, _quiet)
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_truncated_file_is_named(writable: Path, tmp_path: Path) -> None:
    path = writable / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors: truncated" in _refused(writable, tmp_path / "out")


def test_a_tensor_of_another_shape_is_named(writable: Path, tmp_path: Path) -> None:
    fields = json.loads((writable / "config.json").read_text())
    (writable / "config.json").write_text(json.dumps(fields | {"ffn_hidden_size": 128}))
    message = _refused(writable, tmp_path / "out")
    assert "layers.0.mlp.dense_h_to_4h.weight has shape (320, 64), config.json wants (256, 64)" in (
        message
    )


def test_missing_and_unknown_tensors_are_named(writable: Path, tmp_path: Path) -> None:
    fields = json.loads((writable / "config.json").read_text())
    (writable / "config.json").write_text(json.dumps(fields | {"num_layers": 4}))
    assert "layers.3.input_layernorm.weight is missing" in _refused(writable, tmp_path / "out")
    (writable / "config.json").write_text(json.dumps(fields | {"num_layers": 2}))
    message = _refused(writable, tmp_path / "out")
    assert "7 unknown tensors, the first is transformer.encoder.layers.2." in message


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_not_a_number_is_named(writable: Path, tmp_path: Path, value: float) -> None:
    name = "transformer.encoder.layers.1.self_attention.dense.weight"
    stored = find_tensors(writable)[name]
    with stored.path.open("r+b") as file:
        file.seek(stored.offset + 2 * 77)
        file.write(np.array(value, np.float16).tobytes())
    message = _refused(writable, tmp_path / "out")
    assert "model.safetensors" in message and f"{name} holds NaN" in message


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_only_what_is_not_finite_is_refused(shared: Path, dtype: str) -> None:
    kind = DTYPES[dtype]
    assert kind is not None
    stored = next(iter(find_tensors(shared / "golden" / "chatglm3-6b").values()))
    limits = ml_dtypes.finfo(kind)
    fine = np.array([0.0, -0.0, limits.max, limits.min, limits.tiny, -limits.tiny], kind)
    check_finite(fine, stored)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        with pytest.raises(UserError, match="NaN or infinity"):
            check_finite(np.append(fine, np.array(value, kind)), stored)


def test_a_second_copy_that_differs_is_named(shared: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(shared / "golden" / "chatglm-6b-3l", directory)
    import_hf(directory, tmp_path / "checkpoint", "keep", None, _quiet)
    export_hf(tmp_path / "checkpoint", tmp_path / "hf", None, "keep", None, _quiet)
    stored = find_tensors(tmp_path / "hf")["lm_head.weight"]
    with stored.path.open("r+b") as file:
        file.seek(stored.offset)
        file.write(b"\x00\x3c")
    assert "lm_head.weight is not equal to transformer.word_embeddings.weight" in _refused(
        tmp_path / "hf", tmp_path / "out"
    )


def test_a_flipped_byte_of_an_export_is_found(shared: Path, tmp_path: Path) -> None:
    source = shared / "golden" / "glm-4-9b-chat"
    import_hf(source, tmp_path / "checkpoint", "keep", None, _quiet)
    export_hf(tmp_path / "checkpoint", tmp_path / "out", None, "keep", 200_000, _quiet)
    name = "transformer.encoder.layers.2.mlp.dense_4h_to_h.weight"
    stored = find_tensors(tmp_path / "out")[name]
    data = bytearray(stored.path.read_bytes())
    data[stored.offset + 5] ^= 1
    stored.path.write_bytes(data)
    (tmp_path / "out" / "config.json").write_text("{}")
    assert check_manifest(tmp_path / "out") == [
        f"{stored.path.name}: tensor {name} has changed",
        "config.json has changed",
    ]


def test_an_existing_directory_is_not_overwritten(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists already"):
        import_hf(shared / "golden" / "chatglm3-6b", tmp_path / "out", "keep", None, _quiet)


def test_too_small_a_disk_is_told_before_anything_is_written(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = _refused(shared / "golden" / "chatglm3-6b", tmp_path / "out")
    assert "are needed and 0.0 GB are free" in message


def test_a_disk_that_fills_up_leaves_nothing_behind(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_hf(shared / "golden" / "chatglm3-6b", tmp_path / "checkpoint", "keep", None, _quiet)

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(UserError, match=r"cannot write .*safetensors: the disk is full"):
        export_hf(tmp_path / "checkpoint", tmp_path / "out", None, "keep", None, _quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*model\.json"):
        export_hf(tmp_path, tmp_path / "out", None, "keep", None, _quiet)
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.json is no description of a model"):
        export_hf(tmp_path, tmp_path / "out", None, "keep", None, _quiet)
    (tmp_path / "model.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        open_source(tmp_path)


@pytest.mark.parametrize("shape", [(1, 1), (256, 256), (300, 513), (2, 1000), (700, 3)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_transposing_in_tiles(shape: tuple[int, int], dtype: str) -> None:
    kind = DTYPES[dtype]
    assert kind is not None
    matrix = (np.arange(shape[0] * shape[1], dtype=np.float32) % 2039).reshape(shape).astype(kind)
    ours = transposed(matrix)
    np.testing.assert_array_equal(ours, matrix.T)
    assert ours.flags.c_contiguous and ours.dtype == kind
