"""Supervised fine-tuning: maximum likelihood of the answers."""

import dataclasses
from collections.abc import Iterator
from functools import partial

import optax

from glm_jax.batch import Sequences
from glm_jax.keeper import NOTHING_KEPT, Keeper
from glm_jax.model import CausalLM
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.train import Report, Update, init_state, language_loss, make_update, num_targets, train
from sharding.layout import Layout
from sharding.ranges import NonNegative, Positive, check_ranges


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning."""

    steps: NonNegative = (
        1000  # updates; 0: SFT is left out, its model is the one that a run starts from
    )
    batch_size: Positive = 64  # sequences an update
    optim: OptimConfig = OptimConfig()

    def __post_init__(self) -> None:
        check_ranges(self, "sft")


def sft_update(optimizer: optax.GradientTransformation, layout: Layout) -> Update:
    """The update of `glm_jax.train.make_update` on Sequences."""
    return make_update(partial(language_loss, layout=layout), num_targets, optimizer, layout)


def train_sft(
    model: CausalLM,
    config: SFTConfig,
    batches: Iterator[Sequences],
    layout: Layout,
    report: Report,
    keeper: Keeper = NOTHING_KEPT,
) -> CausalLM:
    """A copy of `model` after `config.steps` updates on `batches`. Raises UserError on a batch that does not divide."""
    layout.check_batch(config.batch_size, "sft.batch_size")
    optimizer = make_optimizer(config.optim, config.steps)
    update = sft_update(optimizer, layout)
    state = keeper.restore(partial(init_state, model, optimizer))
    return train(state, update, batches, config.steps, layout, report, keeper).model
