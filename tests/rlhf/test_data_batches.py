"""Batches: what stands where, every row once an epoch, and an exact restart."""

import json
import time
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
import pytest

from glm_jax.batch import Judged, Prompts, Sequences
from glm_jax.tokenizers import ChatGLM3Tokenizer
from rlhf.data.batches import in_order, prompt_rows, sft_rows, shuffled
from rlhf.data.pair_rows import judged_rows, token_pairs
from rlhf.data.records import Example, Preference, Prompt, user_turn
from sharding.errors import UserError

LENGTH, PROMPT_LENGTH, BATCH = 32, 14, 4
Batch = TypeVar("Batch")
WORDS = ("灯光", "毛巾", "窗帘", "走廊", "电梯", "书桌", "花园", "楼梯", "地毯", "浴室", "阳台")


def whole(batch: Batch) -> Batch:
    """All rows of a batch, looked up."""
    looked_up: Batch = jax.tree.map(np.asarray, batch)
    return looked_up


def judged(records: list[Preference], tokenizer: ChatGLM3Tokenizer, length: int) -> Judged:
    return judged_rows(records, token_pairs(records, tokenizer, length), length)


@pytest.fixture(scope="module")
def tokenizer() -> ChatGLM3Tokenizer:
    return ChatGLM3Tokenizer.train([f"{word}很亮太旧，还行。" for word in WORDS], vocab_size=320)


@pytest.fixture(scope="module")
def sequences(tokenizer: ChatGLM3Tokenizer) -> Sequences:
    return sft_rows(
        [Example(user_turn(w), "很亮" + "，" * i) for i, w in enumerate(WORDS)], tokenizer, LENGTH
    )


@pytest.fixture(scope="module")
def pairs(tokenizer: ChatGLM3Tokenizer) -> Judged:
    return judged(
        [Preference(user_turn(w), "很亮", "太旧，" * (i % 3 + 1)) for i, w in enumerate(WORDS)],
        tokenizer,
        LENGTH,
    )


@pytest.fixture(scope="module")
def prompts(tokenizer: ChatGLM3Tokenizer) -> Prompts:
    return prompt_rows([Prompt(user_turn(w)) for w in WORDS], tokenizer, PROMPT_LENGTH)


def test_sequences_hold_the_conversation_and_its_targets(
    sequences: Sequences, tokenizer: ChatGLM3Tokenizer
) -> None:
    assert sequences.ids.shape == (11, LENGTH)
    assert [array.dtype for array in sequences] == [np.int32, bool, bool]
    for row, word in enumerate(WORDS):
        answer = {"role": "assistant", "content": "很亮" + "，" * row}
        ids, target = tokenizer.chat_example([*user_turn(word), answer])
        assert sequences.ids[row, : len(ids)].tolist() == ids
        assert sequences.target[row, : len(ids)].tolist() == target
        assert sequences.valid[row].tolist() == [i < len(ids) for i in range(LENGTH)]
        assert not sequences.target[row, len(ids) :].any()


def test_pairs_share_the_prompt_and_count_only_the_last_answer(
    tokenizer: ChatGLM3Tokenizer,
) -> None:
    talk = (
        {"role": "user", "content": "灯光"},
        {"role": "assistant", "content": "很亮"},
        {"role": "user", "content": "毛巾"},
    )
    pair = judged([Preference(talk, "还行。", "太旧")], tokenizer, 40).pairs
    start = len(tokenizer.chat_prompt(talk))
    for side, text in ((pair.chosen, "还行。"), (pair.rejected, "太旧")):
        answer = side.ids[0][side.target[0]]
        assert side.target[0].argmax() == start
        assert answer[-1] == tokenizer.eos_id and tokenizer.decode_answer(answer) == text
    assert (pair.chosen.ids[0, :start] == pair.rejected.ids[0, :start]).all()
    assert pair.chosen.ids[0, :start].tolist() == tokenizer.chat_prompt(talk)


