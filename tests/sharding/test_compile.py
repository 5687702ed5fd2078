"""Which options a program is compiled with."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice

from sharding.compile import REDUCE_MEANWHILE, WHOLE_PRODUCTS, compiler_options
from sharding.layout import Layout


@pytest.mark.parametrize(
    ("platform", "kind", "expected"),
    [
        ("tpu", "TPU v5 lite", {**WHOLE_PRODUCTS, **REDUCE_MEANWHILE}),
        ("tpu", "TPU v4", WHOLE_PRODUCTS),
        ("gpu", "NVIDIA H100", {}),
        ("cpu", "cpu", {}),
    ],
)
def test_options_are_those_of_the_mesh(
    platform: str, kind: str, expected: Mapping[str, str]
) -> None:
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    with jax.sharding.use_abstract_mesh(
        Layout().mesh().abstract_mesh.update(abstract_device=device)
    ):
        assert compiler_options() == expected


def test_this_compiler_is_told_nothing() -> None:
    with jax.set_mesh(Layout().mesh()):
        assert jax.jit(jnp.sin, compiler_options=compiler_options())(0.0) == 0.0
