"""Attention's own backward pass against the derivative JAX takes of the plain formula."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.attention import attention, own_groups
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
