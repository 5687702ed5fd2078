"""Optimizers as optax chains."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike

from sharding.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay (betas and clip of the paper's later public code)."""

    learning_rate: float = 1e-3  # peak; 0 trains nothing
    # share of the updates with a rising learning rate; 0: the first update has the peak, 1: the last one
    warmup_fraction: float = 0.03
    final_fraction: float = 0.1  # learning rate of the last update, as a share of the peak
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8  # added to the root of the second moment
    clip_norm: float = 1.0  # of the global gradient norm

    def __post_init__(self) -> None:
        for name, fits, values in (
            ("learning_rate", 0.0 <= self.learning_rate < math.inf, "0 or a positive number"),
            ("warmup_fraction", 0.0 <= self.warmup_fraction <= 1.0, "0 to 1"),
            ("final_fraction", 0.0 <= self.final_fraction <= 1.0, "0 to 1"),
            ("weight_decay", 0.0 <= self.weight_decay < math.inf, "0 or a positive number"),
            ("beta1", 0.0 <= self.beta1 < 1.0, "0 or more and less than 1"),
            ("beta2", 0.0 <= self.beta2 < 1.0, "0 or more and less than 1"),
            ("eps", 0.0 < self.eps < math.inf, "a positive number"),
            ("clip_norm", self.clip_norm > 0.0, "a positive number; inf clips nothing"),
        ):
            if not fits:
                raise UserError(
                    f"optimizer: {name} = {getattr(self, name)} is out of range: give {values}"
                )


def learning_rate(config: OptimConfig, num_updates: int) -> optax.Schedule:
    """Updates done so far -> learning rate of the next one, of `num_updates` in all.

    Of n updates the first w = round(warmup_fraction n) warm up: update k has peak k / w for k <= w, then a cosine falls
    from the peak to final_fraction peak at k = n. With w = 0 the first update has the peak. Later updates are like
    the last.
    """
    n = max(1, num_updates)
    w = max(1, round(config.warmup_fraction * n))

    def schedule(done: ArrayLike) -> jax.Array:
        k = jnp.minimum(jnp.asarray(done) + 1, n)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * (k - w) / max(1, n - w)))
        falling = config.final_fraction + (1 - config.final_fraction) * cosine
        return config.learning_rate * jnp.where(k <= w, k / w, falling)

    return schedule


def decayed(params: nnx.Module) -> nnx.Module:
    """Pytree of bool: True for matrices and embeddings, False for norm scales and biases."""

    def is_matrix(path: tuple[jax.tree_util.KeyEntry, ...], _: jax.Array) -> bool:
        name = jax.tree_util.keystr(path[-1:]).lstrip(".")
        return name.startswith("w_") or name == "embedding"

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(config: OptimConfig, num_updates: int) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, then AdamW (Loshchilov & Hutter 2019) on the schedule of `learning_rate`.

    Its update takes `step`, the position in the schedule. The moments count the gradients they have seen, which may be
    fewer: updates that are left out or skipped move the schedule on all the same.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decayed),
        _descend(learning_rate(config, num_updates)),
    )


def _descend(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Scale by minus the learning rate at position `step`; no state."""

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        step: ArrayLike,
        **_: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        rate = schedule(step)
        return jax.tree.map(lambda x: -rate * x, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
