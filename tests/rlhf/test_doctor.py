"""The doctor passes what is healthy, and names every bug that is planted in PPO."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glm_jax.continuous
import glm_jax.generate
import glm_jax.optim
import glm_jax.sampler
import glm_jax.train
import rlhf.advantages
import rlhf.losses
import rlhf.ppo
import rlhf.ppo_iteration
from glm_jax.attention import Sight
from glm_jax.batch import Sequences
from glm_jax.config import PRESETS
from glm_jax.continuous import RolloutConfig
from glm_jax.generate import SamplingConfig
from glm_jax.metrics import Metrics
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.sampler import Sampler
from glm_jax.train import TrainState
from glm_jax.trunk import Cache, Trunk
from rlhf.cli import main
from rlhf.doctor.checks import OF_ROLLOUT, OF_UPDATE
from rlhf.doctor.doctor import Doctor
from rlhf.doctor.evidence import Setting
from rlhf.doctor.finding import Finding
from rlhf.kl import KLConfig
from rlhf.ppo import Models, PPOConfig
from rlhf.ppo_iteration import Learners, Listener
from rlhf.trials.models import ANSWER, STOP_IDS, tiny
from rlhf.trials.ppo import PLAIN, small_ppo
from sharding.errors import UserError
from sharding.layout import Layout
from tests.rlhf.planted import stale_weights

CONFIG = dataclasses.replace(tiny(PRESETS["chatglm3-6b"]), num_layers=2)
Patch = pytest.MonkeyPatch
ROWS = PLAIN.batch_size
OPTIM = OptimConfig(learning_rate=5e-3, warmup_fraction=0.5)
OPTIMIZERS = (make_optimizer(OPTIM, 8),) * 2

NUCLEUS = dataclasses.replace(
    PLAIN, sampling=SamplingConfig(max_new_tokens=ANSWER, temperature=0.7, top_p=0.8)
)
WHITENED = dataclasses.replace(PLAIN, whiten=True)
GROUPS = dataclasses.replace(
    PLAIN,
    advantage="rloo",
    samples=4,
    truncated="penalty",
    kl=KLConfig(coef=0.1, log_ratio_clip=0.01),
)
CUT = Layout(data=2, accumulate=2)
RICH = dataclasses.replace(
    PLAIN,
    epochs=2,
    kl=KLConfig(coef=0.1, place="loss"),
    entropy_weight=0.05,
    sft_weight=0.3,
    sampling=SamplingConfig(max_new_tokens=ANSWER, temperature=0.7, top_k=20, top_p=0.9),
)
ADAPTIVE = dataclasses.replace(PLAIN, kl=KLConfig(coef=0.1, target=0.05, horizon=20))
RELATIVE = dataclasses.replace(GROUPS, advantage="grpo", kl=KLConfig(coef=0.1))
SLOTS = RolloutConfig(slots=4, buckets=(8,), prefill_tokens=32)


def examined(
    config: PPOConfig,
    layout: Layout = Layout(),
    score_scale: float = 1.0,
    dtype: str = "float32",
    between: Callable[[Learners, Models], tuple[Learners, Models]] = lambda *x: x,
    same_key: bool = False,
    total: int | None = None,
    rollout: RolloutConfig = RolloutConfig(),
    **illness: Any,
) -> dict[str, Finding]:
    """Findings of two iterations of a tiny model; all but config, layout and dtype are ways to be ill.

    `between` happens between the iterations; `total`: updates that the optimizers' schedules are made for.
    """
    model = dataclasses.replace(CONFIG, compute_dtype=dtype)
    config = dataclasses.replace(config, iterations=2, actor=OPTIM, critic=OPTIM)
    total = total or config.iterations * config.epochs * config.minibatches
    optimizers = (make_optimizer(OPTIM, total),) * 2
    with jax.set_mesh(layout.mesh()):
        small = small_ppo(model, config, optimizers, layout, **illness)
        iterate, models, learners, inputs = small
        if rollout.slots is not None:
            sampler = Sampler(model, config.sampling, STOP_IDS, layout, rollout=rollout)
            iterate = dataclasses.replace(iterate, sample=sampler)
        models.reward.w_scalar = models.reward.w_scalar * score_scale
        setting = Setting(config, STOP_IDS, STOP_IDS[0], 1e-4, False, scheduled=True)
        doctor = Doctor(iterate, setting, strict=False)
        for step in range(2):
            key = jax.random.key(0 if same_key else step)
            try:
                learners, _, _ = doctor(learners, models, inputs(step), key)
                learners, models = between(learners, models)
            except (RuntimeError, ValueError):
                if "start" not in illness:  # the planted bug has freed an array
                    raise
                break
    return doctor.findings


def failed(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if finding.status == "fail"}


@pytest.mark.parametrize(
    ("config", "layout", "dtype"),
    [
        (PLAIN, Layout(), "float32"),
        (RICH, Layout(), "bfloat16"),
        pytest.param(NUCLEUS, Layout(), "float32", marks=pytest.mark.slow),
        pytest.param(WHITENED, CUT, "float32", marks=pytest.mark.slow),
        pytest.param(GROUPS, Layout(fsdp=2, tensor=2), "float32", marks=pytest.mark.slow),
        pytest.param(RELATIVE, Layout(data=2), "bfloat16", marks=pytest.mark.slow),
        pytest.param(
            ADAPTIVE, Layout(pipe=2, data=2, microbatches=2), "bfloat16", marks=pytest.mark.slow
        ),
    ],
)
def test_a_sound_run_passes(config: PPOConfig, layout: Layout, dtype: str) -> None:
    findings = examined(config, layout, dtype=dtype)
    assert not failed(findings), findings
    assert findings.keys() == OF_ROLLOUT.keys() | OF_UPDATE.keys()
    skipped = {name for name, finding in findings.items() if finding.status == "skip"}
    expected = set() if config.sampling.truncates else {"support"}
    assert skipped == expected | (set() if config.advantage == "gae" else {"values"})


def test_the_doctor_stops_a_run_before_anything_is_learnt(monkeypatch: Patch) -> None:
    _reward_one_token_early(monkeypatch)
    layout = Layout()
    with jax.set_mesh(layout.mesh()):
        iterate, models, learners, inputs = small_ppo(CONFIG, PLAIN, OPTIMIZERS, layout)
        unused = Mock()
        iterate = dataclasses.replace(iterate, update_actor=unused, update_critic=unused)
        doctor = Doctor(iterate, Setting(PLAIN, STOP_IDS, STOP_IDS[0], 1e-4, False), strict=True)
        line = r"shaped rewards: .* the score belongs on its last one"
        with pytest.raises(UserError, match=line):
            doctor(learners, models, inputs(0), jax.random.key(0))
    unused.assert_not_called()


class Lenient(Listener):
    """Leaves every update out whose gradient is not finite."""

    def __init__(self) -> None:
        self.left_out: list[tuple[int, str]] = []

    def skip(self, update: int, role: str, model: Any, batch: Any) -> bool:
        self.left_out.append((update, role))
        return True


def test_an_update_may_be_left_out_while_the_doctor_looks() -> None:
    layout = Layout()
    with jax.set_mesh(layout.mesh()):
        iterate, models, learners, inputs = small_ppo(CONFIG, PLAIN, OPTIMIZERS, layout)

        def not_finite(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
            return state, {"grad_norm": jnp.float32(jnp.nan), "loss": jnp.float32(jnp.nan)}

        iterate = dataclasses.replace(iterate, update_critic=not_finite)
        doctor = Doctor(iterate, Setting(PLAIN, STOP_IDS, STOP_IDS[0], 1e-4, False), strict=False)
        listener, key = Lenient(), jax.random.key(0)
        _, figures, _ = doctor(learners, models, inputs(0), key, True, listener)
    assert listener.left_out == [(1, "critic"), (2, "critic")]
    assert figures["skipped"] == 2.0 and all(map(math.isfinite, figures.values()))
    assert failed(doctor.findings) == {"learning"}  # the critic did not learn, which is true


# bugs; each says where it was seen or what it would do to a user


def _rewards_in_integers(patch: Patch) -> None:
    """Scores below 1 become 0."""
    shaped = rlhf.advantages.shaped_rewards
    patch.setattr(
        rlhf.ppo, "shaped_rewards", lambda *x: shaped(*x).astype(jnp.int32).astype(jnp.float32)
    )


def _nth_temperature(patch: Patch, first: int, end: int) -> None:
    """Trace some of the log-probabilities (policy, reference, updates) at temperature 1."""
    right, calls = rlhf.ppo.token_logprobs, itertools.count()

    def token_logprobs(logits: Any, ids: Any, temperature: float, support: Any) -> Any:
        wrong = first <= next(calls) < end
        return right(logits, ids, 1.0 if wrong else temperature, support)

    patch.setattr(rlhf.ppo, "token_logprobs", token_logprobs)


def _positions_jump(patch: Patch) -> None:
    """Decoding goes on counting at the column, as if the prompt had no padding on its left."""
    prefill = Trunk.prefill

    def jumping(self: Trunk, ids: Any, real: Any, room: int, layout: Layout) -> Any:
        hidden, cache = prefill(self, ids, real, room, layout)
        column = jnp.full_like(cache.position, ids.shape[1] - 1)
        assert isinstance(cache, Cache)
        return hidden, cache._replace(position=column)

    patch.setattr(Trunk, "prefill", jumping)


def _attention_to_padding(patch: Patch) -> None:
    """Whole sequences see their padding."""

    def mask(self: Sight) -> Any:
        length = self.segments.shape[1]
        reach = jnp.tril(jnp.ones((length, length), bool))[None]
        return jnp.broadcast_to(reach, (len(self.segments), length, length))

    patch.setattr(Sight, "mask", mask)


def _mask_shifted(patch: Patch) -> None:
    """The response mask begins one token late and ends one token late."""
    generate = glm_jax.sampler.generate

    def shifted(*args: Any, **settings: Any) -> Any:
        found = generate(*args, **settings)
        target = jnp.pad(found.sequences.target[:, :-1], ((0, 0), (1, 0)))
        return found._replace(sequences=found.sequences._replace(target=target))

    patch.setattr(glm_jax.sampler, "generate", shifted)


def _mean_of_means(patch: Patch) -> None:
    """Every accumulated piece divides by its own number of tokens."""
    masked_mean = rlhf.losses.masked_mean

    def own_count(values: Any, mask: Any, count: Any = None) -> Any:
        return masked_mean(values, mask) / CUT.accumulate

    patch.setattr(rlhf.losses, "masked_mean", own_count)


def _whitened_by_shard(patch: Patch) -> None:
    """Each half of the batch has its own mean and deviation."""
    whitened = rlhf.advantages.whitened

    def by_shard(advantages: Any, mask: Any) -> Any:
        halves = [slice(0, ROWS // 2), slice(ROWS // 2, ROWS)]
        return jnp.concatenate([whitened(advantages[half], mask[half]) for half in halves])

    patch.setattr(rlhf.ppo, "whitened", by_shard)


def _no_stop_token(patch: Patch) -> None:
    """Answers that were cut off are scored at their last token."""
    patch.setattr(
        rlhf.ppo,
        "with_stop",
        lambda sequences, *_: jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1))), sequences),
    )


def _whole_vocabulary_in_training(patch: Patch) -> None:
    """The nucleus is for the rollout only."""
    patch.setattr(rlhf.ppo, "support_of", lambda *_: None)


def _reward_one_token_early(patch: Patch) -> None:
    """The score stands on the token before the last one."""
    last_token = rlhf.advantages.last_token
    patch.setattr(
        rlhf.advantages,
        "last_token",
        lambda mask: jnp.pad(last_token(mask)[:, 1:], ((0, 0), (0, 1))),
    )


def _values_late(patch: Patch) -> None:
    """The critic has seen the token that its value is the baseline of."""
    patch.setattr(rlhf.ppo, "aligned", lambda values: values)


def _answers_of_other_prompts(patch: Patch) -> None:
    """K samples are laid out one round of prompts after the other, and grouped as if they were not."""
    patch.setattr(
        rlhf.ppo_iteration,
        "repeated",
        lambda rows, count: jax.tree.map(lambda x: np.concatenate([np.asarray(x)] * count), rows),
    )


def _kl_as_reward(patch: Patch) -> None:
    """The policy is paid for moving away."""
    shaped = rlhf.advantages.shaped_rewards
    patch.setattr(
        rlhf.ppo,
        "shaped_rewards",
        lambda scores, logp, ref_logp, *rest: shaped(scores, ref_logp, logp, *rest),
    )


def _gae_beyond_the_end(patch: Patch) -> None:
    """The value after the last token is bootstrapped from padding."""

    def gae(rewards: Any, values: Any, mask: Any, gamma: float, lam: float) -> Any:
        everywhere = jnp.ones_like(mask)
        advantages, returns = rlhf.advantages.gae(rewards, values, everywhere, gamma, lam)
        return jnp.where(mask, advantages, 0.0), jnp.where(mask, returns, 0.0)

    patch.setattr(rlhf.ppo, "gae", gae)


def _rows_mixed_up(patch: Patch) -> None:
    """A minibatch has the old log-probabilities of other answers."""
    take_rows = rlhf.ppo.take_rows

    def mixed(experience: Any, index: Any) -> Any:
        rows = take_rows(experience, index)
        return rows._replace(logp=rows.logp[::-1])

    patch.setattr(rlhf.ppo_iteration, "take_rows", mixed)


def _negative_kl(patch: Patch) -> None:
    """The exact KL with its arguments' logarithms the wrong way round."""
    token_kl = rlhf.ppo.token_kl
    patch.setattr(rlhf.ppo, "token_kl", lambda *x: -token_kl(*x))


