"""Counts of files, by hand; and the commands around them."""

import gzip
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from rlhf import cli
from rlhf.data.mistakes import OnMistake, Tally
from rlhf.data.reading import read_records
from rlhf.data.stats import Stats, statistics

SHARED = Path(__file__).parents[3] / "shared"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")

LINES: list[dict[str, Any]] = [
    {"prompt": "ab", "responses": ["xxx", "yy", "z"], "annotator": "ann", "task": "math"},
    {"prompt": "ab", "responses": ["z", "yy"], "annotator": "bob"},
    {
        "prompt": [
            {"role": "system", "content": "sys"},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi"},
            {"role": "user", "content": "more"},
        ],
        "responses": ["1234", "12345678"],
        "ranks": [1, 1],
    },
    {"prompt": "alone", "response": "seven__"},
]


def count(path: Path) -> Stats:
    return statistics(read_records([path], Tally(OnMistake.skip_all())), len, "characters")


def test_a_file_counted_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)), encoding="utf-8")
    found = count(path)
    assert (found.comparisons, found.rankings, found.examples, found.prompts) == (5, 3, 1, 3)
    assert found.turns == pytest.approx((1 + 2 + 1) / 3)
    assert found.history == pytest.approx((0 + 3 + 5 + 2 + 0) / 3)
    assert found.prompt == pytest.approx((2 + 4 + 5) / 3)
    assert found.response == pytest.approx((3 + 2 + 1 + 4 + 8 + 7) / 6)
    assert found.responses_per_ranking == {2: 2, 3: 1} and found.ties == 1
    assert found.tasks == {"math": 3} and found.annotators == {"ann": 3, "bob": 1}
    # xxx > yy, xxx > z, yy > z prefer the longer one; z > yy the shorter; the tie says nothing
    first, second, *rest = found.length_buckets
    assert (first.longer_wins, first.shorter_wins, first.equal) == (0, 0, 0)
    assert (second.longer_wins, second.shorter_wins, second.range) == (3, 1, "1 to 5")
    assert all(bucket.win_rate is None for bucket in rest)
    assert found.agreement.judged_twice == 1


@needs_data
def test_public_data_counted_by_hand() -> None:
    """Against counts of the raw files that know nothing of our readers."""
    data = SHARED / "data"
    hh = count(data / "hh-rlhf" / "harmless-base-test.jsonl.gz")
    with gzip.open(
        data / "hh-rlhf" / "harmless-base-test.jsonl.gz", "rt", encoding="utf-8"
    ) as file:
        raw = [json.loads(line) for line in file]
    split = {name: [re.split(r"\n\nAssistant:", x[name]) for x in raw] for name in raw[0]}
    both = [
        (a[:-1], a[-1].strip(), b[-1].strip())
        for a, b in zip(split["chosen"], split["rejected"], strict=True)
        if a[:-1] == b[:-1] and a[-1].strip() and b[-1].strip()
    ]
    assert hh.comparisons == len(both) == 2303
    prompts = {tuple(prompt) for prompt, _, _ in both}
    assert hh.prompts == len(prompts) == 2301
    turns = [sum(part.count("\n\nHuman:") for part in prompt) for prompt in prompts]
    assert hh.turns == pytest.approx(sum(turns) / len(turns))
    longer = sum(len(better) > len(worse) for _, better, worse in both)
    assert sum(bucket.longer_wins for bucket in hh.length_buckets) == longer

    oasst = count(data / "oasst1-zh" / "oaast_rm_zh.json")
    rankings = json.loads((data / "oasst1-zh" / "oaast_rm_zh.json").read_text(encoding="utf-8"))
    rankings = [x for x in rankings if len(set(x["output"])) == len(x["output"])]
    pairs = [pair for x in rankings for pair in combinations(x["output"], 2)]
    assert oasst.comparisons == len(pairs) == 1790 and oasst.rankings == len(rankings) == 769
    assert sum(b.longer_wins for b in oasst.length_buckets) == sum(
        len(a) > len(b) for a, b in pairs
    )
    asked = {(x["instruction"], json.dumps(x["history"])) for x in rankings}
    assert oasst.prompts == len(asked) == 747
    words = sum(len(instruction) for instruction, _ in asked) / len(asked)
    assert oasst.prompt == pytest.approx(words)

    pandalm = count(data / "pandalm-testset" / "testset-v1.json")
    judged = json.loads((data / "pandalm-testset" / "testset-v1.json").read_text(encoding="utf-8"))
    judged = [
        x
        for x in judged
        if x["instruction"].strip()  # one asks nothing
        and all(isinstance(x[f"response{i}"], str) and x[f"response{i}"].strip() for i in (1, 2))
    ]
    verdicts = [x[f"annotator{i}"] for x in judged for i in (1, 2, 3)]
    assert pandalm.comparisons == len(verdicts) == 2814
    assert pandalm.ties == verdicts.count(0) == 316
    same = sum(x["annotator1"] == x["annotator2"] for x in judged) / len(judged)
    between = pandalm.agreement.between[0]
    assert between.same == pytest.approx(
        same, abs=0.02
    )  # a pair that stands twice counts once here


