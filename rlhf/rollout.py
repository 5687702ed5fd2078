"""Answers of a policy and their scores."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from glm_jax.batch import Prompts, Sequences
from glm_jax.config import GLMConfig
from glm_jax.generate import Generation, SamplingConfig, generate
from glm_jax.model import CausalLM, init_model, restack
from sharding.layout import Layout

Sampler = Callable[[CausalLM, Prompts, jax.Array], Generation]


def make_sampler(
    config: GLMConfig, sampling: SamplingConfig, stop_ids: tuple[int, ...], layout: Layout
) -> Sampler:
    """The jitted program (policy, prompts, key) -> Generation, all of it laid out for training.

    Inside, policy and prompts move to the generation layout on the same devices and the answers move back.
    """
    generation = layout.for_generation()
    like = jax.eval_shape(lambda key: init_model(config, generation, key), jax.random.key(0))

    def rows(x: jax.Array, to: Layout) -> jax.Array:
        return jax.sharding.reshard(x, to.spec("batch", *[None] * (x.ndim - 1)))

    @jax.jit
    def sample(policy: CausalLM, prompts: Prompts, key: jax.Array) -> Generation:
        prompts = jax.tree.map(lambda x: rows(x, generation), prompts)
        answers = generate(restack(policy, like), prompts, key, sampling, stop_ids, generation)
        return jax.tree.map(lambda x: rows(x, layout), answers)

    return sample


def with_stop(sequences: Sequences, ended: Bool[Array, " B"], stop_id: int) -> Sequences:
    """One column longer, with `stop_id` appended to the answers that did not stop by themselves.

    The reward model reads its score at an end-of-turn token (the paper's later code appends it): an answer cut off at
    the length limit gets one as well. The appended token is no target: the policy did not choose it.
    """
    wider = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1))), sequences)
    before = jnp.pad(
        sequences.target, ((0, 0), (1, 0))
    )  # is the token to the left part of the answer?
    append = before & ~wider.target & ~ended[:, None]
    return Sequences(
        ids=jnp.where(append, stop_id, wider.ids), valid=wider.valid | append, target=wider.target
    )
