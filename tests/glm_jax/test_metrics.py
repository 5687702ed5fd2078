"""Metrics of pieces of a batch add up to those of the whole batch."""

import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.metrics import Deviation, Peak, Shares, combined, finished, neutral

VALUES = np.random.default_rng(0).normal(-3.0, 2.0, 12)  # all peaks below 0


def _shares(rows: np.ndarray) -> Shares:
    return {
        "mean": jnp.float32(rows.sum() / len(VALUES)),
        "count": jnp.int32(len(rows)),
        "peak": Peak(jnp.float32(rows.max())),
        "spread": Deviation(
            jnp.float32(rows.sum() / len(VALUES)), jnp.float32((rows**2).sum() / len(VALUES))
        ),
    }


@pytest.mark.parametrize("cuts", [[], [5], [1, 4, 9]])
def test_pieces_combine_to_the_figures_of_the_batch(cuts: list[int]) -> None:
    pieces = [_shares(rows) for rows in np.split(VALUES, cuts)]
    total: Shares = neutral(pieces[0])
    for piece in pieces:
        total = combined(total, piece)
    figures = {name: float(value) for name, value in finished(total).items()}
    # float32 sums of 12 numbers below 10
    assert figures["mean"] == pytest.approx(VALUES.mean(), abs=1e-5)
    assert figures["count"] == len(VALUES)
    assert figures["peak"] == pytest.approx(VALUES[VALUES < 0].max(), abs=1e-5)
    assert figures["spread"] == pytest.approx(VALUES.std(), abs=1e-5)


def test_neutral_shares_keep_the_dtype_and_change_nothing() -> None:
    shares = _shares(VALUES)
    nothing = neutral(shares)
    assert nothing["count"].dtype == jnp.int32  # type: ignore[union-attr]
    assert isinstance(nothing["peak"], Peak) and float(nothing["peak"].largest) == -np.inf
    assert isinstance(nothing["spread"], Deviation) and float(nothing["spread"].square) == 0.0
    both = combined(nothing, shares), combined(shares, nothing)
    for found in both:
        for name, value in finished(found).items():
            assert float(value) == float(finished(shares)[name])


def test_a_deviation_of_equal_values_is_0_and_not_nan() -> None:
    # rounding may leave the mean square below the squared mean
    found = finished({"spread": Deviation(jnp.float32(0.1), jnp.float32(0.0099999))})
    assert float(found["spread"]) == 0.0