def test_the_commands_count_filter_and_convert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "data.jsonl", tmp_path / "out"
    more = [{"prompt": f"ask {i}", "chosen": "a longer one", "rejected": "short"} for i in range(9)]
    lines = [*map(json.dumps, LINES), '{"prompt": "x", "responses": ["y"]}', *map(json.dumps, more)]
    path.write_text("\n".join(lines), encoding="utf-8")

    assert cli.main(["data", "stats", str(path), "--json", str(tmp_path / "stats.json")]) == 0
    shown = capsys.readouterr()
    assert "221,866" in shown.out and "longer wins" in shown.out
    assert f"skipped {path}:5: a ranking of 1 response" in shown.err
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["comparisons"] == 14 and stats["paper"]["comparisons"] == 221866
    assert stats["skipped"] == {"single": 1}

    command = ["data", "filter", str(path), "--out", str(out), "--filters.votes", "each"]
    command += ["--filters.edges", "1", "100"]
    assert cli.main(command) == 0
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    report = json.loads((out / "report.json").read_text())
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [entry["where"] for entry in skipped] == [f"{path}:5"]
    assert report["pairs"] == len(pairs) and report["skipped"] == {"single": 1}
    dropped = {step["name"]: step["dropped"] for step in report["steps"] if step["dropped"]}
    # z > yy and yy > z are a cycle; of the rest, no shorter response is preferred
    assert dropped == {"tie": 1, "cycle": 2, "length balance": 11} and not pairs
    before = report["length_buckets"]["before"]
    assert [(b["low"], b["high"]) for b in before] == [(0, 1), (1, 100), (100, None)]
    assert (before[1]["longer_wins"], before[1]["longer_win_rate"]) == (11, 1.0)
    assert (out / "balance.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(command) == 1
    assert "exists already" in capsys.readouterr().err

    converted = tmp_path / "ours.jsonl"
    assert cli.main(["data", "convert", str(path), str(converted)]) == 0
    assert count(converted) == count(path)
    assert (
        cli.main(["data", "convert", str(path), str(converted), "--mistakes.single", "refuse"]) == 1
    )
    assert f"{path}:5" in capsys.readouterr().err
    assert count(converted) == count(path), "what was there is kept"
    assert not list(tmp_path.glob(".ours*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "absent.jsonl"], "absent.jsonl: cannot be read"),
        (["stats", "absent.jsonl", "--form", "hhh"], "form 'hhh' is not known"),
        (["stats", "absent.jsonl", "--tokenizer", "nowhere"], "/nowhere: expected"),
    ],
)
def test_wrong_options_are_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
