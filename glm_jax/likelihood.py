"""Token log-probabilities under a model whose vocabulary is too large for the logits of all rows to exist at once.

The logits of 4,096 tokens of ChatGLM3 are 1 GB in float32, several times what a device holds of the model itself under
FSDP over a pod. So they are made for a part of the vocabulary after the other, in the forward pass and again for the
gradient; with the weights split over devices, a part of them is gathered at a time, too.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from glm_jax.layers import MASKED, remade
from glm_jax.loss import aligned, token_logprobs
from glm_jax.model import CausalLM, apply_head
from glm_jax.trunk import Segments
from sharding.layout import Layout

LOGITS_AT_ONCE = 2**26  # of a device: 256 MiB in float32


def sequence_logprobs(
    model: CausalLM, ids: Int[Array, "B T"], segments: Segments, layout: Layout
) -> Float[Array, "B T"]:
    """`token_logprobs` of whole sequences under `model`, at temperature 1 and over the whole vocabulary."""
    return hidden_logprobs(model, model.trunk(ids, segments, layout), ids, layout)


def hidden_logprobs(
    model: CausalLM, hidden: Float[Array, "B T D"], ids: Int[Array, "B T"], layout: Layout
) -> Float[Array, "B T"]:
    """`sequence_logprobs` where the trunk gave `hidden`."""
    count = num_parts(model, ids.size, layout)
    if count == 1:
        return token_logprobs(apply_head(model, hidden, layout), ids)
    return aligned(_in_parts(model, hidden, ids, count, layout))


def num_parts(model: CausalLM, num_tokens: int, layout: Layout) -> int:
    """Parts that the vocabulary is cut into: the fewest that suffice, or up to twice as many if those divide it."""
    columns = _vocabulary(model) // layout.ways("vocab")
    logits = num_tokens // layout.ways("batch") * columns
    few = max(min(-(-logits // LOGITS_AT_ONCE), columns), 1)
    dividing = (n for n in range(few, min(2 * few, columns) + 1) if columns % n == 0)
    # ChatGLM-6B's vocabulary is 32 times a prime: its last part is filled up
    return next(dividing, -(-columns // -(-columns // few)))


def _in_parts(
    model: CausalLM, hidden: jax.Array, ids: jax.Array, count: int, layout: Layout
) -> jax.Array:
    """log softmax of the token that follows each, [B, T]."""
    size, compute = model.trunk.config.vocab_size, hidden.dtype
    following = jnp.reshape(
        jnp.pad(ids[:, 1:], ((0, 0), (0, 1))), (-1,), out_sharding=layout.spec("batch")
    )
    # gradients of all parts add up in float32
    rows = jnp.reshape(
        hidden.astype(jnp.float32), (-1, hidden.shape[-1]), out_sharding=layout.spec("batch", None)
    )
    table = model.trunk.embedding if model.w_head is None else jnp.swapaxes(model.w_head, 0, 1)
    numbers = jnp.arange(len(table), out_sharding=layout.spec("vocab"))

    @remade
    def part(
        rows: jax.Array, weights: jax.Array, numbers: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Of one part of the vocabulary: log of the sum of exp, and the logit of the token that follows."""
        split = layout.spec("batch", "vocab")
        logits = jnp.einsum("RD,VD->RV", rows.astype(compute), weights, out_sharding=split)
        logits = jnp.where(numbers < size, logits.astype(jnp.float32), MASKED)
        hit = following[:, None] == numbers
        return jax.nn.logsumexp(logits, axis=-1), jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)

    # what fills a part is no token's number
    parts = _cut(table.astype(compute), count, layout), _cut(numbers, count, layout, fill=size)
    totals, chosen = jax.lax.map(lambda now: part(rows, *now), parts)
    logp = jnp.sum(chosen, axis=0) - jax.nn.logsumexp(totals, axis=0)
    return jnp.reshape(logp, ids.shape, out_sharding=layout.spec("batch", "time"))


def _cut(x: jax.Array, count: int, layout: Layout, fill: int = 0) -> jax.Array:
    """[V, ...] -> [count, part, ...], each part split over "vocab" as V is: what a device has of it, it had.

    Where `count` does not divide what a device has, its last part ends in `fill`.
    """
    ways, tail = layout.ways("vocab"), x.shape[1:]
    rest = jax.typeof(x).sharding.spec[1:]
    own = len(x) // ways
    columns = -(-own // count)
    if own % count:
        split = jax.sharding.PartitionSpec(*layout.spec("vocab"), None, *rest)
        x = jnp.reshape(x, (ways, own, *tail), out_sharding=split)
        missing = (0, count * columns - own)
        x = jnp.pad(x, ((0, 0), missing, *[(0, 0)] * len(tail)), constant_values=fill)
    split = jax.sharding.PartitionSpec(*layout.spec("vocab"), None, None, *rest)
    cut = jnp.reshape(x, (ways, count, columns, *tail), out_sharding=split)
    merged = jax.sharding.PartitionSpec(None, *layout.spec("vocab"), *rest)
    return jnp.reshape(jnp.swapaxes(cut, 0, 1), (count, ways * columns, *tail), out_sharding=merged)


def _vocabulary(model: CausalLM) -> int:
    return len(model.trunk.embedding) if model.w_head is None else model.w_head.shape[1]
