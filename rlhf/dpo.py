"""Direct preference optimisation on the policy's own answers, labelled by the reward model (arXiv 2404.00934)."""

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from glm_jax.batch import Pairs, Prompts, Sequences
from glm_jax.generate import Generation, SamplingConfig
from glm_jax.keeper import NOTHING_KEPT, Keeper
from glm_jax.likelihood import sequence_logprobs
from glm_jax.metrics import Shares
from glm_jax.model import CausalLM
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.sampler import Sampler
from glm_jax.scalar import ScalarModel, sequence_scores
from glm_jax.train import (
    Report,
    Update,
    init_state,
    language_loss,
    make_update,
    num_targets,
    num_tokens,
    train,
)
from rlhf.advantages import TIE
from rlhf.losses import dpo_loss, ipo_loss
from rlhf.reward import interleave
from rlhf.rollout import require_scores, with_stop
from sharding.errors import UserError
from sharding.layout import Layout
from sharding.processes import fetch
from sharding.ranges import AtLeast, NonNegative, Positive, check_ranges


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Settings of DPO; no number of it is in the paper."""

    prompts: Positive = 1024  # training prompts that answers are drawn for
    samples: int = 4  # answers a prompt, of which the best and the worst make a pair
    # answers cut off at max_new_tokens. keep: as any other; penalty: `truncation_penalty` off their score; reject: they
    # may be the rejected answer of a pair, never the preferred one; mask: neither. Not in the paper
    truncated: Literal["keep", "penalty", "reject", "mask"] = "reject"
    truncation_penalty: Annotated[float, AtLeast(0)] = 1.0
    steps: NonNegative = 200  # updates; 0: DPO is left out
    batch_size: Positive = 64  # pairs an update
    # dpo: as in the paper; ipo: a squared loss that draws the gap of log-ratios to 1 / (2 beta)
    loss: Literal["dpo", "ipo"] = "dpo"
    label_smoothing: float = 0.0  # chance that a label is wrong, for dpo; not in the paper
    beta: float = 0.1
    sft_batch_size: Positive = 64  # SFT sequences mixed into an update
    sft_weight: float = 0.05  # of the SFT loss mixed in (nats/token)
    sampling: SamplingConfig = SamplingConfig()
    optim: OptimConfig = OptimConfig(learning_rate=1e-6)

    def __post_init__(self) -> None:
        check_ranges(self, "dpo")
        if self.samples < 2:
            raise UserError(f"dpo.samples = {self.samples}: a pair needs 2 answers or more")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"dpo.label_smoothing = {self.label_smoothing} is out of range: a label that is wrong as often as "
                f"right says nothing, give 0 or more and less than 0.5"
            )
        if self.loss == "ipo" and self.label_smoothing:
            raise UserError("dpo.label_smoothing belongs to dpo.loss = dpo; set it to 0 for ipo")
        if not self.beta > 0.0:
            raise UserError(f"dpo.beta = {self.beta} is out of range: give a positive number")


class LabelledPairs(NamedTuple):
    """Pairs with the reference model's log-probability of each whole answer."""

    pairs: Pairs
    ref_logp: Any  # np.ndarray or jax.Array, float32 [B, 2], chosen and rejected


# what it consists of, without arrays
PAIRS = LabelledPairs(Pairs(Sequences(0, 0, 0), Sequences(0, 0, 0)), 0)


def answer_logprobs(model: CausalLM, sequences: Sequences, layout: Layout) -> Float[Array, " B"]:
    """log pi(y | x) in nats of whole answers."""
    logp = sequence_logprobs(model, sequences.ids, sequences.valid, layout)
    return jnp.sum(jnp.where(sequences.target, logp, 0.0), axis=1)


Batch = tuple[LabelledPairs, Sequences]
Counts = tuple[int, jax.Array]  # pairs, SFT target tokens


def counts(batch: Batch) -> Counts:
    """What the two losses of a batch are divided by."""
    labelled, sft_batch = batch
    return int(labelled.ref_logp.shape[0]), num_targets(sft_batch)


def pair_loss(
    model: CausalLM, batch: Batch, count: Counts, config: DPOConfig, layout: Layout
) -> tuple[jax.Array, Shares]:
    """L_DPO - beta_sft * mean log pi over SFT tokens (arXiv 2404.00934, section 3.2.3)."""
    labelled, sft_batch = batch
    logp = answer_logprobs(model, interleave(labelled.pairs), layout)
    logp = jnp.reshape(logp, (-1, 2), out_sharding=layout.spec("batch", None))
    if config.loss == "ipo":
        loss, metrics = ipo_loss(logp, labelled.ref_logp, config.beta, count[0])
    else:
        smoothing = config.label_smoothing
        loss, metrics = dpo_loss(logp, labelled.ref_logp, config.beta, count[0], smoothing)
    sft_loss, _ = language_loss(model, sft_batch, count[1], layout)
    return loss + config.sft_weight * sft_loss, {"dpo_loss": loss, "sft_loss": sft_loss, **metrics}


def dpo_update(
    config: DPOConfig, optimizer: optax.GradientTransformation, layout: Layout
) -> Update:
    """The update of `glm_jax.train.make_update` on labelled pairs and SFT sequences."""
    return make_update(partial(pair_loss, config=config, layout=layout), counts, optimizer, layout)


