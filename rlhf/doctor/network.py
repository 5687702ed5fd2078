"""The doctor's own readings of the networks: distributions of tokens, scalar outputs, losses and their gradients.

The networks themselves (`apply_model`, `apply_scalar`) are held to the original code elsewhere; everything that PPO
makes of their outputs is written here a second time and never calls what it checks.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from glm_jax.batch import Sequences
from glm_jax.generate import SamplingConfig
from glm_jax.model import CausalLM, apply_model
from glm_jax.scalar import ScalarModel, apply_scalar
from rlhf.ppo import Experience, PPOConfig
from sharding.layout import Layout

Tree = TypeVar("Tree")
NEVER = -1e30  # a logit of no weight; finite, so that 0 times it is 0


class Readings(NamedTuple):
    """Distributions of policy and reference at every token, [B, T], aligned to the token; nats.

    Arrays of the mesh or, once fetched, of the host.
    """

    full: Any  # log-probability of the token over the whole vocabulary, at the temperature
    logp: Any  # over the recorded support
    ref_logp: Any  # the reference's, over the same support
    entropy: Any  # of the policy over the support
    kl: Any  # KL(policy || reference) over the support
    above: Any  # probability over the support of the tokens that are more likely
    tied: Any  # of the tokens that are exactly as likely, itself included
    others: Any  # [K, B, T], probability over the support of other tokens
    smallest: Any  # log of the policy's probability of the smallest support within rounding
    largest: Any  # of the largest
    ref_full: Any  # the reference's log-probability of the token over the whole vocabulary
    ref_smallest: Any  # log of the reference's probability of the same supports
    ref_largest: Any
    missing: Any  # int32, tokens that must be in the support and are not
    excess: Any  # int32, tokens that are in the support and must not be


def precise(tree: Tree) -> Tree:
    """Return a pytree whose models - weights, and moments, which look like them - compute in float32."""

    def is_model(x: Any) -> bool:
        return isinstance(x, CausalLM | ScalarModel)

    def replaced(x: Any) -> Any:
        if not is_model(x):
            return x
        config = dataclasses.replace(x.trunk.config, compute_dtype="float32")
        return dataclasses.replace(x, trunk=dataclasses.replace(x.trunk, config=config))

    found: Tree = jax.tree.map(replaced, tree, is_leaf=is_model)
    return found


def read_tokens(
    policy: CausalLM,
    reference: CausalLM,
    sequences: Sequences,
    support: Bool[Array, "B T V"] | None,
    others: Int[Array, "K B T"],
    edge: Float[Array, ""],
    sampling: SamplingConfig,
    layout: Layout,
) -> Readings:
    """Read both networks on whole sequences.

    `others[k, b, t]` is a token whose probability is asked for in place of token t. `edge` (nats) is how far rounding
    may move a logit: the bounds of the support are that much apart.
    """
    ids = sequences.ids

    def scaled(model: CausalLM) -> jax.Array:
        logits = apply_model(model, ids, sequences.valid, layout)
        whole = jax.sharding.reshard(logits, layout.spec("batch", "time", None))
        return whole / sampling.temperature

    z, ref_z = scaled(policy), scaled(reference)
    tokens = jnp.arange(z.shape[-1])

    def ahead(x: jax.Array) -> jax.Array:
        return jnp.pad(x[..., 1:], [(0, 0)] * (x.ndim - 1) + [(0, 1)])

    here = ahead(ids)[..., None] == tokens
    inside = jnp.ones_like(here) if support is None else support
    if support is not None:
        inside = jax.sharding.reshard(inside, layout.spec("batch", "time", None))

    def at_token(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(here, values, 0.0), axis=-1)

    def normalised(logits: jax.Array, among: jax.Array) -> jax.Array:
        kept = jnp.where(among, logits, NEVER)
        return kept - jax.nn.logsumexp(kept, axis=-1, keepdims=True)

    whole, ref_whole = (x - jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in (z, ref_z))

    def mass(log_p: jax.Array, among: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(jnp.where(among, log_p, NEVER), axis=-1)

    logp, ref_logp = normalised(z, inside), normalised(ref_z, inside)
    p = jnp.where(inside, jnp.exp(logp), 0.0)
    own = at_token(z)[..., None]
    lowest, highest = edges(z, sampling, edge)
    surely, perhaps = (z >= lowest) | here, (z >= highest) | here
    found = Readings(
        full=at_token(whole),
        logp=at_token(logp),
        ref_logp=at_token(ref_logp),
        entropy=-jnp.sum(p * jnp.where(inside, logp, 0.0), axis=-1),
        kl=jnp.sum(p * jnp.where(inside, logp - ref_logp, 0.0), axis=-1),
        above=jnp.sum(jnp.where(z > own, p, 0.0), axis=-1),
        tied=jnp.sum(jnp.where(z == own, p, 0.0), axis=-1),
        others=jnp.stack(
            [jnp.sum(jnp.where(ahead(x)[..., None] == tokens, p, 0.0), axis=-1) for x in others]
        ),
        smallest=mass(whole, surely),
        largest=mass(whole, perhaps),
        ref_full=at_token(ref_whole),
        ref_smallest=mass(ref_whole, surely),
        ref_largest=mass(ref_whole, perhaps),
        missing=jnp.sum(surely & ~inside, axis=-1, dtype=jnp.int32),
        excess=jnp.sum(inside & ~perhaps, axis=-1, dtype=jnp.int32),
    )
    return jax.tree.map(_behind, found)


def _behind(x: jax.Array) -> jax.Array:
    """[..., T] of the positions before tokens, moved onto the tokens."""
    return jnp.pad(x[..., :-1], [(0, 0)] * (x.ndim - 1) + [(1, 0)])


def edges(
    z: Float[Array, "B T V"], sampling: SamplingConfig, edge: Float[Array, ""]
) -> tuple[Float[Array, "B T 1"], Float[Array, "B T 1"]]:
    """Logits from which on a token surely is in the support, and from which on it may be.

    `z` are scaled logits. Top-k keeps what is at least the k-th largest; top-p then the most likely tokens that
    together reach p. A logit may be off by `edge`, and so may a cumulative probability.
    """
    ordered = jnp.flip(jnp.sort(z, axis=-1), axis=-1)
    lowest = highest = jnp.full_like(z[..., :1], 2 * NEVER)

    def surely(least: jax.Array) -> jax.Array:
        """The logit itself, unless another one is so near that rounding may exchange the two."""
        near = jnp.sum(jnp.abs(ordered - least) <= edge, axis=-1, keepdims=True)
        return jnp.where(near > 1, least + edge, least)

    if sampling.top_k and sampling.top_k < z.shape[-1]:
        kth = ordered[..., sampling.top_k - 1 : sampling.top_k]
        lowest, highest = surely(kth), kth - edge
    if sampling.top_p < 1.0:

        def least(among: jax.Array, mass: jax.Array) -> jax.Array:
            p = jax.nn.softmax(jnp.where(ordered >= among, ordered, NEVER), axis=-1)
            reached = jnp.cumsum(p, axis=-1) - p < mass
            return jnp.min(jnp.where(reached, ordered, ordered[..., :1]), axis=-1, keepdims=True)

        # the fewer tokens top-k leaves, the fewer reach the same share of their probability
        nucleus = least(lowest, sampling.top_p - edge), least(highest, sampling.top_p + edge)
        lowest = jnp.maximum(lowest, surely(nucleus[0]))
        highest = jnp.maximum(highest, nucleus[1] - edge)
    return lowest, highest


def read_scalar(
    model: ScalarModel, ids: Int[Array, "B T"], valid: Bool[Array, "B T"], layout: Layout
) -> Float[Array, "B T"]:
    """The head's output at every position."""
    return apply_scalar(model, ids, valid, layout)


