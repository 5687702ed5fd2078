"""Length balancing holds for what the loss weighs: read back from token rows, from tables and from files."""

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from glm_jax.batch import Judged, Packed
from glm_jax.tokenizers import Tokenizer
from rlhf import cli
from rlhf.data.accounts import Account, Accounts
from rlhf.data.files.files import FilesData
from rlhf.data.filter_config import Debiasing, FilterConfig
from rlhf.data.mistakes import OnMistake
from rlhf.data.pair_rows import TokenPair, debiased_pairs, token_pairs
from rlhf.data.records import Preference, Split, user_turn
from rlhf.reward import RewardConfig
from rlhf.reward_stage import judged_data
from sharding.errors import UserError

EDGES = (1, 3, 9, 27)
# Rows hold float32 weights, each off by at most 2^-24 of itself; sums of 40 of them are off by at most as much of the
# sum, and by 40 * 2^-53 for adding in float64: 6e-8. Four times that, and a little.
ROUNDING = 3e-7
Side = tuple[str, str, float]  # prompt, answer or nothing, weight
Gaps = Iterable[tuple[int, float]]  # length of the winner less that of the loser, weight


def farthest(gaps: Gaps, edges: tuple[int, ...] = EDGES) -> float:
    """The largest distance of a bucket's longer winners from half of its weight, relative to that weight."""
    sides: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for gap, weight in gaps:
        if gap:
            bucket = sum(abs(gap) >= edge for edge in edges)
            sides[bucket][gap > 0] += weight
    return max((abs(a - b) / (a + b) for a, b in sides.values()), default=0.0)


def weighed(rows: Judged | Packed) -> list[tuple[tuple[int, ...], int, float]]:
    """(prompt's tokens, gap, weight) of every pair, read back from the rows alone."""
    found = []
    if isinstance(rows, Judged):
        for row, weight in enumerate(rows.weight.tolist()):
            both = [side.ids[row][side.valid[row]].tolist() for side in rows.pairs]
            found.append((both, weight))
    else:
        for row, columns in enumerate(np.asarray(rows.weight).tolist()):
            for j, weight in enumerate(columns):
                if weight > 0:
                    ends = (rows.chosen_end[row, j], rows.rejected_end[row, j])
                    segments = (rows.segments[row] == rows.segments[row, end] for end in ends)
                    found.append(([rows.ids[row][here].tolist() for here in segments], weight))
    return [(tuple(a[: a.index(2)]), len(a) - len(b), weight) for (a, b), weight in found]


def split_of(judged: Sequence[tuple[str, int, int, float | None]]) -> Split:
    """Pairs of prompts and lengths, those with a number stating their weight; three held out."""
    records = [
        Preference(
            *(user_turn(prompt), "x" * (better + 1), "y" * (worse + 1), weight or 1.0),
            weight_stated=weight is not None,
        )
        for prompt, better, worse, weight in judged
    ]
    return Split(records, [Preference(user_turn("held"), "a" * n, "b") for n in (1, 2, 30)])


# few prompts, so that rankings have many pairs; more shorter winners among those of the first prompts
JUDGED = st.lists(
    st.tuples(
        st.sampled_from("ppppqqrstuvw"),
        st.integers(0, 40),
        st.integers(0, 40),
        st.sampled_from([None, None, None, 0.01, 0.3, 7.0]),
    ),
    min_size=8,
    max_size=40,
    unique_by=lambda pair: pair[:3],
)


