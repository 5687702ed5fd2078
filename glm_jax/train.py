"""TrainState, the one shape of update step, and the loop around it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from glm_jax.batch import Sequences
from glm_jax.loss import cross_entropy, token_logprobs
from glm_jax.model import CausalLM, apply_model
from sharding.layout import Layout

Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Any], tuple[jax.Array, Metrics]]  # (model, batch) -> (scalar, metrics)
Report = Callable[[int, Mapping[str, float], int], None]  # (step, metrics, tokens)


@partial(
    jax.tree_util.register_dataclass, data_fields=("step", "model", "opt_state"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What an update step consumes and returns."""

    step: jax.Array  # int32 scalar, updates done
    model: Any
    opt_state: optax.OptState


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
    updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
    return TrainState(state.step + 1, optax.apply_updates(state.model, updates), opt_state)


def make_update(
    loss_fn: LossFn, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The jitted update (state, batch) -> (state, metrics); the state is donated."""

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.model, batch)
        metrics = {"loss": loss, **metrics, "grad_norm": optax.tree.norm(grads)}
        return apply_gradients(state, grads, optimizer), metrics

    return update


def train(
    state: TrainState,
    update: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    batches: Iterator[Any],
    num_steps: int,
    layout: Layout,
    report: Report,
) -> TrainState:
    """Run `num_steps` updates over `batches` of host arrays, reporting every one."""
    for step in range(1, num_steps + 1):
        batch = layout.put(next(batches))
        tokens = num_tokens(batch)
        state, metrics = update(state, batch)
        report(step, to_host(metrics), int(tokens))
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


def language_loss(model: CausalLM, batch: Sequences, layout: Layout) -> tuple[jax.Array, Metrics]:
    """Mean negative log-likelihood of the target tokens, nats/token."""
    logp = token_logprobs(apply_model(model, batch.ids, batch.valid, layout), batch.ids)
    return cross_entropy(logp, batch.target), {"tokens": jnp.sum(batch.target)}