class Counts(NamedTuple):
    """Divisors of the losses of a minibatch."""

    answer: jax.Array  # answer tokens that are learnt from
    sft: jax.Array  # target tokens of the SFT batch


def _answer_logits(model: CausalLM, rows: Experience, layout: Layout, t: float) -> jax.Array:
    ids, valid, _ = rows.sequences
    logits = apply_model(model, ids, valid, layout) / t
    return logits if rows.support is None else jnp.where(rows.support, logits, NEVER)


def _picked(logits: jax.Array, ids: jax.Array, layout: Layout) -> jax.Array:
    """log softmax at the token that follows each position, moved onto it."""
    following = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
    tokens = jnp.arange(logits.shape[-1], out_sharding=layout.spec("vocab"))
    hit = following[:, :, None] == tokens
    chosen = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    return _behind(chosen - jax.nn.logsumexp(logits, axis=-1))


def actor_parts(
    actor: CausalLM,
    rows: Experience,
    sft: Sequences,
    counts: Counts,
    config: PPOConfig,
    kl_coef: float,
    layout: Layout,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The actor's loss of some rows of a minibatch, and its parts by the names that the update reports.

    Per answer token -min(A r, A clip(r, 1 - e, 1 + e)) with r = pi / pi_old, plus beta (pi_0 / pi - 1 - log pi_0 / pi)
    where the KL is in the loss, minus the weighted entropy; plus the weighted negative log-likelihood of SFT tokens.
    """
    logits = _answer_logits(actor, rows, layout, config.sampling.temperature)
    logp = _picked(logits, rows.sequences.ids, layout)
    counted = rows.counts

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(x, where=counted) / counts.answer

    ratio = jnp.exp(jnp.where(counted, logp - rows.logp, 0.0))
    low, high = 1.0 - config.clip_range, 1.0 + config.clip_range
    near = jnp.where(ratio < low, low, jnp.where(ratio > high, high, ratio))
    gain = jnp.minimum(rows.advantages * ratio, rows.advantages * near)
    sft_logits = apply_model(actor, sft.ids, sft.valid, layout)
    sft_logp = _picked(sft_logits, sft.ids, layout)
    parts = {
        "policy_loss": -mean(gain),
        "sft_loss": -jnp.sum(sft_logp, where=sft.target) / counts.sft,
        "approx_kl": mean(ratio - 1.0 - jnp.where(counted, logp - rows.logp, 0.0)),
    }
    loss = parts["policy_loss"] + config.sft_weight * parts["sft_loss"]
    if config.kl.place == "loss":
        away = jnp.where(counted, rows.ref_logp - logp, 0.0)
        parts["kl_loss"] = mean(jnp.exp(away) - 1.0 - away)
        loss += kl_coef * parts["kl_loss"]
    if config.entropy_weight:
        log_p = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        by_position = -jnp.sum(jnp.exp(log_p) * jnp.where(log_p > NEVER / 2, log_p, 0.0), axis=-1)
        parts["policy_entropy"] = mean(_behind(by_position))
        loss -= config.entropy_weight * parts["policy_entropy"]
    return loss, parts


def critic_parts(
    critic: ScalarModel, rows: Experience, counts: Counts, config: PPOConfig, layout: Layout
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The critic's loss of some rows: mean of max((V - R)^2, (V_near - R)^2) / 2, V_near at most `value_clip` away."""
    values = _behind(apply_scalar(critic, rows.sequences.ids, rows.sequences.valid, layout))
    old, returns = rows.values, rows.returns
    assert old is not None and returns is not None
    step = values - old
    most = config.value_clip
    near = old + jnp.where(step > most, most, jnp.where(step < -most, -most, step))
    worse = jnp.maximum((values - returns) ** 2, (near - returns) ** 2)
    loss = 0.5 * jnp.sum(worse, where=rows.counts) / counts.answer
    return config.value_weight * loss, {"value_loss": loss}


def take(tree: Any, index: jax.Array) -> Any:
    """Rows of every [B, ...] array, split like the array."""
    return jax.tree.map(lambda x: x.at[index].get(out_sharding=jax.typeof(x).sharding.spec), tree)


Parts = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def gradient_of(parts: Parts) -> Callable[..., Any]:
    """Jitted ((loss, parts), gradient) of `parts` with respect to its first argument."""
    return jax.jit(jax.value_and_grad(parts, has_aux=True))


@partial(jax.jit, donate_argnums=0)
def added(total: Any, more: Any) -> Any:
    """Sum of two pytrees, in the memory of the first."""
    return jax.tree.map(jnp.add, total, more)


@jax.jit
def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm of all entries of a pytree."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))
