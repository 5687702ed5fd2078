"""Every record is used or left out for a reason, told in a line a side; what does not fit meets one policy."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm_jax.tokenizers import Tokenizer, load_tokenizer
from rlhf.data.accounts import Account, Accounts
from rlhf.data.batches import prompt_rows, sft_rows
from rlhf.data.files.files import FilesData
from rlhf.data.filter_config import FilterConfig
from rlhf.data.mistakes import OnMistake, Tally
from rlhf.data.pair_rows import token_pairs
from rlhf.data.prepare import build_tables, open_accounts, open_tables
from rlhf.data.reading import read_records
from rlhf.data.records import Example, Preference, Prompt, user_turn
from rlhf.data.reviews.reviews import ReviewsData
from rlhf.evaluate import EvaluateConfig
from rlhf.ppo_run import tokenized
from rlhf.recipe import Recipe
from rlhf.reward import RewardConfig
from sharding.errors import UserError

SHARED = Path(__file__).parents[3] / "shared"
TABLES = ("sft", "preferences", "prompts")
SYSTEM = {"role": "system", "content": "be brief"}


def write(folder: Path, kinds: list[tuple[int, int, bool, bool]]) -> FilesData:
    """A record of each table for every (prompt, size, system message?, entry that is skipped?)."""
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    for number, size, system, empty in kinds:
        content = f"prompt {number} " + "p" * (size % 9)
        prompt: Any = [SYSTEM, {"role": "user", "content": content}] if system else content
        gap = "y" * (size % 7)
        for name, fields in (
            ("sft", {"response": "x" * size}),
            ("preferences", {"chosen": "x" * (size % 13 + 1), "rejected": f"{gap}z"}),
            ("prompts", {}),
        ):
            tables[name].append({"prompt": " " if empty else prompt, **fields})
    paths: dict[str, Any] = {name: folder / f"{name}.jsonl" for name in TABLES}
    for name, lines in tables.items():
        paths[name].write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return FilesData(**paths, heldout_fraction=0.4, mistakes=OnMistake.skip_all())


KINDS = st.lists(
    st.tuples(
        st.integers(0, 30), st.integers(1, 60), st.sampled_from([False] * 5 + [True]), st.booleans()
    ),
    min_size=20,
    max_size=60,
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(KINDS, st.integers(0, 99), st.integers(12, 50), st.booleans(), st.booleans())
def test_records_are_conserved_from_files_to_rows(
    characters: Tokenizer,
    tmp_path: Path,
    kinds: Any,
    seed: int,
    length: int,
    balance: bool,
    packed: bool,
) -> None:
    """Entries = skipped + those of both sides; of a side, all = rows + left out, with a line where any is."""
    data = replace(write(tmp_path, kinds), seed=seed, filters=FilterConfig(balance=balance))
    skipped: list[str] = []
    splits, accounts = data.undebiased().accounted(skipped.append)
    recipe = Recipe(
        data=data,
        length=length,
        prompt_length=16,
        max_prompts=5,
        reward=RewardConfig(pack_length=30 if packed else None),
        evaluate=EvaluateConfig(num_prompts=3),
    )
    try:
        found = tokenized(splits, characters, recipe, accounts)
    except UserError as error:  # nothing trains on none
        if not re.search("no record fits|length balance", str(error)):
            raise
        return
    assert found.judged is not None
    rows = {
        ("sft", "train"): len(found.sft.ids),
        ("sft", "heldout"): len(found.heldout_sft.ids),
        ("preferences", "train"): int((found.judged.train.weight > 0).sum()),
        ("preferences", "heldout"): len(found.judged.heldout.weight),
        ("prompts", "train"): len(found.prompts.row),
        ("prompts", "heldout"): len(found.heldout_prompts.row),
    }
    by_side = {(account.table, account.side): account for account in accounts}
    assert by_side.keys() == rows.keys()
    for name, account in by_side.items():
        assert account.used == rows[name] > 0
        assert account.total == rows[name] + sum(account.left_out.values())
        assert (account.line() is None) == (account.total == rows[name])
        assert all(count > 0 for count in account.left_out.values())
    empty = sum(broken for *_, broken in kinds)
    for table in TABLES:
        both = sum(by_side[table, side].total for side in ("train", "heldout"))
        assert both == len(kinds) - empty
    assert bool(skipped) == bool(empty)
    assert len(found.texts) == len(found.prompts.row) and found.prompts.row.tolist() == list(
        range(len(found.texts))
    )
    assert not any(SYSTEM["content"] in text for text in found.texts + found.heldout_texts)


def test_the_lines_of_a_run(characters: Tokenizer, tmp_path: Path) -> None:
    kinds = [(n, 3 + n % 5, False, False) for n in range(40)]
    kinds[4:4] = [(100, 50, False, False), (101, 3, True, False), (0, 3, False, False)]
    data = write(tmp_path, kinds)
    root = tmp_path / "tables"
    build_tables(data.undebiased(), root, TABLES)
    accounts = open_accounts(root, TABLES)
    splits = open_tables(data, root, TABLES)
    recipe = Recipe(data=data, length=40, prompt_length=17, evaluate=EvaluateConfig(num_prompts=9))
    tokenized(splits, characters, recipe, accounts)
    told = accounts.lines()
    assert len(told) == len({line.split(" used; ")[0].split(" of ")[1] for line in told})
    text = "\n".join(told)
    place = f"{tmp_path}/sft.jsonl"
    assert f"1 longer than length = 40 tokens ({place}:5)" in text
    assert f"1 not in the model's chat format ({place}:6: no system messages)" in text
    assert f"1 repeating another prompt ({tmp_path}/prompts.jsonl:7)" in text
    assert "by filter 'duplicate judgement'" in text or "by filter 'length balance'" in text
    assert "beyond the first 9" in text


@pytest.mark.parametrize("kind", ["long", "system"])
@pytest.mark.parametrize("table", TABLES)
def test_one_setting_leaves_out_or_refuses_in_every_table(
    characters: Tokenizer, tmp_path: Path, table: str, kind: str
) -> None:
    fine = user_turn("fine")
    bad = user_turn("p" * 50) if kind == "long" else (SYSTEM, *fine)
    where = "data.jsonl:2"
    account = Account(table, "train")

    def rows(unfit: Any, *prompts: Any) -> int:
        places = ["data.jsonl:1", where][-len(prompts) :]
        both = list(zip(prompts, places, strict=True))
        if table == "sft":
            examples = [Example(p, "a", where=w) for p, w in both]
            return len(sft_rows(examples, characters, 30, account, unfit).ids)
        if table == "preferences":
            pairs = [Preference(p, "a", "b", where=w) for p, w in both]
            return len(token_pairs(pairs, characters, 30, account, unfit))
        return len(
            prompt_rows([Prompt(p, where=w) for p, w in both], characters, 30, account, unfit).row
        )

    with pytest.raises(UserError, match=f"{where}: .*unfit = skip") as caught:
        rows("refuse", fine, bad)
    assert "\n" not in str(caught.value) and "data.jsonl:1" not in str(caught.value)
    account = Account(table, "train")
    assert rows("skip", fine, bad) == 1 == account.used
    assert where in str(account.line()) and "1 of 2 training" in str(account.line())
    account = Account(table, "train")
    with pytest.raises(UserError, match=f"{table}: no record fits.*{where}"):
        rows("skip", bad)


def test_a_record_of_no_file_is_named_by_its_number(characters: Tokenizer) -> None:
    prompts = [Prompt(user_turn("fine")), Prompt(user_turn("long " * 20))]
    with pytest.raises(UserError, match=r"record 1 'long long long long ': longer than prompt_len"):
        prompt_rows(prompts, characters, 20, unfit="refuse")
    assert prompt_rows(prompts, characters, 20).row.tolist() == [0]
    account = Account("prompts", "heldout")
    assert prompt_rows(prompts * 3, characters, 20, account, most=2).row.tolist() == [0, 2]
    assert account.left_out == {"longer than prompt_length = 20 tokens": 1, "beyond the first 2": 3}
    assert account.used == 2


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"])
def test_system_messages_are_left_out_where_a_generation_knows_none(name: str) -> None:
    tokenizer = load_tokenizer(SHARED / "tokenizers" / name)
    knows = name in ("chatglm3-6b", "glm-4-9b-chat")
    prompts = [user_turn("你好"), (SYSTEM, *user_turn("你好"))]
    account = Account("sft", "train")
    examples = [Example(p, "好", where=f"x.jsonl:{n}") for n, p in enumerate(prompts, 1)]
    assert len(sft_rows(examples, tokenizer, 99, account).ids) == 1 + knows
    assert knows == (account.line() is None)
    if not knows:
        assert "(x.jsonl:2: messages system, user: this model knows only user and" in str(
            account.line()
        )


def test_an_entry_of_another_kind_is_skipped_and_not_read(tmp_path: Path) -> None:
    """Once, however many records it holds."""
    tree: list[Any] = [{"role": "assistant", "text": t, "rank": n} for n, t in enumerate("ab")]
    second = {"role": "prompter", "text": "more", "replies": tree}
    tree = [*tree, {"role": "assistant", "text": "c", "replies": [second]}]
    entry = {"message_tree_id": "1", "prompt": {"role": "prompter", "text": "q", "replies": tree}}
    path = tmp_path / "tree.jsonl"
    path.write_text(f"{json.dumps(entry)}\n" * 2, encoding="utf-8")
    told: list[str] = []
    data = FilesData(path, mistakes=OnMistake.skip_all())
    assert len(list(read_records([path], Tally(data.mistakes)))) == 4
    data.splits(told.append)
    assert told == [f"2 entries skipped: malformed, the first at {path}:1"]


def test_accounts_survive_their_file(tmp_path: Path) -> None:
    accounts = Accounts()
    accounts.of("sft", "train", 9).leave_out("longer than length = 3 tokens", 2, "x:1")
    accounts.of("prompts", "heldout", 4)
    accounts.write(tmp_path / "accounts.json")
    again = Accounts.read(tmp_path / "accounts.json")
    assert [vars(account) for account in again] == [vars(account) for account in accounts]
    assert again.lines() == [
        "7 of 9 SFT examples used; left out: 2 longer than length = 3 tokens (x:1, ...)".replace(
            "SFT", "training SFT"
        )
    ]


def test_reasons_name_the_first_records_alone() -> None:
    account = Account("preferences", "heldout", 10_000)
    for n in range(5_000):
        account.leave_out("longer than length = 3 tokens", 1, f"x:{n}")
    assert account.line() == (
        "5,000 of 10,000 held-out pairs used; left out: "
        "5,000 longer than length = 3 tokens (x:0, x:1, x:2, ...)"
    )
    assert Counter(account.left_out).total() + account.used == 10_000


def test_every_review_is_used_or_left_out(tmp_path: Path) -> None:
    """Counts are those of the lines of both files, by hand."""
    fine = ["灯光都很亮，看着真舒服", "毛巾都很新，摸着真舒服"]
    pos = [*fine, fine[0], "灯泡两面都说，算不得评价", "", "太短", "灯" * 90]
    neg = ["灯泡两面都说，算不得评价", "宾馆反馈 谢谢您的光临惠顾", "燈號這個東西實在是壞透頂了"]
    for name, lines in (("pos", pos), ("neg", [*neg, "窗帘都太暗，看着真别扭"])):
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    told: list[str] = []
    splits = ReviewsData(tmp_path / "pos", tmp_path / "neg").splits(told.append)
    assert sum(map(len, splits.sft)) == 3
    assert told == [
        "3 of 10 reviews used; left out: 1 repeating another line; 1 without a buyer's word; "
        "2 in both files; 1 shorter than min_chars = 10; 1 longer than max_chars = 80; "
        "1 not in simplified characters"
    ]
