"""What policies and critics are trained to lower. Pure functions: arrays in, (scalar, metrics) out.

[B, T] arrays are aligned to the token they speak of (see glm_jax.loss). A loss of some rows divides by the `count` of
the whole (global) batch, so that the losses of all its pieces and shards add up; None: these rows are the batch.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from glm_jax.loss import Count, masked_mean
from glm_jax.metrics import Metric, Peak, Shares
from rlhf.kl import bounded_exp, k3


def policy_loss(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    clip_range: float,
    count: Count = None,
) -> tuple[jax.Array, Shares]:
    """mean over answer tokens of max(-A ratio, -A clip(ratio, 1 +- eps)) (Schulman et al. 2017, eq. 7).

    `approx_kl` of the metrics is k3 of the old policy from this one, nats/token.
    """
    mean = partial(masked_mean, mask=response_mask, count=count)
    log_ratio = jnp.where(response_mask, logp - old_logp, 0.0)
    # of inf, which is e^x from 88 nats on, the clipped branch has the gradient 0 * inf
    ratio = bounded_exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
    metrics: dict[str, Metric] = {
        "ratio_mean": mean(ratio),
        "ratio_max": Peak(jnp.max(ratio)),
        "clip_fraction": mean((jnp.abs(ratio - 1) > clip_range).astype(jnp.float32)),
        "approx_kl": mean(k3(-log_ratio)),
    }
    return mean(jnp.maximum(-advantages * ratio, -advantages * clipped)), metrics


def value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    value_clip: float,
    count: Count = None,
) -> jax.Array:
    """mean over answer tokens of max((V - R)^2, (V_clip - R)^2) / 2, V_clip within value_clip of the old value."""
    near = old_values + jnp.clip(values - old_values, -value_clip, value_clip)
    worse = jnp.maximum((values - returns) ** 2, (near - returns) ** 2)
    return 0.5 * masked_mean(worse, response_mask, count)


def dpo_loss(
    logp: Float[Array, "B 2"],
    ref_logp: Float[Array, "B 2"],
    beta: float,
    count: int | None = None,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, Shares]:
    """-log sigmoid(beta h), h = (log pi - log pi_0)(y_w) - (log pi - log pi_0)(y_l) (Rafailov et al. 2023, eq. 7).

    With `label_smoothing` = e, the chance that a label is wrong: (1 - e) of it and e of -log sigmoid(-beta h)
    (Mitchell 2023, eq. 3). Arguments are log-probabilities in nats of whole answers, column 0 chosen, column 1
    rejected. Mean over the `count` pairs of the batch (None: these).
    """
    margin = beta * _preference(logp, ref_logp)
    right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    count = count or len(logp)
    loss = -jnp.sum((1 - label_smoothing) * right + label_smoothing * wrong) / count
    return loss, _margins(logp, ref_logp, margin, count)


def ipo_loss(
    logp: Float[Array, "B 2"], ref_logp: Float[Array, "B 2"], beta: float, count: int | None = None
) -> tuple[jax.Array, Shares]:
    """(h - 1 / (2 beta))^2 with h as in `dpo_loss` (Azar et al. 2023, eq. 17; its tau is beta).

    The gap of two log-ratios is drawn to 1 / (2 beta) nats and not beyond.
    """
    preference = _preference(logp, ref_logp)
    count = count or len(logp)
    loss = jnp.sum((preference - 0.5 / beta) ** 2) / count
    return loss, _margins(logp, ref_logp, beta * preference, count)


def _preference(logp: jax.Array, ref_logp: jax.Array) -> jax.Array:
    ratio = logp - ref_logp
    return ratio[:, 0] - ratio[:, 1]


def _margins(logp: jax.Array, ref_logp: jax.Array, margin: jax.Array, count: int) -> Shares:
    return {
        "accuracy": jnp.sum(margin > 0) / count,
        "margin": jnp.sum(margin) / count,
        "chosen_logratio": jnp.sum(logp[:, 0] - ref_logp[:, 0]) / count,
    }