def candidates(
    scores: Float[np.ndarray, "P K"], ended: Bool[np.ndarray, "P K"], config: DPOConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the answers as preferred ones and as rejected ones; an answer that may not be one is -inf or inf there.

    `ended` is False where an answer was cut off: `config.truncated` says what becomes of it.
    """
    best, worst = scores.astype(np.float64), scores.astype(np.float64)
    if config.truncated == "penalty":
        best = worst = best - np.where(ended, 0.0, config.truncation_penalty)
    if config.truncated in ("reject", "mask"):
        best = np.where(ended, best, -np.inf)
    if config.truncated == "mask":
        worst = np.where(ended, worst, np.inf)
    return best, worst


def best_and_worst(
    answers: Sequences,
    scores: Float[np.ndarray, "P K"],
    ended: Bool[np.ndarray, "P K"],
    logp: Float[np.ndarray, "P K"],
    config: DPOConfig,
) -> LabelledPairs:
    """Pair the best of each prompt's K answers with the worst; host arrays.

    `answers` are [P K, T], those of the first prompt first; `logp` are the reference log-probabilities. A prompt
    without two candidates whose scores differ by more than rounding (`TIE`) says nothing and is dropped.
    """
    as_best, as_worst = candidates(scores, ended, config)
    highest, lowest = as_best.max(axis=1), as_worst.min(axis=1)
    size = np.maximum(1.0, np.abs(scores).max(axis=1, initial=0.0))
    rows = np.flatnonzero(highest > lowest + TIE * size)
    best, worst = as_best.argmax(axis=1)[rows], as_worst.argmin(axis=1)[rows]
    places = [rows * scores.shape[1] + k for k in (best, worst)]
    chosen, rejected = (Sequences(*(x[place] for x in answers)) for place in places)
    return LabelledPairs(
        Pairs(chosen, rejected), np.stack([logp.reshape(-1)[place] for place in places], axis=1)
    )


def sample_pairs(
    policy: CausalLM,
    reward: ScalarModel,
    config: DPOConfig,
    prompts: Iterable[Prompts],
    sample: Sampler,
    stop_id: int,
    key: jax.Array,
    layout: Layout,
    report: Report,
) -> LabelledPairs:
    """Draw `config.samples` answers to every prompt and pair the best with the worst; arrays on the host.

    `policy` is the model that DPO starts from, hence also its reference. Raises UserError if no pair is left, and where
    the reward model's score is not a number.
    """

    @jax.jit
    def label(
        policy: CausalLM, reward: ScalarModel, answers: Generation
    ) -> tuple[jax.Array, jax.Array]:
        sequences = answers.sequences
        score = sequence_scores(reward, with_stop(sequences, answers.ended, stop_id), layout)
        return score, answer_logprobs(policy, sequences, layout)

    collected: list[LabelledPairs] = []
    cut_off = total = 0
    for number, batch in enumerate(prompts):
        stream = jax.random.fold_in(key, number)
        drawn = sample(policy, layout.put(batch), stream, config.samples)
        labels = fetch((*label(policy, reward, drawn), drawn.ended))
        scores, logp, ended = (x.reshape(-1, config.samples) for x in labels)
        row = np.asarray(batch.row)
        real = row >= 0
        require_scores(scores[real], row[real], "the policy")
        # rows that fill the batch drop out: all their answers are alike
        scores, ended = np.where(real[:, None], scores, 0.0), ended | ~real[:, None]
        collected.append(best_and_worst(fetch(drawn.sequences), scores, ended, logp, config))
        cut_off, total = cut_off + int(np.sum(~ended[real])), total + ended[real].size
        spread = float(np.mean(np.ptp(scores[real], axis=1)))
        tokens = int(num_tokens(drawn.sequences))
        metrics = {"score": float(np.mean(scores[real])), "spread": spread}
        report(number + 1, {**metrics, "ended": float(np.mean(ended[real]))}, tokens)
    pairs: LabelledPairs = jax.tree.map(lambda *x: np.concatenate(x), *collected)
    if not len(pairs.ref_logp):
        raise UserError(
            f"dpo: no pair is left: no prompt has two answers that score differently, {cut_off} of {total} answers are "
            f"cut off (dpo.truncated = {config.truncated}): raise dpo.samples, temperature or max_new_tokens"
        )
    return pairs


def train_dpo(
    model: CausalLM,
    config: DPOConfig,
    pairs: Iterator[LabelledPairs],
    sft_batches: Iterator[Sequences],
    layout: Layout,
    report: Report,
    keeper: Keeper = NOTHING_KEPT,
) -> CausalLM:
    """A copy of `model` after `config.steps` updates. Raises UserError on a batch that does not divide."""
    layout.check_batch(config.batch_size, "dpo.batch_size")
    optimizer = make_optimizer(config.optim, config.steps)
    update = dpo_update(config, optimizer, layout)
    state = keeper.restore(partial(init_state, model, optimizer))
    batches = zip(pairs, sft_batches, strict=False)
    return train(state, update, batches, config.steps, layout, report, keeper).model