def _score_beside_the_answer(patch: Patch) -> None:
    """The score is read in the last column, padding or not."""

    def last_column(model: Any, sequences: Sequences, layout: Layout) -> Any:
        return rlhf.ppo.apply_scalar(model, sequences.ids, sequences.valid, layout)[:, -1]

    patch.setattr(rlhf.ppo, "sequence_scores", last_column)


def _clip_on_the_wrong_side(patch: Patch) -> None:
    """The larger gain counts, not the smaller one."""
    right = rlhf.losses.jnp.maximum
    _in_losses(patch, "maximum", lambda a, b: -right(-a, -b))


def _in_losses(patch: Patch, name: str, function: Any) -> None:
    """Replace a function of jax.numpy in rlhf.losses alone."""
    names = {key: getattr(jnp, key) for key in dir(jnp) if not key.startswith("__")}
    patch.setattr(rlhf.losses, "jnp", SimpleNamespace(**{**names, name: function}))


def _clip_too_wide(patch: Patch) -> None:
    """The ratio may move twice as far."""
    policy_loss = rlhf.losses.policy_loss

    def wide(logp: Any, old: Any, advantages: Any, mask: Any, clip: float, count: Any) -> Any:
        return policy_loss(logp, old, advantages, mask, 2 * clip, count)

    patch.setattr(rlhf.ppo, "policy_loss", wide)


