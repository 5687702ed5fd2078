"""Proximal policy optimisation as in ChatGLM-RLHF (arXiv 2404.00934, section 3).

One iteration: 1. sample an answer to every prompt; 2. score it and subtract the score of the reference answer;
3. log-probabilities of policy and SFT model, values of the critic, shaped rewards, advantages; 4. minibatch updates
of actor and critic. All arrays are aligned to the token they speak of (see glm_jax.loss).
"""

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from glm_jax.batch import Prompts, Sequences
from glm_jax.generate import Generation, Sampler, SamplingConfig
from glm_jax.loss import aligned, masked_mean, token_kl, token_logprobs
from glm_jax.model import CausalLM, apply_model
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.train import (
    Metrics,
    Report,
    init_state,
    language_loss,
    make_update,
    num_tokens,
    to_host,
)
from rlhf.heads import ScalarModel, apply_scalar, last_token, sequence_scores
from rlhf.rollout import with_stop
from sharding.errors import UserError
from sharding.layout import Layout
from sharding.processes import fetch


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

    def check(self, layout: Layout) -> None:
        """Raise UserError where batch and layout do not divide, or sampling is greedy."""
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
        layout.for_generation().check_batch(self.batch_size, "ppo.batch_size")


class Experience(NamedTuple):
    """What an update learns from; [B, T] float32 arrays count where `sequences.target` is True."""

    sequences: Sequences
    logp: jax.Array  # of the policy that sampled, by the trainer's own program
    values: jax.Array  # of the critic, before each token
    advantages: jax.Array
    returns: jax.Array


