"""Small tokenizers trained with the rules of ChatGLM3's."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.tokenizers import ChatGLM3Tokenizer, load_tokenizer, pad_left, pad_right
from glm_jax.tokenizers.v3 import SPECIAL_TOKENS
from sharding.errors import UserError

TEXTS = [
    f"{what}{how}，{more}。"
    for what in ("灯光", "毛巾", "窗帘", "走廊", "电梯", "书桌", "花园", "楼梯")
    for how in ("很亮", "太旧", "不错", "一般", "干净", "有点吵")
    for more in ("下回再来看看", "朋友也这么说", "abc 12 用着还行")
]


@pytest.fixture(scope="module")
def small() -> ChatGLM3Tokenizer:
    return ChatGLM3Tokenizer.train(TEXTS, vocab_size=400)


def test_trained_vocabulary_has_the_original_layout(small: ChatGLM3Tokenizer) -> None:
    assert small.vocab_size == 400
    assert small.num_pieces == 400 - len(SPECIAL_TOKENS)
    assert list(small.special) == list(SPECIAL_TOKENS)
    assert sorted(small.special.values()) == list(range(small.num_pieces, 400))
    assert (small.pad_id, small.eos_id) == (0, 2)
    assert small.encode("\n")[-1] == 13  # the byte 0x0A, as in the original


def test_training_takes_the_rules_of_the_original(small: ChatGLM3Tokenizer, shared: Path) -> None:
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    theirs, ours = proto.ModelProto(), proto.ModelProto()
    theirs.ParseFromString((shared / "tokenizers" / "chatglm3-6b" / "tokenizer.model").read_bytes())
    ours.ParseFromString(small.files["tokenizer.model"])
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
    assert loaded.files == again.files == small.files
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
    for stop in (small.special["<|user|>"], small.special["<|observation|>"]):
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
        small.special["<|observation|>"],
        *small.encode("\n"),
        *small.encode("不错"),
        small.special["<|user|>"],
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
        load_tokenizer(tmp_path)
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
