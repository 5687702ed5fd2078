"""Filters against plain loops, and what they promise: order means nothing, nothing is altered, length tells nothing."""

import itertools
import json
import random
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.agreement import agreement
from rlhf.data.balance import balanced, buckets
from rlhf.data.filter_config import Endpoint, FilterConfig
from rlhf.data.filters import Selection, kept, select, survey
from rlhf.data.graph import in_cycles, votes
from rlhf.data.pairs import PairColumns, PairTable, weights_of
from rlhf.data.quality import Quality, by_rules, from_endpoint, from_file
from rlhf.data.reading import Found
from rlhf.data.records import Comparison, Preference, user_turn
from sharding.errors import UserError


def compare(
    prompt: str, *responses: str, ranks: tuple[int, ...] = (), annotator: str = "", task: str = ""
) -> Comparison:
    order = ranks or tuple(range(1, len(responses) + 1))
    return Comparison(user_turn(prompt), responses, order, {}, annotator, task)


def table(*comparisons: Comparison) -> PairTable:
    columns = PairColumns()
    for comparison in comparisons:
        columns.add(comparison)
    return columns.table()


def found(comparisons: Iterable[Comparison]) -> Iterator[Found]:
    return (Found(f"file:{i}", comparison) for i, comparison in enumerate(comparisons))


EVERYTHING = FilterConfig(
    min_prompt_chars=1, votes="each", cycles="keep", balance=False, weigh="pair"
)


def filtered(
    comparisons: list[Comparison], config: FilterConfig
) -> tuple[list[Preference], Selection]:
    selection = select(survey(found(comparisons), config, len), config)
    return [pair for _, pair in kept(found(comparisons), selection)], selection


def pairs_of(comparisons: list[Comparison], config: FilterConfig) -> set[tuple[str, str, str]]:
    pairs, _ = filtered(comparisons, config)
    return {(str(p.prompt[0]["content"]), p.chosen, p.rejected) for p in pairs}


TEXTS = st.sampled_from([1, 2, 3, 5, 9, 14, 30, 40]).map(lambda n: "x" * n)


Judged = tuple[str, tuple[str, ...], tuple[int, ...], str]
# a few prompts, answers that meet again and again, rankings of up to four with ties
JUDGED = st.lists(
    st.tuples(
        st.sampled_from("pqr"),
        st.lists(TEXTS, min_size=4, max_size=4, unique=True).map(tuple),
        st.lists(st.integers(1, 3), min_size=2, max_size=4).map(tuple),
        st.sampled_from(["", "ann", "bob"]),
    ),
    max_size=30,
)


def comparisons(judged: list[Judged]) -> list[Comparison]:
    # not in the strategy: type checks draw random numbers, which hypothesis forbids there
    return [
        compare(prompt, *responses[: len(ranks)], ranks=ranks, annotator=who)
        for prompt, responses, ranks, who in judged
    ]


