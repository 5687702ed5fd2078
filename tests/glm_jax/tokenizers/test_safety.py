"""Text stays text: no spelling of a special token in a message becomes one."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.tokenizers import (
    ChatGLM2Tokenizer,
    ChatGLMTokenizer,
    FastTokenizer,
    RanksTokenizer,
    Tokenizer,
    load_tokenizer,
)
from glm_jax.tokenizers.glm4 import PATTERN, _byte_alphabet
from sharding.errors import UserError

FOLDERS = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat")
SPELLINGS = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "<sop>",
    "<eop>",
    "</s>",
    "<pad>",
    "<unused_0>",
    "<ENC>",
    "<dBLOCK>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|endoftext|>",
)
TEXT = st.lists(
    st.one_of(
        st.sampled_from(SPELLINGS), st.text(max_size=6), st.sampled_from(["[", "<", " ", "\n"])
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def loaded(shared: Path) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(shared / "tokenizers" / name) for name in FOLDERS}


def _special(tokenizer: Tokenizer) -> set[int]:
    if isinstance(tokenizer, ChatGLMTokenizer):
        return {*range(130000, 130008), 1, 2, 3}
    special = getattr(tokenizer, "special")  # noqa: B009
    return {*special.values(), 1, 2} - ({1, 2} if isinstance(tokenizer, RanksTokenizer) else set())


@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_no_text_spells_a_special_token(loaded: dict[str, Tokenizer], text: str) -> None:
    for tokenizer in loaded.values():
        assert not _special(tokenizer) & set(tokenizer.encode(text)), type(tokenizer)
        empty = tokenizer.chat_prompt([{"role": "user", "content": ""}])
        prompt = tokenizer.chat_prompt([{"role": "user", "content": text}])
        count = [sum(token in _special(tokenizer) for token in ids) for ids in (empty, prompt)]
        assert count[0] == count[1]


@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_what_is_encoded_decodes_to_the_same_text(loaded: dict[str, Tokenizer], text: str) -> None:
    assert loaded["glm-4-9b-chat"].decode(loaded["glm-4-9b-chat"].encode(text)) == text


def test_a_spelling_reads_the_same_whether_or_not_it_is_special(
    loaded: dict[str, Tokenizer],
) -> None:
    tokenizer = loaded["chatglm-6b"]
    text = "before <sop> and [MASK] after<eop>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("folder", ["chatglm-6b", "chatglm2-6b"])
def test_models_of_rounds_refuse_other_roles(loaded: dict[str, Tokenizer], folder: str) -> None:
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    with pytest.raises(UserError, match="messages system, user: this model knows only user and"):
        loaded[folder].chat_prompt(messages)
    with pytest.raises(UserError, match="must end with the assistant's answer"):
        loaded[folder].chat_example(messages[1:])


def test_answers_are_cut_and_cleaned(loaded: dict[str, Tokenizer]) -> None:
    v1, v2, v4 = (loaded[name] for name in ("chatglm-6b", "chatglm2-6b", "glm-4-9b-chat"))
    assert v1.decode_answer([*v1.encode("好的，没问题！ yes, sir!"), v1.eos_id, 5]) == (
        "好的，没问题！ yes, sir!"
    )
    assert v2.decode_answer([*v2.encode(" fine \n"), v2.eos_id, 36474]) == "fine"
    answer = [*v4.encode("get_weather\n{}"), v4.eos_id, *v4.encode("more")]
    assert v4.decode_answer(answer) == "{}"


def test_tools_need_the_repository_s_template(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(
        (shared / "tokenizers" / "glm-4-9b-chat" / "tokenizer.model").read_bytes()
    )
    bare = load_tokenizer(tmp_path)
    assert isinstance(bare, RanksTokenizer) and bare.eos_id == 151336
    system = {"role": "system", "content": "", "tools": [{"type": "function"}]}
    with pytest.raises(UserError, match="need the chat_template"):
        bare.chat_prompt([system])


def test_directories_without_a_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no tokenizer in {tmp_path}"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"neither\x00")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"YQ== 0\nnonsense\n")
    with pytest.raises(UserError, match="holds no byte-pair ranks"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer\.json of GLM-4"):
        load_tokenizer(tmp_path)


def test_chatglm2_and_chatglm3_are_told_apart(shared: Path, tmp_path: Path) -> None:
    model = (shared / "tokenizers" / "chatglm2-6b" / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert not isinstance(load_tokenizer(tmp_path), ChatGLM2Tokenizer)  # nothing says: the latest
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "THUDM/chatglm2-6b-32k"}))
    assert isinstance(load_tokenizer(tmp_path), ChatGLM2Tokenizer)


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of ranks that makes another, by the rank it makes."""
    merges = []
    for token in ranks:
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(a, b) for a, b in halves if a in ranks and b in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _fast_json(tokenizer: RanksTokenizer) -> str:
    """The same tokenizer as a tokenizer.json."""
    spell = {byte: character for character, byte in _byte_alphabet()}
    ranks: dict[bytes, int] = tokenizer._encoding._mergeable_ranks

    def spelt(token: bytes) -> str:
        return "".join(spell[byte] for byte in token)

    added = [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, token_id in tokenizer.special.items()
    ]
    split = {
        "type": "Split",
        "pattern": {"Regex": PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    bytes_ = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
            "post_processor": None,
            "decoder": bytes_,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {spelt(token): rank for token, rank in ranks.items()},
                "merges": [[spelt(a), spelt(b)] for a, b in _merges(ranks)],
            },
        },
        ensure_ascii=False,
    )


def test_a_tokenizer_json_gives_the_same_ids(
    loaded: dict[str, Tokenizer], shared: Path, tmp_path: Path
) -> None:
    ranks = loaded["glm-4-9b-chat"]
    assert isinstance(ranks, RanksTokenizer)
    (tmp_path / "tokenizer.json").write_text(_fast_json(ranks), encoding="utf-8")
    source = shared / "tokenizers" / "glm-4-9b-chat"
    (tmp_path / "tokenizer_config.json").write_bytes(
        (source / "tokenizer_config.json").read_bytes()
    )
    fast = load_tokenizer(tmp_path)
    assert isinstance(fast, FastTokenizer)
    assert (fast.vocab_size, fast.prefix, fast.stop_ids) == (
        ranks.vocab_size,
        ranks.prefix,
        ranks.stop_ids,
    )
    golden = json.loads((source / "golden.json").read_text(encoding="utf-8"))
    for case in golden["tiktoken_strings"]:
        assert fast.encode(case["text"]) == case["ids"]
        assert fast.decode(case["ids"]) == case["decoded"]
    for case in golden["chat"]:
        expected = case["input_ids_by_message"] or case["input_ids"]
        assert fast.chat_prompt(case["messages"]) == expected
