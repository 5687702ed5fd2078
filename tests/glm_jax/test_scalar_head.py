"""The scalar head: its initialisation, its values, and the token it is read at; the trunk is a table."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.batch import Sequences
from glm_jax.config import PRESETS, GLMConfig, Head
from glm_jax.model import CausalLM
from glm_jax.model_v2 import TrunkV2
from glm_jax.scalar import (
    INIT,
    ScalarModel,
    apply_scalar,
    head_of,
    init_scalar,
    last_token,
    scalar_model,
    sequence_scores,
)
from sharding.layout import Layout

ONE, WIDTH, VOCABULARY = Layout(), 64, 10
TABLE = np.random.default_rng(0).normal(size=(VOCABULARY, WIDTH)) + 1.0


@pytest.fixture
def trunk(monkeypatch: pytest.MonkeyPatch) -> TrunkV2:
    """A trunk whose hidden state of a token is its bfloat16 row of TABLE."""

    def hidden(self: TrunkV2, ids: jax.Array, segments: jax.Array, layout: Layout) -> jax.Array:
        return jnp.asarray(TABLE, jnp.bfloat16)[ids]

    monkeypatch.setattr(TrunkV2, "__call__", hidden)
    return TrunkV2(jnp.zeros((1, 1)), None, jnp.zeros(1), PRESETS["chatglm3-6b"])


def _weights() -> np.ndarray:
    return np.random.default_rng(1).normal(size=WIDTH).astype(np.float32)


IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]], np.int32)
VALID = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]], bool)
LAST = [2, 4, 3]


def _exact() -> np.ndarray:
    """Values in float64 of the table as bfloat16 holds it."""
    rounded = np.asarray(jnp.asarray(TABLE, jnp.bfloat16), np.float64)
    return np.asarray(rounded[IDS] @ _weights())


def test_values_of_bfloat16_states_are_summed_in_float32(trunk: TrunkV2) -> None:
    model = ScalarModel(trunk, jnp.asarray(_weights()))
    found = apply_scalar(model, jnp.asarray(IDS), jnp.asarray(VALID), ONE)
    assert found.dtype == jnp.float32
    # 64 float32 terms of at most 10; a bfloat16 sum would be wrong by 1e-1
    np.testing.assert_allclose(found, _exact(), rtol=0, atol=1e-4)


def test_a_score_is_the_value_at_the_last_valid_token(trunk: TrunkV2) -> None:
    model = ScalarModel(trunk, jnp.asarray(_weights()))
    rows = Sequences(jnp.asarray(IDS), jnp.asarray(VALID), jnp.asarray(VALID))
    found = sequence_scores(model, rows, ONE)
    np.testing.assert_allclose(found, [_exact()[b, t] for b, t in enumerate(LAST)], atol=1e-4)


def test_the_last_token_is_found_on_either_side_of_padding() -> None:
    expected = np.zeros((4, 5), bool)
    expected[range(3), LAST] = True
    valid = jnp.asarray(np.concatenate([VALID, np.zeros((1, 5), bool)]))
    np.testing.assert_array_equal(last_token(valid), expected)
    holes = jnp.array([[True, False, True, True, False]])
    assert last_token(holes).tolist() == [[False, False, False, True, False]]


def test_a_head_begins_with_deviation_1_over_width_plus_1() -> None:
    width = 4096
    config = GLMConfig(8, width, 1, 1, 1, 8, 8, max_length=8)
    trunk = TrunkV2(jnp.zeros((1, 1)), None, jnp.zeros(1), config)
    with jax.set_mesh(ONE.mesh()):
        w = np.asarray(scalar_model(trunk, ONE, jax.random.key(0)).w_scalar, np.float64)
    assert w.shape == (width,)
    # four deviations of the estimates from 4,096 samples
    assert w.std() * (width + 1) == pytest.approx(1.0, abs=4 / (2 * width) ** 0.5)
    assert w.mean() * (width + 1) == pytest.approx(0.0, abs=4 / width**0.5)
    narrow = GLMConfig(8, 4, 1, 1, 1, 8, 8, max_length=8)
    trunk = TrunkV2(jnp.zeros((1, 1)), None, jnp.zeros(1), narrow)
    with jax.set_mesh(ONE.mesh()):
        small = scalar_model(trunk, ONE, jax.random.key(0)).w_scalar
    np.testing.assert_allclose(small, jax.random.normal(jax.random.key(0), (4,)) / 5, rtol=1e-6)
    fourth = (w**4).mean() / w.var() ** 2
    assert fourth == pytest.approx(3.0, abs=4 * (24 / width) ** 0.5)  # normal, not uniform (1.8)


def test_a_scalar_model_has_the_trunk_and_head_of_two_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[jax.Array] = []

    def init_trunk(config: GLMConfig, layout: Layout, key: jax.Array) -> TrunkV2:
        keys.append(key)
        return TrunkV2(jnp.zeros((1, 1)), None, jnp.zeros(1), config)

    monkeypatch.setattr("glm_jax.scalar.init_trunk", init_trunk)
    config = GLMConfig(8, 16, 1, 1, 1, 8, 8, max_length=8)
    with jax.set_mesh(ONE.mesh()):
        model = init_scalar(config, ONE, jax.random.key(3))
        first, second = jax.random.split(jax.random.key(3))
        head = scalar_model(model.trunk, ONE, second).w_scalar
    assert jax.random.key_data(keys[0]).tolist() == jax.random.key_data(first).tolist()
    np.testing.assert_array_equal(model.w_scalar, head)


def test_every_head_has_its_initialiser_and_name(trunk: TrunkV2) -> None:
    models: dict[Head, CausalLM | ScalarModel] = {
        Head.SCALAR: ScalarModel(trunk, jnp.zeros(1)),
        Head.VOCABULARY: CausalLM(trunk, None),
    }
    initialiser: Callable[..., object] = INIT[Head.SCALAR]
    assert initialiser is init_scalar and set(INIT) == set(models)
    for head, model in models.items():
        assert head_of(model) is head