def _value_clip_too_wide(patch: Patch) -> None:
    """Values may move twice as far."""
    value_loss = rlhf.losses.value_loss

    def wide(values: Any, old: Any, returns: Any, mask: Any, clip: float, count: Any) -> Any:
        return value_loss(values, old, returns, mask, 2 * clip, count)

    patch.setattr(rlhf.ppo, "value_loss", wide)


def _no_gradient_through_the_ratio(patch: Patch) -> None:
    """The surrogate's value is right and its gradient 0."""
    policy_loss = rlhf.losses.policy_loss

    def stopped(logp: Any, *rest: Any) -> Any:
        return policy_loss(jax.lax.stop_gradient(logp), *rest)

    patch.setattr(rlhf.ppo, "policy_loss", stopped)


def _returns_of_the_next_value(patch: Patch) -> None:
    """Returns add the value of the next token."""

    def gae(rewards: Any, values: Any, mask: Any, gamma: float, lam: float) -> Any:
        advantages, _ = rlhf.advantages.gae(rewards, values, mask, gamma, lam)
        following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
        return advantages, jnp.where(mask, advantages + following, 0.0)

    patch.setattr(rlhf.ppo, "gae", gae)


def _returns_of_whitened_advantages(patch: Patch) -> None:
    """Advantages are whitened before returns are made of them."""

    def gae(rewards: Any, values: Any, mask: Any, gamma: float, lam: float) -> Any:
        advantages, _ = rlhf.advantages.gae(rewards, values, mask, gamma, lam)
        advantages = rlhf.advantages.whitened(advantages, mask)
        return advantages, jnp.where(mask, advantages + values, 0.0)

    patch.setattr(rlhf.ppo, "gae", gae)