@given(
    judged=JUDGED,
    weigh=st.sampled_from(["prompt", "pair"]),
    seed=st.integers(0, 3),
    packed=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_sides_of_every_bucket_weigh_the_same_in_the_rows(
    characters: Tokenizer,
    judged: list[tuple[str, int, int, float | None]],
    weigh: Any,
    seed: int,
    packed: bool,
) -> None:
    """Also where many pairs are longer than the rows, and whatever the file says of weights."""
    config = FilterConfig(weigh=weigh, seed=seed, edges=EDGES)
    length = 30
    reward = RewardConfig(pack_length=55 if packed else None)
    split, accounts = split_of(judged), Accounts()
    try:
        data = judged_data(split, characters, length, reward, Debiasing(config, None), accounts)
    except UserError as error:
        assume(False)
        raise AssertionError from error
    found = weighed(data.train)
    assert farthest((gap, weight) for _, gap, weight in found) < ROUNDING
    counts = [gap for _, gap, _ in found]
    assert farthest((gap, 1.0) for gap in counts) == 0.0, "and as many pairs"
    assert len(found) == accounts.of("preferences", "train").used > 0
    if weigh == "prompt" and all(weight is None for *_, weight in judged):
        totals: dict[tuple[int, ...], float] = defaultdict(float)
        for prompt, _, weight in found:
            totals[prompt] += weight
        assert max(totals.values()) < 1 + ROUNDING


def test_the_constructed_set_of_rankings_against_single_pairs(characters: Tokenizer) -> None:
    """Longer wins in rankings, shorter in single pairs: half of the pairs, and 6 % of the weight before."""
    records = []
    for number in range(30):
        answers = ["x" * (6 * k + 6) for k in range(6)]
        records += [
            Preference(user_turn(f"ranking {number}"), answers[b], answers[a])
            for a in range(6)
            for b in range(a + 1, 6)
        ]
        for gap, count in ((6, 5), (12, 4), (18, 3), (24, 2), (30, 1)):
            records += [
                Preference(user_turn(f"{number} {gap} {i}"), "y" * 6, "z" * (6 + gap))
                for i in range(count)
            ]
    pairs = token_pairs(records, characters, 100)
    account = Account("preferences", "train")
    config = FilterConfig(edges=EDGES)
    kept, _ = debiased_pairs(records, pairs, config, None, account)
    assert len(kept) == len(records) == 900, "nothing to drop: as many on either side"
    prompts: dict[str, int] = defaultdict(int)
    for pair in kept:
        prompts[str(pair.prompt)] += 1
    old = [(len(p.chosen) - len(p.rejected), 1 / prompts[str(p.prompt)]) for p in kept]
    assert farthest(old) == pytest.approx(0.5 * 2 - 2 / 16)  # 1/16 of the weight: 43.75 % from half
    new = [(len(p.chosen) - len(p.rejected), p.weight) for p in kept]
    # math.fsum is exact, and each weight is one product of float64
    assert farthest(new) < 1e-14


def test_balancing_looks_at_nothing_but_pairs_that_fit(characters: Tokenizer) -> None:
    """Without the pairs that are too long the same ones stay with the same weights."""
    judged = [(f"{n % 7}", n % 23, (5 * n) % 19, None) for n in range(60)]
    long = [(f"{n % 7}", 50 + n, n, None) for n in range(40)]
    found = []
    for pairs in (judged, judged + long, long + judged):
        config = Debiasing(FilterConfig(edges=EDGES), None)
        data = judged_data(split_of(pairs), characters, 30, RewardConfig(), config)
        found.append(sorted(weighed(data.train)))
    assert found[0] == found[1] == found[2] and 0 < len(found[0]) < 60


def test_lengths_are_those_of_the_named_tokenizer(characters: Tokenizer, tmp_path: Path) -> None:
    """In its tokens the buckets balance, and in characters they do not."""
    from glm_jax.tokenizers import ChatGLM3Tokenizer, load_tokenizer

    ChatGLM3Tokenizer.train(["word word words and more"] * 9, 290).save(tmp_path)
    texts = ["word " * (n % 5 + 1) + "q" * (n % 3) for n in range(60)]
    records = [
        Preference(user_turn(f"p{n % 9}"), a, b + "!") for n, (a, b) in enumerate(pairwise(texts))
    ]
    split = Split(records, records[:3])
    config = FilterConfig(edges=(1, 2, 4))
    data = judged_data(split, characters, 90, RewardConfig(), Debiasing(config, tmp_path))
    encode = load_tokenizer(tmp_path).encode
    rows = data.train
    assert isinstance(rows, Judged)
    gaps: list[tuple[int, float]] = []
    by_eye: list[tuple[int, float]] = []
    for row, weight in enumerate(rows.weight.tolist()):
        a, b = (characters.decode(side.ids[row][side.target[row]]) for side in rows.pairs)
        gaps.append((len(encode(a)) - len(encode(b)), weight))
        by_eye.append((len(a) - len(b), weight))
    assert farthest(gaps, (1, 2, 4)) < ROUNDING < 0.01 < farthest(by_eye, (1, 2, 4))


LINES: list[dict[str, Any]] = [
    *({"prompt": f"r{n}", "responses": ["x" * k for k in (40, 30, 21, 10)]} for n in range(40)),
    *(
        {
            "prompt": f"s{n}",
            "chosen": "y" * 5,
            "rejected": "z" * (6 + n % 34),
            "weight": 0.5 + n % 2,
        }
        for n in range(0, 300, 2)
    ),
    *({"prompt": f"t{n}", "chosen": "y" * 5, "rejected": "z" * (6 + n % 34)} for n in range(99)),
]


def write(folder: Path) -> FilesData:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)), encoding="utf-8")
    return FilesData(preferences=path, heldout_fraction=0.3, filters=FilterConfig(edges=EDGES))


def test_the_training_side_of_files_is_balanced_by_weight(tmp_path: Path) -> None:
    """After the split, which leaves other pairs on it than are balanced together; held-out pairs are as they are."""
    train, heldout = write(tmp_path).splits().preferences
    gaps = [(len(p.chosen) - len(p.rejected), p.weight) for p in train]
    assert farthest(gaps) < 1e-14 and len(gaps) > 50
    assert farthest((len(p.chosen) - len(p.rejected), p.weight) for p in heldout) > 0.1
    assert {p.weight for p in heldout if p.weight_stated} == {0.5}


