"""Bounds with a reason for comparisons of float32 numbers, and a record of how close the tests come to theirs.

`pytest --record-tolerances FILE` appends a line of JSON for every comparison: the error as a share of the bound, the
line of the test, and the test. `python -m tests.tolerances FILE` prints the lines that have less than `HEADROOM`.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_jax.config import Config

HEADROOM = 4.0  # of a bound over the error that rounding is expected to make
UNIT = 2.0**-24  # largest relative error of one rounding to float32


def rounding(terms: float, magnitude: float, headroom: float = HEADROOM) -> float:
    """Bound of the rounding error of a float32 sum: headroom * 2^-24 * sqrt(terms) * magnitude.

    Roundings are as good as independent with mean zero, so that their sum grows with the root of their number (Higham
    and Mary 2019, theorem 2.4); another order of summation, blocking or fused multiply-add stays within the bound.

    Args:
        terms: numbers that are added up on the way to the result, one product after the other included.
        magnitude: largest absolute value that is summed or reached on the way.
        headroom: factor over one standard deviation.
    """
    return headroom * UNIT * math.sqrt(terms) * magnitude


def terms_of(config: Config, length: int) -> int:
    """Number of terms that are added up on the way from a token to its log-probability, through all layers."""
    inner = config.num_heads * config.head_dim
    # two norms and the products behind them; scores and their softmax; the outputs of attention and MLP
    layer = 4 * config.hidden_size + config.head_dim + 2 * length + inner + config.ffn_size
    return config.num_layers * layer + 2 * config.hidden_size + config.vocab_size


def record(path: Path) -> None:
    """Append every comparison of `np.testing.assert_allclose` and `pytest.approx` to `path` from now on."""
    scalar: Any = type(pytest.approx(1.0))  # which pytest keeps private
    plain_allclose: Any = np.testing.assert_allclose
    plain_equal = scalar.__eq__

    def write(share: float, error: float, bound: float) -> None:
        frame = sys._getframe(2)
        while "/tests/" not in frame.f_code.co_filename and frame.f_back is not None:
            frame = frame.f_back
        line = {
            "share": share,
            "error": error,
            "bound": bound,
            "line": f"{frame.f_code.co_filename.rpartition('/tests/')[2]}:{frame.f_lineno}",
            "test": os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)"),
        }
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def allclose(
        actual: Any, desired: Any, rtol: float = 1e-7, atol: float = 0, **more: Any
    ) -> None:
        a, b = (np.asarray(x, np.float64) for x in (actual, desired))
        a, b = np.broadcast_arrays(a, b)
        finite = np.isfinite(a) & np.isfinite(b)
        a, b = a[finite], b[finite]
        error, bound = np.abs(a - b), atol + rtol * np.abs(b)
        shares = np.divide(error, bound, out=np.where(error > 0, np.inf, 0.0), where=bound > 0)
        if shares.size:
            worst = int(shares.argmax())
            write(float(shares[worst]), float(error[worst]), float(bound[worst]))
        plain_allclose(actual, desired, rtol=rtol, atol=atol, **more)

    def equal(self: Any, actual: Any) -> bool:
        same = plain_equal(self, actual)
        if same and isinstance(self.expected, (int, float)) and math.isfinite(self.expected):
            error, bound = abs(float(self.expected) - float(actual)), float(self.tolerance)
            write(error / bound if bound else 0.0, error, bound)
        return bool(same)

    np.testing.assert_allclose = allclose  # type: ignore[assignment]
    scalar.__eq__ = equal


def _print_tight(path: Path) -> None:
    """Print the largest share of the bound for every line of a test that has less than the headroom."""
    worst: dict[str, dict[str, Any]] = {}
    for text in path.read_text().splitlines():
        found = json.loads(text)
        if found["share"] > worst.get(found["line"], {"share": -1.0})["share"]:
            worst[found["line"]] = found
    for found in sorted(worst.values(), key=lambda x: -x["share"]):
        if found["share"] > 1 / HEADROOM:
            sys.stdout.write(
                "{share:9.3g} {error:9.2e} of {bound:9.2e} {line} {test}\n".format(**found)
            )
    sys.stdout.write(f"{len(worst)} lines compared\n")


if __name__ == "__main__":
    _print_tight(Path(sys.argv[1]))
