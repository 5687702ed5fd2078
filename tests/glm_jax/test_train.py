"""The update step and the training loop on a linear model, against NumPy in float64."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import glm_jax.train
from glm_jax.batch import Pairs, Sequences
from glm_jax.config import PRESETS
from glm_jax.keeper import Keeper
from glm_jax.metrics import Deviation, Peak, Shares
from glm_jax.model import CausalLM
from glm_jax.model_v2 import TrunkV2
from glm_jax.optim import OptimConfig
from glm_jax.train import (
    TrainState,
    Update,
    init_state,
    language_loss,
    make_update,
    num_targets,
    num_tokens,
    require_finite,
    to_host,
    train,
)
from rlhf.sft import SFTConfig, sft_update, train_sft
from sharding.errors import UserError
from sharding.layout import Layout

ROWS, WIDTH = 8, 3
RATE = 0.1
X = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=ROWS).astype(np.float32)
START = np.array([0.5, -1.0, 2.0], np.float32)
SGD = optax.trace(decay=0.9)  # it keeps a state, so that a lost one shows


@nnx.dataclass
class _Linear(nnx.Module):
    w: jax.Array = nnx.data()


def _loss(model: Any, rows: Any, count: Any) -> tuple[jax.Array, Shares]:
    """Squared errors of a linear model."""
    x, y = rows
    error = x @ model.w - y
    return jnp.sum(error**2) / count, {
        "error": jnp.sum(error) / count,
        "largest": Peak(jnp.max(error)),
        "spread": Deviation(jnp.sum(error) / count, jnp.sum(error**2) / count),
    }


def _update(
    accumulate: int, optimizer: optax.GradientTransformation = SGD
) -> tuple[Update, Layout]:
    layout = Layout(accumulate=accumulate)
    counts = lambda rows: len(rows[1])  # noqa: E731
    return make_update(_loss, counts, optimizer, layout, lambda batch: batch["rows"]), layout


def _model() -> _Linear:
    return _Linear(jnp.asarray(START))


def _scaled(momentum: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    return 0.9 * momentum + gradient


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_updates_follow_the_gradient_of_the_whole_batch(accumulate: int) -> None:
    descent = optax.chain(SGD, optax.scale(-RATE))
    update, layout = _update(accumulate, descent)
    w, momentum = START.astype(np.float64), np.zeros(WIDTH)
    with jax.set_mesh(layout.mesh()):
        state = init_state(_model(), descent)
        for step in range(3):
            state, metrics = update(state, {"rows": layout.put((X, Y))})
            error = X @ w - Y
            gradient = 2 * X.T.astype(np.float64) @ error / ROWS
            # float32 sums of 8 terms below 20
            assert float(metrics["loss"]) == pytest.approx((error**2).mean(), abs=1e-5)
            assert float(metrics["grad_norm"]) == pytest.approx(np.linalg.norm(gradient), abs=1e-5)
            assert float(metrics["error"]) == pytest.approx(error.mean(), abs=1e-5)
            assert float(metrics["largest"]) == pytest.approx(error.max(), abs=1e-5)
            assert float(metrics["spread"]) == pytest.approx(error.std(), abs=1e-5)
            momentum = _scaled(momentum, gradient)
            w = w - RATE * momentum
            assert int(state.step) == step + 1
            np.testing.assert_allclose(state.model.w, w, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accumulation_computes_one_piece_at_a_time(accumulate: int) -> None:
    update, layout = _update(accumulate)
    with jax.set_mesh(layout.mesh()):
        state = init_state(_model(), SGD)
        program = str(jax.make_jaxpr(update)(state, {"rows": layout.put((X, Y))}))
    assert ("scan[" in program) == (accumulate > 1)
    assert (f"f32[{ROWS // 2},{WIDTH}]" in program) == (accumulate > 1)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_gradient_changes_no_weight_and_no_moment(bad: float, accumulate: int) -> None:
    descent = optax.chain(SGD, optax.scale(-RATE))
    update, layout = _update(accumulate, descent)
    with jax.set_mesh(layout.mesh()):
        state, _ = update(init_state(_model(), descent), {"rows": layout.put((X, Y))})
        before = jax.tree.map(np.asarray, state)
        broken = Y.copy()
        broken[3] = bad
        state, metrics = update(state, {"rows": layout.put((X, broken))})
    assert not math.isfinite(float(metrics["grad_norm"]))
    assert int(state.step) == 2
    for old, new in zip(
        jax.tree.leaves((before.model, before.opt_state)),
        jax.tree.leaves((state.model, state.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)


def test_a_state_shares_no_buffer_with_the_model() -> None:
    update, layout = _update(1)
    with jax.set_mesh(layout.mesh()):
        model = _model()
        state = init_state(model, SGD)
        assert int(state.step) == 0 and state.step.dtype == jnp.int32
        update(state, {"rows": layout.put((X, Y))})  # donates the state
        np.testing.assert_array_equal(model.w, START)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    require_finite({"grad_norm": 0.0, "loss": math.nan}, "update 3")
    for norm in (math.nan, math.inf):
        with pytest.raises(UserError, match=r"^update 3: the gradient is not finite \(loss 1.5\)"):
            require_finite({"grad_norm": norm, "loss": 1.5}, "update 3")


# the loop


class _Recorder(Keeper):
    def __init__(self, skips: bool = False) -> None:
        self.kept: list[tuple[int, int, Mapping[str, float]]] = []
        self.skips, self.skipped = skips, list[tuple[int, float]]()

    def keep(self, tree: Any, count: int, *_: Any, metrics: Any = None, **__: Any) -> None:
        self.kept.append((int(tree.step), count, metrics))

    def skip(self, step: int, model: Any, batch: Any, role: str = "") -> bool:
        self.skipped.append((step, float(model)))
        return self.skips


def _batches(*factors: float) -> Iterator[Any]:
    for factor in factors:
        valid = np.ones((2, 3), bool)
        valid[0, 0] = False
        yield Sequences(np.full((2, 3), factor, np.float32), valid, valid)


def _counting(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    """The model is the sum of the batches' numbers; NaN is a bad gradient."""
    number = batch.ids[0, 0]
    good = jnp.isfinite(number)
    model = state.model + jnp.where(good, number, 0.0)
    return TrainState(state.step + 1, model, None), {"loss": number, "grad_norm": 2 * number}


