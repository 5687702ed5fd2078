"""The reward model of ChatGLM-RLHF: pairwise loss and a prior on the scores."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from glm_jax.batch import Pairs, Sequences
from glm_jax.metrics import Deviation, Metric, Shares
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.scalar import ScalarModel, sequence_scores
from glm_jax.train import Report, Update, init_state, make_update, train
from sharding.layout import Layout
from sharding.processes import fetch


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Training of the reward model."""

    steps: int = 400
    batch_size: int = 64  # pairs an update
    l2_weight: float = 0.001  # of the score prior; not in the paper (its later code has 0.001)
    optim: OptimConfig = OptimConfig(learning_rate=5e-6)


def interleave(pairs: Pairs) -> Sequences:
    """Pairs of B rows as Sequences of 2B rows, chosen and rejected in turn; rows stay on their device."""

    def merge(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
        spec = jax.typeof(chosen).sharding.spec
        both = jnp.stack([chosen, rejected], axis=1)
        return jnp.reshape(both, (-1, chosen.shape[-1]), out_sharding=spec)

    return jax.tree.map(merge, pairs.chosen, pairs.rejected)


def pair_scores(
    model: ScalarModel, pairs: Pairs, layout: Layout
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Scores of the chosen and of the rejected answers."""
    scores = sequence_scores(model, interleave(pairs), layout)
    both = jnp.reshape(scores, (-1, 2), out_sharding=layout.spec("batch", None))
    return both[:, 0], both[:, 1]


def num_pairs(pairs: Pairs) -> int:
    """Pairs of a batch."""
    return int(pairs.chosen.ids.shape[0])


def reward_loss(
    model: ScalarModel, pairs: Pairs, count: int, layout: Layout, l2_weight: float
) -> tuple[jax.Array, Shares]:
    """L_RM + l2_weight * L_REG, mean over the `count` pairs of the batch.

    L_RM = -log sigmoid(r_w - r_l) (arXiv 2404.00934, eq. 1); L_REG = r_w^2 + r_l^2, a zero-mean Gaussian prior on
    scores (ibid., section 3.1.3), because eq. 1 fixes no scale and no origin.
    """
    chosen, rejected = pair_scores(model, pairs, layout)
    ranking = -jax.nn.log_sigmoid(chosen - rejected)
    prior = chosen**2 + rejected**2
    mean = jnp.sum(chosen + rejected) / (2 * count)
    metrics: dict[str, Metric] = {
        "accuracy": jnp.sum(chosen > rejected) / count,
        "margin": jnp.sum(chosen - rejected) / count,
        "score_mean": mean,
        "score_std": Deviation(mean, jnp.sum(prior) / (2 * count)),
    }
    return jnp.sum(ranking + l2_weight * prior) / count, metrics


def reward_update(
    config: RewardConfig, optimizer: optax.GradientTransformation, layout: Layout
) -> Update:
    """The update of `glm_jax.train.make_update` on Pairs."""
    loss = partial(reward_loss, layout=layout, l2_weight=config.l2_weight)
    return make_update(loss, num_pairs, optimizer, layout)


def train_reward(
    model: ScalarModel,
    config: RewardConfig,
    batches: Iterator[Pairs],
    layout: Layout,
    report: Report,
) -> ScalarModel:
    """A copy of `model` after `config.steps` updates. Raises UserError on a batch that does not divide."""
    layout.check_batch(config.batch_size, "reward.batch_size")
    optimizer = make_optimizer(config.optim, config.steps)
    update = reward_update(config, optimizer, layout)
    state = init_state(model, optimizer)
    return train(state, update, batches, config.steps, layout, report).model


def evaluate_reward(
    model: ScalarModel, batches: Iterable[Pairs], layout: Layout
) -> dict[str, float | int]:
    """Accuracy over all pairs with its standard error, and that of a scorer that only sees length.

    Rows without a valid token fill the last batch and do not count. Equal scores count one half.
    """

    @jax.jit
    def gaps(model: ScalarModel, pairs: Pairs) -> tuple[jax.Array, jax.Array, jax.Array]:
        chosen, rejected = pair_scores(model, pairs, layout)
        longer = jnp.sum(pairs.chosen.target, axis=1) - jnp.sum(pairs.rejected.target, axis=1)
        return chosen - rejected, longer, jnp.any(pairs.chosen.valid, axis=1)

    margins, length_gaps = [], []
    for pairs in batches:
        margin, longer, real = fetch(gaps(model, layout.put(pairs)))
        margins.append(margin[real])
        length_gaps.append(longer[real])
    accuracy, length_only = (
        float(np.mean((np.sign(np.concatenate(x)) + 1) / 2)) for x in (margins, length_gaps)
    )
    count = sum(map(len, margins))
    return {
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / count),
        "length_only_accuracy": length_only,
        "num_pairs": count,
    }
