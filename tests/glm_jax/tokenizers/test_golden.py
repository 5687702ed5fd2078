"""Ids, text, prompts and targets of every generation against its original tokenizer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_jax.tokenizers import (
    ChatGLM2Tokenizer,
    ChatGLM3Tokenizer,
    ChatGLMTokenizer,
    RanksTokenizer,
    Tokenizer,
    load_tokenizer,
    pad_left,
)

KINDS = {
    "chatglm-6b": ChatGLMTokenizer,
    "chatglm2-6b": ChatGLM2Tokenizer,
    "chatglm3-6b": ChatGLM3Tokenizer,
    "glm-4-9b-chat": RanksTokenizer,
}
ROUNDS = ("chatglm-6b", "chatglm2-6b")
IGNORED = -100


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, shared: Path) -> Path:
    return shared / "tokenizers" / request.param


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def golden(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    return fields


def _messages(case: dict[str, Any]) -> list[dict[str, Any]]:
    """A dialogue of the file as messages, a training answer included."""
    if "messages" in case:
        return list(case["messages"])
    turns = [*case["history"], [case["query"]]]
    roles = ("user", "assistant")
    spoken = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(roles, turn)  # noqa: B905
    ]
    answer = [{"role": "assistant", "content": case["answer"]}] if "answer" in case else []
    return spoken + answer


def test_the_directory_decides_the_class(folder: Path, tokenizer: Tokenizer) -> None:
    assert type(tokenizer) is KINDS[folder.name]


def test_special_ids_and_size(tokenizer: Tokenizer, golden: dict[str, Any]) -> None:
    special = golden["special"]
    if isinstance(tokenizer, ChatGLMTokenizer):
        assert tokenizer.prefix == (special["gmask"], special["bos"])
        assert (tokenizer.eos_id, tokenizer.pad_id) == (special["eos"], special["pad"])
        assert tokenizer.vocab_size == golden["vocab_size"]
    elif isinstance(tokenizer, RanksTokenizer):
        assert tokenizer.special == special
        assert tokenizer.num_ranks == golden["n_mergeable_ranks"]
        assert tokenizer.pad_id == special["<|endoftext|>"]
    else:
        assert isinstance(tokenizer, ChatGLM2Tokenizer | ChatGLM3Tokenizer)
        assert {k: v for k, v in special.items() if k not in ("bos", "eos", "pad")} == (
            tokenizer.special
        )
        assert (tokenizer.eos_id, tokenizer.pad_id) == (special["eos"], special["pad"])
        assert tokenizer.vocab_size == golden["vocab_size"]


def test_ids_and_text_of_all_strings(tokenizer: Tokenizer, golden: dict[str, Any]) -> None:
    original = getattr(tokenizer, "encode_original", tokenizer.encode)
    assert len(golden["strings"]) == 45
    for case in golden["strings"]:
        assert original(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"], skip_special=False) == case["decoded"], case["text"]
        if isinstance(tokenizer, ChatGLMTokenizer):
            assert [*case["ids"], *tokenizer.prefix] == case["ids_with_special"]
        else:
            assert [*tokenizer.prefix, *case["ids"]] == case["ids_with_special"]
    for name in (
        "sp_strings",
        "tiktoken_strings",
    ):  # the inner tokenizer, which knows no special tokens
        for case in golden.get(name, []):
            assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
            assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_chat_prompts(tokenizer: Tokenizer, golden: dict[str, Any]) -> None:
    assert golden["chat"]
    for case in golden["chat"]:
        expected = case.get("input_ids_by_message") or case["input_ids"]
        assert tokenizer.chat_prompt(_messages(case)) == expected, case
        if isinstance(tokenizer, RanksTokenizer):  # what apply_chat_template makes of its text
            assert tokenizer.encode_original(case["text"]) == case["input_ids"]
        elif "decoded" in case:
            assert tokenizer.decode(expected, skip_special=False) == case["decoded"]


def test_training_examples(tokenizer: Tokenizer, golden: dict[str, Any]) -> None:
    assert golden["sft"]
    for case in golden["sft"]:
        ids, target = tokenizer.chat_example(_messages(case))
        assert ids == case["input_ids"], case
        labels = [token if counts else IGNORED for token, counts in zip(ids, target, strict=True)]
        assert labels == case["labels"], case


def test_padded_batches(tokenizer: Tokenizer, golden: dict[str, Any]) -> None:
    batch = golden["padded_batch"]
    if "texts" in batch:
        rows = [[*tokenizer.prefix, *tokenizer.encode(text)] for text in batch["texts"]]
    else:
        rows = [tokenizer.chat_prompt(_messages(case)) for case in golden["chat"]]
    ids, valid = pad_left(rows, len(batch["input_ids"][0]), tokenizer.pad_id)
    np.testing.assert_array_equal(ids, batch["input_ids"])
    if "attention_mask" in batch:
        np.testing.assert_array_equal(valid, np.array(batch["attention_mask"]).astype(bool))
        positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
        np.testing.assert_array_equal(positions, batch["position_ids"])


def test_spelt_special_tokens_and_text_pieces_of_chatglm_6b(shared: Path) -> None:
    folder = shared / "tokenizers" / "chatglm-6b"
    golden = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, ChatGLMTokenizer)
    pieces = golden["special_by_piece"]
    assert tokenizer.encode("a\tb")[1] == pieces["<|tab|>"]
    assert tokenizer.encode("a\nb")[1] == pieces["<n>"]
    assert tokenizer.encode("a" + " " * 80 + "b")[1] == pieces["<|blank_80|>"]
    batch = golden["mask_in_text"]
    rows = [[*tokenizer.encode_original(text), *tokenizer.prefix] for text in batch["texts"]]
    ids, _ = pad_left(rows, len(batch["input_ids"][0]), tokenizer.pad_id)
    assert ids.tolist() == batch["input_ids"]
    spelt = [*tokenizer.encode("a"), pieces["[MASK]"], *tokenizer.encode("b")]
    assert tokenizer.encode_original("a  [MASK]\n b") == spelt
    for text in batch["texts"]:  # a message's [MASK] is text
        asked = tokenizer.chat_prompt([{"role": "user", "content": text}])
        assert asked.count(pieces["[MASK]"]) == 0


def test_saving_gives_the_repository_s_files_byte_for_byte(
    tokenizer: Tokenizer, folder: Path, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert "tokenizer_config.json" in names and len(names) == 2
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert type(load_tokenizer(tmp_path)) is type(tokenizer)
