"""Prompts in batches for several answers each, and answers with a stop token to be scored at."""

import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.batch import Prompts, Sequences
from glm_jax.sampler import Sampler
from rlhf.rollout import prompt_batches, repeated, require_scores, with_stop
from sharding.errors import UserError
from sharding.layout import Layout

STOP = 9


def test_rows_are_repeated_one_after_the_other() -> None:
    rows = {"ids": np.arange(6).reshape(3, 2), "row": np.array([7, 8, 9])}
    found = repeated(rows, 2)
    assert found["row"].tolist() == [7, 7, 8, 8, 9, 9]
    assert found["ids"].tolist() == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]


def _prompts(count: int) -> Prompts:
    ids = np.arange(2 * count, dtype=np.int32).reshape(count, 2)
    return Prompts(ids, np.ones((count, 2), bool), np.arange(count, dtype=np.int32))


@pytest.mark.parametrize(
    ("answers", "samples", "real"),
    [(6, 1, 6), (6, 2, 3), (7, 2, 3), (2, 4, 1)],  # at least one prompt a batch
)
@pytest.mark.parametrize("ways", [(1, 1), (2, 1), (1, 4), (4, 6)])
def test_every_prompt_stands_once_in_batches_that_divide(
    answers: int, samples: int, real: int, ways: tuple[int, int]
) -> None:
    sample = Sampler.__new__(Sampler)  # of which only the layouts are read
    sample.training, sample.generation = (Layout(data=count) for count in ways)
    batches = prompt_batches(_prompts(10), answers, samples, sample)
    rows = [np.asarray(batch.row) for batch in batches]
    assert np.concatenate([r[r >= 0] for r in rows]).tolist() == list(range(10))
    for batch, row in zip(batches, rows, strict=True):
        kept = row >= 0
        assert kept.sum() <= real and len(kept) % np.lcm(*ways) == 0
        assert len(kept) - np.lcm(*ways) < real
        np.testing.assert_array_equal(np.asarray(batch.ids)[kept, 0], 2 * row[kept])
    assert all((r >= 0).sum() == real for r in rows[:-1])


def test_a_score_that_is_no_number_names_its_prompt() -> None:
    scores = np.zeros((3, 2))
    require_scores(scores, np.array([4, 5, 6]), "the policy")
    require_scores(np.zeros((0, 2)), np.zeros(0, int), "the policy")
    scores[1, 1], scores[2, 0] = np.nan, np.inf
    line = r"scores the policy's answers to 2 of 3 prompts .*\(first: prompt 5\)"
    with pytest.raises(UserError, match=line):
        require_scores(scores, np.array([4, 5, 6]), "the policy")


@pytest.mark.parametrize("left", [0, 2])
def test_every_answer_is_closed_by_the_stop_token(left: int) -> None:
    """Rows: ended, cut off inside the row, cut off at its end, without an answer."""
    target = np.array([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    valid = target.copy()
    valid[:, :2] = True
    ids = np.where(valid, np.arange(1, 6), 0)
    ids, valid, target = (np.pad(x, ((0, 0), (left, 0))) for x in (ids, valid, target))
    ended = np.array([True, False, False, False])
    found = with_stop(
        Sequences(*(jnp.asarray(x) for x in (ids, valid, target))), jnp.asarray(ended), STOP
    )
    expected = np.pad(ids, ((0, 0), (0, 1)))
    expected[0, left + 3] = expected[1, left + 3] = expected[2, left + 5] = STOP
    np.testing.assert_array_equal(found.ids, expected)
    np.testing.assert_array_equal(found.valid, np.pad(valid, ((0, 0), (0, 1))) | (expected == STOP))
    np.testing.assert_array_equal(found.target, np.pad(target, ((0, 0), (0, 1))))