@given(JUDGED, st.integers(0, 5), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_balancing_leaves_nothing_to_length_and_order_and_texts_alone(
    judged: list[Judged], seed: int, rng: random.Random
) -> None:
    data = comparisons(judged)
    config = FilterConfig(min_prompt_chars=1, seed=seed, edges=(1, 3, 9, 27))
    pairs, selection = filtered(data, config)
    for bucket in buckets(selection.pairs, config.edges):
        assert abs(bucket.longer_wins - bucket.shorter_wins) <= 1
        if bucket.low > 0:
            assert bucket.longer_wins == bucket.shorter_wins
    # each pair is one of a comparison's, its texts as they were
    given_pairs = {
        (c.prompt[0]["content"], c.responses[i], c.responses[j])
        for c in data
        for i, j in itertools.permutations(range(len(c.responses)), 2)
        if c.ranks[i] < c.ranks[j]
    }
    assert {(p.prompt[0]["content"], p.chosen, p.rejected) for p in pairs} <= given_pairs
    shuffled = list(data)
    rng.shuffle(shuffled)
    again, _ = filtered(shuffled, config)
    key = lambda pair: (str(pair.prompt), pair.chosen, pair.rejected, pair.annotator)  # noqa: E731
    assert sorted(map(key, again)) == sorted(map(key, pairs))
    weights = {key(pair): pair.weight for pair in pairs}
    assert all(weights[key(pair)] == pair.weight for pair in again)


def test_balancing_drops_only_from_the_side_that_has_more() -> None:
    pairs = table(
        *(compare(f"p{i}", "long" * 2, "s") for i in range(9)),
        *(compare(f"q{i}", "s", "long" * 2) for i in range(4)),
        *(compare(f"r{i}", "same", "size") for i in range(3)),
    )
    keep = balanced(pairs, 0, (1, 100))
    gap = pairs.chosen_length - pairs.rejected_length
    assert [int(keep[gap > 0].sum()), int(keep[gap < 0].sum()), int(keep[gap == 0].sum())] == [
        4,
        4,
        3,
    ]
    draws = [tuple(balanced(pairs, seed, (1, 100))) for seed in range(20)]
    assert len(set(draws)) > 10, "the seed draws which"
    shares = np.mean(draws, axis=0)[gap > 0]
    assert shares.min() > 0.1 and shares.max() < 0.8, "not always the same ones"


def _on_a_cycle(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """By walking: a preference is on a cycle if its loser leads back to its winner."""
    after = defaultdict(set)
    for winner, loser in pairs:
        after[winner].add(loser)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for text in after[waiting.pop()] - seen:
                seen.add(text)
                waiting.append(text)
        return seen

    return {(winner, loser) for winner, loser in pairs if winner in reached(loser)}


@given(
    st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from("abcdef"), st.sampled_from("abcdef")))
)
@settings(max_examples=100, deadline=None)
def test_cycles_are_those_that_walking_finds(edges: list[tuple[str, str, str]]) -> None:
    data = [compare(prompt, a, b) for prompt, a, b in edges if a != b]
    cyclic = in_cycles(table(*data))
    for prompt in "pq":
        here = {(a, b) for p, a, b in edges if p == prompt and a != b}
        expected = _on_a_cycle(here)
        marked = {
            comparison.responses
            for comparison, mark in zip(data, cyclic, strict=True)
            if mark and comparison.prompt == user_turn(prompt)
        }
        assert marked == expected


def test_a_cycle_is_of_one_prompt() -> None:
    data = [compare("p", "a", "b"), compare("p", "b", "c"), compare("q", "c", "a")]
    assert not in_cycles(table(*data)).any()
    data.append(compare("p", "c", "a"))
    assert in_cycles(table(*data)).tolist() == [True, True, False, True]
    assert pairs_of(data, replace(EVERYTHING, cycles="drop")) == {("q", "c", "a")}
    assert len(pairs_of(data, EVERYTHING)) == 4


@given(JUDGED)
@settings(max_examples=60, deadline=None)
def test_votes_are_those_of_a_count(judged: list[Judged]) -> None:
    pairs = table(*comparisons(judged))
    stands, drawn = votes(pairs)
    counts: Counter[tuple[int, int]] = Counter()
    for row in range(len(pairs)):
        low, high = sorted((int(pairs.chosen[row]), int(pairs.rejected[row])))
        counts[low, high] += 0 if pairs.tie[row] else 1 if pairs.chosen[row] == low else -1
    for (low, high), balance in counts.items():
        rows = [r for r in range(len(pairs)) if {pairs.chosen[r], pairs.rejected[r]} == {low, high}]
        assert all(drawn[rows] == (balance == 0))
        chosen = [int(pairs.chosen[r]) for r in rows if stands[r]]
        assert chosen == ([] if balance == 0 else [low if balance > 0 else high])


def test_every_filter_drops_what_it_is_for() -> None:
    good = [compare("what is it", "a", "b"), compare("what was it", "a", "b")]
    cases: list[tuple[list[Comparison], FilterConfig, str]] = [
        ([compare("x", "a", "b")], replace(EVERYTHING, min_prompt_chars=2), "short prompt"),
        ([compare(" What  IS it", "c", "d")], EVERYTHING, "repeated prompt"),
        ([compare("hm", "a", "b")], replace(EVERYTHING, min_intention=1), "unclear intention"),
        ([compare("?!?!", "a", "b")], replace(EVERYTHING, min_semantics=1), "unclear semantics"),
        (
            [compare("what is the latest news about it", "a", "b")],
            replace(EVERYTHING, answerable=True),
            "not answerable",
        ),
        ([good[0]], EVERYTHING, "duplicate judgement"),
        ([compare("tie it now", "a", "b", ranks=(1, 1))], EVERYTHING, "tie"),
        (
            [compare("what is it", "b", "a")],
            replace(EVERYTHING, votes="majority"),
            "tie or drawn vote",
        ),
        ([compare("what is it", "b", "a")], replace(EVERYTHING, cycles="drop"), "cycle"),
    ]
    for extra, config, name in cases:
        pairs, selection = filtered([*good, *extra], config)
        dropped = {step.name: step.dropped for step in selection.steps if step.dropped}
        assert set(dropped) == {name}, (name, dropped)
        assert len(pairs) == len(good) + len(extra) - dropped[name]
        incoming = [step.pairs for step in selection.steps]
        outgoing = [step.pairs - step.dropped for step in selection.steps]
        assert incoming[1:] == outgoing[:-1] and outgoing[-1] == len(pairs)


