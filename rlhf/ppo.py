"""Proximal policy optimisation as in ChatGLM-RLHF (arXiv 2404.00934, section 3).

One iteration: 1. sample an answer to every prompt; 2. score it and subtract the score of the reference answer;
3. log-probabilities of policy and SFT model, values of the critic, shaped rewards, advantages; 4. minibatch updates
of actor and critic. All arrays are aligned to the token they speak of (see glm_jax.loss).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from glm_jax.batch import Sequences
from glm_jax.generate import Generation, SamplingConfig, support_of
from glm_jax.loss import (
    aligned,
    masked_mean,
    num_counted,
    token_entropy,
    token_kl,
    token_logprobs,
)
from glm_jax.metrics import Metric, Metrics, Shares
from glm_jax.model import CausalLM, apply_model
from glm_jax.optim import OptimConfig
from glm_jax.scalar import ScalarModel, apply_scalar, last_token, sequence_scores
from glm_jax.train import Update, language_loss, make_update, num_targets
from rlhf.advantages import gae, grpo, on_tokens, rloo, shaped_rewards, whitened
from rlhf.kl import KLConfig, k2, k3
from rlhf.losses import policy_loss, value_loss
from rlhf.rollout import with_stop
from sharding.errors import UserError
from sharding.layout import Layout
from sharding.ranges import AtLeast, NonNegative, Positive, check_ranges


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO; clip, GAE and SFT weights are not in the paper (most are in its later public code)."""

    iterations: Positive = 700  # the paper: 600 to 800
    batch_size: Positive = 256  # answers an iteration, `samples` to a prompt
    samples: Positive = 1  # answers a prompt; not in the paper
    minibatches: Positive = 2  # updates an epoch
    epochs: Positive = 1  # passes over an iteration's answers
    # k3 of the old policy (nats/token) that ends an iteration's updates; None: disabled. Not in the paper
    stop_kl: float | None = None
    # first iterations, in which only the critic learns; not in the paper
    critic_warmup: NonNegative = 0
    # gae: with a critic, as in the paper; rloo, grpo: against the other answers to the prompt, without one
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    # whiten advantages over the whole batch; the paper has the reference baseline instead
    whiten: bool = False
    kl: KLConfig = KLConfig()
    clip_range: float = 0.2  # of the ratio; not in the paper
    value_clip: float = 0.2  # of the value's change; not in the paper
    value_weight: float = 1.0  # of the value loss; not in the paper
    entropy_weight: float = 0.0  # of the policy's entropy (nats/token); not in the paper
    score_clip: float = 5.0  # scores are clamped to +- this; not in the paper
    # answers cut off at max_new_tokens; penalty: `truncation_penalty` off their score, also in y_ref and in prompt
    # selection; mask: nothing is learnt from them. Not in the paper
    truncated: Literal["keep", "penalty", "mask"] = "keep"
    truncation_penalty: Annotated[float, AtLeast(0)] = 1.0  # not in the paper
    gamma: float = 1.0  # discount; not in the paper
    gae_lambda: float = 0.95  # not in the paper
    sft_batch_size: Positive = 64  # SFT sequences mixed into an update; not in the paper
    sft_weight: float = 0.05  # of the SFT loss mixed in (nats/token); its value is not in the paper
    # subtract the score of the SFT model's own answer y_ref to the prompt; for gae alone, since it cancels in rloo and
    # grpo, which sample no y_ref
    reference_baseline: bool = True
    sampling: SamplingConfig = SamplingConfig()
    # iterations between checks by the doctor, beside the first two in which each model learns; 0: none
    doctor_every: NonNegative = 0
    actor: OptimConfig = OptimConfig(learning_rate=1e-6)
    critic: OptimConfig = OptimConfig(learning_rate=2e-6)

    def __post_init__(self) -> None:
        check_ranges(self, "ppo")

    @property
    def subtracts_reference(self) -> bool:
        """True where the score of y_ref is a baseline: one number a prompt cancels in the advantages of a group."""
        return self.reference_baseline and self.advantage == "gae"

    def check(self, layout: Layout, generation: Layout) -> None:
        """Raise UserError where batch, samples and layouts do not divide, or sampling is greedy."""
        for name in ("minibatches", "samples"):
            if self.batch_size % getattr(self, name):
                raise UserError(
                    f"ppo.batch_size = {self.batch_size} is not a multiple of ppo.{name} = {getattr(self, name)}"
                )
        if self.sampling.greedy:
            raise UserError(
                "ppo.sampling.temperature = 0 has no log-probabilities to learn from: set it above 0"
            )
        if self.advantage != "gae" and self.samples < 2:
            raise UserError(
                f"ppo.advantage = {self.advantage} compares answers to one prompt: set ppo.samples to 2 or more"
            )
        if self.advantage != "gae" and self.critic_warmup:
            raise UserError(
                f"ppo.critic_warmup = {self.critic_warmup} is for a critic, which ppo.advantage = {self.advantage} "
                f"does not have: set it to 0"
            )
        if self.critic_warmup >= self.iterations > 0:
            raise UserError(
                f"ppo.critic_warmup = {self.critic_warmup} leaves none of ppo.iterations = {self.iterations} in which "
                f"the actor learns: lower it, or raise ppo.iterations"
            )
        layout.check_batch(self.batch_size // self.minibatches, "ppo.batch_size / ppo.minibatches")
        prompts = self.batch_size // self.samples
        for split in (layout, generation):
            whole = dataclasses.replace(split, microbatches=1, accumulate=1)
            whole.check_batch(prompts, "ppo.batch_size / ppo.samples")


class Experience(NamedTuple):
    """What an update learns from; [B, T] float32 arrays count where `counts` is True."""

    sequences: Sequences
    counts: jax.Array  # bool [B, T], tokens of answers that are learnt from
    logp: jax.Array  # of the policy that sampled, by the trainer's own program
    ref_logp: jax.Array
    support: jax.Array | None  # bool [B, T, V], what could be drawn; None: everything
    scores: jax.Array  # float32 [B], of the reward model, as `score_answers` gives them
    shaped: jax.Array  # rewards of tokens
    values: jax.Array | None  # of the critic, before each token; None without one
    advantages: jax.Array
    returns: jax.Array | None


def contents(config: PPOConfig) -> Experience:
    """What an experience consists of under `config`, without arrays."""
    there: Any = 0
    support = there if config.sampling.truncates else None
    of_critic = there if config.advantage == "gae" else None
    sequences = Sequences(there, there, there)
    return Experience(
        sequences, there, there, there, support, there, there, of_critic, there, of_critic
    )


class Models(NamedTuple):
    """The four models of an iteration, by role."""

    actor: CausalLM
    critic: ScalarModel | None  # None where the advantages need none
    reference: CausalLM  # the SFT model, frozen
    reward: ScalarModel  # frozen


def score_answers(
    reward: ScalarModel, answers: Generation, config: PPOConfig, stop_id: int, layout: Layout
) -> Float[Array, " B"]:
    """The reward model's score of every answer, clamped, less `truncation_penalty` where the setting asks for it.

    `stop_id` closes answers as it closed training examples. Rollouts, reference answers and prompt selection share this
    score, so that the reward of a policy that is the SFT model has mean 0.
    """
    scores = sequence_scores(reward, with_stop(answers.sequences, answers.ended, stop_id), layout)
    scores = jnp.clip(scores, -config.score_clip, config.score_clip)
    if config.truncated == "penalty":
        scores -= jnp.where(answers.ended, 0.0, config.truncation_penalty)
    return scores


class Finite(NamedTuple):
    """Which answers have numbers, bool [B] each, in the order in which one NaN leads to another."""

    score: jax.Array
    reward: jax.Array  # the score less its baseline
    actor: jax.Array
    reference: jax.Array
    critic: jax.Array


def make_experience(
    models: Models,
    answers: Generation,
    baseline: Float[Array, " B"],
    kl_coef: Float[Array, ""],
    config: PPOConfig,
    stop_id: int,
    layout: Layout,
) -> tuple[Experience, Metrics, Finite]:
    """Score answers and estimate advantages; `baseline` is the score of each prompt's reference answer, or 0."""
    sequences, mask = answers.sequences, answers.sequences.target
    temperature = config.sampling.temperature

    logits = apply_model(models.actor, sequences.ids, sequences.valid, layout)
    ref_logits = apply_model(models.reference, sequences.ids, sequences.valid, layout)
    # one temperature and one support for behaviour, actor and reference: else ratio and KL compare different
    # distributions
    support = support_of(logits, sequences.ids, config.sampling, layout)
    logp = token_logprobs(logits, sequences.ids, temperature, support)
    ref_logp = token_logprobs(ref_logits, sequences.ids, temperature, support)

    scores = score_answers(models.reward, answers, config, stop_id, layout)
    rewards = scores - baseline
    counts = mask & answers.ended[:, None] if config.truncated == "mask" else mask
    in_reward = kl_coef if config.kl.place == "reward" else 0.0
    shaped = shaped_rewards(rewards, logp, ref_logp, mask, in_reward, config.kl.log_ratio_clip)
    values = returns = None
    if models.critic is None:
        relative = {"rloo": rloo, "grpo": grpo}[config.advantage]
        kl_rewards = jnp.sum(shaped, axis=1) - rewards
        advantages = on_tokens(relative(rewards, kl_rewards, config.samples), mask)
    else:
        values = aligned(apply_scalar(models.critic, sequences.ids, sequences.valid, layout))
        advantages, returns = gae(shaped, values, mask, config.gamma, config.gae_lambda)
    if config.whiten:
        advantages = whitened(advantages, counts)
    log_ratio = logp - ref_logp
    metrics = {
        "reward": jnp.mean(rewards),
        "reward_se": jnp.std(rewards, ddof=1) / rewards.shape[0] ** 0.5,
        "score": jnp.mean(scores),
        "kl": masked_mean(log_ratio, mask),
        "kl_k2": masked_mean(k2(log_ratio), mask),
        "kl_k3": masked_mean(k3(log_ratio), mask),
        "kl_exact": masked_mean(token_kl(logits, ref_logits, temperature, support), mask),
        "entropy": -masked_mean(logp, mask),
        "drift": jnp.max(jnp.where(mask, jnp.abs(logp - answers.logp), 0.0)),
        "length": jnp.mean(jnp.sum(mask, axis=1).astype(jnp.float32)),
        "ended": jnp.mean(answers.ended, dtype=jnp.float32),
        "other_stop": jnp.mean(_ended_elsewhere(answers, stop_id), dtype=jnp.float32),
        "advantage_std": jnp.sqrt(masked_mean(advantages**2, counts)),
    }
    experience = Experience(
        sequences, counts, logp, ref_logp, support, scores, shaped, values, advantages, returns
    )
    return experience, metrics, _finite(experience, rewards)


def _ended_elsewhere(answers: Generation, stop_id: int) -> Bool[Array, " B"]:
    """Mark the answers that ended at another stop token than `stop_id`, such as a tool call."""
    ids, _, target = answers.sequences
    return jnp.any(last_token(target) & (ids != stop_id), axis=1) & answers.ended


def _finite(experience: Experience, rewards: jax.Array) -> Finite:
    def rows(values: jax.Array) -> jax.Array:
        return jnp.all(jnp.isfinite(values) | ~experience.sequences.target, axis=1)

    actor, reference = rows(experience.logp), rows(experience.ref_logp)
    critic = actor if experience.values is None else rows(experience.values)
    scores, rewards = jnp.isfinite(experience.scores), jnp.isfinite(rewards)
    return Finite(scores, rewards, actor, reference, critic)


def take_rows(tree: Any, index: jax.Array) -> Any:
    """Rows `index` of every [B, ...] array, split as it is."""

    def take(x: jax.Array) -> jax.Array:
        return x.at[index].get(out_sharding=jax.typeof(x).sharding.spec)

    return jax.tree.map(take, tree)


ActorRows = tuple[Experience, Sequences]
ActorCounts = tuple[jax.Array, jax.Array]  # answer tokens, SFT target tokens


def actor_counts(rows: ActorRows) -> ActorCounts:
    """What the two losses of a minibatch are divided by."""
    experience, sft_batch = rows
    return num_counted(experience.counts), num_targets(sft_batch)


def actor_loss(
    actor: CausalLM, rows: ActorRows, count: ActorCounts, config: PPOConfig, layout: Layout
) -> tuple[jax.Array, Shares]:
    """L_PPO - beta_sft * mean log pi over SFT tokens (arXiv 2404.00934, section 3.2.3), of a minibatch.

    Minus the entropy bonus and plus the KL's k3 where the settings weigh them.
    """
    experience, sft_batch = rows
    sequences, counts, support = experience.sequences, experience.counts, experience.support
    temperature = config.sampling.temperature
    logits = apply_model(actor, sequences.ids, sequences.valid, layout)
    logp = token_logprobs(logits, sequences.ids, temperature, support)
    surrogate, metrics = policy_loss(
        logp, experience.logp, experience.advantages, counts, config.clip_range, count[0]
    )
    sft_loss, _ = language_loss(actor, sft_batch, count[1], layout)
    found: dict[str, Metric] = {"policy_loss": surrogate, "sft_loss": sft_loss, **metrics}
    loss = surrogate + config.sft_weight * sft_loss
    if config.kl.place == "loss":
        kl = masked_mean(k3(logp - experience.ref_logp), counts, count[0])
        loss, found["kl_loss"] = loss + config.kl.coef * kl, kl
    if config.entropy_weight:
        by_token = token_entropy(logits, temperature, support)
        entropy = masked_mean(by_token, counts, count[0])
        loss, found["policy_entropy"] = loss - config.entropy_weight * entropy, entropy
    return loss, found


def actor_update(
    config: PPOConfig,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    rows_of: Callable[[Any], Any] = lambda batch: batch,
) -> Update:
    """The update of `glm_jax.train.make_update` on rows of an experience and of SFT data."""
    loss = partial(actor_loss, config=config, layout=layout)
    return make_update(loss, actor_counts, optimizer, layout, rows_of)


CriticCounts = tuple[jax.Array, jax.Array]  # answer tokens, variance of their returns


def critic_counts(experience: Experience) -> CriticCounts:
    """What the value loss of a minibatch and its unexplained variance are divided by."""
    mask, returns = experience.counts, experience.returns
    assert returns is not None
    variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return num_counted(mask), jnp.maximum(variance, 1e-8)


def critic_loss(
    critic: ScalarModel,
    experience: Experience,
    count: CriticCounts,
    config: PPOConfig,
    layout: Layout,
) -> tuple[jax.Array, Shares]:
    """The clipped value loss of a minibatch, times its weight."""
    sequences, (tokens, variance) = experience.sequences, count
    values = aligned(apply_scalar(critic, sequences.ids, sequences.valid, layout))
    mask, old_values, returns = experience.counts, experience.values, experience.returns
    assert old_values is not None and returns is not None
    loss = value_loss(values, old_values, returns, mask, config.value_clip, tokens)
    explained = masked_mean(1 - (values - returns) ** 2 / variance, mask, tokens)
    return config.value_weight * loss, {"value_loss": loss, "explained_variance": explained}


def critic_update(
    config: PPOConfig,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    rows_of: Callable[[Any], Any] = lambda batch: batch,
) -> Update:
    """The update of `glm_jax.train.make_update` on rows of an experience."""
    loss = partial(critic_loss, config=config, layout=layout)
    return make_update(loss, critic_counts, optimizer, layout, rows_of)
