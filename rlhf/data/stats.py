"""What a file of comparisons or conversations holds, in the terms of the paper's table 2."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from rlhf.data.agreement import Agreement, agreement
from rlhf.data.balance import Bucket, buckets
from rlhf.data.filter_config import EDGES
from rlhf.data.pairs import CountTokens, PairColumns, digest
from rlhf.data.reading import Found
from rlhf.data.records import Comparison, Example, Messages, prompt_key

# arXiv 2404.00934, table 2: what ChatGLM-RLHF was trained on; lengths in tokens
PAPER = {
    "comparisons": 221_866,
    "turns": 2.4,
    "history": 314.1,
    "prompt": 104.1,
    "response": 267.7,
}


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts of a file; means are over dialogues (a prompt with its responses), of responses over responses."""

    comparisons: int  # pairs of responses, ties included
    rankings: int  # judgements: two or more responses ranked by one annotator
    examples: int  # conversations to imitate
    prompts: int  # distinct ones
    turns: float  # questions of the user, the last one included
    history: float  # length of all that precedes the last message
    prompt: float  # length of the last message
    response: float  # length of a response
    responses_per_ranking: dict[int, int]
    ties: int  # pairs
    tasks: dict[str, int]  # comparisons of each
    annotators: dict[str, int]
    length_buckets: list[Bucket]
    agreement: Agreement
    unit: str  # of lengths: tokens or characters

    def as_json(self) -> dict[str, Any]:
        """Plain values, the paper's row beside them."""
        plain = dataclasses.asdict(self)
        plain["length_buckets"] = [bucket.as_json() for bucket in self.length_buckets]
        found = self.agreement
        plain["agreement"] = {**found._asdict(), "between": [b._asdict() for b in found.between]}
        return {**plain, "paper": PAPER}


class _Dialogues:
    """Means over distinct prompts, and over the responses to them."""

    def __init__(self, count: CountTokens) -> None:
        self._count = count
        self.seen: set[int] = set()
        self._answers: set[int] = set()
        self.sums = Counter[str]()

    def add(self, prompt: Messages, responses: Iterable[str]) -> None:
        """A dialogue; one that came before adds the responses that are new."""
        text = prompt_key(prompt)
        key = digest(text)
        if key not in self.seen:
            self.seen.add(key)
            lengths = [self._count(str(message["content"])) for message in prompt]
            self.sums["turns"] += sum(message["role"] == "user" for message in prompt)
            self.sums["history"] += sum(lengths[:-1])
            self.sums["prompt"] += lengths[-1]
        for response in responses:
            answer = digest(text, response)
            if answer not in self._answers:
                self._answers.add(answer)
                self.sums["response"] += self._count(response)

    def mean(self, name: str) -> float:
        """The mean of a length; 0 of nothing."""
        number = len(self._answers if name == "response" else self.seen)
        return self.sums[name] / number if number else 0.0


def statistics(
    found: Iterable[Found],
    count_tokens: CountTokens,
    unit: str,
    edges: tuple[int, ...] = EDGES,
) -> Stats:
    """Read records once and count."""
    count_tokens = lru_cache(256)(
        count_tokens
    )  # both count a comparison's responses, one after the other
    dialogues, columns = _Dialogues(count_tokens), PairColumns(count_tokens)
    sizes: Counter[int] = Counter()
    examples = 0
    for _, record in found:
        if isinstance(record, Comparison):
            columns.add(record)
            sizes[len(record.responses)] += 1
            dialogues.add(record.prompt, record.responses)
        elif isinstance(record, Example):
            examples += 1
            dialogues.add(record.prompt, [record.response])
        else:
            dialogues.add(record.prompt, [])
    pairs = columns.table()
    return Stats(
        comparisons=len(pairs),
        rankings=sizes.total(),
        examples=examples,
        prompts=len(dialogues.seen),
        **{name: dialogues.mean(name) for name in ("turns", "history", "prompt", "response")},
        responses_per_ranking=dict(sorted(sizes.items())),
        ties=int(pairs.tie.sum()),
        tasks=_named(pairs.tasks, pairs.task.tolist()),
        annotators=_named(pairs.annotators, pairs.annotator.tolist()),
        length_buckets=buckets(pairs, edges),
        agreement=agreement(pairs),
        unit=unit,
    )


def _named(names: tuple[str, ...], codes: list[int]) -> dict[str, int]:
    return {names[code]: count for code, count in Counter(codes).most_common() if names[code]}
