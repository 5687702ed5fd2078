"""What PPO estimates: shaped rewards, advantages, and the two clipped losses. Pure functions on [B, T] arrays.

All arrays are aligned to the token they speak of (see glm_jax.loss); `response_mask` is True at an answer's tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from glm_jax.loss import Count, masked_mean
from glm_jax.metrics import Metric, Peak, Shares
from glm_jax.scalar import last_token


def shaped_rewards(
    scores: Float[Array, " B"],
    logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    kl_coef: float,
) -> Float[Array, "B T"]:
    """r_t = -beta (log pi - log pi_0), plus the score on the answer's last token (arXiv 2404.00934, section 3.2).

    Their sum over an answer is score - beta * KL, KL being the sampled log-ratio.
    """
    penalty = jnp.where(response_mask, -kl_coef * (logp - ref_logp), 0.0)
    return penalty + jnp.where(last_token(response_mask), scores[:, None], 0.0)


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    gamma: float,
    lam: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Advantages and returns by generalised advantage estimation (Schulman et al. 2016, eq. 16), 0 off the answer.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1};  R_t = A_t + V_t.
    Nothing follows an answer's last token: V = 0 and A = 0 there.
    """
    mask = response_mask.astype(jnp.float32)
    values = values * mask
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = (rewards + gamma * following - values) * mask

    def step(later: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        delta, counts = now
        advantage = delta + gamma * lam * later * counts
        return advantage, advantage

    _, backwards = jax.lax.scan(
        step, jnp.zeros_like(deltas[:, 0]), (deltas.T, mask.T), reverse=True
    )
    advantages = backwards.T * mask
    return advantages, (advantages + values) * mask


def policy_loss(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    clip_range: float,
    count: Count = None,
) -> tuple[jax.Array, Shares]:
    """mean over answer tokens of max(-A ratio, -A clip(ratio, 1 +- eps)) (Schulman et al. 2017, eq. 7)."""
    mean = partial(masked_mean, mask=response_mask, count=count)
    ratio = jnp.exp(jnp.where(response_mask, logp - old_logp, 0.0))
    clipped = jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
    metrics: dict[str, Metric] = {
        "ratio_mean": mean(ratio),
        "ratio_max": Peak(jnp.max(ratio)),
        "clip_fraction": mean((jnp.abs(ratio - 1) > clip_range).astype(jnp.float32)),
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
