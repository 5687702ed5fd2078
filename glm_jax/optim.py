"""Optimizers as optax chains."""

import dataclasses

import jax
import optax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay (betas and clip of the paper's later public code)."""

    learning_rate: float = 1e-3  # peak
    warmup_fraction: float = 0.03  # of all steps
    final_fraction: float = 0.1  # learning rate at the end, as a share of the peak
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8  # added to the root of the second moment
    clip_norm: float = 1.0  # of the global gradient norm


def learning_rate(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Step -> learning rate: linear up over the warm-up, cosine down to the final fraction at `num_steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=max(1, round(config.warmup_fraction * num_steps)),
        decay_steps=max(2, num_steps),
        end_value=config.final_fraction * config.learning_rate,
    )


def decayed(params: nnx.Module) -> nnx.Module:
    """Pytree of bool: True for matrices and embeddings, False for norm scales and biases."""

    def is_matrix(path: tuple[jax.tree_util.KeyEntry, ...], _: jax.Array) -> bool:
        name = jax.tree_util.keystr(path[-1:]).lstrip(".")
        return name.startswith("w_") or name == "embedding"

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (Loshchilov & Hutter 2019) on the schedule of `learning_rate`."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, num_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
