"""Which judged pairs a reward model learns from: the paper's filters (arXiv 2404.00934, section 3.1), in its order.

Prompts first (short, repeated, of poor quality, of an intent there is too much of), then judgements (repeated, by
annotators who agree with nobody, ties, cycles), then length. Where the paper names no number, little or nothing is
dropped by default.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from rlhf.data.agreement import agreement, kappas
from rlhf.data.balance import debiased
from rlhf.data.filter_config import FilterConfig
from rlhf.data.graph import in_cycles, votes
from rlhf.data.pairs import (
    CountTokens,
    PairColumns,
    PairTable,
    digest,
    grouped,
    preference_of,
)
from rlhf.data.quality import Quality, Scorer, by_rules, from_endpoint, from_file
from rlhf.data.reading import Found
from rlhf.data.records import (
    Comparison,
    Messages,
    Preference,
    same_prompt,
    uniform_hash,
)

BATCH = 512  # prompts that are scored at a time


class Step(NamedTuple):
    """What one filter did."""

    name: str
    pairs: int  # that came in
    dropped: int


class Survey(NamedTuple):
    """What the first reading finds: columns of all pairs, and of each distinct prompt what is wrong with it."""

    pairs: PairTable
    refused: dict[int, str]  # digest of a prompt -> the filter that drops it
    others: int = 0  # records that are no comparisons


class Selection(NamedTuple):
    """What is kept, and how it came about."""

    pairs: PairTable  # in the order of reading
    weight: np.ndarray  # float64 [P], what each counts for in the loss
    steps: list[Step]
    before_balance: PairTable


def survey(found: Iterable[Found], config: FilterConfig, count_tokens: CountTokens) -> Survey:
    """Read comparisons once. Records of another kind are counted and left out."""
    config.check()
    columns, scorer = PairColumns(count_tokens), _scorer(config)
    refused: dict[int, str] = {}
    others = 0
    spelt: dict[int, int] = {}  # digest of a prompt -> of its `same_prompt`
    waiting: list[tuple[int, Messages]] = []

    def mark() -> None:
        if scorer is not None and waiting:
            for (key, _), quality in zip(waiting, scorer([p for _, p in waiting]), strict=True):
                if reason := _poor(quality, config):
                    refused[key] = reason
        waiting.clear()

    for _, record in found:
        if not isinstance(record, Comparison):
            others += 1
            continue
        key = columns.add(record)
        if key in spelt:
            continue
        spelt[key] = digest(same_prompt(record.prompt))
        if len(str(record.prompt[-1]["content"]).strip()) < config.min_prompt_chars:
            refused[key] = "short prompt"
        else:
            waiting.append((key, record.prompt))
            if len(waiting) == BATCH:
                mark()
    mark()
    for key in _repeated(spelt):
        refused.setdefault(key, "repeated prompt")
    return Survey(columns.table(), refused, others)


def _repeated(spelt: dict[int, int]) -> list[int]:
    """Prompts that differ from another one in spelling only; of each lot, that with the smallest digest stays."""
    keys = np.fromiter(spelt, np.uint64, len(spelt))
    _, same = np.unique(np.fromiter(spelt.values(), np.uint64, len(spelt)), return_inverse=True)
    order = np.lexsort((keys, same))
    again = np.append(False, same[order][1:] == same[order][:-1])[: len(keys)]
    found: list[int] = keys[order[again]].tolist()
    return found


def _scorer(config: FilterConfig) -> Scorer | None:
    """What marks prompts; None where no mark would drop any."""
    if not (config.min_intention or config.min_semantics or config.answerable):
        return None
    if config.endpoint is not None:
        return from_endpoint(config.endpoint)
    return from_file(config.marks) if config.marks else by_rules


def _poor(quality: Quality, config: FilterConfig) -> str | None:
    if quality.intention < config.min_intention:
        return "unclear intention"
    if quality.semantics < config.min_semantics:
        return "unclear semantics"
    return "not answerable" if config.answerable and not quality.answerable else None


def select(surveyed: Survey, config: FilterConfig) -> Selection:
    """Apply every filter; the same pairs are kept in whatever order the lines stand."""
    steps: list[Step] = []
    pairs = surveyed.pairs

    def keep(name: str, mask: np.ndarray) -> None:
        nonlocal pairs
        steps.append(Step(name, len(pairs), int((~mask).sum())))
        pairs = pairs.take(mask)

    for reason in (
        "short prompt",
        "repeated prompt",
        "unclear intention",
        "unclear semantics",
        "not answerable",
    ):
        bad = [key for key, why in surveyed.refused.items() if why == reason]
        keep(reason, ~np.isin(pairs.prompt, np.array(bad, np.uint64)))
    keep("intent above its cap", _within_cap(pairs, config))
    keep("duplicate judgement", _first_of_equals(pairs))
    keep("annotator disagrees", _trusted(pairs, config.min_kappa))
    if config.votes == "majority":
        stands, drawn = votes(pairs)
        keep("tie or drawn vote", ~drawn)
        keep("outvoted or said by several", stands[~drawn])
    else:
        keep("tie", ~pairs.tie)
    if config.cycles == "drop":
        keep("cycle", ~in_cycles(pairs))
    before = pairs
    stays, weight = debiased(pairs, config)
    if config.balance:
        keep("length balance", stays)
    return Selection(pairs, weight, steps, before)


def _within_cap(pairs: PairTable, config: FilterConfig) -> np.ndarray:
    """Pairs of prompts that stay when no task has more than `intent_cap` times the median task's prompts."""
    keep = np.ones(len(pairs), bool)
    if config.intent_cap is None or not len(pairs):
        return keep
    _, first = np.unique(pairs.prompt, return_index=True)
    task = pairs.task[first]
    counts = np.bincount(task, minlength=len(pairs.tasks))
    most = max(1, int(config.intent_cap * float(np.median(counts[counts > 0]))))
    for code in np.flatnonzero(counts > most):
        prompts = pairs.prompt[first[task == code]]
        draws = [uniform_hash(config.seed, "intent", str(key)) for key in prompts.tolist()]
        dropped = prompts[np.argsort(draws)[most:]]
        keep &= ~np.isin(pairs.prompt, dropped)
    return keep


