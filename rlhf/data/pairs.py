"""Judged pairs as columns: what filters decide by, without the texts.

A million pairs take 60 MB here and a few GB as Python objects, so files are read twice: once to fill these columns,
once more to write what the filters kept. Everything a filter decides follows from what a pair says, never from where
it stands: another order of lines keeps the same pairs.
"""

import array
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from glm_jax.tokenizers import load_tokenizer
from rlhf.data.records import Comparison, Preference, prompt_key

CountTokens = Callable[[str], int]


def length_in(tokenizer: Path | None) -> CountTokens:
    """What measures a text: the tokens of a model's directory, or characters."""
    if tokenizer is None:
        return len
    encode = load_tokenizer(tokenizer).encode
    return lambda text: len(encode(text))


@dataclasses.dataclass(frozen=True)
class PairTable:
    """One row a pair of responses of a comparison; arrays [P]. In a tie `chosen` is the one listed first."""

    comparison: np.ndarray  # int64, number of the comparison in the order of reading
    chosen_index: np.ndarray  # int16, which of its responses is preferred
    rejected_index: np.ndarray  # int16
    tie: np.ndarray  # bool
    prompt: np.ndarray  # uint64, digest of the prompt
    chosen: np.ndarray  # uint64, digest of prompt and response
    rejected: np.ndarray  # uint64
    chosen_length: np.ndarray  # int32, tokens (or characters) of the response
    rejected_length: np.ndarray  # int32
    annotator: np.ndarray  # int32, index into `annotators`
    task: np.ndarray  # int32, index into `tasks`
    weight: np.ndarray  # float64, as the data states it; NaN where it does not
    said: (
        np.ndarray
    )  # uint64, digest of all that the data says besides: labels, weight, order, strength
    annotators: tuple[str, ...]
    tasks: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompt)

    def take(self, rows: np.ndarray) -> "PairTable":
        """The rows of a mask or of indices."""
        columns = {
            name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        return dataclasses.replace(self, **columns)

    def low_high(self) -> tuple[np.ndarray, np.ndarray]:
        """The two responses, smaller digest first: the pair whoever won."""
        return np.minimum(self.chosen, self.rejected), np.maximum(self.chosen, self.rejected)

    def verdict(self) -> np.ndarray:
        """int64: 1 where the smaller digest of the two is preferred, -1 where the other is, 0 in a tie."""
        return np.where(self.tie, 0, np.where(self.chosen < self.rejected, 1, -1))

    def source(self) -> np.ndarray:
        """uint64, who judged and of which task: what tells rows about the same pair apart."""
        who, what = (
            np.array([digest(name) for name in names], np.uint64)
            for names in (self.annotators, self.tasks)
        )
        return _mixed(who[self.annotator] ^ _mixed(what[self.task]))

    def draw(self, seed: int) -> np.ndarray:
        """A uniform number in [0, 1) a row, float64, that depends on the pair and the seed alone."""
        bits = _mixed(self.chosen ^ _mixed(self.rejected + np.uint64(seed)))
        return (bits >> np.uint64(11)).astype(np.float64) / 2**53


def _mixed(bits: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014), on uint64."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def digest(*texts: str) -> int:
    """64 bits of the texts; among a million two different ones agree once in 40 million times."""
    joined = "\0".join(texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest())


class PairColumns:
    """Fills a PairTable, comparison by comparison."""

    _TYPES: ClassVar[dict[str, str]] = {
        **{"comparison": "q", "chosen_index": "h", "rejected_index": "h", "tie": "b"},
        **{"prompt": "Q", "chosen": "Q", "rejected": "Q"},
        **{"chosen_length": "i", "rejected_length": "i", "annotator": "i", "task": "i"},
        **{"weight": "d", "said": "Q"},
    }

    def __init__(self, count_tokens: CountTokens = len) -> None:
        self._count = count_tokens
        self._columns = {name: array.array(code) for name, code in self._TYPES.items()}
        self._annotators: dict[str, int] = {}
        self._tasks: dict[str, int] = {}
        self._read = 0

    def add(self, comparison: Comparison) -> int:
        """Append every pair of the comparison's responses; returns the digest of the prompt."""
        key = prompt_key(comparison.prompt)
        answers = [digest(key, response) for response in comparison.responses]
        lengths = [self._count(response) for response in comparison.responses]
        annotator = self._annotators.setdefault(comparison.annotator, len(self._annotators))
        task = self._tasks.setdefault(comparison.task, len(self._tasks))
        prompt = digest(key)
        weight = math.nan if comparison.weight is None else comparison.weight
        for i, j, tie in ordered_pairs(comparison):
            row = (
                *(self._read, i, j, tie, prompt, answers[i], answers[j], lengths[i], lengths[j]),
                *(annotator, task, weight, _besides(comparison, i, j)),
            )
            value: Any
            for column, value in zip(self._columns.values(), row, strict=True):
                column.append(value)
        self._read += 1
        return prompt

    def table(self) -> PairTable:
        """What was added so far."""
        columns = {
            name: np.frombuffer(column, dtype=column.typecode)
            if column
            else np.empty(0, column.typecode)
            for name, column in self._columns.items()
        }
        columns["tie"] = columns["tie"].astype(bool)
        return PairTable(**columns, annotators=tuple(self._annotators), tasks=tuple(self._tasks))


def _besides(comparison: Comparison, i: int, j: int) -> int:
    """Digest of what a pair says beside its texts and verdict; 0 where it says nothing."""
    labels = sorted((name, marks[i], marks[j]) for name, marks in comparison.labels.items())
    first = i < j if comparison.listed else None
    if not labels and (comparison.weight, comparison.strength, first) == (None, None, None):
        return 0
    return digest(repr((labels, comparison.weight, comparison.strength, first)))


def ordered_pairs(comparison: Comparison) -> Iterable[tuple[int, int, bool]]:
    """(preferred, other, whether they tie) of every two responses, in the order they are listed."""
    for i, j in itertools.combinations(range(len(comparison.responses)), 2):
        worse = comparison.ranks[i] > comparison.ranks[j]
        first, second = (j, i) if worse else (i, j)
        yield first, second, comparison.ranks[i] == comparison.ranks[j]


def preference_of(
    comparison: Comparison, chosen: int, rejected: int, weight: float, where: str = ""
) -> Preference:
    """One pair of a comparison, its texts as they are."""
    return Preference(
        comparison.prompt,
        comparison.responses[chosen],
        comparison.responses[rejected],
        weight,
        comparison.annotator,
        comparison.task,
        chosen_first=chosen < rejected if comparison.listed else None,
        labels={k: (marks[chosen], marks[rejected]) for k, marks in comparison.labels.items()},
        strength=comparison.strength,
        weight_stated=comparison.weight is not None,
        where=where,
    )


def as_comparison(pair: Preference) -> Comparison:
    """Return a pair as a comparison of two responses: the inverse of `preference_of`."""
    sides, ranks, labels = (pair.chosen, pair.rejected), (1, 2), pair.labels
    if pair.chosen_first is False:
        sides, ranks = sides[::-1], (2, 1)
        labels = {name: marks[::-1] for name, marks in labels.items()}
    return Comparison(
        pair.prompt,
        sides,
        ranks,
        labels,
        pair.annotator,
        pair.task,
        pair.weight if pair.weight_stated else None,
        pair.strength,
        pair.chosen_first is not None,
    )


def weights_of(prompt: np.ndarray) -> np.ndarray:
    """float64 [P]: 1 / (pairs of the same prompt), so that a ranking of K counts as one and not K (K - 1) / 2 times."""
    _, inverse, counts = np.unique(prompt, return_inverse=True, return_counts=True)
    return 1.0 / counts[inverse]


def grouped(*columns: np.ndarray) -> tuple[np.ndarray, int]:
    """The number of each row's group (rows equal in all columns), and how many groups there are."""
    stacked = np.stack(columns, axis=1)
    flat = np.ascontiguousarray(stacked).view([("", stacked.dtype)] * len(columns)).ravel()
    groups, inverse = np.unique(flat, return_inverse=True)
    return inverse, len(groups)
