"""The oracle's world: its gold reward by hand, and that what is planted in its annotators is there."""

import random

import pytest

from rlhf.data.oracle.oracle import OracleData, gold_reward, prefers_first, task_of, written_answer
from rlhf.data.records import prompt_text
from sharding.errors import UserError

PROMPT = "birds: wren rook kite;"


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("wren rook kite", 2.0),
        ("kite wren rook", 2.0),  # in any order
        ("", 0.0),
        ("wren", 2 / 3),
        ("wren wren", 2 / 3 - 0.25),  # again
        ("wren oak and kite", 4 / 3 - 0.5),
        ("and " * 20, -2.0),  # never below
    ],
)
def test_the_gold_reward_by_hand(answer: str, reward: float) -> None:
    assert gold_reward(PROMPT + answer) == pytest.approx(reward)


def test_a_text_without_a_prompt_is_worth_nothing() -> None:
    assert gold_reward("wren rook kite") == -2.0


def test_the_same_seed_makes_the_same_world_and_no_prompt_stands_on_both_sides() -> None:
    one, two, other = (OracleData(prompts=60, seed=seed).splits() for seed in (0, 0, 1))
    assert one == two and one != other
    sides = [{prompt_text(r.prompt) for r in side} for side in one.prompts]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 60
    for table in (one.sft, one.preferences):
        for side, texts in zip(table, sides, strict=True):
            assert {prompt_text(r.prompt) for r in side} <= texts
    assert {record.task for record in one.preferences.train} == {
        "birds",
        "trees",
        "tools",
        "stones",
    }
    assert all(
        record.task == task_of(prompt_text(record.prompt)) for record in one.preferences.train
    )


def _share(data: OracleData, first: str, second: str) -> float:
    rng = random.Random(0)
    return sum(prefers_first(data, PROMPT, first, second, rng) for _ in range(2000)) / 2000


def test_annotators_without_faults_prefer_what_is_better() -> None:
    data = OracleData(noise=0.0)
    assert _share(data, "wren rook kite", "wren rook") == 1.0
    assert _share(data, "wren rook", "wren rook kite") == 0.0


def test_noise_is_that_of_a_normal_distribution() -> None:
    data = OracleData(noise=2 / 3)  # one standard deviation between the two
    assert _share(data, "wren rook kite", "wren rook") == pytest.approx(0.841, abs=0.03)


def test_a_liking_for_length_turns_preferences_round() -> None:
    honest, biased = OracleData(noise=0.0), OracleData(noise=0.0, length_bias=0.5)
    assert _share(honest, "wren rook kite", "wren rook kite and so") == 1.0
    assert _share(biased, "wren rook kite", "wren rook kite and so") == 0.0


def test_a_circular_taste_makes_cycles() -> None:
    data = OracleData(noise=0.0, cycle=5.0)
    three, four, five = ("wren rook kite", "wren rook kite and", "wren rook kite and so")
    assert _share(data, four, three) == _share(data, five, four) == _share(data, three, five) == 1.0


def test_written_answers_are_as_told() -> None:
    rng = random.Random(0)
    data = OracleData(recall=0.6, extra_words=2.0)
    answers = [written_answer(data, PROMPT, rng).split() for _ in range(4000)]
    wanted = {"wren", "rook", "kite"}
    recall = sum(len(wanted & set(words)) for words in answers) / (3 * len(answers))
    extra = sum(len(words) - len(wanted & set(words)) for words in answers) / len(answers)
    assert recall == pytest.approx(0.6, abs=0.02) and extra == pytest.approx(2.0, abs=0.1)
    assert all(answers)


@pytest.mark.parametrize(
    "field", [{"prompts": 2000}, {"answers": 1}, {"recall": 1.5}, {"noise": -1.0}]
)
def test_fields_out_of_range_are_named(field: dict[str, float]) -> None:
    with pytest.raises(UserError, match=rf"data(: |\.){next(iter(field))} = "):
        OracleData(**field).splits()  # type: ignore[arg-type]
