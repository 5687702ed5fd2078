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
from rlhf.data.records import Example, Prompt, prompt_text
from sharding.errors import UserError

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


def sft_rows(records: Sequence[Example], tokenizer: Tokenizer, length: int) -> Sequences:
    """Tokenise conversations, padded right to `length`; every answer's tokens are targets.

    Those of more than `length` tokens are left out: a cut answer would teach not to stop. Raises
    UserError where none fits.
    """
    examples = [
        tokenizer.chat_example([*record.prompt, {"role": "assistant", "content": record.response}])
        for record in records
    ]
    fitting = [(ids, target) for ids, target in examples if len(ids) <= length]
    require_some("sft", len(fitting), length)
    ids, valid = pad_right([ids for ids, _ in fitting], length)
    target, _ = pad_right([target for _, target in fitting], length)
    return Sequences(ids, valid, target.astype(bool))


def prompt_rows(records: Sequence[Prompt], tokenizer: Tokenizer, prompt_length: int) -> Prompts:
    """Tokenise prompts, padded left to `prompt_length`; `row` is the row number in `records`.

    Raises UserError naming the first prompt of more than `prompt_length` tokens.
    """
    sequences = [tokenizer.chat_prompt(record.prompt) for record in records]
    for number, (record, ids) in enumerate(zip(records, sequences, strict=True)):
        if len(ids) > prompt_length:
            text = prompt_text(record.prompt).replace("\n", " ")[:20]
            raise UserError(
                f"prompts: record {number} ({text!r}...) has {len(ids)} tokens, more than "
                f"prompt_length = {prompt_length}; shorten it or raise prompt_length"
            )
    row = np.arange(len(records), dtype=np.int32)
    return Prompts(*pad_left(sequences, prompt_length), row)


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


def require_some(table: str, count: int, length: int) -> None:
    """Raise UserError when no record fits."""
    if not count:
        raise UserError(f"{table}: no record fits into length = {length} tokens; raise the length")