def test_prompts_end_in_the_last_column(prompts: Prompts, tokenizer: ChatGLM3Tokenizer) -> None:
    assert (prompts.ids[:, -1] == tokenizer.assistant_id).all()
    assert prompts.valid[:, -1].all() and not prompts.valid[:, 0].any()
    assert prompts.row.tolist() == list(range(11)) and prompts.row.dtype == np.int32
    for row, word in enumerate(WORDS):
        ids = prompts.ids[row][prompts.valid[row]]
        assert ids.tolist() == tokenizer.chat_prompt(user_turn(word))


def test_every_row_comes_once_an_epoch_in_a_new_order(prompts: Prompts) -> None:
    batches = shuffled(prompts, BATCH, seed=3)
    taken = [whole(next(batches)) for _ in range(11)]  # four epochs of 11 rows
    assert all(
        isinstance(batch, Prompts) and batch.ids.shape == (BATCH, PROMPT_LENGTH) for batch in taken
    )
    epochs = np.concatenate([batch.row for batch in taken]).reshape(4, 11)
    assert np.sort(epochs).tolist() == [list(range(11))] * 4
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    for batch in taken:
        assert (batch.ids == prompts.ids[batch.row]).all()
    again = shuffled(prompts, BATCH, seed=3)
    assert all((whole(next(again)).row == batch.row).all() for batch in taken)
    other = shuffled(prompts, BATCH, seed=4)
    assert any((whole(next(other)).row != batch.row).any() for batch in taken)


def test_no_pair_of_many_is_swapped_on_its_way_into_rows(tokenizer: ChatGLM3Tokenizer) -> None:
    """500 pairs: if one in twenty were swapped, all would stand right in 1 of 10^11 cases."""
    records = []
    for number in range(500):
        answers = ["很亮" + "，" * (number % 7), "太旧" + "。" * (number % 5)]
        good, bad = answers if number % 2 else answers[::-1]  # neither text nor length tells
        records.append(Preference(user_turn(WORDS[number % len(WORDS)]), good, bad))

    def tokens(record: Preference, answer: str) -> list[int]:
        return tokenizer.chat_example([*record.prompt, {"role": "assistant", "content": answer}])[0]

    given = [tuple(tokens(r, x)) for r in records for x in (r.chosen, r.rejected)]
    both = list(zip(given[::2], given[1::2], strict=True))
    rows = judged(records, tokenizer, 40)

    def read(batch: Judged) -> list[tuple[tuple[int, ...], ...]]:
        sides = [(np.asarray(side.ids), np.asarray(side.valid)) for side in batch.pairs]
        lists = [[tuple(i[v].tolist()) for i, v in zip(*side, strict=True)] for side in sides]
        return list(zip(*lists, strict=True))

    assert read(rows) == both
    batches = shuffled(rows, 50, seed=1)
    epoch = [pair for _ in range(10) for pair in read(next(batches))]
    assert sorted(epoch) == sorted(both)


@pytest.mark.parametrize("table", ["sequences", "pairs", "prompts"])
def test_a_restored_iterator_goes_on_exactly(table: str, request: pytest.FixtureRequest) -> None:
    rows = request.getfixturevalue(table)
    batches = shuffled(rows, BATCH, seed=0)
    states, expected = [], []
    for _ in range(11):  # four epochs
        states.append(json.dumps(batches.get_state()))
        expected.append(whole(next(batches)))
    for number, state in enumerate(states):
        restored = shuffled(rows, BATCH, seed=0)
        restored.set_state(json.loads(state))
        for batch in expected[number : number + 3]:
            resumed = whole(next(restored))
            assert type(resumed) is type(rows)
            assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), resumed, batch))


