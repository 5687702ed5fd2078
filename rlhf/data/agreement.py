"""How far annotators agree on which of two responses is better: Cohen's and Krippendorff's coefficients."""

import itertools
from typing import NamedTuple

import krippendorff
import numpy as np
from sklearn.metrics import cohen_kappa_score

from rlhf.data.pairs import PairTable, grouped


class Between(NamedTuple):
    """Two annotators on the pairs that both judged."""

    one: str
    other: str
    pairs: int
    same: float  # share of them on which they say the same
    kappa: float | None  # Cohen (1960); None where chance alone would agree entirely


class Agreement(NamedTuple):
    """All annotators together, and every two of them."""

    alpha: float | None  # Krippendorff (2011), nominal; None where no pair was judged twice
    judged_twice: int  # pairs of responses that two or more annotators judged
    between: list[Between]


def agreement(pairs: PairTable, most_annotators: int = 20) -> Agreement:
    """Agreement on pairs, ties being a verdict of their own.

    `between` has the `most_annotators` who judged most. An annotator who judged a pair twice counts once, with what
    stands last in the order of verdicts.
    """
    item, _ = grouped(*pairs.low_high())
    verdict = pairs.verdict() + 1
    rows = np.lexsort((verdict, pairs.annotator, item))
    item, verdict, who = item[rows], verdict[rows], pairs.annotator[rows]
    last = np.append((item[1:] != item[:-1]) | (who[1:] != who[:-1]), True)[: len(item)]
    item, verdict, who = item[last], verdict[last], who[last]
    counts = np.zeros((int(item.max(initial=-1)) + 1, 3), np.int64)
    np.add.at(counts, (item, verdict), 1)
    counts = counts[counts.sum(axis=1) > 1]
    between = []
    judged = np.bincount(who, minlength=len(pairs.annotators))
    busiest = np.sort(np.argsort(-judged, kind="stable")[:most_annotators])
    for a, b in itertools.combinations(busiest.tolist(), 2):
        both, in_a, in_b = np.intersect1d(item[who == a], item[who == b], return_indices=True)
        if len(both):
            said = verdict[who == a][in_a], verdict[who == b][in_b]
            between.append(_between(pairs.annotators[a], pairs.annotators[b], *said))
    return Agreement(_alpha(counts), len(counts), between)


def _alpha(counts: np.ndarray) -> float | None:
    if not len(counts) or (counts.sum(axis=0) > 0).sum() < 2:
        return None  # nothing to compare, or a single verdict that all gave: nothing to differ in
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


def _between(one: str, other: str, a: np.ndarray, b: np.ndarray) -> Between:
    uniform = len(np.unique(np.concatenate([a, b]))) < 2
    kappa = None if uniform else float(cohen_kappa_score(a, b))
    return Between(one, other, len(a), float(np.mean(a == b)), kappa)


def kappas(found: Agreement) -> dict[str, float]:
    """annotator -> mean kappa with the others, weighted by the pairs that both judged."""
    sums: dict[str, list[float]] = {}
    for pair in found.between:
        for name in (pair.one, pair.other):
            if pair.kappa is not None:
                total = sums.setdefault(name, [0.0, 0.0])
                total[0] += pair.kappa * pair.pairs
                total[1] += pair.pairs
    return {name: total / weight for name, (total, weight) in sums.items()}
