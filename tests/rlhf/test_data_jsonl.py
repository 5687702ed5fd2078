"""A user's own JSON lines: every mistake is named, everything right is kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.jsonl.jsonl import JsonlData
from rlhf.data.records import prompt_key, prompt_text
from sharding.errors import UserError

GOOD = {
    "sft": {"prompt": "灯光怎么样", "response": "很亮"},
    "preferences": {"prompt": "灯光怎么样", "chosen": "很亮", "rejected": "太暗"},
    "prompts": {"prompt": "灯光怎么样"},
}


def write(folder: Path, **lines: list[str]) -> JsonlData:
    """Twenty good lines a file, about as many prompts, and `lines` after them."""
    for name, fields in GOOD.items():
        good = [fields | {"prompt": f"第{i}间房的灯光怎么样"} for i in range(20)]
        text = [json.dumps(line, ensure_ascii=False) for line in good] + lines.get(name, [])
        (folder / f"{name}.jsonl").write_text("\n".join(text) + "\n\n", encoding="utf-8")
    sft, preferences, prompts = (folder / f"{name}.jsonl" for name in GOOD)
    return JsonlData(sft, preferences, prompts, heldout_fraction=0.3)


def test_records_come_in_order_and_all_tables_agree_about_the_side(tmp_path: Path) -> None:
    talk = [
        {"role": "system", "content": "简短回答"},
        {"role": "user", "content": "毛巾呢"},
        {"role": "assistant", "content": "很旧"},
        {"role": "user", "content": "窗帘呢"},
    ]
    lines = {
        name: [json.dumps(fields | {"prompt": talk, "extra": 1})] for name, fields in GOOD.items()
    }
    lines["prompts"] *= 2
    splits = write(tmp_path, **lines).splits()
    for split in splits:
        assert len(split.train) + len(split.heldout) == 21
        numbers = [
            [int(prompt_text(r.prompt)[1:].split("间")[0]) for r in side if len(r.prompt) == 1]
            for side in split
        ]
        assert numbers == [sorted(side) for side in numbers]
        train, heldout = ({prompt_text(r.prompt) for r in side} for side in split)
        assert not train & heldout
        assert (train, heldout) == tuple({prompt_text(r.prompt) for r in s} for s in splits.sft)
    records = [record for side in splits.sft for record in side]
    assert tuple(talk) in [record.prompt for record in records]
    assert {record.response for record in records} == {"很亮"}


def test_the_order_of_a_messages_fields_makes_no_other_prompt() -> None:
    turn = {"role": "user", "content": "灯光"}
    assert prompt_key((turn,)) == prompt_key((dict(reversed(turn.items())),))
    assert prompt_key((turn,)) != prompt_key((turn, turn))


def test_a_new_line_leaves_the_others_on_their_side(tmp_path: Path) -> None:
    before = write(tmp_path).splits()
    after = write(tmp_path, sft=['{"prompt": "毛巾", "response": "新"}']).splits()
    assert set(map(str, before.sft.train)) <= set(map(str, after.sft.train))
    assert set(map(str, before.sft.heldout)) <= set(map(str, after.sft.heldout))


@pytest.mark.parametrize(
    ("table", "line", "message"),
    [
        ("sft", "{", "malformed JSON"),
        ("sft", "[1]", "not a JSON object"),
        ("sft", {"response": "很亮"}, "field 'prompt' is missing"),
        ("sft", {"prompt": "灯光"}, "field 'response' is missing"),
        ("sft", {"prompt": " ", "response": "很亮"}, "empty prompt"),
        ("sft", {"prompt": [], "response": "很亮"}, "empty prompt"),
        ("sft", {"prompt": "灯光", "response": "\n"}, "empty response"),
        ("sft", {"prompt": "灯光", "response": 3}, "empty response"),
        ("preferences", {"prompt": "灯光", "chosen": "很亮"}, "field 'rejected' is missing"),
        ("preferences", {"prompt": "灯", "chosen": "亮", "rejected": "亮"}, "are the same text"),
        ("prompts", {"prompt": [{"role": "bot", "content": "灯光"}]}, "has no role"),
        ("prompts", {"prompt": [{"role": "user", "content": ""}]}, "empty prompt"),
        ("prompts", {"prompt": [{"role": "user"}]}, "empty prompt"),
        ("prompts", {"prompt": [{"role": "assistant", "content": "亮"}]}, "ends with no question"),
        (
            "prompts",
            {"prompt": [{"role": "user", "content": "灯光", "metadata": 1}]},
            "'metadata' of a message is not a text",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, table: str, line: Any, message: str) -> None:
    text = line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)
    data = write(tmp_path, **{table: [text]})
    with pytest.raises(UserError, match=rf"{table}\.jsonl:21: .*{message}.*; ") as caught:
        data.splits()
    assert "\n" not in str(caught.value)


def test_bad_files_and_empty_splits_are_named(tmp_path: Path) -> None:
    data = write(tmp_path)
    for name in GOOD:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(GOOD[name]), encoding="utf-8")
    with pytest.raises(UserError, match=r"no (train|heldout) example is left in sft; give more"):
        data.splits()
    data.sft.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match=r"sft\.jsonl: not UTF-8 \(byte 12\)"):
        data.splits()
    data.sft.unlink()
    with pytest.raises(UserError, match=r"sft\.jsonl: cannot be read"):
        data.splits()
