"""Presets have the published sizes."""

from functools import partial

import jax
import pytest

from glm_jax.config import PRESETS
from glm_jax.model import init_model
from sharding.layout import Layout


@pytest.mark.parametrize(("name", "billions"), [("chatglm3-6b", 6.24)])
def test_number_of_parameters(name: str, billions: float) -> None:
    layout = Layout()
    with jax.set_mesh(layout.mesh()):
        shapes = jax.eval_shape(partial(init_model, PRESETS[name], layout), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) / 1e9 == pytest.approx(billions, abs=0.005)
