"""Attention's own backward pass against the derivative JAX takes of the plain formula."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.attention import Sight, attention, over_sequences, own_groups
from glm_jax.layers import MASKED
from sharding.layout import Layout, get_layout
from tests.glm_jax.exact import assert_as_exact, exact_attention

B, T, S, N, H = 2, 5, 7, 4, 8


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / H**0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v)


def _inputs(groups: int) -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(groups)
    shapes = [(B, T, N, H), (B, S, groups, H), (B, S, groups, H)]
    arrays = [3 * rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    mask = rng.random((B, T, S)) < 0.5
    mask[0, 2] = False  # a row that sees nothing
    mask[1, 1] = np.arange(S) == 3
    return arrays, mask


@pytest.mark.isa
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", ["single", "dp_tp"])
def test_attention_and_its_gradient_are_those_of_the_formula(name: str, groups: int) -> None:
    layout = get_layout(name, 1 if name == "single" else 4)
    arrays, mask = _inputs(groups)
    weight = np.random.default_rng(9).standard_normal((B, T, N, H)).astype(np.float32)

    def of_attention(q: jax.Array, k: jax.Array, v: jax.Array, on: jax.Array) -> jax.Array:
        kv = "kv_heads" if groups % layout.ways("kv_heads") == 0 else None
        q = jax.sharding.reshard(q, layout.spec("batch", "time", "heads", "head_dim"))
        k, v = (jax.sharding.reshard(x, layout.spec("batch", None, kv, None)) for x in (k, v))
        return attention(q, k, v, on, layout)

    def results(function: Callable[..., jax.Array], layout: Layout) -> list[np.ndarray]:
        with jax.set_mesh(layout.mesh()):
            q, k, v, on, w = layout.put([*arrays, mask, weight])

            def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
                out = function(q, k, v, on)
                return jnp.sum(out * w), out

            gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
            return [np.asarray(x) for x in (out, *gradients)]

    found, plain = results(of_attention, layout), results(_plain, Layout())
    q, k, v = arrays
    assert_as_exact(found, plain, exact_attention(q, k, v, mask, weight))


@pytest.mark.parametrize(
    ("groups", "tensor", "copies"), [(1, 2, 2), (2, 2, 2), (2, 4, 4), (4, 2, 4)]
)
def test_shards_have_as_few_copies_of_groups_as_do(groups: int, tensor: int, copies: int) -> None:
    layout = Layout(tensor=tensor)
    (_, k, v), _ = _inputs(groups)
    with jax.set_mesh(layout.mesh()):
        ours = own_groups(jnp.asarray(k), jnp.asarray(v), layout)
    for x, whole in zip(ours, (k, v), strict=True):
        assert x.shape == (B, S, copies, H)
        np.testing.assert_array_equal(x, np.repeat(whole, copies // groups, axis=2))


def test_nothing_of_length_times_length_waits_for_the_backward_pass() -> None:
    arrays, mask = _inputs(2)
    layout = Layout()
    with jax.set_mesh(layout.mesh()):
        q, k, v = layout.put(arrays)
        _, pullback = jax.vjp(
            lambda q, k, v: attention(q, k, v, jnp.asarray(mask), layout), q, k, v
        )
    kept = [x for x in jax.tree.leaves(pullback) if x.dtype == jnp.float32]
    assert kept and all(x.shape[-2:] != (T, S) for x in kept)


@pytest.mark.parametrize("prefix", [False, True])
def test_the_mask_of_a_sight_against_a_loop(prefix: bool) -> None:
    segments = np.array([[0, 2, 2, 2, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    last = np.array([[0, 2, 2, 3, 5, 5], [1, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
    reach = last if prefix else np.tile(np.arange(6), (3, 1))
    found = Sight(jnp.asarray(segments), jnp.asarray(reach) if prefix else None).mask()
    for b in range(3):
        for t in range(6):
            for s in range(6):
                same = segments[b, t] == segments[b, s] != 0
                assert bool(found[b, t, s]) == (same and s <= reach[b, t])


def test_attention_over_sequences_follows_the_mask_of_its_sight() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((B, S, N, H)).astype(np.float32)) for _ in range(3))
    sight = Sight(jnp.asarray([[1] * S, [0, 0, 3, 3, 3, 2, 2]]))
    layout = Layout()
    with jax.set_mesh(layout.mesh()):
        found = over_sequences(sight, layout)(q, k, v)
    real = np.asarray(sight.segments)[:, :, None, None] > 0
    expected = _plain(q, k, v, sight.mask())
    np.testing.assert_allclose(np.where(real, found - expected, 0), 0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_softmax_is_computed_in_float32(dtype: str) -> None:
    """A bfloat16 sum of 512 equal weights stops growing at 256."""
    length = 512
    one, layout = jnp.ones((1, 1, 1, H), dtype), Layout()
    k = jnp.zeros((1, length, 1, H), dtype)
    v = jnp.asarray(np.linspace(1, 3, length)[None, :, None, None] * np.ones(H), dtype)

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attention(q, k, v, jnp.ones((1, 1, length), bool), layout))

    with jax.set_mesh(layout.mesh()):
        out = attention(one, k, v, jnp.ones((1, 1, length), bool), layout)
        _, d_k, d_v = jax.grad(total, (0, 1, 2))(one, k, v)
    assert out.dtype == d_k.dtype == d_v.dtype == dtype
    wide = np.asarray(v, np.float64)[0, :, 0]
    # one rounding to bfloat16 is 2^-9 of a value; four of them
    bound = 2.0**-7 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.asarray(out, np.float64)[0, 0, 0], wide.mean(0), rtol=bound)
    np.testing.assert_allclose(np.asarray(d_v, np.float64), 1 / length, rtol=bound)
    expected = (wide - wide.mean(0)).sum(1) / length / H**0.5
    largest = np.abs(expected).max()
    np.testing.assert_allclose(
        np.asarray(d_k, np.float64)[0, :, 0, 0], expected, atol=bound * largest
    )
