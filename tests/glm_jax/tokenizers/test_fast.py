"""A tokenizer.json gives GLM-4's ids, whatever wrote it."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from glm_jax.tokenizers import FastTokenizer, RanksTokenizer, load_tokenizer
from glm_jax.tokenizers.glm4 import PATTERN, _byte_alphabet


@pytest.fixture(scope="module")
def source(shared: Path) -> Path:
    return shared / "tokenizers" / "glm-4-9b-chat"


@pytest.fixture(scope="module")
def golden(source: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((source / "golden.json").read_text(encoding="utf-8"))
    return fields


@pytest.fixture(scope="module")
def ranks(source: Path) -> RanksTokenizer:
    return RanksTokenizer.load(source)


@pytest.fixture(scope="module")
def folder(source: Path, ranks: RanksTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a `-hf` repository holds the tokenizer."""
    folder = tmp_path_factory.mktemp("fast")
    (folder / "tokenizer.json").write_text(_fast_json(ranks), encoding="utf-8")
    config = (source / "tokenizer_config.json").read_bytes()
    (folder / "tokenizer_config.json").write_bytes(config)
    return folder


def test_a_tokenizer_json_gives_the_same_ids(
    folder: Path, ranks: RanksTokenizer, golden: dict[str, Any], tmp_path: Path
) -> None:
    fast = load_tokenizer(folder)
    assert isinstance(fast, FastTokenizer)
    assert fast.special == ranks.special and fast.num_ranks == ranks.num_ranks
    assert (fast.vocab_size, fast.prefix) == (ranks.vocab_size, ranks.prefix)
    assert (fast.stop_ids, fast.pad_id, fast.eos_id) == (ranks.stop_ids, ranks.pad_id, ranks.eos_id)
    for case in golden["tiktoken_strings"]:
        assert fast.encode(case["text"]) == case["ids"]
        assert fast.decode(case["ids"]) == case["decoded"]
    for case in golden["strings"]:
        assert fast.encode_original(case["text"]) == case["ids"]
        assert fast.decode(case["ids"], skip_special=False) == case["decoded"]
    for case in golden["chat"]:
        expected = case["input_ids_by_message"] or case["input_ids"]
        assert fast.chat_prompt(case["messages"]) == expected
    for case in golden["sft"]:
        assert fast.chat_example(case["messages"]) == ranks.chat_example(case["messages"])
    fast.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_what_a_tokenizer_json_asks_for_beyond_ids_is_not_done(
    folder: Path, ranks: RanksTokenizer, tmp_path: Path
) -> None:
    fields = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    fields["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    fields["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": ranks.pad_id,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    text = "one two three four five six"
    assert load_tokenizer(tmp_path).encode(text) == ranks.encode(text)


def test_ids_are_those_of_transformers(folder: Path, golden: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what another package warns of while it is imported
        transformers = pytest.importorskip("transformers")
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ours = load_tokenizer(folder)
    assert isinstance(ours, FastTokenizer)
    for case in golden["strings"]:
        ids = theirs.encode(case["text"], add_special_tokens=False)
        assert ours.encode_original(case["text"]) == ids
    for case in golden["tiktoken_strings"]:
        ids = theirs.encode(case["text"], add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(case["text"]) == ids


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
