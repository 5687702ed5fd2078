"""Token log-probabilities and the losses made of them. Nats throughout.

Arrays are aligned to the token they speak of: `logp[b, t]` is the log-probability of `ids[b, t]` given the tokens
before it, so a target mask selects without shifting. Column 0 has no past and holds 0.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from glm_jax.layers import MASKED, remade


def aligned(values: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Move what was computed at the position *before* a token (its logits, its value) onto the token."""
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0)))


# Which tokens could be drawn at a position (its logits' tokens, not aligned); None: all.
Support = Bool[Array, "B T V"] | None


def token_logprobs(
    logits: Float[Array, "B T V"],
    ids: Int[Array, "B T"],
    temperature: float = 1.0,
    support: Support = None,
) -> Float[Array, "B T"]:
    """log softmax(logits / temperature) over the `support` of the tokens that stand there, aligned to them.

    Written as a masked sum, not a gather, so that logits split over the vocabulary stay where they are. The support
    must hold the tokens that stand there.
    """
    # ids move and not logits, of which a slice is a copy
    following = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
    split = jax.typeof(logits).sharding.spec[
        -1:
    ]  # else every device compares with the whole vocabulary
    vocabulary = jnp.arange(
        logits.shape[-1], out_sharding=PartitionSpec(*split) if any(split) else None
    )

    @remade
    def chosen(logits: jax.Array) -> jax.Array:
        scaled = _restricted(logits / temperature, support)
        hit = following[:, :, None] == vocabulary
        return jnp.sum(jnp.where(hit, scaled, 0.0), axis=-1) - jax.nn.logsumexp(scaled, axis=-1)

    return aligned(chosen(logits))


def token_kl(
    logits: Float[Array, "B T V"],
    ref_logits: Float[Array, "B T V"],
    temperature: float = 1.0,
    support: Support = None,
) -> Float[Array, "B T"]:
    """KL(policy || reference) over the support at every token's position, aligned to the token; >= 0.

    Both distributions are those that remain of softmax(logits / temperature) on the support.
    """
    logp = jax.nn.log_softmax(_restricted(logits / temperature, support), axis=-1)
    ref_logp = jax.nn.log_softmax(_restricted(ref_logits / temperature, support), axis=-1)
    return aligned(jnp.sum(jnp.exp(logp) * (logp - ref_logp), axis=-1))


def token_entropy(
    logits: Float[Array, "B T V"], temperature: float = 1.0, support: Support = None
) -> Float[Array, "B T"]:
    """Entropy in nats of the distribution that every token was drawn from, aligned to the token."""

    @remade
    def entropy(logits: jax.Array) -> jax.Array:
        logp = jax.nn.log_softmax(_restricted(logits / temperature, support), axis=-1)
        return -jnp.sum(jnp.exp(logp) * logp, axis=-1)

    return aligned(entropy(logits))


def _restricted(logits: jax.Array, support: Support) -> jax.Array:
    # finite, so that 0 times it is 0
    return logits if support is None else jnp.where(support, logits, MASKED)


# How many entries count in the whole (global) batch. A loss of some of its rows divides by it, and so is their share of
# the whole batch's loss; None: these rows are the whole batch.
Count = Int[Array, ""] | int | None


def num_counted(mask: Bool[Array, "*shape"]) -> Int[Array, ""]:
    """Entries that count, at least 1."""
    return jnp.maximum(jnp.sum(mask), 1)


def masked_mean(
    values: Float[Array, "*shape"], mask: Bool[Array, "*shape"], count: Count = None
) -> Float[Array, ""]:
    """Mean over the whole batch of the entries that count; 0 where none does."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / (num_counted(mask) if count is None else count)


def cross_entropy(
    logp: Float[Array, "B T"], target: Bool[Array, "B T"], count: Count = None
) -> Float[Array, ""]:
    """Negative log-likelihood in nats per target token."""
    return -masked_mean(logp, target, count)
