"""Files that our commands write are read back field by field: files, records, storage, report card."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm_jax.tokenizers import Tokenizer
from rlhf import cli
from rlhf.card.card import grade
from rlhf.data.files.files import FilesData
from rlhf.data.filter_config import FilterConfig
from rlhf.data.forms.ours import line_of
from rlhf.data.mistakes import OnMistake, Tally
from rlhf.data.pair_rows import token_pairs
from rlhf.data.prepare import prepare
from rlhf.data.reading import read_records
from rlhf.data.records import Comparison, Example, Preference, Prompt, user_turn
from rlhf.scoring import scored_pairs

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(lambda t: t.strip())
NAME = st.sampled_from(["", "ann", "bob 北"])
NUMBER = st.one_of(st.integers(-(10**6), 10**6), st.floats(allow_nan=False, allow_infinity=False))
POSITIVE = st.floats(min_value=1e-300, max_value=1e300)
TOOLS = st.lists(st.fixed_dictionaries({"name": TEXT, "parameters": st.just({"a": [1, None]})}))
OPENING = st.fixed_dictionaries(
    {"role": st.just("system"), "content": TEXT}, optional={"tools": TOOLS, "metadata": TEXT}
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "observation"]), "content": TEXT},
    optional={"metadata": TEXT},
)
MESSAGES = st.tuples(st.lists(OPENING, max_size=1), st.lists(TURN, max_size=3), TEXT).map(
    lambda talk: [*talk[0], *talk[1], {"role": "user", "content": talk[2]}]
)
PROMPT = st.one_of(TEXT, MESSAGES)
OF_TWO = {
    "weight": POSITIVE,
    "annotator": NAME,
    "task": NAME,
    "labels": st.dictionaries(
        TEXT, st.lists(st.one_of(st.none(), NUMBER), min_size=2, max_size=2), max_size=2
    ),
}
PAIRS = st.fixed_dictionaries(
    {"prompt": PROMPT, "chosen": TEXT.map("+{}".format), "rejected": TEXT.map("-{}".format)},
    optional={**OF_TWO, "chosen_first": st.booleans(), "strength": NUMBER},
)
RANKINGS = st.fixed_dictionaries(
    {"prompt": PROMPT, "responses": st.lists(TEXT, min_size=2, max_size=2, unique=True)},
    optional={**OF_TWO, "ranks": st.sampled_from([[1, 2], [2, 1], [1, 1]])},
)
LONGER = st.fixed_dictionaries(
    {"prompt": PROMPT, "responses": st.lists(TEXT, min_size=3, max_size=3, unique=True)},
    optional={
        "weight": POSITIVE,
        "ranks": st.sampled_from([[1, 2, 3], [3, 1, 1], [2, 1, 3], [1, 1, 1]]),
        "labels": st.dictionaries(TEXT, st.just([1.5, None, -2]), max_size=1),
    },
)
EXAMPLES = st.fixed_dictionaries({"prompt": PROMPT, "response": TEXT}, optional={"task": NAME})
PROMPTS = st.fixed_dictionaries({"prompt": PROMPT}, optional={"task": NAME})


def read(path: Path) -> list[Any]:
    return [record for _, record in read_records([path], Tally(OnMistake()))]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


quick = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(st.lists(st.one_of(PAIRS, RANKINGS, LONGER, EXAMPLES, PROMPTS), min_size=1, max_size=5))
def test_records_survive_their_lines(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    records = read(write(tmp_path / "given.jsonl", lines))
    assert len(records) == len(lines)
    again = read(write(tmp_path / "ours.jsonl", [line_of(record) for record in records]))
    assert again == records


@quick
@given(PAIRS)
def test_every_field_of_a_pair_is_in_its_record(tmp_path: Path, line: dict[str, Any]) -> None:
    """Fields are listed by hand, so that one which writer and reader both forget is missed."""
    (record,) = read(write(tmp_path / "given.jsonl", [line]))
    assert isinstance(record, Comparison)
    best, worst = (record.ranks.index(rank) for rank in (1, 2))
    assert (record.responses[best], record.responses[worst]) == (line["chosen"], line["rejected"])
    assert (best < worst if record.listed else None) == line.get("chosen_first")
    assert record.weight == line.get("weight") and record.strength == line.get("strength")
    assert record.annotator == line.get("annotator", "") and record.task == line.get("task", "")
    labels = {name: [marks[best], marks[worst]] for name, marks in record.labels.items()}
    assert labels == line.get("labels", {})
    prompt = line["prompt"]
    assert list(record.prompt) == (list(user_turn(prompt)) if isinstance(prompt, str) else prompt)


LINES: list[dict[str, Any]] = [
    {
        "prompt": [
            {"role": "system", "content": "be brief", "tools": [{"name": "f", "deep": [1, {}]}]},
            {"role": "user", "content": f"question {n}"},
            {"role": "assistant", "content": "{}", "metadata": "f"},
            {"role": "observation", "content": "42"},
        ],
        "chosen": "yes" * (n % 3 + 1),
        "rejected": "no" * (n % 4 + 1),
        "annotator": "ann",
        "task": "ask",
        "labels": {"helpful": [n, None], "safe": [1.5, -n]},
        "strength": n / 7,
        **({"weight": 0.1 + n} if n % 2 else {}),
        **({"chosen_first": n % 3 == 0} if n % 5 else {}),
    }
    for n in range(60)
]


def fields_of(pair: Preference) -> dict[str, Any]:
    """A pair's record as a line of ours would say it, spelt out here."""
    return {
        "prompt": list(pair.prompt),
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "annotator": pair.annotator,
        "task": pair.task,
        "labels": {name: list(marks) for name, marks in pair.labels.items()},
        "strength": pair.strength,
        "weight": pair.weight,
        **({} if pair.chosen_first is None else {"chosen_first": pair.chosen_first}),
    }


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("weigh", ["prompt", "pair"])
def test_what_filter_writes_reaches_training(tmp_path: Path, balance: bool, weigh: Any) -> None:
    """Each line of its file is a record of a recipe's data with the same fields, in memory and stored."""
    given = write(tmp_path / "given.jsonl", LINES)
    options = ["--filters.weigh", weigh, *([] if balance else ["--filters.no-balance"])]
    command = ["data", "filter", str(given), "--out", str(tmp_path / "out"), *options]
    assert cli.main(command) == 0
    path = tmp_path / "out" / "pairs.jsonl"
    written = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert written and (balance or len(written) == 60)
    for line in written:
        (origin,) = (x for x in LINES if x["prompt"] == line["prompt"])
        assert {**origin, "weight": line["weight"]} == line
        assert balance or line["weight"] == origin.get("weight", 1.0)
    data = FilesData(
        preferences=path, heldout_fraction=0.3, filters=FilterConfig(balance=False, weigh=weigh)
    )
    prepared = prepare(data, tmp_path / "data", ["preferences"]).preferences
    for split in (data.splits().preferences, prepared):
        records = [record for side in split for record in side]
        key = lambda line: json.dumps(line["prompt"])  # noqa: E731
        assert sorted(map(fields_of, records), key=key) == sorted(written, key=key)
        assert {record.where for record in records} == {
            f"{path}:{n + 1}" for n in range(len(written))
        }


