"""A reward model on judged pairs: what its report card is made of."""

from collections.abc import Sequence

import numpy as np

from glm_jax.scalar import ScalarModel
from rlhf.card.card import Scored
from rlhf.data.pair_rows import TokenPair
from rlhf.data.records import Preference, prompt_key
from rlhf.reward import Heldout


def scored(
    model: ScalarModel,
    heldout: Heldout,
    records: Sequence[Preference],
    pairs: Sequence[TokenPair],
) -> Scored:
    """The model's scores of `pairs` of `records`, which `heldout` holds in their order."""
    chosen, rejected = heldout.scores(model)
    judged = [records[pair.record] for pair in pairs]
    prompts: dict[str, int] = {}
    answers: dict[tuple[str, str], int] = {}
    prompt, both = [], []
    for record in judged:
        key = prompt_key(record.prompt)
        prompt.append(prompts.setdefault(key, len(prompts)))
        both.append(
            [
                answers.setdefault((key, text), len(answers))
                for text in (record.chosen, record.rejected)
            ]
        )
    numbers = np.array(both, np.int64).reshape(-1, 2)
    return Scored(
        chosen=chosen,
        rejected=rejected,
        chosen_tokens=np.array([len(pair.chosen) - pair.start for pair in pairs]),
        rejected_tokens=np.array([len(pair.rejected) - pair.start for pair in pairs]),
        prompt=np.array(prompt),
        chosen_answer=numbers[:, 0],
        rejected_answer=numbers[:, 1],
        chosen_first=np.array([record.chosen_first for record in judged], bool),
        task=[record.task for record in judged],
        annotator=[record.annotator for record in judged],
    )
