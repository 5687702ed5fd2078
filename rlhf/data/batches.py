"""Records -> token arrays -> batches.

A table is tokenised and padded once, in memory (6 bytes a token, 12,000 reviews of 80 tokens:
6 MiB). A batch is then a row lookup of microseconds, no worker process is needed, and a record
that does not fit is found before the first step and not hours into a run.

The fields of a batch are `Picked`: which rows stand where, the same in every process of a run. `Layout.put` looks up
those that a process has devices for.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import grain
import jax
import numpy as np

from glm_jax.batch import Prompts, Sequences
from glm_jax.tokenizers import Tokenizer, pad_left, pad_right
from rlhf.data.accounts import Account, Unfit, tokenised, too_long
from rlhf.data.records import Example, Prompt

Rows = TypeVar("Rows", bound=tuple[Any, ...])  # any NamedTuple of arrays [N, ...], or of such


class Picked:
    """Rows `index` of a table, -1 standing for a row of `padding`; looked up when asked for, as in x[slices].

    NumPy takes it for an array, and then looks up all.
    """

    def __init__(self, table: np.ndarray, index: np.ndarray, padding: int = 0) -> None:
        self._table = table
        self._index = index
        self.padding = padding

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all rows together."""
        return (len(self._index), *self._table.shape[1:])

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, where: tuple[Any, ...]) -> np.ndarray:
        index = self._index[where[0]]
        rows = self._table[(index, *where[1:])]  # a copy, hence ours to change
        rows[index < 0] = self.padding
        return rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[slice(None),].astype(dtype or self._table.dtype, copy=False)


def sft_rows(
    records: Sequence[Example],
    tokenizer: Tokenizer,
    length: int,
    account: Account | None = None,
    unfit: Unfit = "skip",
) -> Sequences:
    """Tokenise conversations, padded right to `length`; every answer's tokens are targets.

    Those of more than `length` tokens are left out: a cut answer would teach not to stop. Raises
    UserError where none fits, and on the first that does not where `unfit` says so.
    """

    def tokenise(record: Example) -> tuple[list[int], list[bool]]:
        answer = {"role": "assistant", "content": record.response}
        return tokenizer.chat_example([*record.prompt, answer])

    fitting = tokenised(
        records,
        tokenise,
        lambda example: too_long(len(example[0]), "length", length),
        account or Account("sft"),
        unfit,
    )
    ids, valid = pad_right([ids for _, (ids, _) in fitting], length)
    target, _ = pad_right([target for _, (_, target) in fitting], length)
    return Sequences(ids, valid, target.astype(bool))


def prompt_rows(
    records: Sequence[Prompt],
    tokenizer: Tokenizer,
    prompt_length: int,
    account: Account | None = None,
    unfit: Unfit = "skip",
    most: int | None = None,
) -> Prompts:
    """Tokenise prompts, padded left to `prompt_length`; `row` is the row number in `records`.

    Those of more than `prompt_length` tokens are left out, and those after the first `most` that fit. Raises
    UserError as `sft_rows` does.
    """
    fitting = tokenised(
        records,
        lambda record: tokenizer.chat_prompt(record.prompt),
        lambda ids: too_long(len(ids), "prompt_length", prompt_length),
        account or Account("prompts"),
        unfit,
        most,
    )
    row = np.array([number for number, _ in fitting], np.int32)
    return Prompts(*pad_left([ids for _, ids in fitting], prompt_length), row)


def shuffled(rows: Rows, batch_size: int, seed: int) -> grain.DatasetIterator[Rows]:
    """Batches without end: every row once an epoch, each epoch in an order of its own.

    A batch may straddle two epochs, so all are full and no row is dropped. `get_state()` is a small
    JSON-able dict; `set_state` on a new iterator of the same arguments goes on with the next batch.
    """
    order = grain.MapDataset.range(_num_rows(rows)).seed(seed).shuffle().repeat()
    batches = order.batch(batch_size, batch_fn=np.asarray).map(lambda index: _take(rows, index))
    # Threads would cost more than the row lookup that they take over.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def in_order(rows: Rows, batch_size: int, width: int | None = None) -> Iterator[Rows]:
    """Every row once, in order, `batch_size` a batch; batches are filled up to `width` rows with rows of padding.

    `width` is at least `batch_size`, which is what None means: then the last batch alone is filled up.
    In those rows `valid` and `target` are False, ids are 0 and a prompt's `row` is -1.
    """
    count = _num_rows(rows)
    for start in range(0, count, batch_size):
        index = np.arange(start, start + (width or batch_size))
        yield _take(rows, np.where(index < min(count, start + batch_size), index, -1))


def _num_rows(rows: Rows) -> int:
    return len(jax.tree.leaves(rows)[0])


def _take(rows: Rows, index: np.ndarray) -> Rows:
    taken: Rows = jax.tree.map(lambda table: Picked(table, index), rows)
    if isinstance(taken, Prompts):  # a row of padding is no row of the table
        taken.row.padding = -1
    return taken
