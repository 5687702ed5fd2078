"""Distinct answers behind judged pairs, and the triples of them that judges ordered."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rlhf.card.intervals import Estimate, Sample, share

MAX_PATHS = (
    5_000_000  # two pairs that share an answer, looked at for a third; bounds memory and time
)


class Answers(NamedTuple):
    """A distinct answers; pairs name them by number."""

    score: Float[np.ndarray, " A"]
    tokens: Int[np.ndarray, " A"]
    prompt: Int[np.ndarray, " A"]
    dialogue: Int[np.ndarray, " A"]  # of the prompt
    chosen: Int[np.ndarray, " P"]
    rejected: Int[np.ndarray, " P"]


@dataclasses.dataclass(frozen=True)
class Triples:
    """Three answers to one prompt whose three pairs were all judged."""

    complete: int
    ordered: int  # of those: the judges contradict themselves in none
    alike: Estimate  # share of the ordered that the model orders entirely alike
    chance: float  # 1/6: orders of three
    prompts_left_out: int  # with so many judged pairs that their triples were not looked for


def distinct(
    score: Float[np.ndarray, "2 P"],
    tokens: Int[np.ndarray, "2 P"],
    prompt: Int[np.ndarray, " P"],
    dialogue: Int[np.ndarray, " P"],
    answer: Int[np.ndarray, "2 P"],
) -> Answers:
    """Answers of the pairs, chosen ones above rejected ones; an answer is known by its prompt and its number.

    Where one was scored twice and rounding made a difference, its lower score stands, whatever the order of rows.
    """
    flat_score, flat_tokens, flat_answer = score.ravel(), tokens.ravel(), answer.ravel()
    flat_prompt = np.tile(prompt, 2)
    order = np.lexsort((flat_tokens, flat_score, flat_answer, flat_prompt))
    keys = np.stack([flat_prompt, flat_answer])[:, order]
    new = np.append(True, np.any(np.diff(keys), axis=0))
    number = np.empty(len(order), np.int64)
    number[order] = np.cumsum(new) - 1
    first = order[new]
    chosen, rejected = np.split(number, 2)
    names = flat_prompt[first], np.tile(dialogue, 2)[first]
    return Answers(flat_score[first], flat_tokens[first], *names, chosen, rejected)


def triples(answers: Answers, seed: int) -> Triples:
    """How the judges, and the model with them, order three answers.

    Judgements of the same two answers count as one, by majority; without one, the judges order no triple of theirs.
    A scalar score is itself always transitive: the model can disagree, by equal scores too, but never go in a circle.
    Prompts are looked at from the fewest judged pairs up, as far as `MAX_PATHS` reaches.
    """
    low, high, vote = _judged(answers)
    low, high, vote, left_out = _within_reach(low, high, vote, answers.prompt)
    count = len(answers.score)
    followers = np.bincount(low, minlength=count)
    starts = np.cumsum(followers) - followers
    # every path u < v < w of two judged pairs; edges are sorted, hence those from v stand together
    paths = followers[high]
    uv = np.repeat(np.arange(len(low)), paths)
    within = np.arange(len(uv)) - np.repeat(np.cumsum(paths) - paths, paths)
    vw = starts[high[uv]] + within
    key, wanted = low * count + high, low[uv] * count + high[vw]
    uw = np.searchsorted(key, wanted)
    closed = key[np.minimum(uw, len(key) - 1)] == wanted if len(key) else np.zeros(0, bool)
    edges = np.stack([uv, vw, uw])[:, closed]
    judged = vote[edges]
    circular = (judged[0] == judged[1]) & (judged[2] == -judged[0])
    ordered = np.all(judged != 0, axis=0) & ~circular
    model = np.sign(answers.score[low[edges]] - answers.score[high[edges]])
    alike = np.all(model == judged, axis=0)[ordered]
    dialogue = answers.dialogue[low[edges[0]]][ordered]
    return Triples(
        complete=edges.shape[1],
        ordered=int(ordered.sum()),
        alike=share(alike.astype(np.float64), Sample(np.ones(len(alike)), dialogue), seed),
        chance=1 / 6,
        prompts_left_out=left_out,
    )


def _judged(answers: Answers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of answers low < high, sorted, and the majority: 1 prefers the low one, -1 the high one, 0 neither."""
    other = answers.chosen != answers.rejected
    chosen, rejected = answers.chosen[other], answers.rejected[other]
    low, high = np.minimum(chosen, rejected), np.maximum(chosen, rejected)
    count = len(answers.score)
    key, number = np.unique(low * count + high, return_inverse=True)
    votes = np.bincount(number, np.where(chosen == low, 1, -1), minlength=len(key))
    return key // count, key % count, np.sign(votes)


def _within_reach(
    low: np.ndarray, high: np.ndarray, vote: np.ndarray, prompt: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The judged pairs of the prompts whose paths are looked at, and how many prompts are not."""
    paths = np.bincount(low, minlength=len(prompt))[high]
    _, number = np.unique(prompt[low], return_inverse=True)
    work = np.bincount(number, paths)
    order = np.argsort(work, kind="stable")
    reached = np.zeros(len(work), bool)
    reached[order] = np.cumsum(work[order]) <= MAX_PATHS
    keep = reached[number]
    return low[keep], high[keep], vote[keep], int(np.sum(~reached))
