"""Rewards of tokens, and how much better than expected an answer or a token was. Pure functions.

All [B, T] arrays are aligned to the token they speak of (see glm_jax.loss); `response_mask` is True at an answer's
tokens. Of `samples` = K answers a prompt, those of one prompt stand in K rows one after the other.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from glm_jax.loss import masked_mean
from glm_jax.scalar import last_token

TINY = 1e-8  # added to a variance that may be 0

# Scores that differ by less, relative to the larger of 1 and their size, are equal up to rounding: a score is a float32
# sum over D hidden units, whose rounding grows like eps sqrt(D), and sqrt(D) = 64 for the 4,096 of most of the family.
TIE = 64 * float(jnp.finfo(jnp.float32).eps)


def shaped_rewards(
    scores: Float[Array, " B"],
    logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    kl_coef: Float[Array, ""] | float,
    log_ratio_clip: float | None = None,
) -> Float[Array, "B T"]:
    """r_t = -beta (log pi - log pi_0), plus the score on the answer's last token (arXiv 2404.00934, section 3.2).

    Their sum over an answer is score - beta * KL, KL being the sampled log-ratio (k1), each clamped to
    +- `log_ratio_clip` where that is given.
    """
    log_ratio = logp - ref_logp
    if log_ratio_clip is not None:
        log_ratio = jnp.clip(log_ratio, -log_ratio_clip, log_ratio_clip)
    penalty = jnp.where(response_mask, -kl_coef * log_ratio, 0.0)
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


def rloo(
    rewards: Float[Array, " B"], kl_rewards: Float[Array, " B"], samples: int
) -> Float[Array, " B"]:
    """R_i - mean of the other K - 1 answers' R, R = reward + kl_reward (Ahmadian et al. 2024, eq. 6).

    `kl_rewards` are -beta KL of whole answers, 0 where the KL is in the loss; `samples` = K >= 2.
    """

    def advantage(group: jax.Array) -> jax.Array:
        others = (jnp.sum(group, axis=1, keepdims=True) - group) / (samples - 1)
        return group - others

    return _by_prompt(advantage, rewards + kl_rewards, samples)


def grpo(
    rewards: Float[Array, " B"], kl_rewards: Float[Array, " B"], samples: int
) -> Float[Array, " B"]:
    """(r_i - mean r) / std r + (q_i - mean q), r = rewards, q = kl_rewards, over the K answers of a prompt.

    The first term is Shao et al. 2024, section 4.1.2; it is 0 where all K rewards are equal up to rounding (`TIE`). The
    deviation is that of a sample (K - 1). They have no KL in the reward: q, -beta KL of whole answers, weighs as
    much as the KL in their loss, beta against a reward of deviation 1, and is not divided: where rewards tie, its
    rounding-sized differences would become advantages of 1. `samples` = K >= 2.
    """

    def normalised(group: jax.Array) -> jax.Array:
        gaps = group - jnp.mean(group, axis=1, keepdims=True)
        variance = jnp.sum(gaps**2, axis=1, keepdims=True) / (samples - 1)
        highest, lowest = (f(group, axis=1, keepdims=True) for f in (jnp.max, jnp.min))
        return jnp.where(_tied(highest, lowest), 0.0, gaps / jnp.sqrt(variance + TINY))

    def centred(group: jax.Array) -> jax.Array:
        return group - jnp.mean(group, axis=1, keepdims=True)

    by_score = _by_prompt(normalised, rewards, samples)
    return by_score + _by_prompt(centred, kl_rewards, samples)


def on_tokens(
    advantages: Float[Array, " B"], response_mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """An answer's advantage on each of its tokens, 0 elsewhere."""
    return jnp.where(response_mask, advantages[:, None], 0.0)


def whitened(
    advantages: Float[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """(A - mean) / std over all answer tokens of the global batch, 0 elsewhere and where all are equal (`TIE`).

    Not in the paper, which needs none because of its reference baseline.
    """
    gaps = jnp.where(response_mask, advantages - masked_mean(advantages, response_mask), 0.0)
    highest = jnp.max(jnp.where(response_mask, advantages, -jnp.inf))
    lowest = jnp.min(jnp.where(response_mask, advantages, jnp.inf))
    spread = jnp.sqrt(masked_mean(gaps**2, response_mask) + TINY)
    return jnp.where(_tied(highest, lowest), 0.0, gaps / spread)


def _tied(highest: jax.Array, lowest: jax.Array) -> jax.Array:
    """Tell whether all numbers between these two are equal up to rounding."""
    size = jnp.maximum(jnp.abs(highest), jnp.abs(lowest))
    return highest - lowest <= TIE * jnp.maximum(size, 1.0)


def _by_prompt(
    advantage: Callable[[jax.Array], jax.Array], rewards: jax.Array, samples: int
) -> jax.Array:
    """`advantage` of [prompt, sample]; B numbers are held whole by every device, so that no group is cut."""
    spec = jax.typeof(rewards).sharding.spec
    whole = jax.sharding.reshard(rewards, PartitionSpec(None))
    return jax.sharding.reshard(advantage(whole.reshape(-1, samples)).reshape(-1), spec)
