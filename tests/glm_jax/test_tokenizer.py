"""The tokenizer against the original's ids, and small ones trained with its rules."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.tokenizer import SPECIAL_TOKENS, ChatGLM3Tokenizer, pad_left, pad_right
from sharding.errors import UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
ORIGINAL = SHARED / "tokenizers" / "chatglm3-6b"
needs_original = pytest.mark.skipif(
    not (ORIGINAL / "golden.json").exists(), reason="the original's files are not beside the clone"
)
TEXTS = [
    f"{what}{how}，{more}。"
    for what in ("灯光", "毛巾", "窗帘", "走廊", "电梯", "书桌", "花园", "楼梯")
    for how in ("很亮", "太旧", "不错", "一般", "干净", "有点吵")
    for more in ("下回再来看看", "朋友也这么说", "abc 12 用着还行")
]


@pytest.fixture(scope="module")
def original() -> ChatGLM3Tokenizer:
    return ChatGLM3Tokenizer.load(ORIGINAL)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ORIGINAL / "golden.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def small() -> ChatGLM3Tokenizer:
    return ChatGLM3Tokenizer.train(TEXTS, vocab_size=400)


@needs_original
def test_special_ids_match_the_original(
    original: ChatGLM3Tokenizer, golden: dict[str, Any]
) -> None:
    fixed = {"bos": 1, "eos": original.eos_id, "pad": original.pad_id}
    assert fixed | original.special == golden["special"]
    assert original.num_pieces == golden["sp_vocab_size"]
    assert original.vocab_size == golden["vocab_size"]
    assert original.stop_ids == (2, 64795, 64797)


@needs_original
@pytest.mark.parametrize("table", ["strings", "sp_strings"])
def test_every_string_matches_the_original(
    original: ChatGLM3Tokenizer, golden: dict[str, Any], table: str
) -> None:
    assert len(golden[table]) == 45
    for entry in golden[table]:
        ids = original.encode(entry["text"])
        assert ids == entry["ids"], entry["text"]
        assert original.decode(ids) == entry["decoded"], entry["text"]
        if "ids_with_special" in entry:
            assert [*original.prefix, *ids] == entry["ids_with_special"]


@needs_original
def test_every_chat_prompt_matches_the_original(
    original: ChatGLM3Tokenizer, golden: dict[str, Any]
) -> None:
    assert len(golden["chat"]) == 6
    for entry in golden["chat"]:
        ids = original.chat_prompt(entry["messages"])
        assert ids == entry["input_ids"]
        if "decoded" in entry:
            assert original.decode(ids, skip_special=False) == entry["decoded"]


@needs_original
def test_training_examples_match_the_official_script(
    original: ChatGLM3Tokenizer, golden: dict[str, Any]
) -> None:
    assert len(golden["sft"]) == 2
    for entry in golden["sft"]:
        ids, target = original.chat_example(entry["messages"])
        assert ids == entry["input_ids"]
        labels = [token if counts else -100 for token, counts in zip(ids, target, strict=True)]
        assert labels == entry["labels"]


@needs_original
def test_left_padded_batch_matches_the_original(
    original: ChatGLM3Tokenizer, golden: dict[str, Any]
) -> None:
    batch = golden["padded_batch"]
    sequences = [[*original.prefix, *original.encode(text)] for text in batch["texts"]]
    ids, valid = pad_left(sequences, max(map(len, sequences)), original.pad_id)
    assert ids.tolist() == batch["input_ids"]
    assert valid.astype(int).tolist() == batch["attention_mask"]
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
    assert positions.tolist() == batch["position_ids"]


@needs_original
def test_loading_and_saving_keeps_the_original_bytes(
    original: ChatGLM3Tokenizer, tmp_path: Path
) -> None:
    original.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (
        ORIGINAL / "tokenizer.model"
    ).read_bytes()
    kept, given_ = (
        json.loads((folder / "tokenizer_config.json").read_text())
        for folder in (tmp_path, ORIGINAL)
    )
    assert kept == given_


def test_trained_vocabulary_has_the_original_layout(small: ChatGLM3Tokenizer) -> None:
    assert small.vocab_size == 400
    assert small.num_pieces == 400 - len(SPECIAL_TOKENS)
    assert list(small.special) == list(SPECIAL_TOKENS)
    assert sorted(small.special.values()) == list(range(small.num_pieces, 400))
    assert (small.pad_id, small.eos_id) == (0, 2)
    assert small.encode("\n")[-1] == 13  # the byte 0x0A, as in the original


@needs_original
def test_training_takes_the_rules_of_the_original(small: ChatGLM3Tokenizer) -> None:
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    theirs, ours = proto.ModelProto(), proto.ModelProto()
    theirs.ParseFromString((ORIGINAL / "tokenizer.model").read_bytes())
    ours.ParseFromString(small._model)
    for rule in ("name", "precompiled_charsmap", "add_dummy_prefix", "remove_extra_whitespaces"):
        assert getattr(ours.normalizer_spec, rule) == getattr(theirs.normalizer_spec, rule), rule
    assert ours.normalizer_spec.escape_whitespaces and theirs.normalizer_spec.escape_whitespaces
    same = ["model_type", "split_digits", "byte_fallback", "allow_whitespace_only_pieces"]
    same += ["unk_id", "bos_id", "eos_id", "pad_id", "unk_surface", "max_sentencepiece_length"]
    same += ["split_by_unicode_script", "split_by_whitespace", "treat_whitespace_as_suffix"]
    for rule in same:
        assert getattr(ours.trainer_spec, rule) == getattr(theirs.trainer_spec, rule), rule


def test_training_is_deterministic_in_any_order(small: ChatGLM3Tokenizer, tmp_path: Path) -> None:
    again = ChatGLM3Tokenizer.train(TEXTS[::-1], vocab_size=400)
    again.save(tmp_path)
    loaded = ChatGLM3Tokenizer.load(tmp_path)
    assert loaded._model == again._model == small._model
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "tokenizer.model",
        "tokenizer_config.json",
    ]


@settings(max_examples=80, deadline=None)
@given(text=st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
def test_text_returns_from_its_ids_and_never_holds_special_tokens(
    small: ChatGLM3Tokenizer, text: str
) -> None:
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert all(2 < token < small.num_pieces for token in ids)


@pytest.mark.parametrize("token", [*SPECIAL_TOKENS, "<s>", "</s>", "<unk>"])
def test_special_spellings_in_text_stay_text(small: ChatGLM3Tokenizer, token: str) -> None:
    ids = small.encode(f"灯光{token}不错")
    assert not set(ids) & {0, 1, 2, *small.special.values()}
    assert small.decode(ids) == f"灯光{token}不错"


def test_an_answer_is_read_back_from_what_training_teaches(small: ChatGLM3Tokenizer) -> None:
    question = {"role": "user", "content": "灯光"}
    prompt = small.chat_prompt([question])
    ids, target = small.chat_example([question, {"role": "assistant", "content": "很亮，\n不错"}])
    assert ids[: len(prompt)] == prompt
    assert [i for i, counts in enumerate(target) if counts] == list(range(len(prompt), len(ids)))
    generated = ids[len(prompt) :]
    assert small.decode_answer([*generated, *small.encode("走廊")]) == "很亮，\n不错"
    for stop in (small.user_id, small.observation_id):
        assert small.decode_answer([*generated[:-1], stop, *generated]) == "很亮，\n不错"
    assert small.decode([*generated, 0, small.vocab_size + 3]) == "\n 很亮，\n不错"


def test_only_answers_and_the_token_after_them_are_targets(small: ChatGLM3Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "灯光"},
        {"role": "assistant", "metadata": "look", "content": "走廊"},
        {"role": "observation", "content": "很亮"},
        {"role": "assistant", "content": "不错"},
        {"role": "user", "content": "电梯"},
    ]
    ids, target = small.chat_example(messages)
    targets = [token for token, counts in zip(ids, target, strict=True) if counts]
    assert targets == [
        *small.encode("look\n"),
        *small.encode("走廊"),
        small.observation_id,
        *small.encode("\n"),
        *small.encode("不错"),
        small.user_id,
    ]


def test_padding_sides_mirror_each_other() -> None:
    ids, valid = pad_right([[5, 6], [7]], 3, value=9)
    assert ids.tolist() == [[5, 6, 9], [7, 9, 9]] and valid.tolist()[1] == [True, False, False]
    ids, valid = pad_left([[5, 6], [7]], 3, value=9)
    assert ids.tolist() == [[9, 5, 6], [9, 9, 7]] and valid.tolist()[1] == [False, False, True]
    with pytest.raises(ValueError, match="shape"):
        pad_right([[1, 2, 3, 4]], 3)


def test_unusable_files_give_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.model: cannot be read \(No such file"):
        ChatGLM3Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model at all")
    with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model"):
        ChatGLM3Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not readable as JSON") as caught:
        ChatGLM3Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "size"), [([], 400), ([" \n "], 400), (TEXTS, 90), (TEXTS, 9999)]
)
def test_untrainable_vocabularies_give_one_clear_line(texts: list[str], size: int) -> None:
    with pytest.raises(UserError, match=r"tokenizer: .*; ") as caught:
        ChatGLM3Tokenizer.train(texts, size)
    assert "\n" not in str(caught.value)


def test_unknown_role_is_named(small: ChatGLM3Tokenizer) -> None:
    with pytest.raises(UserError, match="unknown role 'bot'"):
        small.chat_prompt([{"role": "bot", "content": "灯光"}])
