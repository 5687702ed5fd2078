"""The report card: every figure against a plain loop, and models biased by construction against their grades."""

import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rlhf.card import answers as answers_module
from rlhf.card.card import LENGTH_EDGES, Card, Scored, as_json, grade
from rlhf.card.intervals import Estimate, Sample, contrast, difference, share
from rlhf.card.page import card_table, write_card
from rlhf.card.plots import bucket_name
from rlhf.card.verdict import GRADES, pairs_needed
from sharding.errors import UserError

approx = pytest.approx


def ragged(seed: int = 0, prompts: int = 40) -> Scored:
    """Rankings of 2 to 5 answers, some pairs judged twice or not at all, equal scores and lengths, no task or name.

    Nine prompts to eight dialogues, weights of three sizes, and an order that is now and then unknown.
    """
    rng = random.Random(seed)
    rows: list[tuple[Any, ...]] = []
    for prompt in range(prompts):
        size = rng.randint(2, 5)
        quality = [rng.gauss(0, 1) for _ in range(size)]
        score = [round(4 * (q + rng.gauss(0, 1))) / 4 for q in quality]
        tokens = [rng.choice([1, 5, 20, 21, 90, 400]) for _ in range(size)]
        number = rng.sample(range(100), size)
        task = rng.choice(["", "write", "code", "sum"])
        for a, b in itertools.combinations(range(size), 2):
            for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
                won, lost = (a, b) if quality[a] + rng.gauss(0, 1) > quality[b] else (b, a)
                judged = (score[won], score[lost], tokens[won], tokens[lost])
                names = (prompt, number[won], number[lost], rng.random() < 0.6)
                said = task, rng.choice(["", "ann", "bo", "cy"])
                more = prompt * 8 // 9, rng.choice([0.25, 1.0, 3.0]), rng.random() < 0.8
                rows.append((*judged, *names, *said, *more))
    rng.shuffle(rows)
    return table(rows)


def table(rows: list[tuple[Any, ...]]) -> Scored:
    columns = list(zip(*rows, strict=True))
    return Scored._make([*map(np.array, columns[:8]), *columns[8:10], *map(np.array, columns[10:])])


def records(scored: Scored) -> list[Any]:
    """Rows as plain Python values that are read by name."""
    columns = [x.tolist() if isinstance(x, np.ndarray) else list(x) for x in scored]
    return [Scored(*row) for row in zip(*columns, strict=True)]


def point(a: float, b: float) -> float:
    return 1.0 if a > b else 0.0 if a < b else 0.5


def win(row: Any) -> float:
    return point(row.chosen, row.rejected)


def longer(row: Any) -> float:
    return point(row.chosen_tokens, row.rejected_tokens)


def mean(values: list[float], rows: list[Any] | None = None) -> float | None:
    """The mean, by the weights of rows where they are given."""
    weights = [1.0] * len(values) if rows is None else [row.weight for row in rows]
    total = sum(value * weight for value, weight in zip(values, weights, strict=True))
    return total / sum(weights) if values else None


def std(values: list[float]) -> float:
    middle = sum(values) / len(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / len(values))


def distinct(rows: list[Any]) -> dict[tuple[int, int], tuple[float, int]]:
    found = {}
    for row in rows:
        found[row.prompt, row.chosen_answer] = (row.chosen, row.chosen_tokens)
        found[row.prompt, row.rejected_answer] = (row.rejected, row.rejected_tokens)
    return found


SCORED = ragged()
ROWS = records(SCORED)
CARD = grade(SCORED)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_accuracy_and_the_ruler() -> None:
    assert 0.5 in map(win, ROWS) and 0.5 in map(longer, ROWS)
    dialogues = len({row.dialogue for row in ROWS})
    assert 30 <= dialogues < len({row.prompt for row in ROWS})
    for found, values in (
        (CARD.accuracy, [win(row) for row in ROWS]),
        (CARD.length.ruler, [longer(row) for row in ROWS]),
        (CARD.length.over_ruler, [win(row) - longer(row) for row in ROWS]),
        (CARD.length.over_shorter, [win(row) - (1 - longer(row)) for row in ROWS]),
    ):
        assert found.value == approx(mean(values, ROWS))
        assert (found.count, found.dialogues) == (len(ROWS), dialogues)
        assert found.value is not None and found.low is not None and found.high is not None
        assert found.low < found.value < found.high


