"""Bugs that layouts are prone to, each planted by patching the program."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import glm_jax.layers
import glm_jax.likelihood
import glm_jax.model_v1
import glm_jax.optim
import glm_jax.sampler
import glm_jax.train
import glm_jax.trunk
import glm_jax.weights
import rlhf.ppo
import sharding.pipeline
from glm_jax.model_v1 import TrunkV1
from glm_jax.model_v2 import TrunkV2
from glm_jax.sampler import Loan, Sampler
from glm_jax.trunk import Places, Trunk
from sharding.layout import Layout
from sharding.pipeline import num_repeats

Patch = pytest.MonkeyPatch


def no_reduction(patch: Patch) -> None:
    """The spec of an MLP's output says that it is whole, though every shard holds a part of the sum."""

    def gated_mlp(x: Any, w_gate: Any, w_up: Any, w_down: Any, layout: Layout) -> Any:
        def local(x: Any, w_gate: Any, w_up: Any, w_down: Any) -> Any:
            return (jax.nn.silu(x @ w_gate) * (x @ w_up)) @ w_down  # no psum over "tensor"

        column = P(None, "tensor")
        specs = (P(None, None, None), column, column, P("tensor", None))
        program = jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)
        return program(x, w_gate, w_up, w_down)

    patch.setattr("glm_jax.model_v2.gated_mlp", gated_mlp)


def mean_of_means(patch: Patch) -> None:
    """Every shard of the batch divides by its own number of tokens."""

    def cross_entropy(logp: Any, target: Any, count: Any = None) -> Any:
        shards = P("data", None, None)
        split = [jnp.reshape(x, (2, -1, x.shape[1]), out_sharding=shards) for x in (logp, target)]
        total = jnp.sum(jnp.where(split[1], split[0], 0.0), axis=(1, 2))
        return -jnp.mean(total / jnp.sum(split[1], axis=(1, 2)))

    patch.setattr("glm_jax.train.cross_entropy", cross_entropy)


def dropped_microbatch(patch: Patch) -> None:
    """The last microbatch never enters the pipeline; the first goes through twice."""
    pieces = Layout.pieces

    def repeated(self: Layout, tree: Any, count: int) -> Any:
        last = jnp.arange(count) == count - 1
        return jax.tree.map(
            lambda x: jnp.where(last.reshape(-1, *[1] * (x.ndim - 1)), x[:1], x),
            pieces(self, tree, count),
        )

    patch.setattr(Layout, "pieces", repeated)


def swapped_stages(patch: Patch) -> None:
    """Weights are brought to their stages in another order than the pipeline runs through them."""
    slots = glm_jax.weights.layer_slots
    patch.setattr("glm_jax.weights.layer_slots", lambda n, layout: slots(n, layout)[::-1])


def stale_weights(patch: Patch) -> None:
    """The generation layout keeps the weights of the first iteration."""
    first: list[Any] = []

    @contextmanager
    def lend(self: Sampler, policy: Any) -> Iterator[Loan]:
        if not first:
            first.append(jax.tree.map(jnp.copy, self.enter(policy)))
        loan = Loan(first[0])
        yield loan
        loan.policy = policy

    patch.setattr(Sampler, "lend", lend)


def label_shift(patch: Patch) -> None:
    """The first row of every shard of the batch is scored on labels that are one token late."""
    token_logprobs = glm_jax.likelihood.token_logprobs

    def shifted(logits: Any, ids: Any, temperature: float = 1.0) -> Any:
        edge = (jnp.arange(len(ids)) % (len(ids) // 2) == 0)[:, None]
        late = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)))
        return token_logprobs(logits, jnp.where(edge, late, ids), temperature)

    patch.setattr("glm_jax.likelihood.token_logprobs", shifted)


def vocabulary_leak(patch: Patch) -> None:
    """Tokens that only fill up the vocabulary take part in the softmax."""
    patch.setattr("glm_jax.model.MASKED", 0.0)


def accumulation_weight(patch: Patch) -> None:
    """Every accumulated piece is divided by its own number of tokens."""
    cross_entropy = glm_jax.train.cross_entropy
    patch.setattr(
        "glm_jax.train.cross_entropy", lambda logp, target, count: cross_entropy(logp, target) / 2
    )


def rotary_reset(patch: Patch) -> None:
    """Positions begin anew where the next shard of a sequence would."""
    places = TrunkV2.places

    def reset(self: TrunkV2, ids: Any, segments: Any) -> Places:
        found = places(self, ids, segments)
        half = ids.shape[1] // 2
        second = (jnp.arange(ids.shape[1]) >= half)[:, None]
        return found._replace(positions=jnp.where(second, found.positions - half, found.positions))

    patch.setattr(TrunkV2, "places", reset)


def noise_by_shard(patch: Patch) -> None:
    """Noise, as of dropout, whose random numbers depend on the shard."""
    embed = Trunk.embed

    def noisy(self: Trunk, ids: Any, layout: Layout) -> Any:
        x = embed(self, ids, layout)

        def shake(x: Any) -> Any:
            key = jax.random.fold_in(jax.random.key(0), jax.lax.axis_index("data"))
            return x * (1 + 1e-3 * jax.random.normal(key, x.shape))

        spec = P("data", None, None)
        return jax.shard_map(shake, in_specs=spec, out_specs=spec, check_vma=False)(x)

    patch.setattr(Trunk, "embed", noisy)


