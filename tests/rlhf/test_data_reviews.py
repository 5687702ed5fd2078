"""Reviews -> records: what is kept, what is held out, and that nothing is altered."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.records import Splits, prompt_text
from rlhf.data.reviews.reviews import ReviewsData, by_opening, clean, make_pairs, make_records
from sharding.errors import UserError

# Ten openings, so that most appear in both files and some are held out.
REVIEW = st.builds(
    lambda opening, rest: opening + rest,
    st.sampled_from([a + b for a in "灯毛窗走电" for b in "光巾"]),
    st.text("很不好坏亮暗，。 a1", min_size=10, max_size=14),
)
FILES = st.tuples(st.lists(REVIEW, max_size=30), st.lists(REVIEW, max_size=30))
DATA = ReviewsData(heldout_fraction=0.4, max_heldout_reviews=6, pairs_per_review=2)


def records(data: ReviewsData, pos: list[str], neg: list[str]) -> Splits:
    """Like `ReviewsData.splits`, but from lists, whose order the code could see."""
    liked, disliked = (list(dict.fromkeys(map(clean, lines))) for lines in (pos, neg))
    splits: Splits = make_records(
        data,
        by_opening(data, [review for review in liked if review not in disliked]),
        by_opening(data, [review for review in disliked if review not in liked]),
    )
    return splits


@settings(max_examples=40, deadline=None)
@given(files=FILES, seed=st.integers(0, 3))
def test_no_prompt_stands_on_both_sides_and_all_tables_agree(
    files: tuple[list[str], list[str]], seed: int
) -> None:
    splits = records(replace(DATA, seed=seed), *files)
    train = {prompt_text(record.prompt) for split in splits for record in split.train}
    heldout = {prompt_text(record.prompt) for split in splits for record in split.heldout}
    assert not train & heldout
    listed = [prompt_text(record.prompt) for side in splits.prompts for record in side]
    assert len(listed) == len(set(listed)) and set(listed) == train | heldout


@settings(max_examples=40, deadline=None)
@given(files=FILES, random=st.randoms(use_true_random=False))
def test_the_order_of_the_lines_changes_nothing(
    files: tuple[list[str], list[str]], random: object
) -> None:
    pos, neg = files
    shuffled = (list(pos) * 2, list(neg))  # a repeated line changes nothing either
    for lines in shuffled:
        random.shuffle(lines)  # type: ignore[attr-defined]
    assert records(DATA, pos, neg) == records(DATA, *shuffled)


@settings(max_examples=40, deadline=None)
@given(files=FILES)
def test_every_review_is_kept_whole_on_its_own_side(files: tuple[list[str], list[str]]) -> None:
    pos, neg = ({clean(line) for line in lines} for lines in files)
    splits = records(DATA, *files)
    whole = [prompt_text(record.prompt) + record.response for side in splits.sft for record in side]
    assert sorted(whole) == sorted(review for review in pos ^ neg if len(review) >= DATA.min_chars)
    pairs = [record for side in splits.preferences for record in side]
    assert len({(prompt_text(pair.prompt), pair.chosen, pair.rejected) for pair in pairs}) == len(
        pairs
    )
    assert all(prompt_text(pair.prompt) + pair.chosen in pos - neg for pair in pairs)
    assert all(prompt_text(pair.prompt) + pair.rejected in neg - pos for pair in pairs)
    shared = {r[:2] for r in pos - neg if len(r) >= 10} & {r[:2] for r in neg - pos if len(r) >= 10}
    assert {prompt_text(pair.prompt) for pair in pairs} == shared


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 40))
def test_pairs_are_distinct_and_spread(
    chosen: int, rejected: int, per_text: int, total: int
) -> None:
    pairs = make_pairs(
        [f"c{i}" for i in range(chosen)], [f"r{i}" for i in range(rejected)], per_text, total
    )
    assert len(set(pairs)) == len(pairs)
    assert len(pairs) == min(total, min(chosen, rejected) * min(per_text, max(chosen, rejected)))
    assert all(a.startswith("c") and b.startswith("r") for a, b in pairs)
    uses = [Counter(side) for side in zip(*pairs, strict=True)]
    assert max(max(side.values()) for side in uses) <= per_text
    if len(pairs) < total:  # not cut short: as many texts as that many pairs can hold
        assert max(map(len, uses)) == min(max(chosen, rejected), len(pairs))


def test_lines_in_both_files_have_no_judgement(tmp_path: Path) -> None:
    for name, verdict in (("pos", "很亮"), ("neg", "太暗")):
        lines = [f"灯光{verdict}而且走廊也是一样", "毛巾不多不少而且走廊也是一样"] * 2
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    splits = ReviewsData(tmp_path / "pos.txt", tmp_path / "neg.txt").splits()
    assert [prompt_text(record.prompt) for side in splits.prompts for record in side] == ["灯光"]
    assert sum(map(len, splits.sft)) == 2 and sum(map(len, splits.preferences)) == 1


def test_common_openings_always_train() -> None:
    common = [f"灯光第{i}回来看都很好很好" for i in range(DATA.max_heldout_reviews + 1)]
    for seed in range(20):
        data = replace(DATA, seed=seed, heldout_fraction=0.9)
        assert not records(data, common, []).sft.heldout
    rare = common[: DATA.max_heldout_reviews]
    assert any(
        records(replace(DATA, seed=seed, heldout_fraction=0.9), rare, []).sft.heldout
        for seed in range(20)
    )


def test_another_seed_holds_out_other_prompts() -> None:
    lines = [f"{chr(0x4E00 + i)}光都还算亮，看着也舒服" for i in range(60)]
    heldout = [
        {
            prompt_text(r.prompt)
            for r in records(replace(DATA, seed=seed), lines, []).prompts.heldout
        }
        for seed in (0, 1)
    ]
    assert heldout[0] != heldout[1] and all(heldout)


@pytest.mark.parametrize(
    ("line", "review"),
    [
        ("1、灯光很亮", "灯光很亮"),
        ("2.灯光很亮", "灯光很亮"),
        ("（3）、灯光很亮", "灯光很亮"),
        ("4）灯光很亮", "灯光很亮"),
        ("三，灯光很亮", "灯光很亮"),
        ("①灯光很亮", "灯光很亮"),
        ("5 灯光很亮", "灯光很亮"),
        ("。。 -- 6．灯光很亮。", "灯光很亮。"),
        ("7.5瓦的灯光很亮", "7.5瓦的灯光很亮"),
        ("2015年灯光很亮", "2015年灯光很亮"),
        ("三盏灯都很亮", "三盏灯都很亮"),
        ("《灯》很亮", "《灯》很亮"),
        ("补充点评 2007年2月28日 ： 灯光很亮", "灯光很亮"),
        ("宾馆反馈 2007年2月28日 ： 灯光会修", ""),
        ("\u3000灯光&#39;亮&#39; ", "灯光'亮'"),
        ("……", ""),
    ],
)
def test_cleaning_removes_only_what_stands_before_the_first_word(line: str, review: str) -> None:
    assert clean(line) == review


def test_reviews_that_do_not_fit_are_left_out() -> None:
    lines = {
        "灯光" + "好" * 7,  # too short
        "灯光" + "好" * 79,  # too long
        "《灯》很亮很亮很亮很亮很亮",  # opens with a mark
        "燈光嚴重不足服務態度不好",  # traditional characters
    }
    kept = {"灯光" + "好" * 8, "灯光" + "好" * 78, "ok" + "好" * 8}
    assert {
        opening + rest
        for opening, rests in by_opening(ReviewsData(), lines | kept).items()
        for rest in rests
    } == kept


def test_missing_package_and_bad_fields_give_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="leave no review; have 0 < opening_chars"):
        ReviewsData(min_chars=2).splits()
    with pytest.raises(UserError, match="heldout_fraction is 0"):
        ReviewsData(heldout_fraction=0.0).splits()
    path = tmp_path / "pos.txt"
    with pytest.raises(UserError, match=r"pos\.txt: cannot be read \(No such file"):
        ReviewsData(pos=path, neg=path).splits()
    path.write_bytes("灯光".encode("gbk"))
    with pytest.raises(UserError, match=r"pos\.txt: not UTF-8 \(byte 0\)"):
        ReviewsData(pos=path, neg=path).splits()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'glm-jax\[demo\]'"):
        ReviewsData().splits()