def _whitened_twice(patch: Patch) -> None:
    """Advantages are whitened although ppo.whiten is off."""
    gae = rlhf.ppo.gae

    def whitened(rewards: Any, values: Any, mask: Any, gamma: float, lam: float) -> Any:
        advantages, returns = gae(rewards, values, mask, gamma, lam)
        return rlhf.advantages.whitened(advantages, mask), returns

    patch.setattr(rlhf.ppo, "gae", whitened)


def _lambda_for_gamma(patch: Patch) -> None:
    """Discount and lambda change places."""
    gae = rlhf.advantages.gae
    patch.setattr(rlhf.ppo, "gae", lambda r, v, m, gamma, lam: gae(r, v, m, lam, gamma))


def _sft_loss_turned(patch: Patch) -> None:
    """The likelihood of SFT data is lowered."""
    language_loss = rlhf.ppo.language_loss

    def turned(*args: Any) -> Any:
        loss, shares = language_loss(*args)
        return -loss, shares

    patch.setattr(rlhf.ppo, "language_loss", turned)


def _entropy_turned(patch: Patch) -> None:
    """Certainty is rewarded."""
    token_entropy = rlhf.ppo.token_entropy
    patch.setattr(rlhf.ppo, "token_entropy", lambda *x: -token_entropy(*x))


