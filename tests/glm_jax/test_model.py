"""Where tokens stand and what they see, in every generation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.config import Config, GLMConfig, GLMV1Config
from glm_jax.model import CausalLM, apply_model, init_model
from glm_jax.trunk import running_sum
from sharding.layout import Layout

LAYOUT = Layout()


@pytest.fixture(params=["ChatGLM-6B", "ChatGLM3", "GLM-4-0414"])
def model(request: pytest.FixtureRequest, small: GLMConfig, small_v1: GLMV1Config) -> CausalLM:
    shapes: dict[str, Config] = {
        "ChatGLM-6B": small_v1,
        "ChatGLM3": small,
        "GLM-4-0414": dataclasses.replace(small, sandwich_norms=True),
    }
    config = shapes[request.param]
    with jax.set_mesh(LAYOUT.mesh()):
        return jax.jit(lambda key: init_model(config, LAYOUT, key))(jax.random.key(0))


def test_packed_sequences_do_not_see_each_other(model: CausalLM) -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.integers(3, 60, (1, n)).astype(np.int32) for n in (7, 9))
    first[0, 3:5] = second[0, 5:7] = 61, 62
    segments = np.array([[0, 0] + [7] * 7 + [3] * 9 + [0]], np.int32)
    packed = np.concatenate([np.zeros((1, 2)), first, second, np.zeros((1, 1))], axis=1)
    forward = jax.jit(apply_model, static_argnums=3)
    with jax.set_mesh(LAYOUT.mesh()):
        together = forward(model, *LAYOUT.put((packed.astype(np.int32), segments)), LAYOUT)
        alone = [
            forward(model, *LAYOUT.put((ids, np.ones_like(ids, bool))), LAYOUT)
            for ids in (first, second)
        ]
    scale = float(jnp.abs(together).max())
    np.testing.assert_allclose(together[:, 2:9], alone[0], atol=1e-5 * scale)
    np.testing.assert_allclose(together[:, 9:18], alone[1], atol=1e-5 * scale)


def test_running_sum_begins_anew_with_every_segment() -> None:
    values = jnp.array([[1, 0, 2, 5, 1, 1, 3]])
    segments = jnp.array([[0, 0, 4, 4, 4, 1, 1]])
    assert running_sum(values, segments).tolist() == [[1, 1, 2, 7, 8, 1, 4]]


def _places_by_hand(
    ids: list[int], config: GLMV1Config
) -> tuple[list[list[int]], list[list[bool]]]:
    """Positions and mask of one unpadded ChatGLM-6B sequence, by the original's rules."""
    context = ids.index(config.sop_id)
    mask_token = config.gmask_id if config.gmask_id in ids else config.mask_id
    anchor = ids.index(mask_token)
    positions = [[i, 0] if i < context else [anchor, i - context + 1] for i in range(len(ids))]
    mask = [[s <= t or s < context for s in range(len(ids))] for t in range(len(ids))]
    return positions, mask


@pytest.mark.parametrize(
    "ids",
    [
        [5, 6, 7, 61, 62, 8, 9],
        [5, 60, 7, 8, 62, 9],  # [MASK] inside the context
        [5, 60, 7, 61, 62, 9],  # both: [gMASK] counts
        [61, 62],
        [5, 61, 7, 61, 62, 8, 62, 9],  # the first of each counts
    ],
)
def test_places_of_chatglm_6b_against_a_loop(small_v1: GLMV1Config, ids: list[int]) -> None:
    positions, mask = _places_by_hand(ids, small_v1)
    row = np.array([[0, 0, *ids, 0]], np.int32)
    segments = np.array([[0, 0, *[1] * len(ids), 0]], np.int32)
    real = slice(2, 2 + len(ids))
    with jax.set_mesh(LAYOUT.mesh()):
        model = jax.jit(lambda key: init_model(small_v1, LAYOUT, key))(jax.random.key(0))
        places = model.trunk.places(*LAYOUT.put((row, segments)))
        assert np.asarray(places.positions)[0, real].tolist() == positions
        ours = np.array(places.sight.mask())[0]
    assert ours[real, real].tolist() == mask
    ours[real, real] = False
    assert not ours.any()  # padding neither sees nor is seen