def _train(keeper: Keeper, start: int, end: int, *numbers: float) -> tuple[float, list[Any]]:
    reports: list[Any] = []
    layout = Layout()

    def look(step: int, model: Any) -> Mapping[str, float]:
        return {"seen": float(model)} if step % 2 else {}

    with jax.set_mesh(layout.mesh()):
        state = TrainState(jnp.int32(start), jnp.float32(0.0), None)
        state = train(
            state, _counting, _batches(*numbers), end, layout,
            lambda *of: reports.append(of), keeper, look,
        )  # fmt: skip
    assert int(state.step) == end
    return float(state.model), reports


def test_the_loop_runs_looks_reports_and_saves_every_step() -> None:
    keeper = _Recorder()
    total, reports = _train(keeper, 0, 3, 1.0, 2.0, 4.0, 100.0)
    assert total == 7.0
    assert reports == [
        (1, {"loss": 1.0, "grad_norm": 2.0, "seen": 1.0}, 5),
        (2, {"loss": 2.0, "grad_norm": 4.0}, 5),
        (3, {"loss": 4.0, "grad_norm": 8.0, "seen": 7.0}, 5),
    ]
    assert keeper.kept == [(1, 1, {"seen": 1.0}), (2, 2, {}), (3, 3, {"seen": 7.0})]
    assert keeper.skipped == []


def test_a_resumed_loop_runs_the_remaining_steps() -> None:
    keeper = _Recorder()
    total, reports = _train(keeper, 2, 4, 1.0, 2.0, 4.0)
    assert total == 3.0
    assert [step for step, *_ in reports] == [count for _, count, _ in keeper.kept] == [3, 4]


def test_a_skipped_step_reports_so_and_nothing_else() -> None:
    keeper = _Recorder(skips=True)
    total, reports = _train(keeper, 0, 3, 1.0, math.nan, 2.0)
    assert total == 3.0
    assert reports[1] == (2, {"skipped": 1.0}, 5)
    assert keeper.skipped == [(2, 1.0)]


