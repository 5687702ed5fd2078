"""The kernels of TPUs and GPUs against attention in plain operations, and which of them a program has."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding

from glm_jax.attention import Sight, attention, splash_attention
from glm_jax.config import Config, GLMConfig, GLMV1Config
from glm_jax.model import apply_model, init_model
from sharding.layout import Layout, get_layout
from tests.glm_jax.exact import assert_as_exact, exact_attention

B, N, H = 4, 4, 8
DEVICES = {
    "tpu": AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
    "cuda": AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu"),
    "rocm": AbstractDevice(device_kind="AMD Instinct MI300X", num_cores=304, platform="gpu"),
    "cpu": AbstractDevice(device_kind="cpu", num_cores=None, platform="cpu"),
}


def _sight(length: int, prefix: bool) -> Sight:
    """Rows with padding on either side, two sequences in one, and nothing but padding; contexts where `prefix`."""
    segments = np.zeros((B, length), np.int32)
    segments[0, 3:] = 1
    segments[1, : length - 5] = 1
    segments[2, 1 : length // 2], segments[2, length // 2 : -1] = 2, 1
    if not prefix:
        return Sight(jnp.asarray(segments))
    reach = np.tile(np.arange(length, dtype=np.int32), (B, 1))
    for row, start, end in (
        (0, 3, length // 2),
        (1, 0, 2),
        (2, 1, 9),
        (2, length // 2, length - 2),
    ):
        reach[row, start:end] = end - 1
    return Sight(jnp.asarray(segments), jnp.asarray(reach))


def _results(
    attend: Callable[..., jax.Array],
    arrays: list[np.ndarray],
    sight: Sight,
    groups: int,
    layout: Layout,
) -> list[jax.Array]:
    """What attention gives, and the gradients of queries, keys and values."""
    with jax.set_mesh(layout.mesh()):
        *arrays, weight = layout.put(arrays)
        kv = "kv_heads" if groups % layout.ways("kv_heads") == 0 else None
        q, k, v = (
            jax.sharding.reshard(x, layout.spec("batch", "time", heads, "head_dim"))
            for x, heads in zip(arrays, ("heads", kv, kv), strict=True)
        )

        def loss(
            q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight, weight: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            out = attend(q, k, v, sight)
            return jnp.sum(out * weight), out

        gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(
            q, k, v, layout.put(sight), weight
        )
        return [out, *gradients]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize(
    ("name", "groups", "length"),
    [("single", 2, 128), ("dp_tp", 2, 150), ("fsdp_tp", 1, 300), ("tp", 4, 256)],
)
def test_splash_and_its_gradient_are_those_of_plain_attention(
    name: str, groups: int, length: int, prefix: bool
) -> None:
    layout = get_layout(name, 1 if name == "single" else 4)
    rng = np.random.default_rng(groups)
    shapes = [(B, length, N, H), (B, length, groups, H), (B, length, groups, H)]
    arrays = [2 * rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    sight = _sight(length, prefix)
    real = np.asarray(sight.segments)[:, :, None, None] > 0
    # what comes out at padding means nothing, and nobody's loss counts it
    arrays.append(rng.standard_normal((B, length, N, H)).astype(np.float32) * real)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight) -> jax.Array:
        return splash_attention(q, k, v, sight, layout, interpret=True)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight) -> jax.Array:
        return attention(q, k, v, sight.mask(), Layout())

    found = _results(ours, arrays, sight, groups, layout)
    expected = _results(plain, arrays, sight, groups, Layout())
    assert all(np.isfinite(x).all() for x in found)
    q, k, v, weight = arrays
    exact = exact_attention(q, k, v, np.asarray(sight.mask()), weight)
    assert_as_exact(*([np.where(real, x, 0) for x in side] for side in (found, expected, exact)))


def _traced(mesh: AbstractMesh, layout: Layout, config: Config, length: int) -> Any:
    """A model's gradient as it is traced for the devices of `mesh`."""
    with jax.sharding.use_abstract_mesh(mesh):
        model = jax.eval_shape(lambda: init_model(config, layout, jax.random.key(0)))
        spec = NamedSharding(mesh, layout.spec("batch", None))
        rows = [jax.ShapeDtypeStruct((8, length), t, sharding=spec) for t in (jnp.int32, jnp.bool_)]

        def loss(model: Any, ids: jax.Array, valid: jax.Array) -> jax.Array:
            return jnp.sum(apply_model(model, ids, valid, layout))

        return jax.jit(jax.grad(loss)).trace(model, *rows)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tracing asks, which cuDNN is installed, answered where none is."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("name", "platform", "dtype", "kernel"),
    [
        ("fsdp_tp", "tpu", "bfloat16", "splash_mha"),
        ("tp", "tpu", "float32", "splash_mha"),
        ("pp_dp_tp", "tpu", "bfloat16", "splash_mha"),
        ("tp", "cuda", "bfloat16", "dot_product_attention"),
        ("pp_dp_tp", "cuda", "bfloat16", None),
        ("tp", "cuda", "float32", None),
        ("tp", "rocm", "bfloat16", None),
        ("tp", "cpu", "bfloat16", None),
    ],
)
@pytest.mark.usefixtures("cudnn")
def test_a_program_has_the_kernel_of_the_devices_it_is_for(
    name: str, platform: str, dtype: str, kernel: str | None, version: int,
    small: GLMConfig, small_v1: GLMV1Config,
) -> None:  # fmt: skip
    layout = get_layout(name, 8)
    config = dataclasses.replace(small_v1 if version == 1 else small, compute_dtype=dtype)
    mesh = layout.mesh().abstract_mesh.update(abstract_device=DEVICES[platform])
    text = str(_traced(mesh, layout, config, 39).jaxpr)
    for name in ("splash_mha", "dot_product_attention"):
        assert (name in text) == (name == kernel)


def test_the_compiler_is_given_the_kernel_of_tpus(small: GLMConfig) -> None:
    layout = get_layout("pp_dp_tp", 8)
    mesh = layout.mesh().abstract_mesh.update(abstract_device=DEVICES["tpu"])
    assert "tpu_custom_call" in _traced(mesh, layout, small, 40).lower().as_text()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.usefixtures("cudnn")
def test_the_compiler_is_given_the_kernel_of_gpus(
    version: int, small: GLMConfig, small_v1: GLMV1Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ChatGLM-6B, whose contexts see all of themselves, the mask alone says what is seen."""
    layout = get_layout("fsdp_tp", 8)
    config = dataclasses.replace(small_v1 if version == 1 else small, compute_dtype="bfloat16")
    # lowering it needs devices, whichever they are
    monkeypatch.setattr("glm_jax.attention.mesh_platform", lambda: "cuda")
    with jax.set_mesh(layout.mesh()):
        traced = _traced(layout.mesh().abstract_mesh, layout, config, 39)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmha" in text
    (call,) = (line for line in text.splitlines() if "@__cudnn$fmhaScaleBiasSoftmax(" in line)
    assert (
        "tensor<2x1x40x40xbf16>" in call
    )  # one mask for all heads, of a length that has room for 8
    assert ("CAUSAL" in call) == (version == 2)
