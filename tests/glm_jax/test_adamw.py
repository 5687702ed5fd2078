"""The optimizer against AdamW with clipping and a decay mask, written out in NumPy float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glm_jax.optim import OptimConfig, learning_rate, make_optimizer

SHAPES = {"w_q": (3, 2), "b_q": (2,), "attn_norm": (3,), "embedding": (4, 3), "w_scalar": (3,)}
DECAYED = {"w_q", "embedding", "w_scalar"}
Arrays = dict[str, np.ndarray]


@nnx.dataclass
class _Block(nnx.Module):
    w_q: jax.Array = nnx.data()
    b_q: jax.Array = nnx.data()
    attn_norm: jax.Array = nnx.data()


@nnx.dataclass
class _Model(nnx.Module):
    blocks: _Block = nnx.data()
    embedding: jax.Array = nnx.data()
    w_scalar: jax.Array = nnx.data()


def _model(arrays: Arrays) -> _Model:
    on_device = {name: jnp.asarray(array) for name, array in arrays.items()}
    block = _Block(*(on_device.pop(name) for name in ("w_q", "b_q", "attn_norm")))
    return _Model(block, **on_device)


def _normal(seed: int, scale: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()
    }


def _by_hand(weights: Arrays, gradients: list[Arrays], config: OptimConfig, steps: int) -> Arrays:
    """Loshchilov & Hutter 2019, algorithm 2, after clipping by the global norm."""
    schedule = learning_rate(config, steps)
    w = {name: x.astype(np.float64) for name, x in weights.items()}
    first = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    second = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for t, raw in enumerate(gradients, start=1):
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in raw.values()))
        for name in SHAPES:
            g = raw[name] * min(1.0, config.clip_norm / norm)
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * g
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * g * g
            mean = first[name] / (1 - config.beta1**t)
            root = np.sqrt(second[name] / (1 - config.beta2**t))
            step = mean / (root + config.eps)
            if name in DECAYED:
                step = step + config.weight_decay * w[name]
            w[name] = w[name] - float(schedule(t - 1)) * step
    return w


@pytest.mark.parametrize("scale", [0.01, 5.0], ids=["below the clip", "above the clip"])
@pytest.mark.parametrize("eps", [1e-8, 0.05])  # outside the root: 0.05 inside it would differ by 4
def test_updates_are_adamw_after_clipping(scale: float, eps: float) -> None:
    config = OptimConfig(
        learning_rate=0.1, warmup_fraction=0.3, weight_decay=0.3, beta1=0.7, beta2=0.8, eps=eps
    )
    steps = 6
    weights, gradients = _normal(0), [_normal(seed, scale) for seed in range(1, steps + 1)]
    optimizer = make_optimizer(config, steps)
    model = _model(weights)
    state = optimizer.init(model)
    for step, gradient in enumerate(gradients):
        updates, state = optimizer.update(_model(gradient), state, model, step=step)
        model = jax.tree.map(jnp.add, model, updates)
    expected = _by_hand(weights, gradients, config, steps)
    for name in SHAPES:
        # six float32 steps of at most 0.2 each
        found = getattr(model if hasattr(model, name) else model.blocks, name)
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=2e-6, err_msg=name)


def test_a_schedule_rises_to_its_peak_and_falls_to_its_end() -> None:
    config = OptimConfig(learning_rate=0.5, warmup_fraction=0.2, final_fraction=0.1)
    rates = [float(learning_rate(config, 100)(step)) for step in range(100)]
    assert max(rates) == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.05)
    peak = int(np.argmax(rates))
    assert 19 <= peak <= 20
    assert all(a <= b for a, b in itertools.pairwise(rates[: peak + 1]))
    assert all(a > b for a, b in itertools.pairwise(rates[peak:]))
    # halfway between warm-up and end a cosine is halfway between its ends
    assert rates[60] == pytest.approx((0.5 + 0.05) / 2, abs=0.01)
    assert rates[10] == pytest.approx(0.25, abs=0.03)