def test_of_prompts_that_differ_in_spelling_one_stays_whatever_the_order() -> None:
    data = [
        compare(prompt, "a", "b")
        for prompt in ("Ask me", "ask ME", "ａｓｋ me", "ask  me ", "other")
    ]
    ways = {frozenset(pairs_of(list(order), EVERYTHING)) for order in itertools.permutations(data)}
    assert len(ways) == 1 and len(ways.pop()) == 2


def test_intents_are_capped_at_a_multiple_of_the_median() -> None:
    data = [
        compare(f"{task} {i}", "a", "b", task=task)
        for task, count in (("chat", 50), ("math", 10), ("code", 10))
        for i in range(count)
    ]
    pairs, _ = filtered(data, replace(EVERYTHING, intent_cap=1.5))
    assert Counter(pair.task for pair in pairs) == {"chat": 15, "math": 10, "code": 10}
    backwards, _ = filtered(data[::-1], replace(EVERYTHING, intent_cap=1.5))
    texts = lambda found: {(str(p.prompt), p.chosen, p.rejected, p.task) for p in found}  # noqa: E731
    assert texts(backwards) == texts(pairs)
    other, _ = filtered(data, replace(EVERYTHING, intent_cap=1.5, seed=1))
    assert texts(other) != texts(pairs)


def test_annotators_who_agree_with_nobody_are_dropped() -> None:
    data = []
    for i in range(40):
        for name in ("ann", "bob", "contrary"):
            best = (1, 2) if (i % 2 == 0) != (name == "contrary") else (2, 1)
            data.append(compare(f"question {i}", "a", "b", ranks=best, annotator=name))
    pairs, _ = filtered(data, replace(EVERYTHING, min_kappa=0.0))
    assert {pair.annotator for pair in pairs} == {"ann", "bob"} and len(pairs) == 80


def test_agreement_is_that_of_the_textbooks() -> None:
    """Ten pairs judged by two, counted by hand: 7 alike, 3 not, no ties."""
    verdicts = [(1, 1)] * 4 + [(2, 2)] * 3 + [(1, 2)] * 2 + [(2, 1)]
    data = [
        compare(f"q{i}", "a", "b", ranks=(1, 2) if verdict == 1 else (2, 1), annotator=name)
        for i, both in enumerate(verdicts)
        for name, verdict in zip(("ann", "bob"), both, strict=True)
    ]
    pairs = table(*data)
    low_first = pairs.low_high()[0] == np.where(
        pairs.chosen_index == 0, pairs.chosen, pairs.rejected
    )
    result = agreement(pairs)
    (between,) = result.between
    assert (between.one, between.other, between.pairs) == ("ann", "bob", 10)
    assert between.same == 0.7
    # what the lower digest is differs from pair to pair, so chance agreement is counted on those verdicts
    first = [low == (v == 1) for low, (v, _) in zip(low_first[::2], verdicts, strict=True)]
    second = [low == (v == 1) for low, (_, v) in zip(low_first[1::2], verdicts, strict=True)]
    p, q = np.mean(first), np.mean(second)
    chance = p * q + (1 - p) * (1 - q)
    assert between.kappa == pytest.approx((0.7 - chance) / (1 - chance))
    # alpha = 1 - observed / expected disagreement, by Krippendorff's coincidences of 20 values
    ones = sum(first) + sum(second)
    expected = 2 * ones * (20 - ones) / (20 * 19)
    assert result.alpha == pytest.approx(1 - 0.3 / expected)
    assert result.judged_twice == 10
    alone = agreement(table(*data[::2]))
    assert alone.alpha is None and alone.between == []


