"""A reward model is kept, loaded, exported and imported with its head and its scores; nothing takes it for another."""

import dataclasses
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from safetensors.numpy import load_file, save_file

from glm_jax.batch import Sequences
from glm_jax.checkpoint import Card, card_of, load_model, load_scalar, save_model
from glm_jax.config import Config, GLMConfig, GLMV1Config, Head
from glm_jax.convert import export_hf, import_hf
from glm_jax.describe import describe
from glm_jax.hf.classifier import CLASSIFIERS
from glm_jax.hf.config import Form, Tokens, read_fields
from glm_jax.model import CausalLM
from glm_jax.scalar import ScalarModel, init_scalar, sequence_scores
from sharding.disk.find import find_tensors
from sharding.disk.manifest import differing, hash_tensors
from sharding.errors import UserError
from sharding.layout import Layout, get_layout
from tests.tolerances import rounding, terms_of

ONE = Layout()
PAD = 3
TOKENS = Tokens([PAD, 5], PAD)
V3 = GLMConfig(64, 32, 2, 8, 2, 8, 64, max_length=64)
CONFIGS: dict[Form, GLMConfig] = {
    Form.CHATGLM2: dataclasses.replace(V3, position_scale=50.0),
    Form.CHATGLM3: V3,
    Form.GLM4_REMOTE: dataclasses.replace(V3, rope_theta=5e6),
    Form.GLM: dataclasses.replace(V3, rope_theta=5e6),
    Form.GLM4: dataclasses.replace(V3, sandwich_norms=True),
}
GOLDEN = ("input_ids", "attention_mask", "classifier_weight", "classifier_bias", "logits")
WEIGHT = np.ones((1, 64), np.float32)
ZERO = np.zeros(1, np.float32)
REMOTE_LAYER = (
    "input_layernorm.weight",
    "self_attention.query_key_value.weight",
    "self_attention.query_key_value.bias",
    "self_attention.dense.weight",
    "post_attention_layernorm.weight",
    "mlp.dense_h_to_4h.weight",
    "mlp.dense_4h_to_h.weight",
)
HF_LAYER = (
    "input_layernorm.weight",
    *(f"self_attn.{name}_proj.{kind}" for name in "qkv" for kind in ("weight", "bias")),
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_up_proj.weight",
    "mlp.down_proj.weight",
)


def _quiet(line: str) -> None:
    pass


