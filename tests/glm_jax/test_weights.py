"""Weights cut for any layout and back, bit for bit; nothing padded is ever kept."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from glm_jax.config import Config, GLMConfig, GLMV1Config
from glm_jax.model import init_model
from glm_jax.weights import axes_of, host_weights, kept_layout, named_weights, restack
from sharding.layout import Layout, get_layout
from sharding.pipeline import IDLE, layer_slots

LAYOUTS = (
    "1x1x1x1",
    "1x2x2x2",
    "1x1x1x8",
    "2x1x2x2:gpipe:1",
    "4x1x2x1:circular:2:2",
    "8x1x1x1:circular:8:3",
)


@pytest.fixture(scope="module", params=["v1", "v2"])
def odd(request: pytest.FixtureRequest, small: GLMConfig, small_v1: GLMV1Config) -> Config:
    """Layers and vocabulary that hardly any layout divides."""
    config: Config = small_v1 if request.param == "v1" else small
    return dataclasses.replace(config, num_layers=5, vocab_size=67)


@pytest.mark.usefixtures("users_code")
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_weights_are_drawn_under_every_layout(odd: Config, name: str) -> None:
    def draw(layout: Layout) -> dict[str, np.ndarray]:
        with jax.set_mesh(layout.mesh()):
            model = jax.jit(partial(init_model, odd, layout))(jax.random.key(0))
            for path, w in named_weights(model).items():
                spec = layout.spec(*axes_of(path, odd, layout))
                assert w.sharding.spec == spec, path
            return host_weights(model, layout)

    plain, ours = draw(Layout()), draw(get_layout(name, None))
    assert ours.keys() == plain.keys()
    for path, weight in plain.items():
        np.testing.assert_array_equal(ours[path], weight, err_msg=path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_there_and_back_again(odd: Config, name: str) -> None:
    layout = get_layout(name, None)
    kept = kept_layout(layout, odd)
    with jax.set_mesh(layout.mesh()):
        model = jax.jit(partial(init_model, odd, layout))(jax.random.key(0))
        flat = jax.jit(partial(restack, source=layout, target=kept))(model)
        again = jax.jit(partial(restack, source=kept, target=layout))(flat)
    for path, weight in named_weights(flat).items():
        if ".blocks." in path:
            assert weight.shape[:2] == (1, 5), path
        assert odd.vocab_size in weight.shape or "embedding" not in path, path
    for path, weight in named_weights(model).items():
        np.testing.assert_array_equal(named_weights(again)[path], weight, err_msg=path)
    for path, weight in host_weights(model, layout).items():
        other = host_weights(flat, kept)[path]
        np.testing.assert_array_equal(other, weight, err_msg=path)


def test_what_is_padded_holds_nothing(odd: Config) -> None:
    layout = Layout(pipe=4, tensor=2, repeats=2)
    slots = layer_slots(odd.num_layers, layout)
    with jax.set_mesh(layout.mesh()):
        model = jax.jit(partial(init_model, odd, layout))(jax.random.key(0))
    assert model.trunk.embedding.shape[0] == 72 > odd.vocab_size
    assert not np.any(np.asarray(model.trunk.embedding)[odd.vocab_size :])
    for path, weight in named_weights(model.trunk.blocks).items():
        assert not np.any(np.asarray(weight)[slots == IDLE]), path
        assert np.all(np.isfinite(weight)), path


def test_an_unknown_weight_has_no_axes(odd: Config) -> None:
    with pytest.raises(KeyError, match="w_new"):
        axes_of(".trunk.blocks.w_new", odd, Layout())
