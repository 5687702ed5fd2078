"""Arguments of the fused kernels: cuDNN's, computed by plain operations, and masks of the splash kernel."""

from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    SplashAttentionKernel,
)

import glm_jax.attention
from glm_jax.attention import Sight, attention, cudnn_attention
from sharding.layout import Layout, get_layout

B, N, H = 2, 4, 8


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [5, 8, 11])
@pytest.mark.parametrize(("name", "groups"), [("single", 2), ("tp", 4)])
def test_cudnn_attention_equals_the_formula(
    causal: bool, length: int, name: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = jax.nn.dot_product_attention
    lengths: list[int] = []

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
        assert options.pop("implementation") == "cudnn"
        assert options["is_causal"] == causal
        lengths.extend((q.shape[1], k.shape[1], v.shape[1], *options["mask"].shape[2:]))
        out: jax.Array = plain(q, k, v, implementation="xla", **options)
        return out

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    layout = get_layout(name, 1 if name == "single" else 2)
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((B, length, heads, H)).astype(np.float32)
        for heads in (N, groups, groups)
    )
    segments = np.ones((B, length), np.int32)
    segments[1, :2] = 0
    segments[0, 3:] = 2
    mask = np.asarray(Sight(jnp.asarray(segments)).mask())
    with jax.set_mesh(layout.mesh()):
        split = layout.spec("batch", "time", "heads", "head_dim")
        queries, keys, values = (jax.sharding.reshard(jnp.asarray(x), split) for x in (q, k, v))
        found = np.asarray(
            cudnn_attention(queries, keys, values, jnp.asarray(mask), layout, causal)
        )
    assert found.shape == q.shape
    assert lengths and all(x % 8 == 0 and 0 <= x - length < 8 for x in lengths)
    for b in range(B):
        for t in np.flatnonzero(segments[b]):
            for n in range(N):
                scores = k[b, :, n * groups // N].astype(np.float64) @ q[b, t, n] / H**0.5
                weights = np.exp(scores) * mask[b, t]
                expected = weights / weights.sum() @ v[b, :, n * groups // N]
                np.testing.assert_allclose(found[b, t, n], expected, atol=1e-5)


@pytest.mark.parametrize("length", [128, 8320])
def test_a_mask_of_the_splash_kernel_is_the_reach(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the forward pass, for gradients of queries where they have a kernel of their own, and of keys."""
    given: list[Any] = []
    made = object.__new__(SplashAttentionKernel)
    made.kwargs = {"option": 3}

    def record(*masks: Any, **options: Any) -> SplashAttentionKernel:
        given.append((masks, options))
        return made

    monkeypatch.setattr(
        glm_jax.attention.splash, "make_splash_mha_single_device", lambda *_, **__: made
    )
    monkeypatch.setattr(glm_jax.attention.splash, "SplashAttentionKernel", record)
    reach = jnp.arange(length)
    assert glm_jax.attention._splash_kernel(1, length, reach, False, None) is made
    (((forward, queries, keys), options),) = given
    assert options == {"option": 3}
    assert forward.q_sequence is reach and keys.q_sequence is reach
    assert queries is None if length <= 8192 else queries.q_sequence is reach
    for info in (forward, keys):
        assert info.data_next is info.mask_next is info.block_mask is None
        assert info.partial_mask_blocks is None


def _products(jaxpr: Any) -> list[Any]:
    """The operands' types of every product, in nested programs too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append({str(operand.aval.dtype) for operand in equation.invars})
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += _products(inner)
    return found


def test_products_of_bfloat16_attention_have_bfloat16_operands() -> None:
    """The units that multiply float32 are several times slower."""
    layout = Layout()

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attention(q, k, v, jnp.ones((1, 3, 3), bool), layout).astype(jnp.float32))

    with jax.set_mesh(layout.mesh()):
        rows = jnp.ones((1, 3, 2, H), jnp.bfloat16)
        traced = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(rows, rows, rows)
    products = _products(traced.jaxpr)
    assert len(products) == 7  # scores, output, scores again, the gradients of weights, q, k and v
    assert all(operands == {"bfloat16"} for operands in products)


def test_scores_are_scaled_and_masked_in_float32() -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 3, H)), jnp.bfloat16) for _ in range(2))
    mask = jnp.tril(jnp.ones((1, 3, 3), bool))
    found = glm_jax.attention._scores(q[:, :, None], k, mask)
    assert found.dtype == jnp.float32 and found.shape == (1, 1, 1, 3, 3)
    products = np.asarray(jnp.einsum("BKTH,BKSH->BKTS", q, k), np.float32)[0, 0]
    for t in range(3):
        expected = products[t, : t + 1] / np.float32(H**0.5)
        np.testing.assert_allclose(found[0, 0, 0, t, : t + 1], expected, rtol=1e-6)
        assert (np.asarray(found[0, 0, 0, t, t + 1 :]) < -1e29).all()