def _refused(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _names(form: Form) -> set[str]:
    """The tensors of a model of two layers with a scalar head, as the original's class names them."""
    if form in (Form.GLM, Form.GLM4):
        layer = HF_LAYER
        if form is Form.GLM4:
            layer += ("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")
        names = {f"model.layers.{i}.{name}" for i in range(2) for name in layer}
        return names | {"model.embed_tokens.weight", "model.norm.weight", "score.weight"}
    names = {f"transformer.encoder.layers.{i}.{name}" for i in range(2) for name in REMOTE_LAYER}
    return names | {
        "transformer.embedding.word_embeddings.weight",
        "transformer.rotary_pos_emb.inv_freq",
        "transformer.encoder.final_layernorm.weight",
        "classifier_head.weight",
        "classifier_head.bias",
    }


def _sequences() -> Sequences:
    """Eight rows, padded on either side."""
    rng = np.random.default_rng(0)
    ids = rng.integers(6, 60, (8, 12), dtype=np.int32)
    valid = np.ones(ids.shape, bool)
    for row, pad in enumerate([0, 1, 5, 11, 0, 2, 6, 9]):
        valid[row, :pad] = row % 2 == 0
        valid[row, 12 - pad :] = row % 2 == 1
    return Sequences(np.where(valid, ids, PAD), valid, valid)


def _scores(model: ScalarModel, layout: Layout) -> np.ndarray:
    score = jax.jit(sequence_scores, static_argnums=2)
    return np.asarray(score(model, layout.put(_sequences()), layout))


def _scorer(config: Config, layout: Layout) -> ScalarModel:
    """A model whose every weight is its own, biases and norms too; drawn on the host, for nothing to compile."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(partial(init_scalar, config, layout), jax.random.key(0))

    def place(path: tuple[jax.tree_util.KeyEntry, ...], like: jax.ShapeDtypeStruct) -> jax.Array:
        mean = float("norm" in jax.tree_util.keystr(path))
        values = rng.normal(mean, 0.3, like.shape).astype(np.float32)
        return jax.device_put(values, NamedSharding(jax.sharding.get_mesh(), like.sharding.spec))

    model: ScalarModel = jax.tree_util.tree_map_with_path(place, shapes)
    return model


def _keep(model: ScalarModel, form: Form, directory: Path, layout: Layout = ONE) -> None:
    save_model(
        model, layout, Card(model.trunk.config, form, TOKENS), directory, lambda folder: None
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a ChatGLM3 with a scalar head."""
    directory = tmp_path_factory.mktemp("kept") / "reward"
    with jax.set_mesh(ONE.mesh()):
        _keep(_scorer(V3, ONE), Form.CHATGLM3, directory)
    return directory


@pytest.mark.parametrize("form", CONFIGS)
def test_scores_survive_disk_export_and_import(form: Form, tmp_path: Path) -> None:
    kept, out, back = tmp_path / "kept", tmp_path / "out", tmp_path / "back"
    with jax.set_mesh(ONE.mesh()):
        model = _scorer(CONFIGS[form], ONE)
        scores, head = _scores(model, ONE), np.asarray(model.w_scalar)
        assert len(set(scores.tolist())) == len(scores) and np.abs(scores).max() > 0.1
        _keep(model, form, kept)
        export_hf(kept, out, None, "keep", 20_000, _quiet)
        import_hf(out, back, "keep", None, _quiet)
        for directory in (kept, out, back):
            assert card_of(directory).head is Head.SCALAR
            loaded = load_scalar(directory, ONE, "float32")
            np.testing.assert_array_equal(np.asarray(loaded.w_scalar), head)
            np.testing.assert_array_equal(_scores(loaded, ONE), scores, err_msg=str(directory))
    found = find_tensors(out)
    assert set(found) == _names(form)
    for name, stored in found.items():
        if name in ("score.weight", "classifier_head.weight"):
            np.testing.assert_array_equal(stored.read(), head[None])
        if name == "classifier_head.bias":
            assert stored.shape == (1,) and not stored.read().any()


@pytest.mark.parametrize(
    ("form", "other", "name"),
    [
        (Form.CHATGLM3, None, "fsdp_tp"),
        (Form.CHATGLM3, None, "pp_dp_tp"),
        (Form.GLM4_REMOTE, Form.GLM, "fsdp_tp"),
        (Form.GLM, Form.GLM4_REMOTE, "fsdp_tp"),
        (Form.GLM4, None, "fsdp_tp"),
    ],
)
def test_scores_survive_sharding(form: Form, other: Form | None, name: str, tmp_path: Path) -> None:
    kept, out, back = tmp_path / "kept", tmp_path / "out", tmp_path / "back"
    with jax.set_mesh(ONE.mesh()):
        scores = _scores(_scorer(CONFIGS[form], ONE), ONE)
    layout = get_layout(name, 8)
    with jax.set_mesh(layout.mesh()):
        _keep(_scorer(CONFIGS[form], layout), form, kept, layout)
        export_hf(kept, out, other, "keep", None, _quiet)
        import_hf(out, back, "keep", layout, _quiet)
        for directory in (kept, out, back):
            ours = _scores(load_scalar(directory, layout, "float32"), layout)
            # scores of about 1 are sums through all layers, which another layout sums in another order
            atol = rounding(2 * terms_of(CONFIGS[form], ours.shape[-1]), 1.0)
            np.testing.assert_allclose(ours, scores, rtol=0, atol=atol)
    assert set(find_tensors(out)) == _names(other or form)
    with jax.set_mesh(ONE.mesh()):
        np.testing.assert_array_equal(_scores(load_scalar(back, ONE, "float32"), ONE), scores)


def test_config_json_names_the_class(kept: Path, tmp_path: Path) -> None:
    export_hf(kept, tmp_path / "remote", None, "keep", None, _quiet)
    fields = read_fields(tmp_path / "remote")
    assert fields["architectures"] == ["ChatGLMForSequenceClassification"]
    assert fields["auto_map"] == {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
    }
    assert (fields["classifier_dropout"], fields["pad_token_id"]) == (None, PAD)
    export_hf(kept, tmp_path / "hf", Form.GLM, "bfloat16", None, _quiet)
    fields = read_fields(tmp_path / "hf")
    assert list(fields) == sorted(fields)
    assert fields["architectures"] == ["GlmForSequenceClassification"]
    assert fields["id2label"] == {"0": "LABEL_0"} and fields["label2id"] == {"LABEL_0": 0}
    assert (fields["torch_dtype"], fields["pad_token_id"]) == ("bfloat16", PAD)


def _classifier(source: Path, to: Path, head: dict[str, np.ndarray], **changes: Any) -> Path:
    """A golden model's directory as its original code would save it with a classifier's head; None takes fields out."""
    fields, tensors = read_fields(source), dict[str, np.ndarray]()
    for path in source.glob("*.safetensors"):
        tensors |= load_file(path)
    for name in ("lm_head.weight", "transformer.output_layer.weight"):
        tensors.pop(name, None)
    to.mkdir()
    save_file(tensors | head, to / "model.safetensors", {"format": "pt"})
    name = CLASSIFIERS[card_of(source).form]
    fields = {**fields, "architectures": [name], "id2label": {"0": "x"}, **changes}
    kept = {key: value for key, value in fields.items() if value is not None}
    (to / "config.json").write_text(json.dumps(kept))
    return to


@pytest.mark.parametrize("folder", ["chatglm3-6b", "glm-4-9b-chat"])
def test_scores_are_those_of_the_original_classifier(
    shared: Path, tmp_path: Path, folder: str
) -> None:
    source = shared / "golden" / folder
    with np.load(source / "golden.npz") as file:
        golden = {name: file[f"seqcls/{name}"] for name in GOLDEN}
    head = {
        "classifier_head.weight": golden["classifier_weight"][:1],
        "classifier_head.bias": np.zeros(1, np.float32),  # without its own, which is taken off
    }
    directory = _classifier(source, tmp_path / "hf", head)
    valid = golden["attention_mask"].astype(bool)
    batch = Sequences(golden["input_ids"], valid, valid)
    with jax.set_mesh(ONE.mesh()):
        score = jax.jit(sequence_scores, static_argnums=2)
        scores = score(load_scalar(directory, ONE, "float32"), ONE.put(batch), ONE)
    logits = golden["logits"][:, 0] - golden["classifier_bias"][0]
    atol = 1e-5 * np.abs(golden["logits"]).max()  # glm_jax.verify.EXACT
    np.testing.assert_allclose(scores, logits, rtol=0, atol=atol)


@pytest.mark.parametrize("layout", [None, "fsdp_tp"])
@pytest.mark.parametrize(
    "folder", ["chatglm3-6b", "glm-4-9b-chat", "glm-4-9b-chat-hf", "GLM-4-9B-0414"]
)
def test_in_and_out_again_is_byte_identical(
    shared: Path, tmp_path: Path, folder: str, layout: str | None
) -> None:
    half = np.dtype(np.float16 if folder == "chatglm3-6b" else ml_dtypes.bfloat16)
    weight = np.linspace(-1, 1, 64).astype(half)[None]
    head = {"score.weight": weight}
    if folder in ("chatglm3-6b", "glm-4-9b-chat"):
        head = {"classifier_head.weight": weight, "classifier_head.bias": np.zeros(1, half)}
    renamed: dict[str, Any] = {}
    if "score.weight" in head:  # by transformers 4.56 or later
        renamed = {"torch_dtype": None, "dtype": half.name}
    source = _classifier(shared / "golden" / folder, tmp_path / "in", head, **renamed)
    lines: list[str] = []
    split = None if layout is None else get_layout(layout, 4)
    with jax.set_mesh((split or ONE).mesh()):
        import_hf(source, tmp_path / "checkpoint", "keep", split, lines.append)
    assert lines[-1].endswith(", scalar head")
    export_hf(tmp_path / "checkpoint", tmp_path / "out", None, "keep", 200_000, lines.append)
    ours, theirs = (hash_tensors(find_tensors(path)) for path in (tmp_path / "out", source))
    assert differing(ours, theirs) == [] and len(ours) == len(theirs)
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["checkpoint", "hf"])
def test_one_head_is_not_taken_for_the_other(kept: Path, tmp_path: Path, name: str) -> None:
    with jax.set_mesh(ONE.mesh()):
        talker = CausalLM(_scorer(V3, ONE).trunk, jax.numpy.ones((32, 64)))
        save_model(
            talker, ONE, Card(V3, Form.CHATGLM3, TOKENS), tmp_path / "checkpoint", lambda f: None
        )
        scorer, wrong = kept, tmp_path / name
        if name == "hf":
            scorer = tmp_path / "scorer"
            export_hf(kept, scorer, None, "keep", None, _quiet)
            export_hf(tmp_path / "checkpoint", wrong, None, "keep", None, _quiet)
        assert f"{scorer} holds a scalar head" in _refused(
            lambda: load_model(scorer, ONE, "float32")
        )
        assert f"{wrong} holds a language model" in _refused(
            lambda: load_scalar(wrong, ONE, "float32")
        )
    for directory, head in ((scorer, Head.SCALAR), (wrong, Head.VOCABULARY)):
        found = describe(directory)
        assert found.head is head and found.problems == []


