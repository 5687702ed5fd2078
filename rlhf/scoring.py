"""A reward model on judged pairs: what its report card is made of."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from glm_jax.scalar import ScalarModel
from rlhf.card.card import Scored
from rlhf.data.pair_rows import TokenPair
from rlhf.data.records import Preference, dialogue_key, prompt_key
from rlhf.reward import Heldout


def scored(
    model: ScalarModel,
    heldout: Heldout,
    records: Sequence[Preference],
    pairs: Sequence[TokenPair],
) -> Scored:
    """The model's scores of `pairs` of `records`, which `heldout` holds in their order."""
    return scored_pairs(*heldout.scores(model), records, pairs)


def scored_pairs(
    chosen: Float[np.ndarray, " P"],
    rejected: Float[np.ndarray, " P"],
    records: Sequence[Preference],
    pairs: Sequence[TokenPair],
) -> Scored:
    """Scores of both sides of `pairs`, with what `records` say of them."""
    judged = [records[pair.record] for pair in pairs]
    prompts, dialogues = _Numbers(), _Numbers()
    answers = _Numbers()
    rows = []
    for record in judged:
        key = prompt_key(record.prompt)
        both = answers[key, record.chosen], answers[key, record.rejected]
        rows.append((prompts[key], dialogues[dialogue_key(record.prompt)], *both))
    numbers = np.array(rows, np.int64).reshape(-1, 4)
    return Scored(
        chosen=chosen,
        rejected=rejected,
        chosen_tokens=np.array([len(pair.chosen) - pair.start for pair in pairs]),
        rejected_tokens=np.array([len(pair.rejected) - pair.start for pair in pairs]),
        prompt=numbers[:, 0],
        dialogue=numbers[:, 1],
        chosen_answer=numbers[:, 2],
        rejected_answer=numbers[:, 3],
        weight=np.array([record.weight for record in judged], np.float64),
        chosen_first=np.array([bool(record.chosen_first) for record in judged], bool),
        order_known=np.array([record.chosen_first is not None for record in judged], bool),
        task=[record.task for record in judged],
        annotator=[record.annotator for record in judged],
    )


class _Numbers(dict[Any, int]):
    """Numbers its keys from 0, in the order in which they are first asked for."""

    def __missing__(self, key: Any) -> int:
        self[key] = len(self)
        return self[key]