def _kl_to_the_old_policy(patch: Patch) -> None:
    """The KL of the loss is taken to the policy that sampled."""
    actor_loss = rlhf.ppo.actor_loss

    def old(actor: Any, rows: Any, *rest: Any, **settings: Any) -> Any:
        experience, sft = rows
        changed = experience._replace(ref_logp=experience.logp)
        return actor_loss(actor, (changed, sft), *rest, **settings)

    patch.setattr(rlhf.ppo, "actor_loss", old)


def _reference_is_the_policy(patch: Patch) -> None:
    """The reference's log-probabilities are the policy's."""
    make_experience = rlhf.ppo_iteration.make_experience

    def mixed_up(models: Models, *args: Any, **settings: Any) -> Any:
        return make_experience(models._replace(reference=models.actor), *args, **settings)

    patch.setattr(rlhf.ppo_iteration, "make_experience", mixed_up)


def _critic_is_the_reward_model(patch: Patch) -> None:
    """Values are the reward model's."""
    make_experience = rlhf.ppo_iteration.make_experience

    def mixed_up(models: Models, *args: Any, **settings: Any) -> Any:
        return make_experience(models._replace(critic=models.reward), *args, **settings)

    patch.setattr(rlhf.ppo_iteration, "make_experience", mixed_up)


def _reference_follows(learners: Learners, models: Models) -> tuple[Learners, Models]:
    moved = jax.tree.map(jnp.copy, learners.actor.model)
    return learners, models._replace(reference=moved)


def _moments_lost(learners: Learners, models: Models) -> tuple[Learners, Models]:
    actor = learners.actor
    blank = jax.tree.map(jnp.zeros_like, actor.opt_state)
    return learners._replace(actor=dataclasses.replace(actor, opt_state=blank)), models


def _moments_lost_between_updates(patch: Patch) -> None:
    """Every update starts from empty moments."""
    apply_gradients = glm_jax.train.apply_gradients

    def forgetful(state: TrainState, grads: Any, optimizer: Any) -> TrainState:
        mean = jax.tree.map(jnp.zeros_like, optax.tree.get(state.opt_state, "mu"))
        blank = optax.tree.set(state.opt_state, mu=mean)
        return apply_gradients(dataclasses.replace(state, opt_state=blank), grads, optimizer)

    patch.setattr(glm_jax.train, "apply_gradients", forgetful)


def _with_replacement(patch: Patch) -> None:
    """Minibatches are drawn anew every time."""

    def minibatches(key: jax.Array, config: PPOConfig) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(int(jax.random.key_data(key)[1]))
        size = config.batch_size // config.minibatches
        for _ in range(config.epochs * config.minibatches):
            yield rng.integers(0, config.batch_size, size).astype(np.int32)

    patch.setattr(rlhf.ppo_iteration, "minibatches", minibatches)