@pytest.mark.parametrize("batch_size", [1, 4, 11, 16])
def test_evaluation_sees_every_row_in_order_and_fills_up_with_padding(
    prompts: Prompts, pairs: Judged, batch_size: int
) -> None:
    batches = [whole(batch) for batch in in_order(prompts, batch_size)]
    assert all(batch.ids.shape == (batch_size, PROMPT_LENGTH) for batch in batches)
    index = np.concatenate([batch.row for batch in batches])
    missing = -11 % batch_size
    assert index.tolist() == [*range(11), *[-1] * missing]
    valid = np.concatenate([batch.valid for batch in batches])
    assert valid.any(axis=1).tolist() == [True] * 11 + [False] * missing
    last = whole(list(in_order(pairs, batch_size))[-1])
    if missing:
        for side in last.pairs:
            assert not any(array[-missing:].any() for array in side)
        assert not last.weight[-missing:].any() and last.weight[:-missing].all()


def test_batches_may_be_wider_than_their_rows(prompts: Prompts) -> None:
    batches = [whole(batch) for batch in in_order(prompts, 3, 4)]
    rows = [batch.row.tolist() for batch in batches]
    assert rows == [[0, 1, 2, -1], [3, 4, 5, -1], [6, 7, 8, -1], [9, 10, -1, -1]]
    assert all((batch.valid.any(axis=1) == (batch.row >= 0)).all() for batch in batches)


def test_a_batch_looks_up_the_rows_it_is_asked_for() -> None:
    class Watched(np.ndarray):
        seen: ClassVar[list[int]] = []

        def __getitem__(self, where: Any) -> Any:
            if isinstance(where, tuple):
                self.seen.extend(where[0].tolist())
            return super().__getitem__(where)

    ids = np.arange(22, dtype=np.int32).reshape(11, 2)
    (batch,) = in_order((ids.view(Watched),), 11)
    assert batch[0].shape == (11, 2) and not Watched.seen
    assert batch[0][slice(4, 7), slice(0, 1)].tolist() == [[8], [10], [12]]
    assert Watched.seen == [4, 5, 6]


def test_a_prompt_that_is_too_long_is_left_out_or_named(tokenizer: ChatGLM3Tokenizer) -> None:
    fine, bad = user_turn("灯光"), user_turn("毛巾" + "很亮，" * 40)
    records = [Prompt(fine), Prompt(bad), Prompt(fine)]
    assert prompt_rows(records, tokenizer, 14).row.tolist() == [0, 2]
    with pytest.raises(
        UserError, match=r"record 1 '毛巾.*: longer than prompt_length = 14 tokens; "
    ):
        prompt_rows(records, tokenizer, 14, unfit="refuse")


def test_training_records_that_do_not_fit_are_left_out_whole(tokenizer: ChatGLM3Tokenizer) -> None:
    prompt, long = user_turn("灯光"), "很亮，" * 40
    short = sft_rows([Example(prompt, "很亮")], tokenizer, 32)
    both = sft_rows([Example(prompt, long), Example(prompt, "很亮")], tokenizer, 32)
    assert all((a == b).all() for a, b in zip(short, both, strict=True))
    kept = [Preference(prompt, "很亮", long), Preference(prompt, "很亮", "很暗")]
    pairs = judged(kept, tokenizer, 32).pairs
    assert (pairs.chosen.ids == short.ids).all() and len(pairs.rejected.ids) == 1
    with pytest.raises(UserError, match="preferences: no record fits into length = 32 tokens"):
        judged(kept[:1], tokenizer, 32)


def test_one_token_less_than_a_record_needs_is_too_short(
    sequences: Sequences, tokenizer: ChatGLM3Tokenizer
) -> None:
    record, need = Example(user_turn("灯光"), "很亮"), int(sequences.valid[0].sum())
    assert sft_rows([record], tokenizer, need).valid.all()
    with pytest.raises(UserError):
        sft_rows([record], tokenizer, need - 1)


def test_a_batch_is_ready_long_before_a_step_ends() -> None:
    rows = Sequences(*(np.zeros((12_000, 96), kind) for kind in (np.int32, bool, bool)))
    batches = shuffled(rows, 64, seed=0)
    next(batches)
    start = time.perf_counter()
    for _ in range(50):
        next(batches)
    assert (time.perf_counter() - start) / 50 < 0.1  # about 1 ms; the bound only catches a blunder