def test_convert_keeps_every_kind_of_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        *LINES,
        {"prompt": "say", "response": "it", "task": "speak"},
        {"prompt": "say what", "task": "ask"},
        {"prompt": "rank", "responses": ["a", "b", "c"], "ranks": [2, 1, 2], "weight": 3},
        {"prompt": "rank", "responses": ["a", "b", "c"], "labels": {"x": [1, 2, None]}},
        {"prompt": "tie", "responses": ["a", "b"], "ranks": [1, 1], "annotator": "bob"},
    ]
    given, out = write(tmp_path / "given.jsonl", lines), tmp_path / "ours.jsonl"
    assert cli.main(["data", "convert", str(given), str(out)]) == 0
    assert read(out) == read(given)
    again = tmp_path / "again.jsonl"
    assert cli.main(["data", "convert", str(out), str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()
    capsys.readouterr()


def test_examples_and_prompts_survive_storage(tmp_path: Path) -> None:
    tables = {
        "sft": [{"prompt": f"q{n}", "response": "a", "task": f"t{n % 3}"} for n in range(30)],
        "prompts": [{"prompt": f"q{n}", "task": f"t{n % 3}"} for n in range(30)],
    }
    paths = {name: write(tmp_path / name, lines) for name, lines in tables.items()}
    data = FilesData(**paths, heldout_fraction=0.3)  # type: ignore[arg-type]
    splits = prepare(data, tmp_path / "data", ["sft", "prompts"])
    for name, kind in (("sft", Example), ("prompts", Prompt)):
        records = [record for side in getattr(splits, name) for record in side]
        assert {type(record) for record in records} == {kind}
        expected = {(f"q{n}", f"t{n % 3}", f"{paths[name]}:{n + 1}") for n in range(30)}
        assert {(r.prompt[0]["content"], r.task, r.where) for r in records} == expected


@pytest.mark.parametrize("stated", [None, 0.25, 1.0])
def test_position_bias_comes_from_what_the_file_says(
    characters: Tokenizer, tmp_path: Path, stated: float | None
) -> None:
    """A share of the pairs whose better answer is said to be listed first; nothing said is nothing known."""
    lines = [
        {
            "prompt": f"q{n}",
            "chosen": "a" * (n % 7 + 1),
            "rejected": "b" * (n % 5 + 1),
            "weight": 1.0 + n % 2,
            **({} if stated is None else {"chosen_first": n % 4 < 4 * stated}),
        }
        for n in range(80)
    ]
    data = FilesData(preferences=write(tmp_path / "x.jsonl", lines), heldout_fraction=0.5)
    records = list(replace(data, filters=FilterConfig(balance=False)).splits().preferences.heldout)
    pairs = token_pairs(records, characters, 99)
    chosen = np.array([len(pair.chosen) for pair in pairs], np.float32)
    rejected = np.array([len(pair.rejected) for pair in pairs], np.float32)
    card = grade(scored_pairs(chosen, rejected, records, pairs))
    judges = card.position.judges
    if stated is None:
        assert (judges.value, judges.count) == (None, 0)
        return
    first = {line["prompt"]: line.get("chosen_first") for line in lines}
    said = [bool(first[str(r.prompt[0]["content"])]) for r in records]
    weights = [1.0 + int(str(r.prompt[0]["content"])[1:]) % 2 for r in records]
    expected = sum(w for w, yes in zip(weights, said, strict=True) if yes) / sum(weights)
    assert judges.count == len(records)
    assert judges.value == pytest.approx(expected, rel=1e-12)  # float64 sums of 40 numbers
