"""The reward model of ChatGLM-RLHF: pairwise loss and a prior on the scores."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from glm_jax.batch import Judged, Packed, Pairs, Sequences
from glm_jax.keeper import NOTHING_KEPT, Keeper
from glm_jax.metrics import Deviation, Metric, Shares
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.scalar import ScalarModel, apply_scalar, sequence_scores
from glm_jax.train import Report, Update, init_state, make_update, train
from sharding.layout import Layout
from sharding.processes import fetch
from sharding.ranges import NonNegative, Positive, check_ranges


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Training of the reward model."""

    steps: Positive = 400
    batch_size: Positive = 64  # pairs an update
    l2_weight: float = 0.001  # of the score prior; not in the paper (its later code has 0.001)
    # answers packed into rows of so many tokens, `batch_size` counting rows; None: a pair a row. Not in the paper
    pack_length: Positive | None = None
    eval_every: NonNegative = 0  # updates between looks at the held-out pairs; 0: none in between
    optim: OptimConfig = OptimConfig(learning_rate=5e-6)

    def __post_init__(self) -> None:
        check_ranges(self, "reward")


def interleave(pairs: Pairs) -> Sequences:
    """Pairs of B rows as Sequences of 2B rows, chosen and rejected in turn; rows stay on their device."""

    def merge(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
        spec = jax.typeof(chosen).sharding.spec
        both = jnp.stack([chosen, rejected], axis=1)
        return jnp.reshape(both, (-1, chosen.shape[-1]), out_sharding=spec)

    return jax.tree.map(merge, pairs.chosen, pairs.rejected)


Batch = Judged | Packed


def pair_scores(model: ScalarModel, batch: Batch, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Scores of the preferred and of the other answers, float32 in the shape of the batch's weights."""
    if isinstance(batch, Packed):
        values = apply_scalar(model, batch.ids, batch.segments, layout)
        return _at(values, batch.chosen_end), _at(values, batch.rejected_end)
    scores = sequence_scores(model, interleave(batch.pairs), layout)
    both = jnp.reshape(scores, (-1, 2), out_sharding=layout.spec("batch", None))
    return both[:, 0], both[:, 1]


def _at(values: Float[Array, "B T"], column: Int[Array, "B J"]) -> Float[Array, "B J"]:
    """values[b, column[b, j]], as a sum so that rows stay on their device."""
    hit = column[:, :, None] == jnp.arange(values.shape[1])
    return jnp.sum(jnp.where(hit, values[:, None], 0.0), axis=-1)


def total_weight(batch: Batch) -> Float[Array, ""]:
    """What the pairs of a batch count for together; of nothing but padding a tiny number, to divide by."""
    return jnp.maximum(jnp.sum(batch.weight), jnp.finfo(jnp.float32).tiny)


def reward_loss(
    model: ScalarModel, batch: Batch, count: Float[Array, ""], layout: Layout, l2_weight: float
) -> tuple[jax.Array, Shares]:
    """L_RM + l2_weight * L_REG, a mean over judged pairs whose weights sum to `count` in the whole batch.

    L_RM = -log sigmoid(r_w - r_l) (arXiv 2404.00934, eq. 1); L_REG = r_w^2 + r_l^2, a zero-mean Gaussian prior on
    scores (ibid., section 3.1.3), because eq. 1 fixes no scale and no origin. Weights are not in the paper: with them a
    ranking of K answers counts as one and not as its K (K - 1) / 2 pairs.
    """
    chosen, rejected = pair_scores(model, batch, layout)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(batch.weight * values) / count

    prior = chosen**2 + rejected**2
    score_mean = mean(chosen + rejected) / 2
    metrics: dict[str, Metric] = {
        "accuracy": mean((chosen > rejected).astype(jnp.float32)),
        "margin": mean(chosen - rejected),
        "score_mean": score_mean,
        "score_std": Deviation(score_mean, mean(prior) / 2),
    }
    return mean(-jax.nn.log_sigmoid(chosen - rejected) + l2_weight * prior), metrics


def reward_update(
    config: RewardConfig, optimizer: optax.GradientTransformation, layout: Layout
) -> Update:
    """The update of `glm_jax.train.make_update` on Judged or Packed."""
    loss = partial(reward_loss, layout=layout, l2_weight=config.l2_weight)
    return make_update(loss, total_weight, optimizer, layout)


Evaluate = Callable[[ScalarModel], Mapping[str, float]]


def train_reward(
    model: ScalarModel,
    config: RewardConfig,
    batches: Iterator[Batch],
    layout: Layout,
    report: Report,
    evaluate: Evaluate | None = None,
    keeper: Keeper = NOTHING_KEPT,
) -> ScalarModel:
    """A copy of `model` after `config.steps` updates; `evaluate` adds to the metrics of every `eval_every`-th one.

    Raises UserError on a batch that does not divide.
    """
    layout.check_batch(config.batch_size, "reward.batch_size")
    optimizer = make_optimizer(config.optim, config.steps)
    update = reward_update(config, optimizer, layout)

    def look(step: int, model: ScalarModel) -> Mapping[str, float]:
        if evaluate is None or not config.eval_every:
            return {}
        due = step % config.eval_every == 0 or step == config.steps
        return evaluate(model) if due else {}

    state = keeper.restore(partial(init_state, model, optimizer))
    return train(state, update, batches, config.steps, layout, report, keeper, look).model


class Heldout:
    """Held-out pairs, scored whenever asked by one compiled program."""

    def __init__(self, batches: Iterable[Judged], layout: Layout) -> None:
        self._batches = list(batches)
        self._layout = layout
        self._score = jax.jit(partial(pair_scores, layout=layout))

    def scores(self, model: ScalarModel) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the preferred and of the other answers, float32 [P]; rows of padding are left out."""
        sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for batch in self._batches:
            scores = fetch(self._score(model, self._layout.put(batch)))
            real = _real(batch)
            for side, found in zip(sides, scores, strict=True):
                side.append(found[real])
        return np.concatenate(sides[0]), np.concatenate(sides[1])

    def __call__(self, model: ScalarModel) -> Mapping[str, float]:
        """Accuracy (equal scores count one half) and the loss of eq. 1 in nats, both means over weights."""
        weights = [np.asarray(batch.weight)[_real(batch)] for batch in self._batches]
        weight = np.concatenate(weights).astype(np.float64)
        chosen, rejected = self.scores(model)
        margin = chosen.astype(np.float64) - rejected
        right, loss = (np.sign(margin) + 1) / 2, np.logaddexp(0.0, -margin)
        return {
            "heldout_accuracy": float(np.average(right, weights=weight)),
            "heldout_loss": float(np.average(loss, weights=weight)),
        }


def _real(batch: Judged) -> np.ndarray:
    """Rows that are no padding."""
    real: np.ndarray = np.any(np.asarray(batch.pairs.chosen.valid), axis=1)
    return real
