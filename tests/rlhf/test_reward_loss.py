"""The reward model's loss, pairs and held-out figures against plain loops; the model is a table of scores."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlhf.reward
from glm_jax.batch import Judged, Packed, Pairs, Sequences
from glm_jax.config import PRESETS
from glm_jax.keeper import NOTHING_KEPT, Keeper
from glm_jax.metrics import finished
from glm_jax.model_v2 import TrunkV2
from glm_jax.optim import OptimConfig
from glm_jax.scalar import ScalarModel
from glm_jax.train import TrainState
from rlhf.reward import (
    Batch,
    Heldout,
    RewardConfig,
    interleave,
    pair_scores,
    reward_loss,
    reward_update,
    total_weight,
    train_reward,
)
from sharding.errors import UserError
from sharding.layout import Layout

ONE, LENGTH = Layout(), 5
TABLE = np.array([0.0, 0.7, -1.2, 2.5, 0.7, -0.4, 1.1, -2.0], np.float32)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ScalarModel:
    """A model whose value at a token is its entry of TABLE times the head; rows are read at their last token."""

    def values(model: ScalarModel, ids: jax.Array, segments: jax.Array, _: Layout) -> jax.Array:
        return model.w_scalar[0] * jnp.asarray(TABLE)[ids] + 0 * segments

    def scores(model: ScalarModel, rows: Sequences, layout: Layout) -> jax.Array:
        last = rows.valid & ~jnp.pad(rows.valid, ((0, 0), (0, 1)))[:, 1:]
        return jnp.sum(jnp.where(last, values(model, rows.ids, rows.valid, layout), 0.0), axis=1)

    monkeypatch.setattr(rlhf.reward, "apply_scalar", values)
    monkeypatch.setattr(rlhf.reward, "sequence_scores", scores)
    trunk = TrunkV2(jnp.zeros((1, 1)), None, jnp.zeros(1), PRESETS["chatglm3-6b"])
    return ScalarModel(trunk, jnp.ones(1))


def _side(lasts: list[int]) -> Sequences:
    """Rows of different lengths that end in these tokens."""
    ids, valid = np.full((len(lasts), LENGTH), 6, np.int32), np.zeros((len(lasts), LENGTH), bool)
    for row, token in enumerate(lasts):
        length = 2 + row % (LENGTH - 1)
        ids[row, length - 1], valid[row, :length] = token, True
    return Sequences(ids, valid, valid)


CHOSEN, REJECTED = [1, 2, 3, 1, 0, 5], [5, 3, 7, 4, 0, 6]
WEIGHTS = np.array(
    [1.0, 0.5, 0.25, 2.0, 0.0, 1.5], np.float32
)  # the fourth is a tie, the fifth padding
JUDGED = Judged(Pairs(_side(CHOSEN), _side(REJECTED)), WEIGHTS)
PACKED = Packed(
    ids=np.array([[1, 5, 2, 3, 0], [3, 7, 1, 4, 5]], np.int32),
    segments=np.array([[1, 1, 2, 2, 0], [1, 2, 3, 4, 5]], np.int32),
    chosen_end=np.array([[0, 2, 0], [0, 2, 4]], np.int32),
    rejected_end=np.array([[1, 3, 0], [1, 3, 0]], np.int32),
    weight=np.array([[1.0, 0.5, 0.0], [0.25, 2.0, 1.5]], np.float32),
)


def _pairs(batch: Batch) -> list[tuple[float, float, float]]:
    """(score of the preferred, of the other, weight), by hand."""
    if isinstance(batch, Judged):
        found = zip(TABLE[CHOSEN], TABLE[REJECTED], WEIGHTS, strict=True)
    else:
        rows = np.arange(2)[:, None]
        sides = (TABLE[batch.ids[rows, end]].flat for end in (batch.chosen_end, batch.rejected_end))
        found = zip(*sides, batch.weight.flat, strict=True)
    return [(float(a), float(b), float(w)) for a, b, w in found]


@pytest.mark.parametrize("batch", [JUDGED, PACKED], ids=["judged", "packed"])
@pytest.mark.parametrize("share", [1, 4])
def test_loss_and_metrics_against_a_loop(model: ScalarModel, batch: Batch, share: int) -> None:
    pairs = _pairs(batch)
    whole = share * math.fsum(w for *_, w in pairs)
    with jax.set_mesh(ONE.mesh()):
        on_mesh = ONE.put(batch)
        chosen, rejected = pair_scores(model, on_mesh, ONE)
        loss, shares = reward_loss(model, on_mesh, share * total_weight(on_mesh), ONE, 0.3)
    assert chosen.shape == rejected.shape == batch.weight.shape
    np.testing.assert_allclose(chosen.ravel(), [c for c, _, _ in pairs])
    np.testing.assert_allclose(rejected.ravel(), [r for _, r, _ in pairs])

    def mean(of: Callable[[float, float], float]) -> float:
        return math.fsum(w * of(c, r) for c, r, w in pairs) / whole

    expected = {
        "accuracy": mean(lambda c, r: float(c > r)),
        "margin": mean(lambda c, r: c - r),
        "score_mean": mean(lambda c, r: (c + r) / 2),
    }
    square = mean(lambda c, r: (c * c + r * r) / 2)
    expected["score_std"] = math.sqrt(square - expected["score_mean"] ** 2)
    # float32 sums of 6 terms below 10
    by_hand = mean(lambda c, r: math.log1p(math.exp(r - c)) + 0.3 * (c * c + r * r))
    assert float(loss) == pytest.approx(by_hand, abs=1e-5)
    found = {name: float(value) for name, value in finished(shares).items()}
    assert found == pytest.approx(expected, abs=1e-5)


def test_interleaved_rows_alternate_between_the_sides() -> None:
    with jax.set_mesh(ONE.mesh()):
        both = interleave(ONE.put(JUDGED.pairs))
    for side, rows in enumerate(JUDGED.pairs):
        for name in ("ids", "valid", "target"):
            np.testing.assert_array_equal(getattr(both, name)[side::2], getattr(rows, name))


def test_the_weight_of_nothing_divides() -> None:
    nothing = JUDGED._replace(weight=jnp.zeros(6))
    assert 0 < float(total_weight(nothing)) < 1e-30
    assert float(total_weight(JUDGED._replace(weight=jnp.asarray(WEIGHTS)))) == 5.25


def test_an_update_descends_the_loss_of_its_settings(model: ScalarModel) -> None:
    rate = 0.05
    import optax

    def by_hand(scale: float) -> float:
        pairs = [(scale * c, scale * r, w) for c, r, w in _pairs(JUDGED)]
        terms = (w * (math.log1p(math.exp(r - c)) + 0.2 * (c * c + r * r)) for c, r, w in pairs)
        return math.fsum(terms) / float(WEIGHTS.sum())

    with jax.set_mesh(ONE.mesh()):
        update = reward_update(RewardConfig(l2_weight=0.2), optax.sgd(rate), ONE)
        state = TrainState(jnp.int32(0), model, optax.sgd(rate).init(model))
        state, metrics = update(jax.tree.map(jnp.copy, state), ONE.put(JUDGED))
    slope = (by_hand(1 + 1e-5) - by_hand(1 - 1e-5)) / 2e-5
    assert float(metrics["loss"]) == pytest.approx(by_hand(1.0), abs=1e-5)
    assert float(state.model.w_scalar[0]) == pytest.approx(1 - rate * slope, abs=1e-5)


class _Fresh(Keeper):
    """Accepts the state that a training begins with."""

    state: Any = None

    def restore(self, make: Callable[[], Any]) -> Any:
        self.state = make()
        return self.state


@pytest.mark.parametrize(
    ("every", "looked", "evaluates"),
    [(3, [3, 6, 7], True), (0, [], True), (7, [7], True), (3, [], False)],
)
def test_heldout_pairs_are_evaluated_on_schedule(
    model: ScalarModel,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
    looked: list[int],
    evaluates: bool,
) -> None:
    calls: list[Any] = []

    def train(state: Any, update: Any, batches: Any, steps: int, *others: Any) -> Any:
        look = others[-1]
        calls.append((state, batches, steps, others[:-1]))
        assert [step for step in range(1, steps + 1) if look(step, model)] == looked
        return state

    monkeypatch.setattr(rlhf.reward, "train", train)
    config = RewardConfig(steps=7, batch_size=4, eval_every=every, optim=OptimConfig())
    batches: Iterator[Batch] = iter([JUDGED])
    keeper = _Fresh()

    def report(step: int, metrics: Mapping[str, float], tokens: int) -> None: ...

    def evaluate(seen: ScalarModel) -> Mapping[str, float]:
        assert seen is model
        return {"heldout_accuracy": 1.0}

    with jax.set_mesh(ONE.mesh()):
        trained = train_reward(
            model, config, batches, ONE, report, evaluate if evaluates else None, keeper
        )
    ((state, given, steps, others),) = calls
    assert (given, steps, others) == (batches, 7, (ONE, report, keeper))
    assert state is keeper.state and trained is state.model is not model
    assert int(state.step) == 0


def test_a_batch_that_does_not_divide_is_refused(model: ScalarModel) -> None:
    config = RewardConfig(batch_size=3)
    with pytest.raises(UserError, match=r"^reward.batch_size = 3 does not divide"):
        train_reward(model, config, iter(()), Layout(data=2), lambda *_: None, None, NOTHING_KEPT)


def test_heldout_figures_are_weighted_and_ignore_padding(model: ScalarModel) -> None:
    padding = JUDGED._replace(pairs=jax.tree.map(np.zeros_like, JUDGED.pairs), weight=0 * WEIGHTS)
    with jax.set_mesh(ONE.mesh()):
        twice = JUDGED._replace(weight=2 * WEIGHTS[::-1].copy())
        heldout = Heldout([JUDGED, twice, padding], ONE)
        chosen, rejected = heldout.scores(model)
        figures = heldout(model)
    pairs = [
        *_pairs(JUDGED),
        *((c, r, 2 * float(w)) for (c, r, _), w in zip(_pairs(JUDGED), WEIGHTS[::-1], strict=True)),
    ]
    np.testing.assert_allclose(chosen, [c for c, _, _ in pairs])
    np.testing.assert_allclose(rejected, [r for _, r, _ in pairs])
    total = math.fsum(w for *_, w in pairs)
    right = math.fsum(w * (0.5 if c == r else float(c > r)) for c, r, w in pairs) / total
    loss = math.fsum(w * math.log1p(math.exp(r - c)) for c, r, w in pairs) / total
    assert figures == pytest.approx({"heldout_accuracy": right, "heldout_loss": loss}, rel=1e-6)


def test_heldout_figures_are_float64(model: ScalarModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums with one digit more than float32 has."""
    big = 2.0**24
    heldout = Heldout([JUDGED._replace(weight=np.array([big, 1, 1, 0, 0, 0], np.float32))], ONE)
    chosen = jnp.array([-1.0, -1.0, -1.0, 0, 0, 0])
    monkeypatch.setattr(heldout, "_score", lambda model, batch: (chosen, jnp.full(6, big)))
    with jax.set_mesh(ONE.mesh()):
        assert heldout(model) == {"heldout_accuracy": 0.0, "heldout_loss": big + 1}
    chosen = jnp.array([1.0, -1.0, -1.0, 0, 0, 0])
    monkeypatch.setattr(heldout, "_score", lambda model, batch: (chosen, jnp.zeros(6)))
    with jax.set_mesh(ONE.mesh()):
        assert heldout(model)["heldout_accuracy"] == big / (big + 2)
