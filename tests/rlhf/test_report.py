"""The closing table, and the page of a run."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from rlhf.plots import read_curves, running_mean
from rlhf.report import samples_table, summary_table, write_report
from rlhf.runlog import METRICS_FILE, RunLog
from sharding.disk.directory import write_json

ANSWERS = {"judged": 0.41, "length": 28.06, "distinct_2": 0.7}
SUMMARY: dict[str, Any] = {
    "seed": 5,
    "layout": "dp_tp",
    "devices": 4,
    "mesh": {"pipe": 1, "data": 2, "fsdp": 1, "tensor": 2},
    "parameters": 1_234_567,
    "reward_model": {
        "accuracy": 0.8425,
        "accuracy_low": 0.826,
        "accuracy_high": 0.858,
        "grade": "good",
        "length_only_accuracy": 0.55,
        "num_pairs": 2000,
    },
    "sft": {**ANSWERS, "heldout_nll": 2.712, "greedy": ANSWERS},
    "ppo": {
        **ANSWERS,
        **{"win_rate": 0.583, "tie_rate": 0.2, "lose_rate": 0.217, "heldout_nll": 2.75},
        **{"kl": 0.0432, "reward_start": 0.01, "reward_start_se": 0.05, "reward_end": 2.41},
        "greedy": {**ANSWERS, "win_rate": 0.111},
    },
    "wall_s": {"sft": 90.0, "ppo": 150.0},
    "tokens_per_s": {"sft": 12345.6},
}
SAMPLES = [
    {
        "prompt": f"第{number}个",
        "sft": "还行[bold]<b>",
        "ppo": "很好",
        "sft_judged": 0.25,
        "ppo_judged": 0.99,
    }
    for number in range(5)
]


class Page(HTMLParser):
    """Texts, pictures and whatever a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.pictures: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.feed(text)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        source = values.get("src") or values.get("href")
        if source and source.startswith("data:image/png;base64,"):
            self.pictures[str(values["alt"])] = base64.b64decode(source.partition(",")[2])
        elif source or tag in ("script", "link"):
            self.fetched.append(source or tag)


def printed(table: Table, width: int = 140) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    with RunLog(tmp_path, Console(quiet=True)) as log:
        with log.stage("sft") as stage:
            for step in range(1, 41):
                stage.step(step, {"loss": 5 / step, "lr": 0.1})
        with log.stage("ppo") as stage:
            for step in range(1, 4):
                metrics = {"loss": 0.1, "reward": 0.2 * step, "kl": 0.01, "kl_exact": 0.02}
                stage.step(step, {**metrics, "length": 20.0})
    write_json(tmp_path / "summary.json", SUMMARY)
    write_json(tmp_path / "samples.json", SAMPLES)
    write_json(tmp_path / "recipe.json", {"seed": 5, "note": "<&>"})
    return tmp_path


def test_the_page_holds_everything_and_fetches_nothing(run_directory: Path) -> None:
    path = write_report(run_directory)
    assert path == run_directory / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.fetched
    assert not re.search(r"url\(|@import", text)
    assert set(page.pictures) == {
        "PPO: reward",
        "PPO: KL from SFT",
        "PPO: answer length",
        "SFT: loss",
    }
    assert all(png.startswith(b"\x89PNG") for png in page.pictures.values())
    for expected in (
        "58.3%",
        "2.712",
        "0.0432",
        "12,346",
        "第4个",
        "还行[bold]<b>",
        "judged 0.99",
    ):
        assert any(expected in part for part in page.texts), expected
    assert any('"note": "<&>"' in part for part in page.texts)


def test_a_run_that_was_cut_short_has_a_page_too(tmp_path: Path) -> None:
    assert not Page(write_report(tmp_path).read_text(encoding="utf-8")).pictures
    line = '{"stage": "sft", "step": %d, "wall_s": 0.1, "loss": %s}\n'
    (tmp_path / METRICS_FILE).write_text(line % (1, "3.5") + line % (2, "null") + '{"stage": "s')
    assert set(Page(write_report(tmp_path).read_text(encoding="utf-8")).pictures) == {"SFT: loss"}
    steps, losses = read_curves(tmp_path / METRICS_FILE)["sft"]["loss"]
    np.testing.assert_array_equal(steps, [1, 2])
    np.testing.assert_array_equal(losses, [3.5, np.nan])


def test_the_table_says_what_the_summary_says() -> None:
    text = printed(summary_table(SUMMARY))
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    # no column for DPO, which did not run
    assert ["Measure", "SFT", "PPO", "What it means"] in rows
    cells = {row[0]: row[1:] for row in reversed(rows)}  # sampled answers stand above greedy ones
    assert cells["Better than SFT"][:2] == ["–", "58.3%"]
    assert cells["Answer length"][:2] == ["28.1", "28.1"]
    assert cells["Held-out NLL"][:2] == ["2.712", "2.750"]
    greedy = text[text.index("Greedy") :]
    assert "11.1%" in greedy
    assert "KL" not in greedy
    facts = " ".join(text.split())
    assert (
        "84.2% (82.6% to 85.8%) of 2,000 held-out pairs (by length alone: 55.0%); grade: good"
        in facts
    )
    assert "dp_tp on 4 devices (data 2 x tensor 2)" in facts
    assert "0.010 ± 0.050 before the first update, 2.410 at the end" in facts
    assert "4.0 minutes" in facts


def test_tables_fit_a_narrow_terminal() -> None:
    for table in (summary_table(SUMMARY), samples_table(SAMPLES)):
        assert all(len(line) <= 80 for line in printed(table, width=80).splitlines())


def test_samples_stand_below_their_prompt() -> None:
    text = printed(samples_table(SAMPLES, count=2))
    assert [part in text for part in ("第0个", "第1个", "第2个")] == [True, True, False]
    assert (
        text.index("第0个") < text.index("还行[bold]<b>") < text.index("很好") < text.index("第1个")
    )
    assert "0.25" in text


def test_running_mean_against_a_plain_loop() -> None:
    values = np.array([float(x) for x in range(60)])
    values[30] = np.nan
    for end, mean in enumerate(running_mean(values), start=1):
        window = [x for x in values[max(0, end - 3) : end] if x == x]
        assert mean == pytest.approx(sum(window) / len(window))
    assert np.isnan(running_mean(np.array([np.nan, 1.0]))[0])
