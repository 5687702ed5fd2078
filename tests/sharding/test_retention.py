"""Which snapshots stay."""

import math

import pytest

from sharding.retention import Retention

WORTHS = {1: 0.5, 2: 0.9, 3: None, 4: 0.7, 5: 0.9, 6: math.nan, 7: 0.1}


@pytest.mark.parametrize(
    ("retention", "stay"),
    [
        (Retention(), {6, 7}),
        (Retention(0), set()),
        (Retention(99), set(WORTHS)),
        (Retention(1, every=3), {3, 6, 7}),
        (Retention(0, best=1), {5}),  # of equal ones the later
        (Retention(1, best=3), {2, 4, 5, 7}),
        (Retention(0, best=99), {1, 2, 4, 5, 7}),  # what has no worth is never the best
        (Retention(0, every=2, best=2), {2, 4, 5, 6}),
    ],
)
def test_the_last_the_multiples_and_the_best_stay(retention: Retention, stay: set[int]) -> None:
    assert retention.staying(WORTHS) == stay
    assert retention.staying({}) == set()
