"""Bugs of optimizers, each planted by patching the program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import glm_jax.optim
from rlhf.ppo_iteration import Iteration

Patch = pytest.MonkeyPatch


def decay_of_norms(patch: Patch) -> None:
    """Weight decay shrinks norms and biases too."""
    patch.setattr("glm_jax.optim.decayed", lambda params: jax.tree.map(lambda _: True, params))


def eps_in_the_root(patch: Patch) -> None:
    """Epsilon is added to the second moment instead of its root."""
    adam = optax.scale_by_adam
    patch.setattr("optax.scale_by_adam", lambda b1, b2, eps: adam(b1, b2, 0.0, eps_root=eps))


def no_bias_correction(patch: Patch) -> None:
    """Moments are used as they are, though they began with 0."""
    patch.setattr("optax._src.transform.optax.tree.bias_correction", lambda m, decay, count: m)


def clip_after_the_moments(patch: Patch) -> None:
    """The step is clipped instead of the gradient."""
    chain = optax.chain
    patch.setattr("optax.chain", lambda *parts: chain(*parts[::-1]))


def schedule_one_late(patch: Patch) -> None:
    """Every update has the learning rate of the next."""
    schedule = glm_jax.optim.learning_rate
    patch.setattr(
        "glm_jax.optim.learning_rate", lambda *args: lambda done: schedule(*args)(done + 1)
    )


def clip_by_each_weight(patch: Patch) -> None:
    """The norm is that of every weight alone."""
    patch.setattr("optax.clip_by_global_norm", optax.clip_by_block_rms)


def decay_with_the_gradient(patch: Patch) -> None:
    """Weight decay is L2 regularisation: it goes through the moments."""
    chain = optax.chain

    def coupled(clip: Any, adam: Any, decay: Any, descend: Any) -> Any:
        return chain(clip, decay, adam, descend)

    patch.setattr("optax.chain", coupled)


def clip_by_shards(patch: Patch) -> None:
    """The norm that gradients are clipped to is that of a shard of the weights."""
    clip = optax.clip_by_global_norm
    patch.setattr("optax.clip_by_global_norm", lambda norm: clip(2**0.5 * norm))


def moments_lost(patch: Patch) -> None:
    """After an iteration's sampling the optimizer's moments begin anew."""
    roll_out = Iteration.roll_out

    def forgetful(self: Iteration, learners: Any, *args: Any) -> Any:
        learners, rolled_out = roll_out(self, learners, *args)
        fresh = jax.tree.map(
            lambda x: x * 0 if x.dtype == jnp.float32 else x, learners.actor.opt_state
        )
        actor = dataclasses.replace(learners.actor, opt_state=fresh)
        return learners._replace(actor=actor), rolled_out

    patch.setattr(Iteration, "roll_out", forgetful)
