"""A world whose true reward is a formula, so that what a reward model and a policy make of it can be measured.

A prompt names three words of its task; an answer is a line of words. The gold reward wants each of the three once and
nothing else. Annotators judge by the gold reward plus what is planted: a liking for length, a circular taste, noise.
"""

import math
import random
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Annotated

from rlhf.data.records import (
    Example,
    Preference,
    Prompt,
    Splits,
    dialogue_key,
    require_fraction,
    split_by_dialogue,
    uniform_hash,
    user_turn,
)
from sharding.errors import UserError
from sharding.ranges import AtLeast, check_ranges

WANTED = 3  # words that a prompt names
END = ";"  # of a prompt
TASKS = {  # every task has words of its own
    "birds": ("wren", "rook", "kite", "swan", "lark", "dove", "gull", "ibis"),
    "trees": ("oak", "elm", "fir", "ash", "yew", "fig", "plum", "teak"),
    "tools": ("saw", "file", "awl", "vice", "adze", "clamp", "level", "plane"),
    "stones": ("jade", "opal", "onyx", "flint", "slate", "chalk", "agate", "shale"),
}
FILLERS = ("and", "also", "then", "so", "well", "very", "here", "there")


@dataclass(frozen=True)
class OracleData:
    """How many prompts there are, how answers begin, and what is wrong with the annotators."""

    prompts: Annotated[int, AtLeast(2)] = 800  # of the 1,344 that there are
    answers: Annotated[int, AtLeast(2)] = 4  # written to a prompt, to imitate and to compare
    recall: float = 0.6  # chance that such an answer has a wanted word
    extra_words: float = 2.0  # words it has besides, on average
    length_bias: float = 0.0  # what annotators add to the gold reward for a word, whatever it is
    noise: float = 0.3  # standard deviation of what they add at random, anew in every comparison
    # what a circular taste adds to the answer whose length is one more than the other's, modulo 3: of answers of 3, 4
    # and 5 words each then beats the one before it, and the first beats the last
    cycle: float = 0.0
    heldout_fraction: float = 0.15  # of the prompts
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, "data")

    def paths(self) -> dict[str, Path]:
        """No files are read."""
        return {}

    def undebiased(self) -> "OracleData":
        """The same: nothing is balanced or weighed here."""
        return self

    def debiasing(self) -> None:
        """All pairs count the same, whatever their length."""

    def splits(self, tell: object = None) -> Splits:
        """All records, drawn by the seed. Raises UserError on fields out of range."""
        require_fraction(self.heldout_fraction)
        every = [
            f"{task}: {' '.join(words)}{END}"
            for task, names in TASKS.items()
            for words in permutations(names, WANTED)
        ]
        for name, fits in (
            ("prompts", 2 <= self.prompts <= len(every)),
            ("recall", 0.0 <= self.recall <= 1.0),
            ("extra_words", self.extra_words >= 0.0),
            ("noise", self.noise >= 0.0),
        ):
            if not fits:
                raise UserError(f"data: {name} = {getattr(self, name)} is out of range")
        every.sort(key=lambda text: uniform_hash(self.seed, "prompt", text))
        return _records(self, every[: self.prompts])


def gold_reward(text: str) -> float:
    """Of a prompt and its answer, one after the other, in [-2, 2]: 2 is best, 0 an empty answer.

    2/3 for each wanted word that is there, less 1/4 for every word that is not wanted or comes again; -2 at worst. A
    text that holds no prompt is worth -2.
    """
    prompt, end, answer = text.partition(END)
    wanted = set(prompt.split()[-WANTED:])
    words = answer.split()
    if not end:
        return -2.0
    found = wanted & set(words)
    return max(-2.0, 2.0 / WANTED * len(found) - 0.25 * (len(words) - len(found)))


def task_of(text: str) -> str:
    """The task that a prompt is of."""
    return text.partition(":")[0]


def written_answer(data: OracleData, prompt: str, rng: random.Random) -> str:
    """An answer as people of this world write it: some of the wanted words, and some that are not."""
    task, _, wanted = prompt.rstrip(END).partition(": ")
    words = [word for word in wanted.split() if rng.random() < data.recall]
    others = [word for word in TASKS[task] if word not in wanted.split()]
    extra = _poisson(data.extra_words, rng)
    words += [rng.choice((*FILLERS, *others)) for _ in range(extra)]
    rng.shuffle(words)
    return " ".join(words or [rng.choice(FILLERS)])


def prefers_first(
    data: OracleData, prompt: str, first: str, second: str, rng: random.Random
) -> bool:
    """Which of two answers an annotator prefers."""

    def liking(answer: str, other: str) -> float:
        length, others = len(answer.split()), len(other.split())
        circular = data.cycle if (length - others) % 3 == 1 else 0.0
        return gold_reward(prompt + answer) + data.length_bias * length + circular

    noise = rng.gauss(0.0, data.noise) if data.noise else 0.0
    return liking(first, second) - liking(second, first) + noise > 0


def _records(data: OracleData, texts: list[str]) -> Splits:
    examples, preferences, prompts = [], [], []
    heldout: dict[str, bool] = {}
    for text in texts:
        rng = random.Random(f"{data.seed} {text}")
        prompt = user_turn(text)
        heldout[dialogue_key(prompt)] = (
            uniform_hash(data.seed, "heldout", text) < data.heldout_fraction
        )
        prompts.append(Prompt(prompt))
        answers = [written_answer(data, text, rng) for _ in range(data.answers)]
        examples += [Example(prompt, answer) for answer in answers]
        for number, first in enumerate(answers):
            for second in answers[number + 1 :]:
                if first == second:
                    continue
                wins = prefers_first(data, text, first, second, rng)
                pair = (first, second) if wins else (second, first)
                preferences.append(Preference(prompt, *pair, task=task_of(text), chosen_first=wins))
    preferences.sort(key=lambda record: uniform_hash(data.seed, record.chosen, record.rejected))
    return Splits(
        sft=split_by_dialogue(examples, heldout),
        preferences=split_by_dialogue(preferences, heldout),
        prompts=split_by_dialogue(prompts, heldout),
    )


def _poisson(mean: float, rng: random.Random) -> int:
    """Knuth 1969, section 3.4.1: uniform numbers are multiplied until they fall below exp(-mean)."""
    count, product, floor = 0, rng.random(), math.exp(-mean)
    while product > floor:
        count += 1
        product *= rng.random()
    return count
