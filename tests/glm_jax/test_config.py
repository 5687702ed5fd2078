"""Presets have the published shapes and sizes; config.json is read and written as the original repositories have it."""

import json
from pathlib import Path
from typing import Any

import pytest

from glm_jax.config import PRESETS, GLMConfig, Head
from glm_jax.hf.config import Form, Tokens, form_of, from_hf, to_hf
from glm_jax.hf.tables import num_parameters
from sharding.errors import UserError

# exact counts: 6.17, 6.24, 9.40 (9.48 with four kv groups) and 32.57 billion
PUBLISHED = {
    "chatglm-6b": 6_173_286_400,
    "chatglm2-6b": 6_243_584_000,
    "chatglm2-6b-32k": 6_243_584_000,
    "chatglm3-6b": 6_243_584_000,
    "chatglm3-6b-32k": 6_243_584_000,
    "chatglm3-6b-128k": 6_243_584_000,
    "glm-4-9b": 9_399_951_360,
    "glm-4-9b-chat": 9_399_951_360,
    "glm-4-9b-chat-1m": 9_483_857_920,
    "glm-4-9b-chat-hf": 9_399_951_360,
    "glm-4-9b-0414": 9_400_279_040,
    "glm-4-32b-0414": 32_566_081_536,
}
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


def _fields(shared: Path, folder: str) -> dict[str, Any]:
    text = (shared / "golden" / folder / "config.json").read_text(encoding="utf-8")
    fields: dict[str, Any] = json.loads(text)
    return fields


def test_every_preset_has_a_published_size() -> None:
    assert set(PUBLISHED) == set(PRESETS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name: str) -> None:
    assert num_parameters(PRESETS[name], Head.VOCABULARY) == PUBLISHED[name]


@pytest.mark.parametrize("folder", FOLDERS)
def test_config_comes_back_with_its_fields_in_order(shared: Path, folder: str) -> None:
    original = _fields(shared, folder)
    form = form_of(original, folder)
    tokens = Tokens(original["eos_token_id"], original["pad_token_id"])
    ours = to_hf(from_hf(original, folder), form, original["torch_dtype"], tokens)
    ours["_name_or_path"] = original.get("_name_or_path")
    original.setdefault("_name_or_path", None)
    assert {k: v for k, v in ours.items() if k != "_name_or_path"} == {
        k: v for k, v in original.items() if k != "_name_or_path"
    }
    assert [k for k in ours if k != "_name_or_path"] == [
        k for k in original if k != "_name_or_path"
    ]
    assert (
        json.dumps(ours["auto_map"]) == json.dumps(original["auto_map"])
        if "auto_map" in ours
        else True
    )


def test_both_forms_of_glm_4_are_one_shape(shared: Path) -> None:
    remote, transformers = (
        from_hf(_fields(shared, name), name) for name in ("glm-4-9b-chat", "glm-4-9b-chat-hf")
    )
    assert remote == transformers


def test_rope_ratio_divides_positions_in_chatglm2_and_multiplies_the_base_later(
    shared: Path,
) -> None:
    fields = _fields(shared, "chatglm3-6b-32k")
    later = from_hf(fields, "x")
    assert isinstance(later, GLMConfig)
    assert (later.rope_theta, later.position_scale) == (500_000.0, 1.0)
    earlier = from_hf(fields | {"_name_or_path": "THUDM/chatglm2-6b-32k"}, "x")
    assert isinstance(earlier, GLMConfig)
    assert (earlier.rope_theta, earlier.position_scale) == (10_000.0, 50.0)
    with pytest.raises(UserError, match="put chatglm2, chatglm3 or glm4 into _name_or_path"):
        from_hf(fields | {"_name_or_path": "output/run-7"}, "x")


@pytest.mark.parametrize(
    ("folder", "change", "message"),
    [
        ("chatglm3-6b", {"model_type": "llama"}, "model_type = 'llama' is not of the ChatGLM fam"),
        ("chatglm3-6b", {"rmsnorm": False}, "rmsnorm = False is not supported"),
        ("chatglm3-6b", {"quantization_bit": 4}, "quantization_bit = 4 is not supported"),
        ("chatglm2-6b", {"pre_seq_len": 128}, "pre_seq_len"),
        ("chatglm-6b", {"position_encoding_2d": False}, "position_encoding_2d = False"),
        ("GLM-4-9B-0414", {"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ("GLM-4-9B-0414", {"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ("glm-4-9b-chat-hf", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
    ],
)
def test_what_the_model_code_does_not_cover_is_refused(
    shared: Path, folder: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        from_hf(_fields(shared, folder) | change, "config.json")


def test_a_missing_field_is_named(shared: Path) -> None:
    fields = _fields(shared, "chatglm2-6b")
    del fields["kv_channels"]
    with pytest.raises(UserError, match=r"x: field 'kv_channels' is missing; .* of ChatGLM2"):
        from_hf(fields, "x")


def test_a_form_that_cannot_hold_the_model_is_refused(shared: Path) -> None:
    sandwich = from_hf(_fields(shared, "GLM-4-9B-0414"), "x")
    with pytest.raises(UserError, match="architecture cannot be written as GLM-4, remote code"):
        to_hf(sandwich, Form.GLM4_REMOTE, "bfloat16")
    long = from_hf(_fields(shared, "glm-4-9b-chat"), "x")
    with pytest.raises(UserError, match="rotary positions cannot be written as ChatGLM2"):
        to_hf(long, Form.CHATGLM2, "bfloat16")
    with pytest.raises(UserError, match="ChatGLM-6B model cannot be written as ChatGLM3"):
        to_hf(PRESETS["chatglm-6b"], Form.CHATGLM3, "float16")
