"""Proximal policy optimisation as in ChatGLM-RLHF (arXiv 2404.00934, section 3).

One iteration: 1. sample an answer to every prompt; 2. score it and subtract the score of the reference answer;
3. log-probabilities of policy and SFT model, values of the critic, shaped rewards, advantages; 4. minibatch updates
of actor and critic. All arrays are aligned to the token they speak of (see glm_jax.loss).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from glm_jax.batch import Sequences
from glm_jax.generate import Generation, SamplingConfig
from glm_jax.loss import aligned, masked_mean, num_counted, token_kl, token_logprobs
from glm_jax.metrics import Metrics, Shares
from glm_jax.model import CausalLM, apply_model
from glm_jax.optim import OptimConfig
from glm_jax.scalar import ScalarModel, apply_scalar, sequence_scores
from glm_jax.train import (
    language_loss,
    num_targets,
)
from rlhf.estimators import gae, policy_loss, shaped_rewards, value_loss
from rlhf.rollout import with_stop
from sharding.errors import UserError
from sharding.layout import Layout


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO; clip, GAE and SFT weights are not in the paper (most are in its later public code)."""

    iterations: int = 700  # the paper: 600 to 800
    batch_size: int = 256  # prompts, hence answers, an iteration
    minibatches: int = 2  # updates an epoch
    epochs: int = 1  # passes over an iteration's answers
    critic_warmup: int = 0  # first iterations, in which only the critic learns; not in the paper
    kl_coef: float = 0.005  # beta, per token; not in the paper
    clip_range: float = 0.2  # of the ratio; not in the paper
    value_clip: float = 0.2  # of the value's change; not in the paper
    score_clip: float = 5.0  # scores are clamped to +- this; not in the paper
    gamma: float = 1.0  # discount; not in the paper
    gae_lambda: float = 0.95  # not in the paper
    sft_batch_size: int = 64  # SFT sequences mixed into an update; not in the paper
    sft_weight: float = 0.05  # of the SFT loss mixed in (nats/token); its value is not in the paper
    reference_baseline: bool = (
        True  # subtract the score of the SFT model's own answer to the prompt
    )
    sampling: SamplingConfig = SamplingConfig()
    actor: OptimConfig = OptimConfig(learning_rate=1e-6)
    critic: OptimConfig = OptimConfig(learning_rate=2e-6)

    def check(self, layout: Layout, generation: Layout) -> None:
        """Raise UserError where batch and layouts do not divide, or sampling is greedy."""
        if self.batch_size % self.minibatches:
            raise UserError(
                f"ppo.batch_size = {self.batch_size} is not a multiple of ppo.minibatches = {self.minibatches}"
            )
        if self.sampling.greedy:
            raise UserError(
                "ppo.sampling.temperature = 0 has no log-probabilities to learn from: set it above 0"
            )
        if self.sampling.top_k or self.sampling.top_p < 1.0:
            raise UserError(
                "ppo.sampling.top_k and top_p must be 0 and 1: the update's log-probabilities are those of the whole "
                "distribution, answers drawn from a part of it would bias the ratio"
            )
        layout.check_batch(self.batch_size // self.minibatches, "ppo.batch_size / ppo.minibatches")
        generation.check_batch(self.batch_size, "ppo.batch_size")


class Experience(NamedTuple):
    """What an update learns from; [B, T] float32 arrays count where `sequences.target` is True."""

    sequences: Sequences
    logp: jax.Array  # of the policy that sampled, by the trainer's own program
    values: jax.Array  # of the critic, before each token
    advantages: jax.Array
    returns: jax.Array


class Models(NamedTuple):
    """The four models of an iteration, by role."""

    actor: CausalLM
    critic: ScalarModel
    reference: CausalLM  # the SFT model, frozen
    reward: ScalarModel  # frozen


def score_answers(
    reward: ScalarModel, answers: Generation, config: PPOConfig, stop_id: int, layout: Layout
) -> Float[Array, " B"]:
    """The reward model's score of every answer, read at its end-of-turn token and clamped."""
    scores = sequence_scores(reward, with_stop(answers.sequences, answers.ended, stop_id), layout)
    return jnp.clip(scores, -config.score_clip, config.score_clip)


def make_experience(
    models: Models,
    answers: Generation,
    baseline: Float[Array, " B"],
    config: PPOConfig,
    stop_id: int,
    layout: Layout,
) -> tuple[Experience, Metrics]:
    """Score answers and estimate advantages; `baseline` is the score of each prompt's reference answer, or 0."""
    sequences, mask = answers.sequences, answers.sequences.target
    temperature = config.sampling.temperature

    logits = apply_model(models.actor, sequences.ids, sequences.valid, layout)
    ref_logits = apply_model(models.reference, sequences.ids, sequences.valid, layout)
    # one temperature for behaviour, actor and reference: else ratio and KL compare different distributions
    logp = token_logprobs(logits, sequences.ids, temperature)
    ref_logp = token_logprobs(ref_logits, sequences.ids, temperature)
    values = aligned(apply_scalar(models.critic, sequences.ids, sequences.valid, layout))

    scores = score_answers(models.reward, answers, config, stop_id, layout)
    rewards = scores - baseline
    shaped = shaped_rewards(rewards, logp, ref_logp, mask, config.kl_coef)
    advantages, returns = gae(shaped, values, mask, config.gamma, config.gae_lambda)
    metrics = {
        "reward": jnp.mean(rewards),
        "reward_se": jnp.std(rewards, ddof=1) / rewards.shape[0] ** 0.5,
        "score": jnp.mean(scores),
        "kl": masked_mean(logp - ref_logp, mask),
        "kl_exact": masked_mean(token_kl(logits, ref_logits, temperature), mask),
        "entropy": -masked_mean(logp, mask),
        "drift": jnp.max(jnp.where(mask, jnp.abs(logp - answers.logp), 0.0)),
        "length": jnp.mean(jnp.sum(mask, axis=1).astype(jnp.float32)),
        "ended": jnp.mean(answers.ended, dtype=jnp.float32),
        "advantage_std": jnp.sqrt(masked_mean(advantages**2, mask)),
    }
    return Experience(sequences, logp, values, advantages, returns), metrics


def take_rows(tree: Any, index: jax.Array, layout: Layout) -> Any:
    """Rows `index` of every [B, ...] array, split like the batch again."""

    def take(x: jax.Array) -> jax.Array:
        return x.at[index].get(out_sharding=layout.spec("batch", *[None] * (x.ndim - 1)))

    return jax.tree.map(take, tree)


ActorRows = tuple[Experience, Sequences]
ActorCounts = tuple[jax.Array, jax.Array]  # answer tokens, SFT target tokens


def actor_counts(rows: ActorRows) -> ActorCounts:
    """What the two losses of a minibatch are divided by."""
    experience, sft_batch = rows
    return num_targets(experience.sequences), num_targets(sft_batch)


def actor_loss(
    actor: CausalLM, rows: ActorRows, count: ActorCounts, config: PPOConfig, layout: Layout
) -> tuple[jax.Array, Shares]:
    """L_PPO - beta_sft * mean log pi over SFT tokens (arXiv 2404.00934, section 3.2.3), of a minibatch."""
    experience, sft_batch = rows
    sequences = experience.sequences
    logits = apply_model(actor, sequences.ids, sequences.valid, layout)
    logp = token_logprobs(logits, sequences.ids, config.sampling.temperature)
    surrogate, metrics = policy_loss(
        logp, experience.logp, experience.advantages, sequences.target, config.clip_range, count[0]
    )
    sft_loss, _ = language_loss(actor, sft_batch, count[1], layout)
    metrics = {"policy_loss": surrogate, "sft_loss": sft_loss, **metrics}
    return surrogate + config.sft_weight * sft_loss, metrics


CriticCounts = tuple[jax.Array, jax.Array]  # answer tokens, variance of their returns


def critic_counts(experience: Experience) -> CriticCounts:
    """What the value loss of a minibatch and its unexplained variance are divided by."""
    mask, returns = experience.sequences.target, experience.returns
    variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return num_counted(mask), jnp.maximum(variance, 1e-8)


def critic_loss(
    critic: ScalarModel,
    experience: Experience,
    count: CriticCounts,
    config: PPOConfig,
    layout: Layout,
) -> tuple[jax.Array, Shares]:
    """The clipped value loss of a minibatch."""
    sequences, (tokens, variance) = experience.sequences, count
    values = aligned(apply_scalar(critic, sequences.ids, sequences.valid, layout))
    mask, returns = sequences.target, experience.returns
    loss = value_loss(values, experience.values, returns, mask, config.value_clip, tokens)
    explained = masked_mean(1 - (values - returns) ** 2 / variance, mask, tokens)
    return loss, {"explained_variance": explained}