def test_chatglm_6b_has_no_such_class(small_v1: GLMV1Config, tmp_path: Path) -> None:
    with jax.set_mesh(ONE.mesh()):
        model = _scorer(small_v1, ONE)
        _keep(model, Form.CHATGLM, tmp_path / "kept")
        head = np.asarray(load_scalar(tmp_path / "kept", ONE, "float32").w_scalar)
    np.testing.assert_array_equal(head, np.asarray(model.w_scalar))
    assert describe(tmp_path / "kept").problems == []
    message = _refused(
        lambda: export_hf(tmp_path / "kept", tmp_path / "out", None, "keep", None, _quiet)
    )
    assert "ChatGLM-6B has no class with a scalar head" in message and "keep the check" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("head", "changes", "message"),
    [
        ((WEIGHT, ZERO + 0.5), {}, r"model.safetensors: classifier_head.bias is not 0"),
        ((WEIGHT, ZERO + np.nan), {}, r"classifier_head.bias is not 0"),
        ((WEIGHT,), {}, r"tensor classifier_head.bias is missing"),
        ((), {}, r"tensor classifier_head.weight is missing"),
        ((WEIGHT * np.inf, ZERO), {}, r"classifier_head.weight holds NaN or infinity"),
        ((WEIGHT[0], ZERO), {}, r"classifier_head.weight has shape \(64,\), .* wants \(1, 64\)"),
        ((WEIGHT, ZERO), {"id2label": None}, r"config.json: a classifier of 2 labels"),
        ((WEIGHT, ZERO), {"num_labels": 3}, r"config.json: a classifier of 3 labels"),
        ((WEIGHT, ZERO), {"architectures": None}, r"transformer.output_layer.weight is missing"),
    ],
)
def test_a_head_that_is_not_ours_is_refused(
    shared: Path,
    tmp_path: Path,
    head: tuple[np.ndarray, ...],
    changes: dict[str, Any],
    message: str,
) -> None:
    names = ("classifier_head.weight", "classifier_head.bias")
    tensors = dict(zip(names, head, strict=False))
    source = _classifier(shared / "golden" / "chatglm3-6b", tmp_path / "in", tensors, **changes)
    refused = _refused(lambda: import_hf(source, tmp_path / "out", "keep", None, _quiet))
    assert re.search(message, refused)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", [Form.GLM, Form.GLM4])
def test_transformers_gives_the_same_scores(form: Form, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with jax.set_mesh(ONE.mesh()):
        model = _scorer(CONFIGS[form], ONE)
        scores = _scores(model, ONE)
        _keep(model, form, tmp_path / "kept")
    export_hf(tmp_path / "kept", tmp_path / "out", None, "keep", None, _quiet)
    classifier = getattr(transformers, CLASSIFIERS[form])
    theirs, report = classifier.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    batch = _sequences()
    with torch.no_grad():
        logits = theirs(
            input_ids=torch.tensor(batch.ids), attention_mask=torch.tensor(batch.valid).long()
        ).logits
    np.testing.assert_allclose(logits[:, 0].numpy(), scores, rtol=1e-5, atol=1e-5)
    # and what it saves comes in
    theirs.save_pretrained(tmp_path / "theirs")
    with jax.set_mesh(ONE.mesh()):
        np.testing.assert_array_equal(
            _scores(load_scalar(tmp_path / "theirs", ONE, "float32"), ONE), scores
        )
