"""Token log-probabilities, KL, entropy and masked means against float64 loops."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.loss import (
    aligned,
    cross_entropy,
    masked_mean,
    num_counted,
    token_entropy,
    token_kl,
    token_logprobs,
)

B, T, V = 2, 4, 7
RNG = np.random.default_rng(0)
LOGITS, REF_LOGITS = RNG.normal(size=(2, B, T, V)).astype(np.float32)
IDS = RNG.integers(0, V, (B, T)).astype(np.int32)
# float32 rounding of logits near 3 and a sum of 7 terms is below 2e-6
CLOSE: dict[str, Any] = {"rel": 0.0, "abs": 1e-5}


def _support() -> np.ndarray:
    """About half of the tokens at every position, the following token among them."""
    support = RNG.random((B, T, V)) < 0.5
    for b in range(B):
        for t in range(T - 1):
            support[b, t, IDS[b, t + 1]] = True
            support[b, t, (IDS[b, t + 1] + 1) % V] = False
    support[:, -1] = True
    return support


def _log_distribution(
    logits: np.ndarray, temperature: float, support: np.ndarray
) -> dict[int, float]:
    scaled = {v: float(logits[v]) / temperature for v in range(V) if support[v]}
    total = math.log(math.fsum(math.exp(x) for x in scaled.values()))
    return {v: x - total for v, x in scaled.items()}


@pytest.mark.parametrize("temperature", [None, 0.6])
@pytest.mark.parametrize("restricted", [False, True])
def test_logprobs_kl_and_entropy_against_a_loop(
    temperature: float | None, restricted: bool
) -> None:
    support = _support() if restricted else np.ones((B, T, V), bool)
    options: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    if restricted:
        options["support"] = jnp.asarray(support)
    logits, ref_logits, ids = map(jnp.asarray, (LOGITS, REF_LOGITS, IDS))
    logp = token_logprobs(logits, ids, **options)
    kl = token_kl(logits, ref_logits, **options)
    entropy = token_entropy(logits, **options)
    for b in range(B):
        assert float(logp[b, 0]) == float(kl[b, 0]) == float(entropy[b, 0]) == 0.0
        for t in range(1, T):
            at = temperature or 1.0, support[b, t - 1]
            p = _log_distribution(LOGITS[b, t - 1], *at)
            q = _log_distribution(REF_LOGITS[b, t - 1], *at)
            assert float(logp[b, t]) == pytest.approx(p[int(IDS[b, t])], **CLOSE)
            exact = math.fsum(math.exp(p[v]) * (p[v] - q[v]) for v in p)
            assert float(kl[b, t]) == pytest.approx(exact, **CLOSE)
            exact = -math.fsum(math.exp(x) * x for x in p.values())
            assert float(entropy[b, t]) == pytest.approx(exact, **CLOSE)


def test_logprobs_store_only_their_inputs_for_the_gradient() -> None:
    for function in (lambda x: token_logprobs(x, jnp.asarray(IDS)), token_entropy):
        _, pullback = jax.vjp(function, jnp.asarray(LOGITS))
        wide = [x for x in jax.tree.leaves(pullback) if x.shape == LOGITS.shape]
        assert [x.dtype for x in wide] == [np.float32]
        np.testing.assert_array_equal(wide[0], LOGITS)


def test_aligned_moves_every_value_one_token_later() -> None:
    values = jnp.arange(1.0, 9.0).reshape(2, 4)
    assert aligned(values).tolist() == [[0, 1, 2, 3], [0, 5, 6, 7]]


def test_a_masked_mean_ignores_what_the_mask_leaves_out() -> None:
    values = jnp.array([[1.0, jnp.nan, -4.0], [jnp.inf, 2.0, 0.5]])
    mask = jnp.array([[True, False, True], [False, True, False]])
    assert float(masked_mean(values, mask)) == pytest.approx(-1 / 3)
    assert float(masked_mean(values, mask, 4)) == pytest.approx(-1 / 4)
    assert float(masked_mean(values, mask, jnp.int32(10))) == pytest.approx(-1 / 10)
    assert float(cross_entropy(values, mask)) == pytest.approx(1 / 3)
    assert float(cross_entropy(values, mask, 5)) == pytest.approx(1 / 5)


def test_an_empty_mask_counts_as_1_and_its_mean_is_0() -> None:
    nothing = jnp.zeros((2, 3), bool)
    assert int(num_counted(nothing)) == 1
    assert int(num_counted(~nothing)) == 6
    assert float(masked_mean(jnp.full((2, 3), 5.0), nothing)) == 0.0