def test_the_command_writes_balanced_weights_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write(tmp_path), tmp_path / "out"
    edges = FilterConfig().edges
    assert cli.main(["data", "filter", str(data.preferences), "--out", str(out)]) == 0
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    gaps = [(len(p["chosen"]) - len(p["rejected"]), p["weight"]) for p in pairs]
    assert farthest(gaps, edges) < 1e-14 and len(gaps) > 100
    report = json.loads((out / "report.json").read_text())
    after = [b["longer_win_rate"] for b in report["length_buckets"]["after"] if b["longer_wins"]]
    assert after == [pytest.approx(0.5)] * len(after) and len(after) > 1
    before = [b["longer_win_rate"] for b in report["length_buckets"]["before"] if b["longer_wins"]]
    assert max(before) > 0.6
    stats = ["data", "stats", str(out / "pairs.jsonl"), "--json", str(tmp_path / "stats.json")]
    assert cli.main(stats) == 0
    again = json.loads((tmp_path / "stats.json").read_text())["length_buckets"]
    assert [b["longer_win_rate"] for b in again if b["longer_wins"]] == [pytest.approx(0.5)] * sum(
        b["longer_wins"] > 0 for b in again
    ), "stats of the file say what the filter says"
    capsys.readouterr()


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 99), st.sampled_from(["prompt", "pair"]))
def test_stated_weights_stand_where_nothing_is_balanced(
    tmp_path: Path, seed: int, weigh: Any
) -> None:
    data = write(tmp_path)
    data = replace(data, seed=seed, filters=replace(data.filters, balance=False, weigh=weigh))
    stated = {line["prompt"]: line["weight"] for line in LINES if "weight" in line}
    found = [p for side in data.splits().preferences for p in side]
    for pair in found:
        prompt = str(pair.prompt[0]["content"])
        expected = stated.get(prompt, 1.0 if weigh == "pair" or prompt[0] == "t" else 1 / 6)
        assert pair.weight == pytest.approx(expected) and pair.weight_stated == (prompt in stated)


def test_nothing_left_after_balancing_is_refused(characters: Tokenizer) -> None:
    records = [Preference(user_turn(f"p{n}"), "long" * 3, "s") for n in range(20)]
    split = Split(records, records[:2])
    config = Debiasing(FilterConfig(), None)
    with pytest.raises(
        UserError, match="0 of 20 training pairs used; left out: 20 by filter 'length bal"
    ):
        judged_data(split, characters, 30, RewardConfig(), config)
    assert len(weighed(judged_data(split, characters, 30, RewardConfig()).train)) == 20


def test_one_pair_of_no_difference_stays(characters: Tokenizer) -> None:
    split = Split([Preference(user_turn("p"), "aa", "bb")], [Preference(user_turn("q"), "a", "b")])
    data = judged_data(split, characters, 30, RewardConfig(), Debiasing(FilterConfig(), None))
    assert [(gap, weight) for _, gap, weight in weighed(data.train)] == [(0, 1.0)]


def test_twenty_thousand_pairs_take_seconds() -> None:
    """Measured 4 s here, where types are checked; the bound only catches a blunder."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 60, (20_000, 2)).tolist()
    texts, tokens = ["x" * n for n in range(60)], [[1] * (n + 1) for n in range(60)]
    records = [
        Preference(user_turn(f"{n // 3}"), texts[a], f"y{texts[b]}")
        for n, (a, b) in enumerate(sizes)
    ]
    pairs = [TokenPair(n, 1, tokens[a], tokens[b]) for n, (a, b) in enumerate(sizes)]
    start = time.perf_counter()
    kept, _ = debiased_pairs(records, pairs, FilterConfig(), None, Account("preferences", "train"))
    assert time.perf_counter() - start < 40
    gaps = ((len(p.chosen) + 1 - len(p.rejected), p.weight) for p in kept)
    assert farthest(gaps, FilterConfig().edges) < 1e-10


SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("file", ["oasst1-zh/oaast_rm_zh.json", "pandalm-testset/testset-v1.json"])
def test_public_data_is_balanced_by_weight(characters: Tokenizer, file: str) -> None:
    data = FilesData(preferences=SHARED / file, mistakes=OnMistake.skip_all())
    split = data.undebiased().splits().preferences
    rows = judged_data(split, characters, 300, RewardConfig(), data.debiasing()).train
    edges = data.filters.edges
    gaps = [(gap, weight) for _, gap, weight in weighed(rows)]
    # some 600 float32 weights
    assert farthest(gaps, edges) < 10 * ROUNDING and len(gaps) > 100
    assert farthest(((gap, 1.0) for gap, _ in gaps), edges) == 0
    plain = data.splits().preferences.train
    assert farthest(((len(p.chosen) - len(p.rejected), p.weight) for p in plain), edges) < 1e-12