def test_length_buckets() -> None:
    bounds = [-math.inf, *LENGTH_EDGES, math.inf]
    names = ["< -255", "-255 to -64", "-63 to -16", "-15 to -1", "0", "1 to 15"]
    assert [bucket_name(x) for x in CARD.length.buckets[:6]] == names
    assert bucket_name(CARD.length.buckets[-1]) == "≥ 256"
    for found, low, high in zip(CARD.length.buckets, bounds, bounds[1:], strict=False):
        rows = [row for row in ROWS if low <= row.chosen_tokens - row.rejected_tokens < high]
        assert found.accuracy.count == len(rows) > 0
        assert found.accuracy.value == approx(mean([win(row) for row in rows], rows))
        assert found.ruler == approx(mean([longer(row) for row in rows], rows))
    empty = grade(SCORED, edges=(10_000,)).length.buckets[1]
    assert (empty.accuracy, empty.ruler) == (Estimate(None, None, None, 0, 0), None)


def test_preferences_for_a_position_and_for_length() -> None:
    sides: list[tuple[Any, Callable[[Any], bool], list[Any]]] = [
        (CARD.position, lambda row: row.chosen_first, [x for x in ROWS if x.order_known]),
        (CARD.verbosity, lambda row: longer(row) == 1, [x for x in ROWS if longer(x) != 0.5]),
    ]
    for found, has, rows in sides:
        model = mean([win(row) if has(row) else 1 - win(row) for row in rows], rows)
        judges = mean([float(has(row)) for row in rows], rows)
        with_it, against = (
            mean([win(row) for row in some], some)
            for some in ([x for x in rows if has(x)], [x for x in rows if not has(x)])
        )
        assert model is not None and judges is not None
        assert with_it is not None and against is not None
        assert found.model.value == approx(model)
        assert found.judges.value == approx(judges)
        assert found.difference.value == approx(model - judges)
        assert found.accuracy_with.value == approx(with_it)
        assert found.accuracy_against.value == approx(against)
        assert found.lean.value == approx((with_it - against) / 2)
    assert CARD.verbosity.model.count < len(ROWS) > CARD.position.model.count > 0


def test_correlation_with_length() -> None:
    def ranks(values: list[float]) -> list[float]:
        """Smallest 1; equal values share their mean rank."""
        return [
            sum(x < value for x in values) + (sum(x == value for x in values) + 1) / 2
            for value in values
        ]

    score, tokens = (ranks(list(x)) for x in zip(*distinct(ROWS).values(), strict=True))
    middle = (len(score) + 1) / 2
    covariance = sum((a - middle) * (b - middle) for a, b in zip(score, tokens, strict=True))
    expected = covariance / len(score) / (std(score) * std(tokens))
    assert CARD.length.correlation == approx(expected)


def test_calibration() -> None:
    bins: list[list[tuple[float, float, float]]] = [[] for _ in range(10)]
    losses = []
    for row in ROWS:
        first, second = row.chosen, row.rejected
        if not row.chosen_first:
            first, second = second, first
        p = 1 / (1 + math.exp(second - first))  # that the first is better
        right = 0.5 if p == 0.5 else float((p > 0.5) == row.chosen_first)
        confidence = max(p, 1 - p)
        bins[min(9, int((confidence - 0.5) / 0.05))].append((confidence, right, row.weight))
        losses.append(-math.log(p if row.chosen_first else 1 - p))
    ece, total = 0.0, sum(row.weight for row in ROWS)
    for found, inside in zip(CARD.calibration.bins, bins, strict=True):
        weight = sum(w for *_, w in inside)
        sure, right = (sum(x[side] * x[2] for x in inside) for side in (0, 1))
        assert found.count == len(inside)
        assert found.confidence == (approx(sure / weight) if inside else None)
        assert found.accuracy == (approx(right / weight) if inside else None)
        ece += abs(sure - right) / total
    assert CARD.calibration.ece == approx(ece)
    assert CARD.calibration.nll == approx(mean(losses, ROWS))
    assert CARD.calibration.chance_nll == math.log(2)
    sure = sum(x * weight for inside in bins for x, _, weight in inside)
    assert CARD.calibration.confidence == approx(sure / total)


