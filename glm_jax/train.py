"""TrainState, the one shape of update step, and the loop around it."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from glm_jax.batch import Sequences
from glm_jax.keeper import NOTHING_KEPT, Keeper
from glm_jax.likelihood import sequence_logprobs
from glm_jax.loss import Count, cross_entropy, num_counted
from glm_jax.metrics import Metrics, Shares, combined, finished, neutral
from glm_jax.model import CausalLM
from sharding.compile import compiler_options
from sharding.errors import UserError
from sharding.layout import Layout

# (model, rows, counts of the whole batch) -> (scalar, shares of metrics)
LossFn = Callable[[Any, Any, Any], tuple[jax.Array, Shares]]
Report = Callable[[int, Mapping[str, float], int], None]  # (step, metrics, tokens)
Look = Callable[[int, Any], Mapping[str, float]]  # (step, model) -> more metrics of that step


@partial(
    jax.tree_util.register_dataclass, data_fields=("step", "model", "opt_state"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What an update step consumes and returns."""

    step: Any  # int32 scalar, position in the schedule: updates done, left out or skipped
    model: Any
    opt_state: Any


Update = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def init_state(model: nnx.Module, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state around a copy of `model`; the optimizer's moments are split like the weights.

    A copy, because updates donate the state: a frozen reference that shared its buffers would be gone.
    """
    copy = jax.tree.map(jnp.copy, model)
    return TrainState(jnp.int32(0), copy, jax.jit(optimizer.init)(copy))


def apply_gradients(
    state: TrainState, grads: nnx.Module, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state after one optimizer step along `grads`."""
    update = optax.with_extra_args_support(optimizer).update
    updates, opt_state = update(grads, state.opt_state, state.model, step=state.step)
    return TrainState(state.step + 1, optax.apply_updates(state.model, updates), opt_state)


def make_update(
    loss_fn: LossFn,
    counts: Callable[[Any], Any],
    optimizer: optax.GradientTransformation,
    layout: Layout,
    rows_of: Callable[[Any], Any] = lambda batch: batch,
) -> Update:
    """The jitted update (state, batch) -> (state, metrics) on the current mesh; the state is donated.

    Where the gradient is not finite the weights and the optimizer come back as they were: NaN never reaches them
    (`require_finite`). The step counts all the same, so the learning rate moves on.

    Args:
        loss_fn: of some rows of a batch their share of its loss, so that the shares of all rows add up.
        counts: rows of the whole batch -> what `loss_fn` divides by.
        optimizer: what the gradient of the whole batch goes to.
        layout: its `accumulate` says in how many pieces the gradient is computed.
        rows_of: batch -> its rows, a pytree of arrays [B, ...].
    """

    @partial(jax.jit, donate_argnums=0, compiler_options=compiler_options())
    def update(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        rows = rows_of(batch)
        count = counts(rows)

        def gradient(rows: Any) -> tuple[tuple[jax.Array, Shares], Any]:
            return jax.value_and_grad(loss_fn, has_aux=True)(state.model, rows, count)

        if layout.accumulate == 1:
            (loss, shares), grads = gradient(rows)
        else:
            (loss, shares), grads = _accumulated(gradient, state.model, rows, layout)
        norm = optax.tree.norm(grads)
        metrics = {"loss": loss, **finished(shares), "grad_norm": norm}
        return _kept_if(
            jnp.isfinite(norm), apply_gradients(state, grads, optimizer), state
        ), metrics

    return update


def _kept_if(good: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    kept: TrainState = jax.tree.map(lambda x, before: jnp.where(good, x, before), new, old)
    return dataclasses.replace(kept, step=new.step)


def skip_updates(state: TrainState, count: int) -> TrainState:
    """Move the schedule past `count` updates that are not made; weights and moments stay."""
    return dataclasses.replace(state, step=state.step + count) if count else state


def require_finite(metrics: Mapping[str, float], where: str) -> None:
    """Raise UserError where an update's gradient was not finite, hence nothing was learnt; `where` names the update."""
    if not math.isfinite(metrics["grad_norm"]):
        raise UserError(
            f"{where}: the gradient is not finite (loss {metrics['loss']:g}); the weights are still those before "
            f"it. Lower the learning rate, or look for NaN in the weights that the run started from"
        )


def _accumulated(gradient: Callable[[Any], Any], model: Any, rows: Any, layout: Layout) -> Any:
    """Sums of what `gradient` gives of every piece, one piece after the other."""
    pieces = layout.pieces(rows, layout.accumulate)

    def add(sums: Any, piece: Any) -> tuple[Any, None]:
        (loss, shares), grads = sums
        (more_loss, more_shares), more_grads = gradient(piece)
        together = (loss + more_loss, combined(shares, more_shares))
        return (together, jax.tree.map(jnp.add, grads, more_grads)), None

    (loss, shares), _ = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], pieces))
    start = ((jnp.zeros_like(loss), neutral(shares)), jax.tree.map(jnp.zeros_like, model))
    return jax.lax.scan(add, start, pieces)[0]


def train(
    state: TrainState,
    update: Update,
    batches: Iterator[Any],
    num_steps: int,
    layout: Layout,
    report: Report,
    keeper: Keeper = NOTHING_KEPT,
    look: Look | None = None,
) -> TrainState:
    """Run updates over `batches` of host arrays until `num_steps` are done, reporting every one.

    What `look` sees in the model after an update is added to its metrics; then `keeper` may save the state. Raises
    UserError at an update whose gradient is not finite, unless `keeper` says that it is to be skipped.
    """
    for step in range(int(state.step) + 1, num_steps + 1):
        batch = layout.put(next(batches))
        tokens = num_tokens(batch)
        state, metrics = update(state, batch)
        figures = to_host(metrics)
        if not math.isfinite(figures["grad_norm"]) and keeper.skip(step, state.model, batch):
            figures = {"skipped": 1.0}
        else:
            require_finite(figures, f"update {step}")
        seen = {} if look is None else look(step, state.model)
        report(step, {**figures, **seen}, int(tokens))
        keeper.keep(state, step, metrics=seen)
    return state


def to_host(metrics: Metrics) -> dict[str, float]:
    """Scalars off the device."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}


@jax.jit
def num_tokens(batch: Any) -> jax.Array:
    """int32 scalar, real tokens in all Sequences of a pytree on the mesh."""

    def is_sequences(x: Any) -> bool:
        return isinstance(x, Sequences)

    found = filter(is_sequences, jax.tree.leaves(batch, is_leaf=is_sequences))
    return sum((jnp.sum(x.valid, dtype=jnp.int32) for x in found), jnp.int32(0))


def language_loss(
    model: CausalLM, batch: Sequences, count: Count, layout: Layout
) -> tuple[jax.Array, Shares]:
    """Mean negative log-likelihood of the target tokens, nats/token."""
    logp = sequence_logprobs(model, batch.ids, batch.valid, layout)
    return cross_entropy(logp, batch.target, count), {"tokens": jnp.sum(batch.target)}


def num_targets(batch: Sequences) -> jax.Array:
    """Target tokens of a batch, at least 1."""
    return num_counted(batch.target)