def test_a_bad_gradient_ends_the_loop_unless_it_is_skipped() -> None:
    keeper = _Recorder()
    with pytest.raises(UserError, match=r"^update 2: the gradient is not finite"):
        _train(keeper, 0, 3, 1.0, math.nan, 2.0)
    assert [count for _, count, _ in keeper.kept] == [1]


# counts and the loss of language models


def _sequences() -> Sequences:
    valid = np.array([[0, 1, 1, 1], [1, 1, 0, 0]], bool)
    target = np.array([[0, 0, 1, 1], [0, 1, 0, 0]], bool)
    return Sequences(np.arange(8, dtype=np.int32).reshape(2, 4), valid, target)


def _language_model(scale: float) -> CausalLM:
    """A model whose one weight that counts is its head, a number."""
    trunk = TrunkV2(jnp.zeros((1, 1)), None, jnp.zeros(1), PRESETS["chatglm3-6b"])
    return CausalLM(trunk, jnp.float32(scale))


def test_tokens_are_counted_in_all_sequences_of_a_batch() -> None:
    rows, ones = jax.tree.map(jnp.asarray, _sequences()), jnp.ones(2)
    assert int(num_tokens(rows)) == 5
    assert int(num_tokens({"pairs": Pairs(rows, rows), "weight": ones})) == 10
    assert int(num_tokens((ones, None))) == 0
    assert num_tokens(rows).dtype == jnp.int32
    assert int(num_targets(rows)) == 3
    assert int(num_targets(rows._replace(target=jnp.zeros((2, 4), bool)))) == 1


def test_metrics_come_to_the_host_as_floats() -> None:
    found = to_host({"a": jnp.float32(1.5), "b": jnp.int32(2)})
    assert found == {"a": 1.5, "b": 2.0} and all(type(x) is float for x in found.values())


def test_the_language_loss_is_a_mean_over_target_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def logprobs(model: Any, ids: Any, valid: Any, layout: Layout) -> jax.Array:
        """A value that no sequence has where it is not valid."""
        return jnp.where(valid, -model.w_head * ids, jnp.nan)

    monkeypatch.setattr(glm_jax.train, "sequence_logprobs", logprobs)
    rows = jax.tree.map(jnp.asarray, _sequences())
    for count, whole in ((None, 3), (6, 6)):
        loss, shares = language_loss(_language_model(0.5), rows, count, Layout())
        assert float(loss) == pytest.approx(0.5 * (2 + 3 + 5) / whole)
        assert int(shares["tokens"]) == 3  # type: ignore[arg-type]


# supervised fine-tuning, which is the loss above in the loop above


def test_sft_minimises_the_language_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def logprobs(model: Any, ids: Any, valid: Any, layout: Layout) -> jax.Array:
        return -((model.w_head * ids - 1.0) ** 2) * valid

    monkeypatch.setattr(glm_jax.train, "sequence_logprobs", logprobs)
    layout, rows = Layout(), _sequences()
    rows = rows._replace(ids=(rows.ids % 4).astype(np.int32))
    config = SFTConfig(
        steps=2, batch_size=2, optim=OptimConfig(learning_rate=0.01, weight_decay=0.0)
    )
    reports, keeper = list[Any](), _Recorder()
    with jax.set_mesh(layout.mesh()):
        model = _language_model(2.0)
        update = sft_update(optax.sgd(0.5), layout)
        state, metrics = update(init_state(model, optax.sgd(0.5)), layout.put(rows))
        targets = [2.0, 3.0, 1.0]
        loss = sum((2 * x - 1) ** 2 for x in targets) / 3
        slope = sum(2 * x * (2 * x - 1) for x in targets) / 3
        assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-6)
        assert float(state.model.w_head) == pytest.approx(2.0 - 0.5 * slope, rel=1e-6)
        trained = train_sft(
            model, config, iter([rows] * 5), layout, lambda *of: reports.append(of), keeper
        )
    assert [step for step, *_ in reports] == [1, 2] == [count for _, count, _ in keeper.kept]
    assert trained.w_head is not None and model.w_head is not None
    assert float(trained.w_head) < 2.0 == float(model.w_head)


def test_sft_refuses_a_batch_that_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"^sft.batch_size = 3 does not divide"):
        train_sft(
            _language_model(1.0), SFTConfig(batch_size=3), iter(()), Layout(data=2), lambda *_: None
        )
