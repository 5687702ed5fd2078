"""Attention's own backward pass against the derivative JAX takes of the plain formula."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    SplashAttentionKernel,
)

import glm_jax.attention
from glm_jax.attention import Sight, attention, over_sequences, own_groups, splash_attention
from glm_jax.layers import MASKED
from sharding.layout import Layout, get_layout
from tests.glm_jax.exact import assert_as_exact, exact_attention

B, T, S, N, H = 2, 5, 7, 4, 8
Patch = pytest.MonkeyPatch


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


Call = tuple[str, tuple[Any, ...], dict[str, Any]]


def _dispatched(arrays: list[jax.Array], sight: Sight, layout: Layout, patch: Patch) -> list[Call]:
    """The kernels called by two programs, with their arguments."""
    calls: list[Call] = []

    def record(kernel: str) -> Callable[..., jax.Array]:
        def call(*arguments: Any, **options: Any) -> jax.Array:
            calls.append((kernel, arguments, options))
            return arrays[0]

        return call

    for kernel in ("splash_attention", "cudnn_attention", "attention"):
        patch.setattr(glm_jax.attention, kernel, record(kernel))
    for _ in range(2):
        over_sequences(sight, layout)(*arrays)
    return calls


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm", "cpu"])
def test_every_device_gets_its_kernel_with_its_arguments(platform: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(glm_jax.attention, "mesh_platform", lambda: platform)
    cases = itertools.product((7, 8, 64, 128, 136), ("float32", "bfloat16"), (1, 2), (False, True))
    for width, dtype, stages, prefix in cases:
        sight = Sight(jnp.ones((1, 3), int), jnp.arange(3)[None] if prefix else None)
        layout = Layout(pipe=stages)
        arrays = [jnp.full((1, 3, 1, width), number, dtype) for number in range(3)]
        calls = _dispatched(arrays, sight, layout, monkeypatch)
        fits = dtype == "bfloat16" and width in (8, 64, 128) and stages == 1
        fused = {"tpu": "splash_attention", "cuda": "cudnn_attention" if fits else "attention"}
        assert [kernel for kernel, *_ in calls] == [fused.get(platform, "attention")] * 2
        for kernel, given, _ in calls:
            assert all(a is b for a, b in zip(given[:3], arrays, strict=True))
            assert given[4] is layout
            if kernel == "splash_attention":
                assert given[3] is sight
            else:
                np.testing.assert_array_equal(given[3], sight.mask())
        options = [option for *_, option in calls]
        if platform == "tpu":  # two pipelines of a program need kernels of two names
            names = [option["name"] for option in options]
            assert names == [None, None] if stages == 1 else len({None, *names}) == 3
        elif platform == "cuda" and fits:
            assert options == [{"causal": not prefix}] * 2


def test_queries_of_the_splash_kernel_are_scaled_in_float32(monkeypatch: Patch) -> None:
    """A scale rounded to bfloat16 would be wrong by up to 2^-9."""
    seen: list[jax.Array] = []

    def record(attend: Any, inputs: Any, layout: Layout) -> jax.Array:
        seen.append(inputs[0])
        return inputs[0]

    monkeypatch.setattr(glm_jax.attention, "_on_every_device", record)
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 128, 1, H)), jnp.bfloat16)
    with jax.set_mesh(Layout().mesh()):
        splash_attention(q, q, q, Sight(jnp.ones((1, 128), int)), Layout())
    exact = np.asarray(q, np.float64) / H**0.5
    np.testing.assert_array_equal(seen[0], jnp.asarray(exact, jnp.bfloat16))


@pytest.mark.parametrize(
    ("length", "block"),
    [(128, 128), (256, 256), (384, 128), (512, 512), (768, 256), (1024, 512), (8192, 512),
     (8320, 128), (8704, 512)],
)  # fmt: skip
def test_blocks_of_the_splash_kernel(length: int, block: int, monkeypatch: Patch) -> None:
    """The largest that divide; gradients come of one kernel up to 8,192 tokens, of two beyond."""
    made: list[tuple[Any, dict[str, Any]]] = []
    kernel = object.__new__(SplashAttentionKernel)

    def record(mask: Any, **options: Any) -> SplashAttentionKernel:
        made.append((mask, options))
        return kernel

    monkeypatch.setattr(glm_jax.attention.splash, "make_splash_mha_single_device", record)
    assert glm_jax.attention._splash_kernel(3, length, None, True, "a name") is kernel
    ((mask, options),) = made
    sizes = dataclasses.asdict(options.pop("block_sizes"))
    assert options == {"interpret": True, "residual_checkpoint_name": "a name"}
    assert mask.shape == (3, length, length)
    assert mask[0, 5:7, 4:8].tolist() == [[True, True, False, False], [True, True, True, False]]
    fused = length <= 8192
    assert sizes["use_fused_bwd_kernel"] == fused
    for name in ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"):
        assert sizes[name] == block, name
    for name in ("block_q_dq", "block_kv_dq"):
        assert sizes[name] == (None if fused else block), name


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