def _first_of_equals(pairs: PairTable) -> np.ndarray:
    """One row of those in which the same annotator says the same of the same two responses.

    What else they say (labels, a weight) decides which: it must not be the first to stand in the file.
    """
    verdict = pairs.verdict().astype(np.uint64)
    group, _ = grouped(*pairs.low_high(), pairs.source(), verdict)
    order = np.lexsort((pairs.said, group))
    keep = np.zeros(len(pairs), bool)
    keep[order[np.unique(group[order], return_index=True)[1]]] = True
    return keep


def _trusted(pairs: PairTable, least: float | None) -> np.ndarray:
    """Rows of annotators who agree with the others at least so much; those who share no pair with anyone stay."""
    if least is None:
        return np.ones(len(pairs), bool)
    names = len(pairs.annotators)
    found = kappas(agreement(pairs, most_annotators=names))
    trusted = [found.get(name, least) >= least for name in pairs.annotators]
    return np.array(trusted, bool)[pairs.annotator]


def kept(found: Iterable[Found], selection: Selection) -> Iterator[tuple[Comparison, Preference]]:
    """The second reading: every kept pair with its weight, and the comparison that it is from."""
    pairs = selection.pairs
    columns: tuple[Any, ...] = (
        pairs.comparison,
        pairs.chosen_index,
        pairs.rejected_index,
        selection.weight,
    )
    rows: Iterator[tuple[Any, Any, Any, Any]] = zip(
        *(column.tolist() for column in columns), strict=True
    )
    row = next(rows, None)
    comparisons = ((where, record) for where, record in found if isinstance(record, Comparison))
    for number, (where, comparison) in enumerate(comparisons):
        while row is not None and row[0] == number:
            yield comparison, preference_of(comparison, *row[1:4], where)
            row = next(rows, None)
        if row is None:
            return