def shaped_rewards(
    scores: Float[Array, " B"],
    logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    kl_coef: float,
) -> Float[Array, "B T"]:
    """r_t = -beta (log pi - log pi_0), plus the score on the answer's last token (arXiv 2404.00934, section 3.2).

    Their sum over an answer is score - beta * KL, KL being the sampled log-ratio.
    """
    penalty = jnp.where(response_mask, -kl_coef * (logp - ref_logp), 0.0)
    return penalty + jnp.where(last_token(response_mask), scores[:, None], 0.0)


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    gamma: float,
    lam: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Advantages and returns by generalised advantage estimation (Schulman et al. 2016, eq. 16), 0 off the answer.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1};  R_t = A_t + V_t.
    Nothing follows an answer's last token: V = 0 and A = 0 there.
    """
    mask = response_mask.astype(jnp.float32)
    values = values * mask
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = (rewards + gamma * following - values) * mask

    def step(later: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        delta, counts = now
        advantage = delta + gamma * lam * later * counts
        return advantage, advantage

    _, backwards = jax.lax.scan(
        step, jnp.zeros_like(deltas[:, 0]), (deltas.T, mask.T), reverse=True
    )
    advantages = backwards.T * mask
    return advantages, (advantages + values) * mask


def policy_loss(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    clip_range: float,
) -> tuple[jax.Array, Metrics]:
    """mean over answer tokens of max(-A ratio, -A clip(ratio, 1 +- eps)) (Schulman et al. 2017, eq. 7)."""
    ratio = jnp.exp(jnp.where(response_mask, logp - old_logp, 0.0))
    clipped = jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
    loss = masked_mean(jnp.maximum(-advantages * ratio, -advantages * clipped), response_mask)
    metrics = {
        "ratio_mean": masked_mean(ratio, response_mask),
        "ratio_max": jnp.max(ratio),
        "clip_fraction": masked_mean(
            (jnp.abs(ratio - 1) > clip_range).astype(jnp.float32), response_mask
        ),
    }
    return loss, metrics


def value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    value_clip: float,
) -> jax.Array:
    """mean over answer tokens of max((V - R)^2, (V_clip - R)^2) / 2, V_clip within value_clip of the old value."""
    near = old_values + jnp.clip(values - old_values, -value_clip, value_clip)
    worse = jnp.maximum((values - returns) ** 2, (near - returns) ** 2)
    return 0.5 * masked_mean(worse, response_mask)


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


def actor_loss(
    actor: CausalLM,
    batch: tuple[Experience, jax.Array, Sequences],
    config: PPOConfig,
    layout: Layout,
) -> tuple[jax.Array, Metrics]:
    """L_PPO - beta_sft * mean log pi over SFT tokens (arXiv 2404.00934, section 3.2.3), of a minibatch."""
    experience, index, sft_batch = batch
    experience = take_rows(experience, index, layout)
    sequences = experience.sequences
    logits = apply_model(actor, sequences.ids, sequences.valid, layout)
    logp = token_logprobs(logits, sequences.ids, config.sampling.temperature)
    surrogate, metrics = policy_loss(
        logp, experience.logp, experience.advantages, sequences.target, config.clip_range
    )
    sft_loss, _ = language_loss(actor, sft_batch, layout)
    metrics = {"policy_loss": surrogate, "sft_loss": sft_loss, **metrics}
    return surrogate + config.sft_weight * sft_loss, metrics


def critic_loss(
    critic: ScalarModel, batch: tuple[Experience, jax.Array], config: PPOConfig, layout: Layout
) -> tuple[jax.Array, Metrics]:
    """The clipped value loss of a minibatch."""
    experience, index = batch
    experience = take_rows(experience, index, layout)
    sequences = experience.sequences
    values = aligned(apply_scalar(critic, sequences.ids, sequences.valid, layout))
    mask = sequences.target
    loss = value_loss(values, experience.values, experience.returns, mask, config.value_clip)
    spread = masked_mean((experience.returns - masked_mean(experience.returns, mask)) ** 2, mask)
    error = masked_mean((values - experience.returns) ** 2, mask)
    return loss, {"explained_variance": 1 - error / jnp.maximum(spread, 1e-8)}


def reference_scores(
    reward: ScalarModel,
    sft_model: CausalLM,
    sample: Sampler,
    prompts: Iterable[Prompts],
    num_prompts: int,
    config: PPOConfig,
    stop_id: int,
    key: jax.Array,
    layout: Layout,
    report: Report,
) -> np.ndarray:
    """r(x, y_ref) by prompt index, float32 [num_prompts]: y_ref is one answer a prompt by the SFT model.

    Drawn before training and exactly as rollouts are (the paper leaves greedy or sampled open), so that the first
    iteration's reward has mean 0.
    """
    score = jax.jit(partial(score_answers, config=config, stop_id=stop_id, layout=layout))
    scores = np.full(num_prompts, np.nan, np.float32)
    for number, batch in enumerate(prompts):
        answers = sample(sft_model, layout.put(batch), jax.random.fold_in(key, number))
        row = np.asarray(batch.row)
        scores[row[row >= 0]] = fetch(score(reward, answers))[row >= 0]
        tokens = int(num_tokens(answers.sequences))
        report(number + 1, {"score": float(np.nanmean(scores))}, tokens)
    return scores


def train_ppo(
    models: Models,
    config: PPOConfig,
    prompts: Iterator[Prompts],
    sft_batches: Iterator[Sequences],
    baseline: np.ndarray,
    sample: Sampler,
    stop_id: int,
    key: jax.Array,
    layout: Layout,
    report: Report,
) -> tuple[CausalLM, ScalarModel]:
    """Actor and critic after `config.iterations` iterations; `baseline` holds r(x, y_ref) by prompt index (or 0)."""
    config.check(layout)
    updates = config.iterations * config.epochs * config.minibatches
    actor_optimizer = make_optimizer(config.actor, updates)
    critic_optimizer = make_optimizer(config.critic, updates)
    experience_of = jax.jit(partial(make_experience, config=config, stop_id=stop_id, layout=layout))
    update_actor = make_update(partial(actor_loss, config=config, layout=layout), actor_optimizer)
    update_critic = make_update(
        partial(critic_loss, config=config, layout=layout), critic_optimizer
    )
    actor = init_state(models.actor, actor_optimizer)
    critic = init_state(models.critic, critic_optimizer)

    for iteration in range(1, config.iterations + 1):
        batch = next(prompts)
        sample_key, shuffle_key = jax.random.split(jax.random.fold_in(key, iteration))
        answers = sample(actor.model, layout.put(batch), sample_key)
        current = models._replace(actor=actor.model, critic=critic.model)
        references = layout.put(baseline[np.asarray(batch.row)])
        experience, metrics = experience_of(current, answers, references)
        losses: list[Metrics] = []
        for index in _minibatches(shuffle_key, config):
            critic, critic_metrics = update_critic(critic, (experience, index))
            merged = {**critic_metrics, "value_loss": critic_metrics["loss"]}
            if iteration > config.critic_warmup:
                sft_batch = layout.put(next(sft_batches))
                actor, actor_metrics = update_actor(actor, (experience, index, sft_batch))
                merged = {**merged, **actor_metrics}
            losses.append(merged)
        means = {name: jnp.mean(jnp.stack([x[name] for x in losses])) for name in losses[0]}
        report(iteration, to_host({**metrics, **means}), int(num_tokens(answers.sequences)))
    return actor.model, critic.model


def _minibatches(key: jax.Array, config: PPOConfig) -> Iterator[np.ndarray]:
    """int32 row numbers of every minibatch of an iteration, reshuffled each epoch."""
    for epoch in range(config.epochs):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), config.batch_size)
        yield from np.split(np.asarray(order, np.int32), config.minibatches)
