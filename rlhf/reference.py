"""What the SFT model makes of the prompts before training: y_ref of the baseline, and which prompts teach anything."""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from glm_jax.batch import Prompts
from glm_jax.model import CausalLM
from glm_jax.sampler import Sampler
from glm_jax.scalar import ScalarModel
from glm_jax.train import Report, num_tokens
from rlhf.ppo import PPOConfig, score_answers
from rlhf.rollout import require_scores
from sharding.errors import UserError
from sharding.layout import Layout
from sharding.processes import fetch


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """Which prompts PPO trains on: those whose answers' scores differ (arXiv 2404.00934, section 3.2.1)."""

    samples: int = (
        0  # answers of the SFT model to every prompt; 0: every prompt stays. Not in the paper
    )
    min_variance: float = 0.01  # of their scores, below which a prompt is dropped; not in the paper

    def __post_init__(self) -> None:
        if self.samples == 1 or self.samples < 0:
            raise UserError(
                f"selection.samples = {self.samples} has no variance: give 2 or more, or 0 to keep every prompt"
            )


class References(NamedTuple):
    """Answers of the SFT model to every prompt, drawn before training; y_ref is the first."""

    answers: list[list[int]]  # the token ids of y_ref, by prompt index
    scores: np.ndarray  # float32 [prompts, samples]

    @property
    def baseline(self) -> np.ndarray:
        """r(x, y_ref), float32 [prompts]."""
        return self.scores[:, 0]

    def selected(self, config: SelectionConfig) -> np.ndarray:
        """Indices of the prompts to train on. Raises UserError where none is left."""
        if not config.samples:
            return np.arange(len(self.scores))
        variance = np.var(self.scores.astype(np.float64), axis=1, ddof=1)
        kept = np.flatnonzero(variance >= config.min_variance)
        if not len(kept):
            raise UserError(
                f"selection.min_variance = {config.min_variance:g} drops every prompt: the scores of "
                f"{config.samples} answers vary by {np.max(variance):.2g} at most; lower it"
            )
        return kept


def draw_references(
    reward: ScalarModel,
    sft_model: CausalLM,
    sample: Sampler,
    prompts: Iterable[Prompts],
    num_prompts: int,
    samples: int,
    config: PPOConfig,
    stop_id: int,
    key: jax.Array,
    layout: Layout,
    report: Report,
) -> References:
    """`samples` answers to each of `num_prompts` prompts and their scores.

    Drawn exactly as rollouts are (the paper leaves greedy or sampled open), so that the first iteration's reward has
    mean 0. Raises UserError where the reward model's score is not a number.
    """
    score = jax.jit(partial(score_answers, config=config, stop_id=stop_id, layout=layout))
    scores = np.full((num_prompts, samples), np.nan, np.float32)
    texts: list[list[int]] = [[] for _ in range(num_prompts)]
    for number, batch in enumerate(prompts):
        stream = jax.random.fold_in(key, number)
        answers = sample(sft_model, layout.put(batch), stream, samples)
        row = np.asarray(batch.row)
        real = row >= 0
        found = fetch(score(reward, answers)).reshape(-1, samples)[real]
        require_scores(found, row[real], "the SFT model")
        scores[row[real]] = found
        ids, _, target = (x[::samples] for x in fetch(answers.sequences))
        for place in np.flatnonzero(real):
            texts[row[place]] = ids[place][target[place]].tolist()
        tokens = int(num_tokens(answers.sequences))
        report(number + 1, {"score": float(np.nanmean(scores))}, tokens)
    return References(texts, scores)