def bias_of_some_rows(patch: Patch) -> None:
    """The gradient of a bias is not reduced over the batch: that of the first shard is taken for all."""
    layer = TrunkV1.layer

    def one_shard(self: TrunkV1, block: Any, x: Any, *more: Any) -> Any:
        first = (jnp.arange(x.shape[0]) < x.shape[0] // 2)[:, None, None]
        own = jax.tree.map(lambda w: w, block)
        own.b_o = jnp.where(first, block.b_o, jax.lax.stop_gradient(block.b_o))
        return layer(self, own, x, *more)

    patch.setattr(TrunkV1, "layer", one_shard)


def bias_of_every_shard(patch: Patch) -> None:
    """An output's bias is added by every tensor shard before they are summed."""
    mlp = glm_jax.model_v1.mlp

    def often(x: Any, w_in: Any, b_in: Any, w_out: Any, b_out: Any, layout: Layout) -> Any:
        return mlp(x, w_in, b_in, w_out, b_out * layout.ways("ffn"), layout)

    patch.setattr("glm_jax.model_v1.mlp", often)


def averaged_pieces(patch: Patch) -> None:
    """Gradients of accumulated pieces are averaged, though their losses add up."""
    accumulated = glm_jax.train._accumulated

    def averaged(gradient: Any, model: Any, rows: Any, layout: Layout) -> Any:
        sums, grads = accumulated(gradient, model, rows, layout)
        return sums, jax.tree.map(lambda g: g / layout.accumulate, grads)

    patch.setattr("glm_jax.train._accumulated", averaged)


def last_piece(patch: Patch) -> None:
    """The gradient is that of the last accumulated piece."""
    accumulated = glm_jax.train._accumulated

    def last(gradient: Any, model: Any, rows: Any, layout: Layout) -> Any:
        sums, _ = accumulated(gradient, model, rows, layout)
        pieces = layout.pieces(rows, layout.accumulate)
        return sums, gradient(jax.tree.map(lambda x: x[-1], pieces))[1]

    patch.setattr("glm_jax.train._accumulated", last)


def stale_remat(patch: Patch) -> None:
    """A layer's backward pass recomputes from an input that was saved before its last change."""
    rematerialised = glm_jax.trunk.rematerialised

    def stale(layer: Any, remat: Any) -> Any:
        work = rematerialised(layer, remat)

        def run(x: Any, now: Any) -> Any:
            then = x + jax.lax.stop_gradient(0.9 * x - x)
            y, late = work(x, now)[0], work(then, now)[0]
            return jax.lax.stop_gradient(y) + (late - jax.lax.stop_gradient(late)), None

        return work if remat == "none" else run

    patch.setattr("glm_jax.trunk.rematerialised", stale)


def permuted_groups(patch: Patch) -> None:
    """On the way to the generation layout kv groups change places, and query heads do not."""
    lend = Sampler.lend

    @contextmanager
    def permuted(self: Sampler, policy: Any) -> Iterator[Loan]:
        with lend(self, policy) as loan:
            right = loan.policy
            wrong = jax.tree.map(lambda w: w, right)
            with jax.set_mesh(self.mesh):
                for name, axis in (("w_k", 3), ("w_v", 3), ("b_k", 2), ("b_v", 2)):
                    weight = getattr(wrong.trunk.blocks, name)
                    setattr(wrong.trunk.blocks, name, jnp.flip(weight, axis))
            loan.policy = wrong
            yield loan
            loan.policy = right

    patch.setattr(Sampler, "lend", permuted)


def shifted_answers(patch: Patch) -> None:
    """Answers come back beside the prompts of their neighbours."""
    draw = Sampler.draw

    def shifted(self: Sampler, *args: Any) -> Any:
        answers = jax.device_get(draw(self, *args))
        return self.training.put(jax.tree.map(lambda x: np.roll(x, 1, axis=0), answers))

    patch.setattr(Sampler, "draw", shifted)


def noise_of_the_first_shard(patch: Patch) -> None:
    """Every shard of the batch counts its rows from 0, so that answers share their random numbers."""
    draw = glm_jax.sampler.generate

    def repeated(policy: Any, prompts: Any, seeds: Any, key: Any, **more: Any) -> Any:
        return draw(policy, prompts, seeds % (len(seeds) // 2), key, **more)

    patch.setattr("glm_jax.sampler.generate", repeated)


def working_slot(patch: Patch) -> None:
    """The slot of a stage that holds no layer works like any other."""
    slots = sharding.pipeline.layer_slots
    patch.setattr("sharding.pipeline.layer_slots", lambda n, layout: np.abs(slots(n, layout)))


def swapped_chunks(patch: Patch) -> None:
    """In a circular schedule the chunks of a stage are in another order than a batch goes around."""
    slots = glm_jax.weights.layer_slots

    def swapped(num_layers: int, layout: Layout) -> np.ndarray:
        found = slots(num_layers, layout)
        chunks = found.reshape(len(found), num_repeats(layout), -1)
        return chunks[:, ::-1].reshape(found.shape)

    patch.setattr("glm_jax.weights.layer_slots", swapped)


def rows_of_a_shard(patch: Patch) -> None:
    """Every shard holds the rows that the other one should."""
    put = Layout.put

    def crossed(self: Layout, tree: Any) -> Any:
        return put(self, jax.tree.map(lambda x: np.roll(x, len(x) // 2, axis=0), tree))

    patch.setattr(Layout, "put", crossed)


def advantages_by_shard(patch: Patch) -> None:
    """Every shard whitens the advantages of its own answers."""
    whiten = rlhf.ppo.whitened

    def apart(values: Any, mask: Any) -> Any:
        half = len(values) // 2
        return jnp.where(
            (jnp.arange(len(values)) < half)[:, None],
            whiten(values, mask & (jnp.arange(len(values)) < half)[:, None]),
            whiten(values, mask & (jnp.arange(len(values)) >= half)[:, None]),
        )

    patch.setattr("rlhf.ppo.whitened", apart)
