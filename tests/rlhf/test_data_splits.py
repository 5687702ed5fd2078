"""Dialogues are never cut in two: by first turns that are normalised here, over every table and source."""

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.data.files.files import FilesData
from rlhf.data.filter_config import FilterConfig
from rlhf.data.mistakes import OnMistake
from rlhf.data.oracle.oracle import OracleData
from rlhf.data.prepare import prepare
from rlhf.data.records import Splits, dialogue_key, user_turn
from rlhf.data.reviews.reviews import ReviewsData
from sharding.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def first_turn(prompt: Iterable[Any]) -> str:
    """Plainly: the first thing that the user says."""
    text = next(m["content"] for m in prompt if m["role"] == "user")
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def sides(splits: Splits) -> tuple[set[str], set[str]]:
    train, heldout = (
        {first_turn(record.prompt) for table in splits for record in table[side]} for side in (0, 1)
    )
    return train, heldout


def histories(records: Iterable[Any]) -> set[str]:
    return {m["content"] for r in records for m in r.prompt if m["role"] == "assistant"}


# (first turn, how it is spelt, system message, depth of the dialogue that a record shows)
FORMS = (str, str.upper, lambda text: f"  {text} ", lambda text: text.replace(" ", "\u3000"))
RECORDS = st.lists(
    st.tuples(
        st.integers(0, 14),
        st.sampled_from(FORMS),
        st.sampled_from(["", "be brief"]),
        st.integers(0, 3),
    ),
    min_size=12,
    max_size=40,
)


def messages(dialogue: int, spell: Any, system: str, depth: int) -> list[dict[str, str]]:
    """A dialogue up to its `depth`-th answer; answers are the dialogue's own."""
    opening = [{"role": "system", "content": system}] if system else []
    talk = [*opening, {"role": "user", "content": spell(f"first turn {dialogue}")}]
    for turn in range(depth):
        talk.append({"role": "assistant", "content": f"answer {dialogue} {turn} a"})
        talk.append({"role": "user", "content": "and then?"})  # which many dialogues have
    return talk


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(RECORDS, RECORDS, RECORDS, st.integers(0, 50), st.booleans())
def test_no_dialogue_and_no_heldout_answer_is_in_training(
    tmp_path: Path, sft: Any, compared: Any, asked: Any, seed: int, named: bool
) -> None:
    answer = lambda record: f"answer {record[0]} {record[3]} "  # noqa: E731
    tables: dict[str, list[dict[str, Any]]] = {
        "sft": [{"prompt": messages(*r), "response": answer(r) + "a"} for r in sft],
        "preferences": [
            {"prompt": messages(*r), "chosen": answer(r) + "a", "rejected": answer(r) + "b"}
            for r in compared
        ],
        "prompts": [{"prompt": messages(*r)} for r in asked],
    }
    paths: dict[str, Any] = {}
    for name, lines in tables.items():
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    if not named:
        del paths["prompts"]
    filters = FilterConfig(balance=False)
    splits = FilesData(**paths, heldout_fraction=0.4, seed=seed, filters=filters).splits()
    train, heldout = sides(splits)
    assert not train & heldout
    trained = [record for table in splits for record in table.train]
    answers = {text for pair in splits.preferences.heldout for text in (pair.chosen, pair.rejected)}
    assert not answers & histories(trained)
    assert not answers & {example.response for example in splits.sft.train}
    assert not {e.response for e in splits.sft.heldout} & histories(trained)
    # a record is on the same side in every table: the side follows from the first turn alone
    for name, lines in tables.items():
        table = getattr(splits, name)
        if name == "sft":
            count = [
                sum(first_turn(x["prompt"]) in side for x in lines) for side in (train, heldout)
            ]
            assert count == [len(table.train), len(table.heldout)]