def _same_order_every_epoch(patch: Patch) -> None:
    """The shuffle is not folded with the epoch."""

    def minibatches(key: jax.Array, config: PPOConfig) -> Iterator[np.ndarray]:
        for _ in range(config.epochs):
            order = jax.random.permutation(key, config.batch_size)
            yield from np.split(np.asarray(order, np.int32), config.minibatches)

    patch.setattr(rlhf.ppo_iteration, "minibatches", minibatches)


def _coefficient_adapts_the_wrong_way(patch: Patch) -> None:
    """A KL above its target lowers the coefficient."""
    adapted = rlhf.ppo_iteration.adapted

    def wrong(coef: float, kl: float, config: KLConfig, num_answers: int) -> float:
        return 2 * coef - adapted(coef, kl, config, num_answers)

    patch.setattr(rlhf.ppo_iteration, "adapted", wrong)


def _samples_share_noise(patch: Patch) -> None:
    """All samples of a prompt have the stream of the first."""
    row_keys = glm_jax.generate.row_keys
    patch.setattr(glm_jax.generate, "row_keys", lambda key, seeds: row_keys(key, seeds // 4 * 4))


def _rows_share_noise(patch: Patch) -> None:
    """All answers have one stream."""
    row_keys = glm_jax.generate.row_keys
    patch.setattr(glm_jax.generate, "row_keys", lambda key, seeds: row_keys(key, 0 * seeds))


def _tokens_share_noise(patch: Patch) -> None:
    """All tokens of an answer have the noise of the first."""
    draw = glm_jax.generate.draw
    patch.setattr(
        glm_jax.generate,
        "draw",
        lambda logits, keys, number, sampling: draw(logits, keys, 0 * number, sampling),
    )


def _half_the_noise(patch: Patch) -> None:
    """Sampling is half as random as its distribution says."""
    gumbel = jax.random.gumbel
    patch.setattr(jax.random, "gumbel", lambda *args, **how: 0.5 * gumbel(*args, **how))


def _answers_in_another_order(patch: Patch) -> None:
    """Slots hand answers back in the order in which they end."""
    answers = glm_jax.continuous._Requests.answers

    def turned(self: Any) -> Any:
        self.ids, self.logp = self.ids[::-1], self.logp[::-1]
        self.length, self.ended = self.length[::-1], self.ended[::-1]
        return answers(self)

    patch.setattr(glm_jax.continuous._Requests, "answers", turned)


def _decay_of_norms(patch: Patch) -> None:
    """Weight decay shrinks norm scales and biases too."""
    patch.setattr(glm_jax.optim, "decayed", lambda params: jax.tree.map(lambda _: True, params))


def _eps_inside_the_root(patch: Patch) -> None:
    """sqrt(v + eps) in place of sqrt(v) + eps."""
    adam = optax.scale_by_adam
    patch.setattr(optax, "scale_by_adam", lambda b1, b2, eps: adam(b1, b2, 0.0, eps_root=eps))


def _no_clip_of_the_gradient(patch: Patch) -> None:
    """The gradient is not clipped by its norm."""
    patch.setattr(optax, "clip_by_global_norm", lambda norm: optax.identity())


def _cache_one_column_early(patch: Patch) -> None:
    """Decoding writes keys and values one column early, over the prompt's last one."""
    decode = Trunk.decode

    def early(self: Trunk, ids: Any, cache: Cache, column: Any, layout: Layout) -> Any:
        return decode(self, ids, cache, column - 1, layout)

    patch.setattr(Trunk, "decode", early)


def _penalty_for_the_wrong_answers(patch: Patch) -> None:
    """The truncation penalty is taken off answers that have ended."""
    score_answers = rlhf.ppo.score_answers

    def wrong(reward: Any, answers: Any, config: PPOConfig, *rest: Any) -> Any:
        right = score_answers(reward, answers, config, *rest)
        return right + config.truncation_penalty * (1.0 - 2.0 * answers.ended)

    patch.setattr(rlhf.ppo, "score_answers", wrong)


def _log_ratio_not_clipped(patch: Patch) -> None:
    """The clamp of log-ratios in the reward is forgotten."""
    shaped: Any = rlhf.advantages.shaped_rewards
    patch.setattr(rlhf.ppo, "shaped_rewards", lambda *x: shaped(*x[:-1], None))


def _aliased(model: Any, optimizer: Any) -> TrainState:
    return TrainState(jnp.int32(0), model, jax.jit(optimizer.init)(model))


def nothing(_: Patch) -> None:
    """The bug is in what `examined` is told."""


WIDER = SamplingConfig(max_new_tokens=ANSWER, temperature=0.7)
HOTTER = SamplingConfig(max_new_tokens=ANSWER, temperature=1.0)
BUGS: dict[str, tuple[Callable[[Patch], None], dict[str, Any], set[str]]] = {
    "rewards in an integer array": (_rewards_in_integers, {}, {"shaped rewards"}),
    "the reference at another temperature": (
        lambda patch: _nth_temperature(patch, 1, 2),
        {},
        {"KL at the start"},
    ),
    "the update at another temperature": (
        lambda patch: _nth_temperature(patch, 2, 99),
        {},
        {"ratio"},
    ),
    "rollouts at another temperature": (
        nothing,
        {"sampling": HOTTER},
        {"rollout log-probabilities"},
    ),
    "positions that count left padding": (_positions_jump, {}, {"rollout log-probabilities"}),
    "attention to padding": (_attention_to_padding, {}, {"padding"}),
    "a response mask that is off by one": (_mask_shifted, {}, {"response mask"}),
    "a mean of means under accumulation": (
        _mean_of_means,
        {"layout": CUT},
        {"loss normalisation"},
    ),
    "whitening by shard": (
        _whitened_by_shard,
        {"config": WHITENED},
        {"advantages"},
    ),
    "no stop token to be scored at": (_no_stop_token, {}, {"scores"}),
    "top-p in the rollout only": (
        _whole_vocabulary_in_training,
        {"config": NUCLEUS},
        {"support"},
    ),
    "top-p in training only": (
        nothing,
        {"config": NUCLEUS, "sampling": WIDER},
        {"rollout log-probabilities"},
    ),
    "the reward on the wrong token": (_reward_one_token_early, {}, {"shaped rewards"}),
    "a reference that shares the policy's memory": (
        nothing,
        {"start": _aliased},
        {"frozen models"},
    ),
    "values one token late": (_values_late, {}, {"values"}),
    "answers grouped with those of other prompts": (
        _answers_of_other_prompts,
        {"config": GROUPS},
        {"shaped rewards"},
    ),
    "a KL that is paid for": (_kl_as_reward, {}, {"shaped rewards"}),
    "GAE beyond the end": (_gae_beyond_the_end, {}, {"advantages"}),
    "stale weights in the rollout": (stale_weights, {}, {"rollout log-probabilities"}),
    "minibatch rows mixed up": (_rows_mixed_up, {}, {"ratio"}),
    "a negative KL": (_negative_kl, {}, {"KL estimators"}),
    "a score read beside the answer": (_score_beside_the_answer, {}, {"scores"}),
    "a stop token that sampling does not know": (
        nothing,
        {"stop_ids": STOP_IDS[:1]},
        {"response mask"},
    ),
    "the policy clip on the wrong side": (_clip_on_the_wrong_side, {}, {"clips"}),
    "a policy clip that is too wide": (_clip_too_wide, {}, {"clips"}),
    "a value clip that is too wide": (_value_clip_too_wide, {}, {"clips"}),
    "no gradient through the ratio": (_no_gradient_through_the_ratio, {}, {"gradient"}),
    "returns of the next value": (_returns_of_the_next_value, {}, {"advantages"}),
    "returns of whitened advantages": (
        _returns_of_whitened_advantages,
        {"config": WHITENED},
        {"advantages"},
    ),
    "whitened without being asked": (_whitened_twice, {}, {"advantages"}),
    "discount and lambda changed": (_lambda_for_gamma, {}, {"advantages"}),
    "an SFT loss of the wrong sign": (_sft_loss_turned, {}, {"loss normalisation"}),
    "an entropy bonus of the wrong sign": (
        _entropy_turned,
        {"config": RICH},
        {"loss normalisation"},
    ),
    "a KL in the loss to the old policy": (_kl_to_the_old_policy, {"config": RICH}, {"clips"}),
    "a reference that is the policy": (_reference_is_the_policy, {}, {"log-probabilities"}),
    "a critic that is the reward model": (_critic_is_the_reward_model, {}, {"values"}),
    "a reference that follows": (nothing, {"between": _reference_follows}, {"frozen models"}),
    "moments lost between iterations": (nothing, {"between": _moments_lost}, {"optimizer"}),
    "moments lost between updates": (
        _moments_lost_between_updates,
        {},
        {"gradient", "optimizer"},
    ),
    "minibatches with replacement": (_with_replacement, {}, {"minibatches"}),
    "one order in all epochs": (_same_order_every_epoch, {"config": RICH}, {"minibatches"}),
    "a schedule counted in iterations": (nothing, {"total": 2}, {"optimizer"}),
    "a KL coefficient that adapts the wrong way": (
        _coefficient_adapts_the_wrong_way,
        {"config": ADAPTIVE},
        {"KL coefficient"},
    ),
    "samples that share random numbers": (
        _samples_share_noise,
        {"config": GROUPS},
        {"random streams"},
    ),
    "answers that share random numbers": (_rows_share_noise, {}, {"random streams"}),
    "tokens that share random numbers": (_tokens_share_noise, {}, {"random streams"}),
    "iterations that share a key": (nothing, {"same_key": True}, {"inputs"}),
    "half the noise": (_half_the_noise, {}, {"sampling"}),
    "answers of slots in another order": (
        _answers_in_another_order,
        {"rollout": SLOTS},
        {"rollout log-probabilities"},
    ),
    "weight decay of norms": (_decay_of_norms, {}, {"optimizer"}),
    "epsilon inside the root": (_eps_inside_the_root, {}, {"optimizer"}),
    "a gradient that is not clipped": (_no_clip_of_the_gradient, {}, {"gradient"}),
    "a KV cache one column early": (_cache_one_column_early, {}, {"rollout log-probabilities"}),
    "a penalty for the wrong answers": (
        _penalty_for_the_wrong_answers,
        {"config": GROUPS},
        {"scores"},
    ),
    "log-ratios that are not clamped": (
        _log_ratio_not_clipped,
        {"config": GROUPS},
        {"shaped rewards"},
    ),
    "a reward model that says the same of all": (nothing, {"score_scale": 0.0}, {"reward scale"}),
    "scores far beyond the clamp": (nothing, {"score_scale": 1000.0}, {"reward scale"}),
}
QUICK = {
    ("a policy clip that is too wide", "bfloat16"),
    ("a reference that is the policy", "float32"),
    ("a reference that shares the policy's memory", "float32"),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(n, dtype, marks=() if (n, dtype) in QUICK else pytest.mark.slow)
        for n in BUGS
        for dtype in ("float32", "bfloat16")
    ],
)
def test_a_planted_bug_is_named(name: str, dtype: str, monkeypatch: Patch) -> None:
    plant, illness, expected = BUGS[name]
    plant(monkeypatch)
    findings = examined(**{"config": PLAIN, **illness}, dtype=dtype)
    assert expected <= failed(findings), findings
    assert all(findings[check].advice for check in expected)


RECIPE = """
import dataclasses
from pathlib import Path

from rlhf.recipe_file import load_recipe

oracle, _ = load_recipe(Path({oracle!r}))
config = dataclasses.replace(oracle, output_dir=Path({out!r}))
"""


@pytest.mark.slow
def test_the_command_examines_a_recipe_and_its_exit_status_says_how_it_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.py"
    oracle = Path(__file__).parents[2] / "configs" / "oracle.py"
    recipe.write_text(RECIPE.format(oracle=str(oracle), out=str(tmp_path / "run")))
    assert main(["doctor", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("response mask", "padding", "frozen models"))
    assert not (tmp_path / "run" / "checkpoints").exists()  # nothing is kept
    assert main(["doctor", str(recipe), "--ppo.score-clip", "0.0001"]) == 1
    cells = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "reward scale fail" in cells and "raise ppo.score_clip" in cells


def test_a_recipe_of_a_reward_model_has_no_ppo_to_examine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text("from rlhf.recipe import RewardRecipe\nconfig = RewardRecipe(devices=8)\n")
    assert main(["doctor", str(recipe)]) == 1
    assert "has no PPO to check" in capsys.readouterr().err
