"""What contradicts itself: ties, and cycles of preferences (arXiv 2404.00934, section 3.1.2 drops both)."""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rlhf.data.pairs import PairTable, grouped


def votes(pairs: PairTable) -> tuple[np.ndarray, np.ndarray]:
    """Rows that stand for a pair once its annotators have voted, and rows of a drawn vote (bool [P] each).

    Of all rows about the same two responses one of the majority's stays; where as many say the one as the other (a
    vote for a tie is half of each), none does. Not in the paper.
    """
    low, high = pairs.low_high()
    group, count = grouped(low, high)
    side = pairs.verdict()
    balance = np.bincount(group, weights=side, minlength=count)
    agrees = (side != 0) & (side == np.sign(balance)[group])
    # any would do, for all say the same; it must not be the first to stand in the file
    order = np.lexsort((pairs.said, pairs.source(), group))
    order = order[agrees[order]]
    _, first = np.unique(group[order], return_index=True)
    stands = np.zeros(len(pairs), bool)
    stands[order[first]] = True
    return stands, (balance == 0)[group]


def in_cycles(pairs: PairTable) -> np.ndarray:
    """bool [P]: preferences that lie on a cycle of their prompt's comparison graph, however long.

    An edge lies on a cycle if and only if its two ends are in one strongly connected component (Tarjan 1972). Responses
    are nodes; as their digests hold the prompt, the graphs of all prompts are one graph without edges between them.
    """
    nodes, ends = np.unique(np.concatenate([pairs.chosen, pairs.rejected]), return_inverse=True)
    winner, loser = np.split(ends, 2)
    edges = ~pairs.tie
    ones = np.ones(int(edges.sum()), np.int8)
    graph = coo_array((ones, (winner[edges], loser[edges])), shape=(len(nodes), len(nodes)))
    _, component = connected_components(graph.tocsr(), directed=True, connection="strong")
    return edges & (component[winner] == component[loser])
