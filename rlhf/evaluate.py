"""Measures of a policy on held-out data: likelihood, answers, and an outside judge."""

import dataclasses
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.batch import Prompts, Sequences
from glm_jax.likelihood import sequence_logprobs
from glm_jax.model import CausalLM
from glm_jax.sampler import Sampler
from glm_jax.tokenizers import Tokenizer
from rlhf.data.oracle.oracle import gold_reward
from sharding.errors import UserError
from sharding.layout import Layout
from sharding.processes import fetch
from sharding.ranges import NonNegative, Positive, check_ranges

Judge = Callable[[str], float]  # text of prompt and answer -> a number, more is better


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """How the policies are compared at the end."""

    num_prompts: Positive = 256  # held-out prompts
    batch_size: Positive = 64
    num_samples: NonNegative = 3  # answers shown side by side
    # snownlp: the sentiment classifier of that package; oracle: the gold reward of `OracleData`
    judge: Literal["snownlp", "oracle"] = "snownlp"
    rollouts: bool = False  # judge the answers of every PPO iteration too: `judged` of its metrics
    tie_margin: float = 0.1  # judgements of two answers closer than this are a tie

    def __post_init__(self) -> None:
        check_ranges(self, "evaluate")


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers of one policy to the same prompts in the same order."""

    texts: list[str]
    lengths: list[int]  # tokens, stop token included
    judged: list[float]  # of prompt and answer together

    @property
    def summary(self) -> dict[str, float]:
        """Mean length, mean judgement and distinct-2."""
        return {
            "length": float(np.mean(self.lengths)),
            "judged": float(np.mean(self.judged)),
            "distinct_2": distinct_n(self.texts, 2),
        }


def require_judge(name: Literal["snownlp", "oracle"]) -> None:
    """Raise UserError where the judge's package is missing; loads nothing."""
    if name == "snownlp" and importlib.util.find_spec("snownlp") is None:
        raise UserError(
            f"evaluate.judge = {name} needs the snownlp package: pip install 'glm-jax[demo]'"
        )


def load_judge(name: Literal["snownlp", "oracle"]) -> Judge:
    """SnowNLP's Bayes classifier of Chinese sentiment, in [0, 1], or the oracle's gold reward, in [-2, 2].

    Raises UserError where the package is missing.
    """
    require_judge(name)
    if name == "oracle":
        return gold_reward
    from snownlp import sentiment

    # a text of stop words only leaves it nothing to judge
    return lambda text: float(sentiment.classify(text)) if text.strip() else 0.5


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Different character n-grams / all character n-grams of the texts (Li et al. 2016); 0 if there are none."""
    grams = Counter(text[i : i + n] for text in texts for i in range(len(text) - n + 1))
    return len(grams) / max(1, grams.total())


def win_tie_lose(ours: Sequence[float], theirs: Sequence[float], margin: float) -> dict[str, float]:
    """Shares of prompts on which our answer is judged better, alike (within `margin`) and worse."""
    gaps = np.asarray(ours) - np.asarray(theirs)
    return {
        "win_rate": float(np.mean(gaps > margin)),
        "tie_rate": float(np.mean(np.abs(gaps) <= margin)),
        "lose_rate": float(np.mean(gaps < -margin)),
    }


def heldout_nll(model: CausalLM, batches: Iterable[Sequences], layout: Layout) -> float:
    """Mean negative log-likelihood over all target tokens of `batches`, nats/token."""

    @jax.jit
    def sums(model: CausalLM, batch: Sequences) -> tuple[jax.Array, jax.Array]:
        logp = sequence_logprobs(model, batch.ids, batch.valid, layout)
        return jnp.sum(jnp.where(batch.target, logp, 0.0)), jnp.sum(batch.target)

    totals = [jax.device_get(sums(model, layout.put(batch))) for batch in batches]
    logp, count = np.sum(np.asarray(totals, np.float64), axis=0)
    return float(-logp / count)


def answer(
    model: CausalLM,
    batches: Iterable[Prompts],
    prompt_texts: Sequence[str],
    sample: Sampler,
    judge: Judge,
    tokenizer: Tokenizer,
    key: jax.Array,
    layout: Layout,
) -> Answers:
    """One judged answer to every prompt; the judge reads prompt and answer as one text."""
    texts: list[str] = []
    lengths: list[int] = []
    for number, batch in enumerate(batches):
        drawn = sample(model, layout.put(batch), jax.random.fold_in(key, number))
        sequences = fetch(drawn.sequences)
        for row in np.flatnonzero(np.asarray(batch.row) >= 0):
            ids = sequences.ids[row][sequences.target[row]]
            texts.append(tokenizer.decode_answer(ids.tolist()))
            lengths.append(len(ids))
    judged = [judge(prompt + text) for prompt, text in zip(prompt_texts, texts, strict=True)]
    return Answers(texts, lengths, judged)
