"""Updates against AdamW in NumPy and float64; bugs of optimizers, planted one at a time."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import glm_jax.optim
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.train import init_state, make_update
from glm_jax.weights import named_weights
from rlhf.doctor.adamw import is_decayed
from rlhf.trials.adamw import AdamW
from sharding.layout import Layout
from tests.rlhf import planted_optim as planted
from tests.tolerances import UNIT

LAYOUT = Layout()
SHAPES = {
    "embedding": (5, 4),
    "w_q": (4, 3),
    "w_scalar": (4,),
    "b_q": (3,),
    "attn_norm": (4,),
    "final_norm_bias": (4,),
}
Patch = pytest.MonkeyPatch


@nnx.dataclass
class Model(nnx.Module):
    """Parameters of every kind by the names that models give them."""

    embedding: jax.Array = nnx.data()
    w_q: jax.Array = nnx.data()
    w_scalar: jax.Array = nnx.data()
    b_q: jax.Array = nnx.data()
    attn_norm: jax.Array = nnx.data()
    final_norm_bias: jax.Array = nnx.data()


def _linear(model: Model, rows: Any, _: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A loss whose gradient is what `rows` holds."""
    terms = [jnp.vdot(getattr(model, name), rows[name]) for name in SHAPES]
    return jnp.sum(jnp.stack(terms)), {}


def _worst(config: OptimConfig, num_updates: int, gradients: list[dict[str, Any]]) -> float:
    """Largest error of a weight after any update, in units of a float32 rounding of weight and step."""
    rng = np.random.default_rng(0)
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    optimizer = make_optimizer(config, num_updates)
    reference = AdamW(config, num_updates)
    worst = 0.0
    with jax.set_mesh(LAYOUT.mesh()):
        state = init_state(Model(**{n: jnp.asarray(x) for n, x in start.items()}), optimizer)
        update = make_update(_linear, lambda rows: jnp.int32(1), optimizer, LAYOUT)
        weights: dict[str, np.ndarray] = {f".{name}": x for name, x in start.items()}
        for gradient in gradients:
            expected = reference.update(weights, {f".{name}": g for name, g in gradient.items()})
            state, _ = update(state, gradient)
            found = {name: np.asarray(x) for name, x in named_weights(state.model).items()}
            for name, exact in expected.items():
                # a step takes some twenty roundings, and 1 - beta2^t loses what cancels; its sum with the weight takes
                # one more, of the weight
                roundings = 20 + 1 / (1 - config.beta2)
                step = np.abs(exact - weights[name])
                unit = UNIT * (np.abs(exact) + roundings * step.max())
                worst = max(worst, float((np.abs(found[name] - exact) / unit).max()))
            weights = found
    return worst


def _gradients(seed: int, count: int, scale: float) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {
            name: (scale * rng.normal(size=shape)).astype(np.float32)
            for name, shape in SHAPES.items()
        }
        for _ in range(count)
    ]


LIMIT = 4.0  # units: the headroom over rounding
BASE = OptimConfig(learning_rate=1e-2, warmup_fraction=0.3, eps=1e-3)


CHOICES: dict[str, list[Any]] = {
    "warmup_fraction": [0.0, 0.3, 0.5],
    "final_fraction": [0.0, 0.1, 1.0],
    "weight_decay": [0.0, 0.1],
    "beta1": [0.9, 0.0],
    "beta2": [0.95, 0.999],
    "eps": [1e-8, 1e-3],
    "clip_norm": [0.5, 1.0, 1e9],
}


@pytest.mark.isa
@pytest.mark.parametrize("seed", range(6))
def test_every_update_is_that_of_adamw_in_float64(seed: int) -> None:
    draw = random.Random(seed)
    config = OptimConfig(1e-2, **{name: draw.choice(values) for name, values in CHOICES.items()})
    updates, scale = draw.randint(2, 6), draw.choice([1e-5, 1e-2, 1.0, 100.0])
    assert _worst(config, updates, _gradients(seed, updates, scale)) <= LIMIT


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    gradients = _gradients(1, 4, 1.0)
    gradients[1]["w_q"][0, 0] = np.nan
    assert _worst(BASE, 4, gradients) <= LIMIT


def test_the_mask_of_decay_is_that_of_the_model() -> None:
    model = Model(**{name: jnp.zeros(shape) for name, shape in SHAPES.items()})
    ours = {name: bool(x) for name, x in named_weights(glm_jax.optim.decayed(model)).items()}
    assert ours == {name: is_decayed(name) for name in ours}
    assert sum(ours.values()) == 3


BUGS: dict[str, Callable[[Patch], None]] = {
    "weight decay on norms": planted.decay_of_norms,
    "epsilon inside the root": planted.eps_in_the_root,
    "no bias correction": planted.no_bias_correction,
    "a clip after the moments": planted.clip_after_the_moments,
    "a schedule off by one": planted.schedule_one_late,
    "a clip of every weight by itself": planted.clip_by_each_weight,
    "decay through the moments": planted.decay_with_the_gradient,
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_of_the_optimizer_is_seen(bug: str, monkeypatch: Patch) -> None:
    gradients = _gradients(2, 3, 1.0)
    assert _worst(BASE, 4, gradients) <= LIMIT
    BUGS[bug](monkeypatch)
    assert _worst(BASE, 4, gradients) > 100 * LIMIT


@pytest.mark.parametrize(
    "settings", [{"beta1": 0.89}, {"beta2": 0.94}, {"clip_norm": 1.1}, {"weight_decay": 0.09}]
)
def test_another_setting_is_seen(settings: dict[str, float]) -> None:
    gradients = _gradients(3, 3, 1.0)
    other = dataclasses.replace(BASE, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            globals(), "make_optimizer", lambda _, n: glm_jax.optim.make_optimizer(other, n)
        )
        assert _worst(BASE, 4, gradients) > 100 * LIMIT
