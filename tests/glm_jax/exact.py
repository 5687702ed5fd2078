"""Attention and its gradient in NumPy and float64: what programs in float32 are measured against."""

import numpy as np

from glm_jax.layers import MASKED
from tests.tolerances import HEADROOM

Arrays = list[np.ndarray]


def exact_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, weight: np.ndarray
) -> Arrays:
    """softmax(q k / sqrt(H)) v of [B, T, N, H] and [B, S, K, H], and the gradients of sum(weight * it)."""
    groups, width = k.shape[2], q.shape[3]
    q, weight = (x.astype(np.float64) for x in (q, weight))
    k, v = (np.repeat(x.astype(np.float64), q.shape[2] // groups, axis=2) for x in (k, v))
    scores = np.einsum("BTNH,BSNH->BNTS", q, k) / width**0.5
    scores = np.where(mask[:, None], scores, MASKED)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    by_p = np.einsum("BTNH,BSNH->BNTS", weight, v)
    by_score = p * (by_p - np.sum(p * by_p, axis=-1, keepdims=True)) * mask[:, None] / width**0.5
    by_k = np.einsum("BNTS,BTNH->BSNH", by_score, q)
    by_v = np.einsum("BNTS,BTNH->BSNH", p, weight)

    def of_groups(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:2], groups, -1, width).sum(axis=3)

    by_q = np.einsum("BNTS,BSNH->BTNH", by_score, k)
    return [np.einsum("BNTS,BSNH->BTNH", p, v), by_q, of_groups(by_k), of_groups(by_v)]


def assert_as_exact(ours: Arrays, plain: Arrays, exact: Arrays) -> None:
    """`ours` is as near to float64 as the plain formula in float32 is, but for the headroom.

    A formula that goes block by block, or recomputes its softmax for the gradient, rounds up to twice as much.
    """
    for found, formula, expected in zip(ours, plain, exact, strict=True):
        rounding = float(np.abs(formula - expected).max())
        assert rounding <= 1e-5 * np.abs(expected).max()  # else the formulas differ
        np.testing.assert_allclose(found, expected, rtol=0, atol=2 * HEADROOM * rounding)
