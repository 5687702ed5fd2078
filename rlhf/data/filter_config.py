"""What the filters of preference data are told; apart from them, because they are slow to import."""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

from sharding.errors import UserError
from sharding.ranges import NonNegative, Positive, check_ranges

# Lower edges of the buckets that lengths are balanced in, tokens; not in the paper. Narrow where most pairs are; d = 0
# says nothing of length.
EDGES = (1, 6, 12, 24, 48, 96, 192, 384)


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible API."""

    url: str  # up to and without /chat/completions
    model: str
    key: str = ""  # sent as a bearer token
    threads: Positive = 8  # requests at a time
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        check_ranges(self, "filters.endpoint")


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """Thresholds of the filters; none of their values is in the paper."""

    min_prompt_chars: NonNegative = 2  # of the last message, blanks at its ends aside
    min_intention: NonNegative = (
        0  # 2: drop ambiguous prompts, 1: only totally unclear ones; see Quality
    )
    min_semantics: NonNegative = (
        0  # 2: drop prompts whose meaning is guessed, 1: only incomprehensible ones
    )
    answerable: bool = False  # drop prompts that are beyond a model
    marks: Path | None = None  # file of a model's marks on those three axes; None: rules
    endpoint: Endpoint | None = None  # ask a model for them instead
    # a task keeps at most this many times the prompts of the median task; None: all
    intent_cap: float | None = None
    min_kappa: float | None = None  # drop annotators whose mean Cohen's kappa is below; None: none
    # several judgements of one pair become one by majority, or each counts for itself
    votes: Literal["majority", "each"] = "majority"
    cycles: Literal["drop", "keep"] = "drop"  # all preferences of a cycle, or none
    # balance lengths: in every bucket of the length difference, longer and shorter winners are as many and weigh alike
    balance: bool = True
    edges: tuple[int, ...] = EDGES  # lower edges of those buckets
    # pairs without a weight in the file: each counts for 1 / (pairs of its prompt), or for 1
    weigh: Literal["prompt", "pair"] = "prompt"
    seed: int = 0  # draws which pairs stay

    def __post_init__(self) -> None:
        check_ranges(self, "filters")

    def check(self) -> None:
        """Raise UserError on values that mean nothing."""
        if list(self.edges) != sorted(set(self.edges)) or (self.edges and self.edges[0] < 1):
            raise UserError(f"filters.edges = {self.edges}: give rising whole numbers from 1 on")
        if self.intent_cap is not None and self.intent_cap <= 0:
            raise UserError(f"filters.intent_cap = {self.intent_cap}: give a positive number")
        if self.marks is not None and self.endpoint is not None:
            raise UserError("filters.marks and filters.endpoint: give one of them")


class Debiasing(NamedTuple):
    """Settings that balance and weigh the pairs that a reward model trains on."""

    filters: FilterConfig
    tokenizer: (
        Path | None
    )  # directory of the tokenizer that lengths are measured in; None: the run's own