def test_what_precedes_or_follows_the_first_turn_makes_no_other_dialogue() -> None:
    first, more = user_turn("Hello  there"), ({"role": "assistant", "content": "hi"},)
    system = ({"role": "system", "content": "be brief", "tools": [{"name": "f"}]},)
    same = [first, user_turn("hello there"), user_turn("ｈｅｌｌｏ there\n")]
    same += [
        (*system, *first),
        (*first, *more, *user_turn("and?")),
        (*system, *first, *more, *first),
    ]
    assert len({dialogue_key(prompt) for prompt in same}) == 1
    other = [user_turn("hello, there"), (*more, *user_turn("and?")), user_turn("and")]
    assert len({dialogue_key(prompt) for prompt in [*other, first]}) == 4
    result = {"role": "observation", "content": "42"}
    assert dialogue_key((*system, *more, result)) == dialogue_key((*more, result))


def test_single_turns_stay_on_the_side_that_they_were_on() -> None:
    """The hash of a dialogue of one turn is spelt out: other releases held the same prompts out."""
    for seed in (0, 7):
        data = FilesData(heldout_fraction=0.3, seed=seed)
        for n in range(200):
            plain = json.dumps([["user", f"frage {n}"]], ensure_ascii=False)
            digest = hashlib.blake2b(json.dumps([seed, plain]).encode(), digest_size=6).digest()
            held = int.from_bytes(digest) / 2**48 < 0.3
            assert data.heldout(user_turn(f"Frage  {n} ")) == held


@pytest.mark.parametrize("seed", range(3))
def test_the_oracle_and_the_reviews_hold_dialogues_out(tmp_path: Path, seed: int) -> None:
    train, heldout = sides(OracleData(prompts=200, seed=seed).splits())
    assert not train & heldout and len(train) + len(heldout) == 200
    openings = [f"{a}{b}" for a in "abcdefgh" for b in "stuvw"]
    spelt = [text for x in openings for text in (x, x.upper(), x.title())]
    for name in ("pos", "neg"):
        lines = [f"{x} is what {name} buyers say of {x}" for x in spelt]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    data = ReviewsData(tmp_path / "pos", tmp_path / "neg", heldout_fraction=0.4, seed=seed)
    train, heldout = sides(data.splits())
    assert not train & heldout and len(train) + len(heldout) == len(openings)
    assert min(len(train), len(heldout)) > 5


def test_one_dialogue_leaves_a_side_empty_which_is_named(tmp_path: Path) -> None:
    """Nine prompts of one dialogue are one draw, not nine."""
    lines = [{"prompt": messages(0, str, "", n), "response": f"x{n}"} for n in range(9)]
    path = tmp_path / "sft.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    for seed in range(8):
        data = FilesData(path, heldout_fraction=0.5, seed=seed)
        assert sorted(map(len, data.splits().sft)) == [0, 9]
        with pytest.raises(
            UserError, match=r"no (train|heldout) example is left in sft; give more"
        ):
            prepare(data, tmp_path / "prepared", ["sft"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("fraction", [0.1, 0.2])
def test_openassistants_dialogues_are_on_one_side(fraction: float) -> None:
    """49 of 63 held-out prompts shared their first turn with training when whole histories were hashed."""
    folder = SHARED / "oasst1-zh"
    files = folder / "oaast_sft_zh.json", folder / "oaast_rm_zh.json"
    data = FilesData(*files, heldout_fraction=fraction, mistakes=OnMistake.skip_all())
    splits = data.splits()
    train, heldout = sides(splits)
    assert not train & heldout and len(heldout) > 25
    assert sum(len({str(r.prompt) for r in side}) for side in splits.preferences) > 500
    # a handful of answers ("hello!") stands in other dialogues too, or in one whose file lacks its beginning
    answers = {text for pair in splits.preferences.heldout for text in (pair.chosen, pair.rejected)}
    trained = [record for table in splits for record in table.train]
    assert len(answers & histories(trained)) < 0.02 * len(answers)
