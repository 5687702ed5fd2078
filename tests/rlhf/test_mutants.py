"""Ten bugs that layouts are prone to, planted one at a time: certify fails and says in which job and parameter."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import glm_jax.layers
import glm_jax.likelihood
import glm_jax.train
import glm_jax.trunk
import glm_jax.weights
from glm_jax.config import PRESETS
from glm_jax.model_v2 import TrunkV2
from glm_jax.sampler import Loan, Sampler
from glm_jax.trunk import Places, Trunk
from rlhf.certify import Trained, compare, rows_for, train
from rlhf.trials.models import tiny
from sharding.layout import Layout

CONFIG = tiny(PRESETS["chatglm3-6b"])
Patch = pytest.MonkeyPatch


@functools.cache
def _reference(job: str, rows: int) -> Trained:
    """Without the bug, which `_row` plants after this."""
    return train(job, CONFIG, rows, Layout())


def _no_reduction(patch: Patch) -> None:
    """The spec of an MLP's output says that it is whole, though every shard holds a part of the sum."""

    def gated_mlp(x: Any, w_gate: Any, w_up: Any, w_down: Any, layout: Layout) -> Any:
        def local(x: Any, w_gate: Any, w_up: Any, w_down: Any) -> Any:
            return (jax.nn.silu(x @ w_gate) * (x @ w_up)) @ w_down  # no psum over "tensor"

        column = P(None, "tensor")
        specs = (P(None, None, None), column, column, P("tensor", None))
        program = jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)
        return program(x, w_gate, w_up, w_down)

    patch.setattr("glm_jax.model_v2.gated_mlp", gated_mlp)


def _mean_of_means(patch: Patch) -> None:
    """Every shard of the batch divides by its own number of tokens."""

    def cross_entropy(logp: Any, target: Any, count: Any = None) -> Any:
        shards = P("data", None, None)
        split = [jnp.reshape(x, (2, -1, x.shape[1]), out_sharding=shards) for x in (logp, target)]
        total = jnp.sum(jnp.where(split[1], split[0], 0.0), axis=(1, 2))
        return -jnp.mean(total / jnp.sum(split[1], axis=(1, 2)))

    patch.setattr("glm_jax.train.cross_entropy", cross_entropy)


def _dropped_microbatch(patch: Patch) -> None:
    """The last microbatch never enters the pipeline; the first goes through twice."""
    pieces = Layout.pieces

    def repeated(self: Layout, tree: Any, count: int) -> Any:
        last = jnp.arange(count) == count - 1
        return jax.tree.map(
            lambda x: jnp.where(last.reshape(-1, *[1] * (x.ndim - 1)), x[:1], x),
            pieces(self, tree, count),
        )

    patch.setattr(Layout, "pieces", repeated)


def _swapped_stages(patch: Patch) -> None:
    """Weights are brought to their stages in another order than the pipeline runs through them."""
    slots = glm_jax.weights.layer_slots
    patch.setattr("glm_jax.weights.layer_slots", lambda n, layout: slots(n, layout)[::-1])


def _stale_weights(patch: Patch) -> None:
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


def _label_shift(patch: Patch) -> None:
    """The first row of every shard of the batch is scored on labels that are one token late."""
    token_logprobs = glm_jax.likelihood.token_logprobs

    def shifted(logits: Any, ids: Any, temperature: float = 1.0) -> Any:
        edge = (jnp.arange(len(ids)) % (len(ids) // 2) == 0)[:, None]
        late = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)))
        return token_logprobs(logits, jnp.where(edge, late, ids), temperature)

    patch.setattr("glm_jax.likelihood.token_logprobs", shifted)


def _vocabulary_leak(patch: Patch) -> None:
    """Tokens that only fill up the vocabulary take part in the softmax."""
    patch.setattr("glm_jax.model.MASKED", 0.0)


def _accumulation_weight(patch: Patch) -> None:
    """Every accumulated piece is divided by its own number of tokens."""
    cross_entropy = glm_jax.train.cross_entropy
    patch.setattr(
        "glm_jax.train.cross_entropy", lambda logp, target, count: cross_entropy(logp, target) / 2
    )


def _rotary_reset(patch: Patch) -> None:
    """Positions begin anew where the next shard of a sequence would."""
    places = TrunkV2.places

    def reset(self: TrunkV2, ids: Any, segments: Any) -> Places:
        found = places(self, ids, segments)
        half = ids.shape[1] // 2
        second = (jnp.arange(ids.shape[1]) >= half)[:, None]
        return found._replace(positions=jnp.where(second, found.positions - half, found.positions))

    patch.setattr(TrunkV2, "places", reset)


def _noise_by_shard(patch: Patch) -> None:
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


PIPELINE = Layout(pipe=2, microbatches=2)
MUTANTS: dict[str, tuple[Callable[[Patch], None], str, Layout]] = {
    "a spec that drops a reduction": (_no_reduction, "sft", Layout(tensor=2)),
    "a mean of the shards' means": (_mean_of_means, "sft", Layout(data=2)),
    "a dropped microbatch": (_dropped_microbatch, "reward", PIPELINE),
    "stages in another order": (_swapped_stages, "dpo", PIPELINE),
    "stale weights after resharding": (_stale_weights, "ppo", PIPELINE),
    "labels shifted at shard edges": (_label_shift, "sft", Layout(data=2)),
    "a leak of the padded vocabulary": (_vocabulary_leak, "sft", Layout(tensor=2)),
    "a wrong weight of accumulated losses": (_accumulation_weight, "sft", Layout(accumulate=2)),
    "rotary positions reset": (_rotary_reset, "reward", Layout(data=2)),
    "noise that depends on the shard": (_noise_by_shard, "reward", Layout(data=2)),
}
QUICK = {"a spec that drops a reduction", "a dropped microbatch", "a leak of the padded vocabulary"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MUTANTS]
)
def test_a_planted_bug_is_found(name: str, monkeypatch: Patch) -> None:
    plant, job, layout = MUTANTS[name]
    rows = rows_for(layout)
    reference = _reference(job, rows)
    plant(monkeypatch)
    row = compare(job, layout, train(job, CONFIG, rows, layout), reference)
    assert not row.passed
    assert row.job == job
    assert row.grad_error > 1e-3 and row.grad_worst.split(".")[-1] in glm_jax.weights.WEIGHT_AXES
    monkeypatch.undo()
    healthy = compare(job, layout, train(job, CONFIG, rows, layout), reference)
    assert healthy.passed, healthy
