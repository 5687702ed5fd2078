"""A user's own files: every mistake is named, everything right is kept, no prompt is on two sides."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.data.files.files import FilesData
from rlhf.data.filter_config import FilterConfig
from rlhf.data.mistakes import OnMistake
from rlhf.data.prepare import prepare
from rlhf.data.records import prompt_key, prompt_text
from sharding.errors import UserError

GOOD = {
    "sft": {"prompt": "灯光怎么样", "response": "很亮"},
    "preferences": {"prompt": "灯光怎么样", "chosen": "很亮", "rejected": "太暗"},
    "prompts": {"prompt": "灯光怎么样"},
}


def write(folder: Path, **lines: list[str]) -> FilesData:
    """Twenty good lines a file, about as many prompts, and `lines` after them."""
    for name, fields in GOOD.items():
        good = [fields | {"prompt": f"第{i}间房的灯光怎么样"} for i in range(20)]
        text = [json.dumps(line, ensure_ascii=False) for line in good] + lines.get(name, [])
        (folder / f"{name}.jsonl").write_text("\n".join(text) + "\n\n", encoding="utf-8")
    sft, preferences, prompts = (folder / f"{name}.jsonl" for name in GOOD)
    return FilesData(sft, preferences, prompts, heldout_fraction=0.3)


def test_records_come_in_order_and_all_tables_agree_about_the_side(tmp_path: Path) -> None:
    talk = [
        {"role": "system", "content": "简短回答"},
        {"role": "user", "content": "毛巾呢"},
        {"role": "assistant", "content": "很旧"},
        {"role": "user", "content": "窗帘呢"},
    ]
    lines = {
        name: [json.dumps(fields | {"prompt": talk, "id": 1})] for name, fields in GOOD.items()
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
        ("sft", "[" * 10**6, "malformed JSON"),
        ("sft", {"response": "很亮"}, "field 'prompt' is missing"),
        ("sft", {"prompt": "灯光"}, "a prompt where a conversation is expected"),
        ("sft", {"prompt": "灯光", "chosen": "亮", "rejected": "暗"}, "a comparison where a conv"),
        ("sft", {"prompt": " ", "response": "很亮"}, "empty prompt"),
        ("sft", {"prompt": [], "response": "很亮"}, "empty prompt"),
        ("sft", {"prompt": "灯光", "response": "\n"}, "empty response"),
        ("sft", {"prompt": "灯光", "response": 3}, "'response' is not a text but a number"),
        ("sft", {"prompt": "灯光", "response": "亮", "extra": 1}, "unknown field 'extra'"),
        ("preferences", {"prompt": "灯光", "chosen": "很亮"}, "field 'rejected' is missing"),
        ("preferences", {"prompt": "灯", "chosen": "亮", "rejected": "亮"}, "are the same text"),
        ("preferences", {"prompt": "灯", "responses": ["亮"]}, "a ranking of 1 response"),
        ("preferences", {"prompt": "灯", "responses": []}, "a ranking of 0 responses"),
        ("preferences", {"prompt": "灯", "responses": ["亮", "亮"]}, "are the same text"),
        ("preferences", {"prompt": "灯", "responses": ["亮", ""]}, "empty response"),
        (
            "preferences",
            {"prompt": "灯", "responses": ["亮", "暗"], "ranks": [1]},
            "1 ranks of 2 responses",
        ),
        (
            "preferences",
            {"prompt": "灯", "responses": ["亮", "暗"], "ranks": [1, 1.5]},
            "'ranks' are not whole numbers",
        ),
        (
            "preferences",
            {"prompt": "灯", "responses": ["亮", "暗"], "labels": {"safety": [1]}},
            "'labels' need a number .* a response: 'safety'",
        ),
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
def test_a_bad_line_is_named_or_skipped(
    tmp_path: Path, table: str, line: Any, message: str
) -> None:
    text = line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)
    data = write(tmp_path, **{table: [text]})
    with pytest.raises(UserError, match=rf"{table}\.jsonl:21: .*{message}.*; ") as caught:
        data.splits()
    assert "\n" not in str(caught.value)
    skipping = replace(data, mistakes=replace(OnMistake.skip_all(), unknown_field="skip")).splits()
    assert skipping == write(tmp_path).splits()


def test_what_is_left_out_is_told_whenever_the_data_is_opened(tmp_path: Path) -> None:
    bad = '{"prompt": "灯", "responses": ["亮"]}'
    data = write(tmp_path, preferences=[bad, bad, *[json.dumps(GOOD["preferences"])] * 2])
    data = replace(data, mistakes=OnMistake.skip_all())
    for _ in range(2):
        told: list[str] = []
        prepare(data, tmp_path / "prepared", tell=told.append)
        assert (
            f"data: 2 entries skipped: single, the first at {tmp_path}/preferences.jsonl:21" in told
        )
        line = next(line for line in told if "duplicate judgement" in line)
        assert re.search(r"data: \d+ of \d+ (training|held-out) pairs used; left out: ", line)
        assert "1 by filter 'duplicate judgement'" in line
        (path,) = (tmp_path / "prepared").glob("*/accounts.json")
        path.unlink()


def test_each_kind_of_mistake_names_its_own_first_entry(tmp_path: Path) -> None:
    lines = ['{"prompt": "灯", "responses": ["亮"]}', '{"prompt": " ", "responses": ["亮", "暗"]}']
    lines.append(json.dumps(GOOD["preferences"] | {"extra": 1}))
    data = replace(write(tmp_path, preferences=lines), mistakes=OnMistake.skip_all())
    told: list[str] = []
    data.splits(told.append)
    place = f"{tmp_path}/preferences.jsonl"
    assert f"1 entries skipped: single, the first at {place}:21" in told
    assert f"1 entries skipped: empty, the first at {place}:22" in told
    assert "field 'extra' ignored in 1 entries" in told


def test_rankings_become_pairs_that_weigh_as_one(tmp_path: Path) -> None:
    """Four answers with a tie in the middle: five pairs, together as heavy as one pair of another prompt."""
    ranking = {"prompt": "灯光", "responses": ["亮", "还行", "一般", "暗"], "ranks": [1, 2, 2, 3]}
    data = write(tmp_path, preferences=[json.dumps(ranking | {"annotator": "a", "task": "hotel"})])
    data = replace(data, filters=FilterConfig(balance=False))
    found = [
        r for side in data.splits().preferences for r in side if r.prompt[0]["content"] == "灯光"
    ]
    assert {(r.chosen, r.rejected) for r in found} == {
        ("亮", "还行"),
        ("亮", "一般"),
        ("亮", "暗"),
        ("还行", "暗"),
        ("一般", "暗"),
    }
    assert {(r.weight, r.annotator, r.task) for r in found} == {(0.2, "a", "hotel")}


def test_training_pairs_are_balanced_and_heldout_ones_are_not(tmp_path: Path) -> None:
    longer = {"chosen": "很亮很亮很亮", "rejected": "暗"}
    lines = [json.dumps({"prompt": f"灯{i}"} | longer, ensure_ascii=False) for i in range(40)]
    splits = write(tmp_path, preferences=lines).splits()
    assert not [r for r in splits.preferences.train if r.chosen == longer["chosen"]]
    assert len([r for r in splits.preferences.heldout if r.chosen == longer["chosen"]]) >= 5


def test_prompts_come_from_the_other_files_where_none_are_given(tmp_path: Path) -> None:
    data = write(tmp_path)
    everything = [r.prompt for side in replace(data, prompts=()).splits().prompts for r in side]
    assert sorted(map(str, everything)) == sorted(
        str(r.prompt) for side in data.splits().prompts for r in side
    )


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.text("aA b", min_size=2, max_size=4).filter(str.strip), min_size=12), st.integers()
)
def test_a_prompt_is_never_on_both_sides(tmp_path: Path, texts: list[str], seed: int) -> None:
    """Nor one that differs from it in case and blanks only."""
    file = tmp_path / "sft.jsonl"
    prompts = [*texts, *(f"question {i}" for i in range(30))]
    lines = (json.dumps({"prompt": text, "response": "x"}) for text in prompts)
    file.write_text("\n".join(lines), encoding="utf-8")
    pairs = tmp_path / "pairs.jsonl"
    lines = (json.dumps({"prompt": text, "responses": ["x", "y"]}) for text in prompts)
    pairs.write_text("\n".join(lines), encoding="utf-8")
    data = FilesData(file, pairs, heldout_fraction=0.4, seed=seed % 1000)
    splits = data.splits()
    sides = [
        {
            " ".join(prompt_text(r.prompt).casefold().split())
            for split in splits
            for r in split[side]
        }
        for side in (0, 1)
    ]
    assert not sides[0] & sides[1]


def test_bad_files_and_empty_splits_are_named(tmp_path: Path) -> None:
    data = write(tmp_path)
    sft = tmp_path / "sft.jsonl"
    for name in GOOD:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(GOOD[name]), encoding="utf-8")
    with pytest.raises(UserError, match=r"no (train|heldout) example is left in sft; give more"):
        prepare(data, tmp_path / "prepared")
    with pytest.raises(UserError, match=r"no train example is left in preferences; give more"):
        prepare(FilesData(sft), tmp_path / "prepared", ["preferences"])
    sft.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match=r"sft\.jsonl:1: not UTF-8 \(byte 12 of the line\)"):
        data.splits()
    sft.write_bytes(b'{"what": 1}')
    with pytest.raises(UserError, match=r"sft\.jsonl:1: no form that is known has the fields what"):
        data.splits()
    sft.unlink()
    with pytest.raises(UserError, match=r"sft\.jsonl: cannot be read"):
        data.splits()