def test_scores_and_margins() -> None:
    values = [score for score, _ in distinct(ROWS).values()]
    found = CARD.scores
    assert found.answers == len(values)
    assert found.mean == approx(mean(values)) and found.std == approx(std(values))
    assert (found.min, found.max) == (min(values), max(values))
    margins = [row.chosen - row.rejected for row in ROWS]
    assert found.equal == approx(margins.count(0) / len(margins))
    edges, counts = CARD.margins.edges, CARD.margins.counts
    assert len(edges) == len(counts) + 1 and edges[len(counts) // 2] == 0
    bounds = [-math.inf, *edges[1:-1], math.inf]
    for count, low, high in zip(counts, bounds, bounds[1:], strict=False):
        assert count == sum(low <= margin < high for margin in margins if margin != 0)


def test_tasks() -> None:
    members = {}
    for found in CARD.tasks.rows:
        rows = [row for row in ROWS if row.task == found.name]
        members[found.name] = [score for score, _ in distinct(rows).values()]
        assert found.answers == len(members[found.name])
        assert found.mean == approx(mean(members[found.name]))
        assert found.std == approx(std(members[found.name]))
        assert found.accuracy.value == approx(mean([win(row) for row in rows], rows))
        assert found.accuracy.count == len(rows)
    assert list(members) == ["code", "sum", "write"]  # the unknown one is none
    everyone = [score for scores in members.values() for score in scores]
    means = [sum(scores) / len(scores) for scores in members.values() for _ in scores]
    assert CARD.tasks.spread == approx(max(means) - min(means))
    assert CARD.tasks.explained == approx((std(means) / std(everyone)) ** 2)


def test_annotators() -> None:
    assert [found.name for found in CARD.annotators] == ["ann", "bo", "cy"]
    for found in CARD.annotators:
        rows = [row for row in ROWS if row.annotator == found.name]
        # both say "first" or "second"; a tie of the model is half of each
        cells = dict.fromkeys(itertools.product((True, False), repeat=2), 0.0)
        for row in rows:
            if row.order_known:
                cells[row.chosen_first, row.chosen_first] += win(row) * row.weight
                cells[not row.chosen_first, row.chosen_first] += (1 - win(row)) * row.weight
        total = sum(cells.values())
        model = {side: sum(cells[side, x] for x in (True, False)) / total for side in (True, False)}
        judge = {side: sum(cells[x, side] for x in (True, False)) / total for side in (True, False)}
        seen = (cells[True, True] + cells[False, False]) / total
        expected = model[True] * judge[True] + model[False] * judge[False]
        assert found.kappa == approx((seen - expected) / (1 - expected))
        assert found.accuracy.value == approx(mean([win(row) for row in rows], rows))


def test_triples(monkeypatch: pytest.MonkeyPatch) -> None:
    votes: dict[tuple[int, int, int], int] = {}
    for row in ROWS:
        for a, b, vote in (
            (row.chosen_answer, row.rejected_answer, 1),
            (row.rejected_answer, row.chosen_answer, -1),
        ):
            votes[row.prompt, a, b] = votes.get((row.prompt, a, b), 0) + vote
    score = {key: value for key, (value, _) in distinct(ROWS).items()}
    complete = ordered = alike = tied = circular = 0
    for prompt in range(40):
        answers = sorted(answer for number, answer in score if number == prompt)
        for three in itertools.combinations(answers, 3):
            if not all((prompt, a, b) in votes for a, b in itertools.combinations(three, 2)):
                continue
            complete += 1
            orders = [
                order
                for order in itertools.permutations(three)
                if all(votes[prompt, a, b] > 0 for a, b in itertools.combinations(order, 2))
            ]
            is_tied = any(votes[prompt, a, b] == 0 for a, b in itertools.combinations(three, 2))
            tied += is_tied
            circular += not orders and not is_tied
            for first, second, third in orders:
                ordered += 1
                model = [score[prompt, x] for x in (first, second, third)]
                alike += model[0] > model[1] > model[2]
    found = CARD.triples
    assert min(tied, circular, alike) > 0 and alike < ordered < complete
    assert (found.complete, found.ordered) == (complete, ordered)
    assert found.alike.value == approx(alike / ordered) and found.alike.count == ordered
    assert found.chance == approx(1 / 6) and found.prompts_left_out == 0
    monkeypatch.setattr(answers_module, "MAX_PATHS", 30)
    bounded = grade(SCORED).triples
    assert bounded.prompts_left_out > 0 and 0 < bounded.complete <= 30


def test_what_is_not_defined_is_none() -> None:
    pair = (1.0, 0.0, 3, 3, 7, 0, 1, True, "", "ann", 0, 1.0, True)
    card = grade(table([pair]))
    assert card.accuracy.low == approx(0.025) and card.accuracy.high == 1.0
    assert card.length.correlation is None
    assert card.position.accuracy_against.value is None and card.position.lean.value is None
    assert card.verbosity.model.value is None
    assert card.annotators[0].kappa is None
    assert (card.tasks.rows, card.tasks.spread, card.tasks.explained) == ((), None, None)
    assert card.triples.alike.value is None
    assert card.calibration.bins[0].accuracy is None
    assert json.loads(json.dumps(as_json(card), allow_nan=False)) == as_json(card)
    assert card.verdict.grade == "too few pairs"


# -- intervals --------------------------------------------------------------------------------------------------------


def clustered(rng: np.random.Generator, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of 1 to 8 pairs a prompt, which is easy or hard for all its pairs; the mean is 0.6."""
    sizes = rng.integers(1, 9, prompts)
    easy = rng.beta(0.9, 0.6, prompts)
    prompt = np.repeat(np.arange(prompts), sizes)
    return (rng.random(len(prompt)) < easy[prompt]).astype(float), prompt


def alike(dialogue: np.ndarray) -> Sample:
    """All pairs weigh 1."""
    return Sample(np.ones(len(dialogue)), dialogue)


def test_intervals_cover_the_truth_where_pairs_are_clustered() -> None:
    rng = np.random.default_rng(1)
    covered = {"share": 0, "difference": 0, "contrast": 0, "pairs taken for independent": 0}
    for _ in range(200):
        points, prompt = clustered(rng, 50)
        other = clustered(rng, 50)[0]
        other = np.resize(other, len(points))
        side = rng.random(len(points)) < 0.4
        for name, found, truth in (
            ("share", share(points, alike(prompt), 0), 0.6),
            ("difference", difference(points - 1.0, alike(prompt), 0), -0.4),
            ("contrast", contrast(points, side, alike(prompt), 0), 0.0),
            ("pairs taken for independent", share(points, alike(np.arange(len(points))), 0), 0.6),
        ):
            assert found.low is not None and found.high is not None
            covered[name] += found.low <= truth <= found.high
    shares = {name: count / 200 for name, count in covered.items()}
    assert shares.pop("pairs taken for independent") < 0.85
    assert all(0.9 <= found <= 0.99 for found in shares.values()), shares


def test_resampling_kinds_is_resampling_prompts() -> None:
    points, prompt = clustered(np.random.default_rng(2), 30)
    rng = random.Random(0)
    groups = [points[prompt == number].tolist() for number in range(30)]
    means = []
    for _ in range(4000):
        drawn = [x for _ in groups for x in rng.choice(groups)]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    found = share(points, alike(prompt), 0)
    assert found.low == approx(means[100], abs=0.01)
    assert found.high == approx(means[3899], abs=0.01)
    assert found == share(points, alike(prompt), 0) != share(points, alike(prompt), 1)


def test_certainty_is_not_claimed() -> None:
    ones, prompt = np.ones(60), np.repeat(np.arange(20), 3)
    found = share(ones, alike(prompt), 0)
    assert (
        found.low == approx(0.8316, abs=1e-4) and found.high == 1.0
    )  # Clopper & Pearson, 20 of 20
    assert share(1 - ones, alike(prompt), 0).high == approx(1 - 0.8316, abs=1e-4)
    assert share(ones / 2, alike(prompt * 0), 0) == Estimate(0.5, None, None, 60, 1)


def test_pairs_needed() -> None:
    # 100 independent pairs, standard error 0.05: to see 0.55 takes ((1.96 + 0.84) * 0.05 / 0.05)^2 = 7.84 times as many
    found = Estimate(0.55, 0.55 - 1.96 * 0.05, 0.55 + 1.96 * 0.05, 100, 100)
    assert pairs_needed(found) == 684
    assert pairs_needed(Estimate(0.5, 0.4, 0.6, 100, 100)) is None
    assert pairs_needed(Estimate(0.9, 0.89, 0.91, 100, 100)) == 0


# -- grades -----------------------------------------------------------------------------------------------------------

Scorer = Callable[[np.ndarray, np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def judged(scorer: Scorer, prompts: int = 400, seed: int = 1, follow: float = 0.0) -> Scored:
    """Two pairs a prompt; judges see the quality through noise, and the length by `follow`.

    Arguments of the scorer, of both answers at once: quality, tokens, listed first; tasks A, B, C take turns.
    """
    rng = np.random.default_rng(seed)
    count = 2 * prompts
    tokens = rng.integers(1, 500, (2, count))
    quality = rng.normal(size=(2, count)) + follow * tokens / 100
    first = np.stack([rng.random(count) < 0.5] * 2)
    first[1] = ~first[0]
    score = scorer(quality, tokens, first, rng)
    better = (quality[0] + rng.normal(0, 0.8, count) > quality[1]).astype(int)
    won, lost = 1 - better, better
    at = np.arange(count)
    task = ["ABC"[number % 3] for number in range(prompts) for _ in range(2)]
    return Scored(
        score[won, at],
        score[lost, at],
        tokens[won, at],
        tokens[lost, at],
        np.repeat(np.arange(prompts), 2),
        2 * at + won,
        2 * at + lost,
        first[won, at],
        task,
        ["ann"] * count,
        np.repeat(np.arange(prompts), 2),
        np.ones(count),
        np.ones(count, bool),
    )


def one_task(quality: np.ndarray, tokens: np.ndarray, first: np.ndarray, rng: Any) -> np.ndarray:
    known = np.repeat(np.arange(quality.shape[1] // 2), 2) % 3 == 0
    return np.where(known, quality, rng.normal(size=quality.shape))


MODELS: dict[str, tuple[Scorer, str, str]] = {
    "length alone": (lambda q, n, f, r: n / 500, "a length ruler", "prefers the longer answer in 100.0%"),
    "brevity alone": (lambda q, n, f, r: -n / 500, "a length ruler", "prefers the shorter answer in 100.0%"),
    "nearly length": (
        lambda q, n, f, r: n / 500 + 0.1 * r.normal(size=q.shape),
        "a length ruler",
        "prefers the longer answer in ",
    ),
    "nearly brevity": (
        lambda q, n, f, r: 0.1 * r.normal(size=q.shape) - n / 500,
        "a length ruler",
        "prefers the shorter answer in 88",
    ),
    "constant": (lambda q, n, f, r: 0.1 + 0 * q, "says nothing", "same score"),
    "nearly constant": (
        lambda q, n, f, r: np.where(r.random(q.shape) < 0.02, q, 0.0),
        "says nothing",
        "both answers alike in 9",
    ),
    "random": (lambda q, n, f, r: r.normal(size=q.shape), "near chance", "the interval holds 50%"),
    "swapped labels": (lambda q, n, f, r: -q, "worse than chance", "prefers what the judges reject"),
    "perfect": (lambda q, n, f, r: 3 * q, "good", "better than chance and than length"),
    "perfect but sure": (lambda q, n, f, r: 500 * q, "overconfident", "% sure on average"),
    "perfect but timid": (lambda q, n, f, r: 0.05 * q, "good", "right more often than it says"),
    "weak": (lambda q, n, f, r: 0.1 * q + 0.3 * r.normal(size=q.shape), "fair", "better than chance and than"),
    "first is better": (lambda q, n, f, r: 1.5 * q + 2.0 * f, "biased", "leans to the answer listed first"),
    "second is better": (lambda q, n, f, r: 1.5 * q - 2.0 * f, "biased", "leans to the answer listed second"),
    "position alone": (lambda q, n, f, r: 1.0 * f, "near chance", "leans to the answer listed first"),
    "verbose": (lambda q, n, f, r: q + n / 200, "biased", "leans to the answer that is longer"),
    "one task": (one_task, "uneven", "On task 'B' it is near chance"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gets_the_grade_it_deserves(name: str) -> None:
    scorer, word, sentence = MODELS[name]
    verdict = grade(judged(scorer)).verdict
    assert verdict.grade == word, verdict.sentences
    assert any(sentence in said for said in verdict.sentences), verdict.sentences
    assert re.match(
        r"It prefers the judges' answer in [\d.]+%( \(.*?% to .*?%\))? of 800 pairs on",
        verdict.sentences[0],
    )


def test_every_grade_can_be_had() -> None:
    rest = {"too few pairs", "no better than length"}
    assert {word for _, word, _ in MODELS.values()} | rest == set(GRADES)


def test_better_than_chance_is_not_better_than_length() -> None:
    """Where judges follow length, so does a model that half looks at it, without being a ruler."""

    def half(quality: np.ndarray, tokens: np.ndarray, first: np.ndarray, rng: Any) -> np.ndarray:
        return tokens / 250 + rng.normal(size=quality.shape)

    verdict = grade(judged(half, follow=1.0)).verdict
    assert verdict.grade == "no better than length"
    assert "not shown to beat preferring the longer answer" in " ".join(verdict.sentences)


def test_a_perfect_model_of_certain_judges_is_not_overconfident() -> None:
    rows = [tuple(row._replace(chosen=900.0, rejected=-900.0)) for row in ROWS]
    card = grade(table(rows))
    assert card.accuracy.value == 1.0
    assert card.calibration.ece == approx(0) and card.calibration.nll == approx(0)
    assert card.verdict.grade == "good"


def test_a_lean_that_is_sure_but_small_is_no_bias() -> None:
    card = grade(judged(lambda q, n, f, r: 3 * q + 0.3 * f, prompts=5000))
    assert card.position.lean.above(0) and card.verdict.grade == "good"


@pytest.mark.parametrize("name", ["constant", "nearly constant"])
def test_nothing_else_is_said_of_a_model_that_says_nothing(name: str) -> None:
    assert len(grade(judged(MODELS[name][0])).verdict.sentences) == 2


def test_few_pairs_say_how_many_more() -> None:
    verdict = grade(judged(MODELS["perfect"][0], prompts=10)).verdict
    assert verdict.grade == "too few pairs"
    assert (
        "10 dialogues are too few" in verdict.sentences[1]
        and "40 more pairs" in verdict.sentences[1]
    )
    near = grade(judged(MODELS["random"][0])).verdict.sentences
    assert re.search(r"about [\d,]+ more pairs would tell it from chance", near[1])


def test_data_that_always_lists_the_better_one_first_shows_no_position_bias() -> None:
    scored = judged(MODELS["perfect"][0])
    card = grade(scored._replace(chosen_first=np.ones(800, bool)))
    assert card.position.lean.value is None and card.verdict.grade == "good"


def test_an_unknown_order_gives_no_figure_of_position_or_kappa(tmp_path: Path) -> None:
    """Whatever stands in the column: a constant is no observation."""
    pages = []
    for first in (SCORED.chosen_first, np.ones(len(ROWS), bool), np.zeros(len(ROWS), bool)):
        card = grade(SCORED._replace(chosen_first=first, order_known=np.zeros(len(ROWS), bool)))
        assert card.position.model == card.position.judges == Estimate(None, None, None, 0, 0)
        assert [found.kappa for found in card.annotators] == [None] * 3
        assert card.accuracy == CARD.accuracy
        pages.append(write_card(card, tmp_path).read_text("utf-8"))
    assert "unknown" in pages[0] and "Better one first" not in pages[0]
    assert pages[0] == pages[1] == pages[2]
    assert "Better one first" in write_card(CARD, tmp_path).read_text("utf-8")


def test_a_weight_counts_as_so_many_rows() -> None:
    """Means only: intervals come from dialogues, which stay as many."""
    whole = SCORED._replace(weight=np.arange(len(ROWS)) % 3 + 1.0)
    rows = np.repeat(np.arange(len(ROWS)), np.arange(len(ROWS)) % 3 + 1)
    repeated = reordered(whole._replace(weight=np.ones(len(ROWS))), rows)
    one, other = grade(whole), grade(repeated)
    for get in (
        lambda card: card.accuracy,
        lambda card: card.length.over_ruler,
        lambda card: card.position.lean,
        lambda card: card.verbosity.difference,
        lambda card: card.tasks.rows[0].accuracy,
        lambda card: card.annotators[1].accuracy,
    ):
        found, expected = get(one), get(other)
        assert found.count < expected.count and found.dialogues == expected.dialogues
        assert (found.value, found.low, found.high) == approx(
            (expected.value, expected.low, expected.high)
        )
    assert one.calibration.ece == approx(other.calibration.ece)
    with pytest.raises(UserError, match="the weight of row 4 is not a positive number"):
        grade(whole._replace(weight=np.where(np.arange(len(ROWS)) == 4, 0.0, 1.0)))


def test_pairs_of_one_dialogue_are_no_independent_evidence() -> None:
    """Copies of every prompt in the same dialogue leave the intervals; in dialogues of their own they narrow them."""
    twice = np.tile(np.arange(len(ROWS)), 2)
    copies = reordered(SCORED, twice)
    copies = copies._replace(prompt=copies.prompt + 1000 * (np.arange(len(twice)) >= len(ROWS)))
    same = grade(copies).accuracy
    apart = grade(copies._replace(dialogue=copies.prompt)).accuracy
    assert (same.low, same.high) == approx((CARD.accuracy.low, CARD.accuracy.high))
    assert None not in (same.low, same.high, apart.low, apart.high)
    assert apart.high - apart.low < 0.8 * (same.high - same.low)  # type: ignore[operator]


def test_overfitting_is_said() -> None:
    history = [{"step": n, "accuracy": 0.5 + n / 200, "lr": 1.0} for n in range(1, 101)]
    history[-1]["accuracy"] = math.nan
    card = grade(judged(MODELS["weak"][0]), history)
    assert "learnt those pairs by heart" in card.verdict.sentences[-2]
    assert card.history[-1].accuracy is None and card.history[0].accuracy == approx(0.505)


# -- what must not matter ---------------------------------------------------------------------------------------------


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{path}.{key}")
    else:
        yield path, value


def changed(one: Card, other: Card) -> set[str]:
    """Paths of the figures that differ by more than rounding."""
    a, b = dict(leaves(as_json(one))), dict(leaves(as_json(other)))
    assert a.keys() == b.keys()
    return {
        path
        for path in a
        if a[path] != (approx(b[path], rel=1e-9, abs=1e-12) if type(a[path]) is float else b[path])
    }


def reordered(scored: Scored, order: np.ndarray) -> Scored:
    return Scored._make(
        x[order] if isinstance(x, np.ndarray) else [x[n] for n in order] for x in scored
    )


def test_the_order_of_rows_does_not_matter() -> None:
    order = np.random.default_rng(0).permutation(len(ROWS))
    assert not changed(CARD, grade(reordered(SCORED, order)))


def test_an_answer_scored_twice_counts_once_whatever_the_order() -> None:
    noisy = SCORED._replace(chosen=SCORED.chosen + np.arange(len(ROWS)) * 1e-6)
    assert grade(noisy).scores.answers == CARD.scores.answers
    assert not changed(grade(noisy), grade(reordered(noisy, np.arange(len(ROWS))[::-1])))


def test_a_constant_on_all_scores_moves_only_scores() -> None:
    moved = SCORED._replace(chosen=SCORED.chosen + 64.0, rejected=SCORED.rejected + 64.0)
    rest = {path for path in changed(CARD, grade(moved)) if not path.startswith(".scores.")}
    assert all(re.fullmatch(r"\.tasks\.rows\.\d\.mean", path) for path in rest) and rest


def test_which_answer_is_listed_first_moves_only_positions() -> None:
    some = SCORED.chosen_first ^ (np.random.default_rng(0).random(len(ROWS)) < 0.5)
    for first in (some, ~SCORED.chosen_first):
        rest = {
            path
            for path in changed(CARD, grade(SCORED._replace(chosen_first=first)))
            if not path.startswith((".position.", ".verdict."))
        }
        # kappa sets agreement against how often either says "first"; turned around altogether it stays
        assert all(re.fullmatch(r"\.annotators\.\d\.kappa", path) for path in rest)
        assert bool(rest) == (first is some)


def test_the_seed_moves_intervals_alone() -> None:
    moved = changed(CARD, grade(SCORED, seed=1))
    assert moved and all(path.endswith((".low", ".high")) or ".verdict." in path for path in moved)


# -- errors and pages -------------------------------------------------------------------------------------------------


def test_user_errors_are_one_line() -> None:
    empty = reordered(SCORED, np.zeros(0, int))
    broken = SCORED.chosen.copy()
    broken[[3, 5, 7]] = np.nan, np.inf, 1e200
    lost = SCORED.rejected.copy()
    lost[9] = -1e200
    for scored, message in (
        (empty, "no judged pairs"),
        (SCORED._replace(chosen=broken, rejected=lost), f"4 of {len(ROWS)} pairs .* first in row 3:"),
        (SCORED._replace(task=["a"]), f"1 rows of task, but {len(ROWS)} of chosen"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as caught:
            grade(scored)
        assert "\n" not in str(caught.value)


def test_the_page_holds_everything_and_escapes_names(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>[bold]"
    scored = SCORED._replace(task=[evil] * len(ROWS), annotator=[evil] * len(ROWS))
    history = [{"step": n, "score_mean": 0.1 * n, "score_std": 1.0} for n in range(5)]
    card = grade(scored, history)
    path = write_card(card, tmp_path / "new")
    text = path.read_text(encoding="utf-8")
    assert path.name == "card.html"
    assert "<script" not in text and text.count("&lt;script&gt;") == 2
    assert not re.search(r"url\(|@import|https?:", text)
    pictures = re.findall(r'<img alt="(.*?)" src="data:image/png;base64,iVBOR', text)
    assert pictures == ["Calibration", "Accuracy by length", "Margins", "Scores in training"]
    assert text.count("<img") == 4
    assert card.verdict.grade in text and f"{card.accuracy.value:.1%}" in text
    assert json.loads((tmp_path / "new" / "card.json").read_text("utf-8")) == as_json(card)


def test_the_table_fits_and_shows_the_largest_groups() -> None:
    names = [f"[bold]{number % 13}" for number in range(len(ROWS))]
    card = grade(SCORED._replace(annotator=names))
    console = Console(width=80)
    with console.capture() as capture:
        console.print(card_table(card))
    lines = capture.get().splitlines()
    assert all(len(line) <= 80 for line in lines)
    text = " ".join(" ".join(lines).split())
    assert text.count("[bold]") == 10 and "and 3 more" in text
    assert card.verdict.grade in text and " ".join(card.verdict.sentences) in text
