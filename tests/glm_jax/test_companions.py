"""Model and tokenizer belong together, or no command takes them; an id without a row is never silent."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.checkpoint import Card, save_model
from glm_jax.companions import check_tokenizer, tokenizer_of
from glm_jax.config import PRESETS, GLMConfig, GLMV1Config, Head
from glm_jax.hf.config import RELEASED_TOKENS, Form, Tokens, default_form
from glm_jax.likelihood import sequence_logprobs
from glm_jax.model import init_model
from glm_jax.scalar import INIT
from glm_jax.tokenizers import ChatGLM3Tokenizer, ChatGLMTokenizer, Tokenizer, load_tokenizer
from rlhf.cli import main
from sharding.errors import UserError
from sharding.layout import Layout, get_layout

ONE = Layout()
TEXTS = [f"say {n} good things" for n in range(300)]


@pytest.fixture(scope="module")
def tokenizer() -> ChatGLM3Tokenizer:
    return ChatGLM3Tokenizer.train(TEXTS, 300)


# Which belongs to which -------------------------------------------------------------------------------------------

GENERATIONS = {
    "chatglm-6b": Form.CHATGLM,
    "chatglm2-6b": Form.CHATGLM2,
    "chatglm3-6b": Form.CHATGLM3,
    "chatglm3-6b-128k": Form.CHATGLM3,
    "glm-4-9b-chat": Form.GLM4_REMOTE,
    "glm-4-9b-chat-hf": Form.GLM,
    "glm-4-32b-0414": Form.GLM4,
}
# a tokenizer -> the models that it serves; ChatGLM2 and ChatGLM3 share one file and one end
SERVED = {
    "chatglm-6b": {"chatglm-6b"},
    "chatglm2-6b": {"chatglm2-6b", "chatglm3-6b", "chatglm3-6b-128k"},
    "chatglm3-6b": {"chatglm2-6b", "chatglm3-6b", "chatglm3-6b-128k"},
    "glm-4-9b-chat": {"glm-4-9b-chat", "glm-4-9b-chat-hf", "glm-4-32b-0414"},
}


@pytest.mark.parametrize("folder", SERVED)
def test_released_tokenizers_serve_their_generation_alone(shared: Path, folder: str) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / folder)
    for name, form in GENERATIONS.items():
        card = Card(PRESETS[name], form, RELEASED_TOKENS[form])
        if name in SERVED[folder]:
            check_tokenizer(card, tokenizer, "here")
            continue
        with pytest.raises(UserError, match="here: model and tokenizer do not belong") as error:
            check_tokenizer(card, tokenizer, "here")
        assert "\n" not in str(error.value)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(280, 320), ends=st.lists(st.integers(0, 310), max_size=3), alone=st.booleans()
)
def test_ids_are_rows_and_ends_are_ends(
    tokenizer: ChatGLM3Tokenizer, rows: int, ends: list[int], alone: bool
) -> None:
    eos: Any = (ends or [tokenizer.eos_id])[0] if alone else ends
    card = Card(GLMConfig(rows, 32, 2, 2, 1, 16, 48), Form.CHATGLM3, Tokens(eos, 0))
    wanted = [eos] if alone else ends
    fits = rows >= 300 and all(end in tokenizer.stop_ids for end in wanted)
    if fits:
        check_tokenizer(card, tokenizer, "x")
    else:
        with pytest.raises(
            UserError, match=f"the model has {rows} rows|eos_token_id of the model is"
        ):
            check_tokenizer(card, tokenizer, "x")


def test_each_id_of_a_tokenizer_is_looked_at(tokenizer: ChatGLM3Tokenizer) -> None:
    card = Card(GLMConfig(300, 32, 2, 2, 1, 16, 48), Form.CHATGLM3, Tokens([], 0))
    changes: dict[str, Any] = {"pad_id": 300, "eos_id": 301, "prefix": (1, 302), "vocab_size": 304}
    changes["stop_ids"] = (303, 2)
    for name, value in changes.items():
        other = ChatGLM3Tokenizer(tokenizer.files)
        setattr(other, name, value)
        with pytest.raises(
            UserError, match=rf"ids up to 30[0-3] \({name}.*\), the model has 300 rows"
        ):
            check_tokenizer(card, other, "x")


def _first(mask: int, gmask: int, sop: int) -> Tokenizer:
    """A tokenizer of ChatGLM-6B with these special tokens."""
    found = ChatGLMTokenizer.__new__(ChatGLMTokenizer)
    found.vocab_size, found.pad_id, found.eos_id, found.stop_ids = 64, 3, 63, (63,)
    found.mask_id, found.prefix = mask, (gmask, sop)
    return found


def test_chatglm_6b_reads_positions_off_the_tokens_of_its_tokenizer(
    small_v1: GLMV1Config, small: GLMConfig
) -> None:
    card = Card(small_v1, Form.CHATGLM, Tokens(63, 3))
    check_tokenizer(card, _first(60, 61, 62), "x")
    for ids, field in (
        ((59, 61, 62), "mask_token_id of the model is 60, of the tokenizer 59"),
        ((60, 59, 62), "gmask_token_id of the model is 61, of the tokenizer 59"),
        ((60, 61, 59), "bos_token_id of the model is 62, of the tokenizer 59"),
    ):
        with pytest.raises(UserError, match=field):
            check_tokenizer(card, _first(*ids), "x")
    with pytest.raises(UserError, match="needs that of a later generation"):
        check_tokenizer(Card(small, Form.CHATGLM3, Tokens(63, 3)), _first(60, 61, 62), "x")


# No command takes what does not belong together -------------------------------------------------------------------


def _saved(directory: Path, rows: int, head: Head, eos: int, tokenizer: Tokenizer) -> Path:
    config = GLMConfig(rows, 32, 2, 2, 1, 16, 48, max_length=128)
    card = Card(config, default_form(config), Tokens(eos, tokenizer.pad_id))
    with jax.set_mesh(ONE.mesh()):
        model = jax.jit(partial(INIT[head], config, ONE))(jax.random.key(0))
        save_model(model, ONE, card, directory, tokenizer.save)
    return directory


@pytest.mark.parametrize(
    ("rows", "eos", "message"),
    [
        (200, 2, "the tokenizer makes ids up to 299"),
        (300, 5, "eos_token_id of the model is 5, the tokenizer ends answers with 2"),
    ],
)
def test_no_command_takes_the_tokenizer_of_another_model(
    rows: int,
    eos: int,
    message: str,
    tokenizer: ChatGLM3Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = str(_saved(tmp_path / "model", rows, Head.VOCABULARY, eos, tokenizer))
    scorer = str(_saved(tmp_path / "scorer", rows, Head.SCALAR, eos, tokenizer))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "say 1", "chosen": "good", "rejected": "bad"}))
    hf, out = str(tmp_path / "hf"), str(tmp_path / "out")
    assert main(["export", model, hf]) == 0
    demo = str(Path(__file__).parents[2] / "configs" / "demo_smoke.py")
    reward = str(Path(__file__).parents[2] / "configs" / "reward_hh.py")
    small = ["--length", "32", "--output-dir", out]
    capsys.readouterr()
    for command in (
        ["generate", model, "--prompt", "say 1"],
        ["generate", hf, "--prompt", "say 1"],
        ["chat", model],
        ["import", hf, out],
        ["import", hf, out, "--stream"],
        ["reward", "report", scorer, str(pairs), "--out", out, "--length", "32"],
        ["run", demo, "--pretrained", model, *small],
        ["run", demo, "--pretrained", hf, *small],
        ["run", demo, "--reward-model", scorer, *small],
        ["run", reward, "--pretrained", model, *small, "--reward.pack-length", "64"],
    ):
        assert main(command) == 1, command
        screen = capsys.readouterr()
        assert message in screen.err and screen.err.count("\n") == 1, (command, screen.err)
        assert not Path(out).exists()
    for directory in (model, hf):
        assert main(["inspect", directory]) == 1
        assert message in " ".join(capsys.readouterr().out.split())


def test_a_directory_without_a_tokenizer_is_imported(
    tokenizer: ChatGLM3Tokenizer, tmp_path: Path
) -> None:
    model = _saved(tmp_path / "model", 300, Head.VOCABULARY, 2, tokenizer)
    assert tokenizer_of(model).vocab_size == 300
    shutil.rmtree(model / "hf")
    (model / "hf").mkdir()
    assert main(["export", str(model), str(tmp_path / "hf")]) == 0
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "out"), "--stream"]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0


# An id without a row ----------------------------------------------------------------------------------------------

BEYOND = [64, 65, 70, 127, 2**31 - 1, -1, -64, -65]


@pytest.mark.parametrize(
    "layout_name",
    ["single", "fsdp_tp", *(pytest.param(x, marks=pytest.mark.slow) for x in ("tp", "pp_dp_tp"))],
)
@pytest.mark.parametrize("vocab_size", [64, 61])  # 61: padded where it is split
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_id_without_a_row_shows(
    small: GLMConfig, layout_name: str, vocab_size: int, dtype: str
) -> None:
    config = dataclasses.replace(small, vocab_size=vocab_size, compute_dtype=dtype)
    layout = get_layout(layout_name, 1 if layout_name == "single" else 8)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab_size, (8, 12), dtype=np.int32)
    wrong = ids.copy()
    for row, token in enumerate([vocab_size, *BEYOND[1:]]):
        wrong[row, row] = token
    with jax.set_mesh(layout.mesh()):
        model = jax.jit(partial(init_model, config, layout))(jax.random.key(0))
        embed = jax.jit(lambda model, ids: model.trunk.embed(ids, layout))
        found = jax.device_get(embed(model, layout.put(wrong)))
        expected = jax.device_get(embed(model, layout.put(ids)))
        np.testing.assert_array_equal(found[wrong == ids], expected[wrong == ids])
        assert np.isnan(found[wrong != ids].astype(np.float32)).all()
        if dtype == "float32":
            logp = jax.jit(partial(sequence_logprobs, layout=layout))
            valid = np.ones_like(ids, bool)
            assert np.isfinite(
                jax.device_get(logp(model, layout.put(ids), layout.put(valid)))
            ).all()
            shown = jax.device_get(logp(model, layout.put(wrong), layout.put(valid)))
            assert np.isnan(shown).any(axis=1).all()