def test_a_prompt_weighs_the_same_however_many_pairs_it_has() -> None:
    data = [compare("ranked", *"abcd"), compare("paired", "a", "b")]
    pairs, _ = filtered(data, replace(EVERYTHING, weigh="prompt"))
    sums: Counter[str] = Counter()
    for pair in pairs:
        sums[str(pair.prompt[0]["content"])] += pair.weight  # type: ignore[assignment]
    assert sums == {"ranked": pytest.approx(1.0), "paired": 1.0}
    assert len(pairs) == 7
    assert weights_of(np.array([5, 5, 9], np.uint64)).tolist() == [0.5, 0.5, 1.0]


def test_rules_mark_what_nobody_could_answer() -> None:
    marks = {
        text: by_rules([user_turn(text)])[0]
        for text in (
            "为什么天空是蓝色的？",
            "hi",
            "????",
            "\ufffd\ufffd\ufffda",
            "aaaaaaaaaaaaaaaaaaa",
            "现在几点了？",
        )
    }
    assert marks["为什么天空是蓝色的？"] == Quality(2, 2, 1)
    assert marks["hi"].intention == 0
    assert marks["????"] == marks["\ufffd\ufffd\ufffda"] == Quality(0, 0, 0)
    assert marks["aaaaaaaaaaaaaaaaaaa"].semantics == 1
    assert marks["现在几点了？"].answerable == 0


def test_marks_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "marks.jsonl"
    line = {"prompt": "one", "intention": 2, "semantics": 1, "answerable": 0}
    path.write_text(json.dumps(line), encoding="utf-8")
    assert from_file(path)([user_turn("one")]) == [Quality(2, 1, 0)]
    with pytest.raises(UserError, match="no marks for the prompt 'two'"):
        from_file(path)([user_turn("two")])
    path.write_text(json.dumps(line | {"semantics": 3}), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"marks.jsonl:1: semantics is 3; give a whole number from 0 to 2"
    ):
        from_file(path)
    data = [compare("one", "a", "b"), compare("two", "a", "b")]
    lines = [line, line | {"prompt": "two", "semantics": 2}]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert pairs_of(data, replace(EVERYTHING, marks=path, min_semantics=2)) == {("two", "a", "b")}


@pytest.fixture
def endpoint() -> Iterator[tuple[Endpoint, list[Any]]]:
    """A model behind HTTP that marks by the last letter of a prompt; and what it was asked."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers["Authorization"], body))
            mark = body["messages"][-1]["content"][-1]
            marks = {"intention": int(mark), "semantics": 2, "answerable": 1}
            content = "no idea" if mark == "9" else f"```json\n{json.dumps(marks)}\n```"
            answer = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1/", "judge", key="secret"), asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_marks_from_an_endpoint(endpoint: tuple[Endpoint, list[Any]]) -> None:
    model, asked = endpoint
    prompts = [user_turn(f"prompt {i % 3}") for i in range(10)]
    assert [quality.intention for quality in from_endpoint(model)(prompts)] == [0, 1, 2] * 3 + [0]
    path, key, body = asked[0]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "judge")
    data = [compare(f"prompt {i}", "a", "b") for i in range(3)]
    config = replace(EVERYTHING, endpoint=model, min_intention=2)
    assert pairs_of(data, config) == {("prompt 2", "a", "b")}
    with pytest.raises(UserError, match="judge did not answer with marks"):
        from_endpoint(model)([user_turn("prompt 9")])
    with pytest.raises(UserError, match="intention is 7"):
        from_endpoint(model)([user_turn("prompt 7")])
    with pytest.raises(UserError, match="cannot be asked"):
        from_endpoint(replace(model, url="http://127.0.0.1:9/v1"))([user_turn("prompt 1")])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FilterConfig(edges=(3, 2)), "edges"),
        (FilterConfig(edges=(0, 2)), "edges"),
        (FilterConfig(intent_cap=0.0), "intent_cap"),
        (FilterConfig(marks=Path("x"), endpoint=Endpoint("u", "m")), "give one of them"),
    ],
)
def test_settings_that_mean_nothing_are_refused(config: FilterConfig, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        survey([], config, len)
