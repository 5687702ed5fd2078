"""Judged pairs -> rows of tokens: a pair a row, or as many answers as fit."""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glm_jax.batch import Judged, Packed, Pairs, Sequences
from glm_jax.tokenizers import Tokenizer, pad_right
from rlhf.data.accounts import Account, Unfit, tokenised, too_long
from rlhf.data.balance import debiased
from rlhf.data.filter_config import FilterConfig
from rlhf.data.pairs import CountTokens, PairColumns, as_comparison
from rlhf.data.records import Preference, prompt_key
from sharding.errors import UserError


class TokenPair(NamedTuple):
    """A pair in tokens, each answer with its prompt before it and its end-of-turn token."""

    record: int  # row number of the record
    start: int  # where the answers begin
    chosen: list[int]
    rejected: list[int]


def token_pairs(
    records: Sequence[Preference],
    tokenizer: Tokenizer,
    length: int,
    account: Account | None = None,
    unfit: Unfit = "skip",
    pack_length: int | None = None,
) -> list[TokenPair]:
    """Tokenise pairs; those with an answer that makes more than `length` tokens are left out.

    With `pack_length`, so are those whose two answers make more than so many together. Raises UserError where none
    fits, and on the first that does not where `unfit` says so.
    """

    def tokenise(record: Preference) -> TokenPair:
        chosen, rejected = (
            tokenizer.chat_example([*record.prompt, {"role": "assistant", "content": answer}])[0]
            for answer in (record.chosen, record.rejected)
        )
        return TokenPair(-1, len(tokenizer.chat_prompt(record.prompt)), chosen, rejected)

    def problem(pair: TokenPair) -> str | None:
        sizes = len(pair.chosen), len(pair.rejected)
        reason = too_long(max(sizes), "length", length)
        if reason is None and pack_length is not None:
            return too_long(sum(sizes), "reward.pack_length", pack_length)
        return reason

    account = account or Account("preferences")
    fitting = tokenised(records, tokenise, problem, account, unfit)
    return [pair._replace(record=number) for number, pair in fitting]


def debiased_pairs(
    records: Sequence[Preference],
    pairs: Sequence[TokenPair],
    config: FilterConfig,
    count_tokens: CountTokens | None,
    account: Account,
) -> tuple[list[Preference], list[TokenPair]]:
    """Pairs balanced and weighed as `config` says, with the records that they are of (`rlhf.data.balance.debiased`).

    All that is decided looks at nothing but these pairs, which are what the loss sees. Lengths are the answers'
    tokens, or what `count_tokens` says. Raises UserError where balancing leaves none.
    """
    columns = PairColumns(count_tokens or (lambda text: 0))
    for pair in pairs:
        columns.add(as_comparison(records[pair.record]))
    table = columns.table()
    if count_tokens is None:
        table = dataclasses.replace(
            table,
            chosen_length=np.array([len(pair.chosen) for pair in pairs], np.int32),
            rejected_length=np.array([len(pair.rejected) for pair in pairs], np.int32),
        )
    keep, weight = debiased(table, config)
    account.leave_out("by filter 'length balance'", int((~keep).sum()))
    if not keep.any():
        raise UserError(
            f"preferences: {account.line()}; give more data, or let lengths be: filters.balance = False"
        )
    left = [pair for pair, stays in zip(pairs, keep.tolist(), strict=True) if stays]
    weighed = [
        records[pair.record]._replace(weight=weight)
        for pair, weight in zip(left, weight.tolist(), strict=True)
    ]
    return weighed, [pair._replace(record=number) for number, pair in enumerate(left)]


def judged_rows(records: Sequence[Preference], pairs: Sequence[TokenPair], length: int) -> Judged:
    """A pair a row, padded right to `length`; only the two answers are targets, not earlier ones."""
    answered = np.arange(length) >= np.array([pair.start for pair in pairs])[:, None]

    def rows(side: Sequence[list[int]]) -> Sequences:
        ids, valid = pad_right(side, length)
        return Sequences(ids, valid, valid & answered)

    weight = np.array([records[pair.record].weight for pair in pairs], np.float32)
    chosen, rejected = rows([p.chosen for p in pairs]), rows([p.rejected for p in pairs])
    return Judged(Pairs(chosen, rejected), weight)


class _Block(NamedTuple):
    """Pairs that stand in one row, and the distinct answers that they are of."""

    answers: list[list[int]]
    pairs: list[tuple[int, int, float]]  # index of the preferred answer, of the other, weight

    @property
    def size(self) -> int:
        return sum(map(len, self.answers))


def packed_rows(records: Sequence[Preference], pairs: Sequence[TokenPair], length: int) -> Packed:
    """As many answers a row as fit into `length`.

    An answer of a ranking stands in its row once, whatever number of pairs it is in; where the answers to a prompt do
    not fit one row, they are divided over several, and those on both sides stand in each. Rows are filled best fit,
    longest first (Johnson 1973: at most 11/9 of the fewest rows, and one more).

    Raises UserError where a pair is longer.
    """
    longest = max(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    if longest > length:
        raise UserError(
            f"reward.pack_length = {length} tokens do not hold every pair: give at least {longest}, or a smaller length"
        )
    rows: list[list[_Block]] = []
    free: list[tuple[int, int]] = []  # (columns left, row), sorted
    blocks = _blocks(records, pairs, length)
    for block in sorted(
        blocks, key=lambda block: -block.size
    ):  # stable: equal sizes keep their order
        at = bisect.bisect_left(free, (block.size, 0))
        left, row = free.pop(at) if at < len(free) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(block)
        bisect.insort(free, (left - block.size, row))
    return _stacked(rows, length)


def _blocks(records: Sequence[Preference], pairs: Sequence[TokenPair], length: int) -> list[_Block]:
    """The pairs of each prompt, cut where their answers fill a row."""
    by_prompt: dict[str, list[TokenPair]] = {}
    for pair in pairs:
        by_prompt.setdefault(prompt_key(records[pair.record].prompt), []).append(pair)
    blocks = []
    for group in by_prompt.values():
        block, places = _Block([], []), dict[tuple[int, ...], int]()
        for pair in group:
            both = [tuple(pair.chosen), tuple(pair.rejected)]
            new = sum(len(ids) for ids in both if ids not in places)
            if block.size + new > length:
                blocks.append(block)
                block, places = _Block([], []), {}
            for ids in both:
                if ids not in places:
                    places[ids] = len(block.answers)
                    block.answers.append(list(ids))
            weight = records[pair.record].weight
            block.pairs.append((places[both[0]], places[both[1]], weight))
        blocks.append(block)
    return blocks


def _stacked(rows: Sequence[Sequence[_Block]], length: int) -> Packed:
    count, most = len(rows), max(sum(len(block.pairs) for block in row) for row in rows)
    packed = Packed(
        ids=np.zeros((count, length), np.int32),
        segments=np.zeros((count, length), np.int32),
        chosen_end=np.zeros((count, most), np.int32),
        rejected_end=np.zeros((count, most), np.int32),
        weight=np.zeros((count, most), np.float32),
    )
    for number, row in enumerate(rows):
        column = segment = judged = 0
        for block in row:
            ends = []
            for ids in block.answers:
                segment += 1
                packed.ids[number, column : column + len(ids)] = ids
                packed.segments[number, column : column + len(ids)] = segment
                column += len(ids)
                ends.append(column - 1)
            for chosen, rejected, weight in block.pairs:
                packed.chosen_end[number, judged] = ends[chosen]
                packed.rejected_end[number, judged] = ends[rejected]
                packed.weight[number, judged] = weight
                judged += 1
    return packed
