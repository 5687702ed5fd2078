"""Files -> records: read, filtered and split by prompt."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rlhf.data.filter_config import FilterConfig
from rlhf.data.filters import Survey, kept, select, survey
from rlhf.data.forms.form import Record
from rlhf.data.mistakes import Mistake, OnMistake, Tally
from rlhf.data.pairs import length_in
from rlhf.data.reading import Found, read_records
from rlhf.data.records import (
    Comparison,
    Example,
    Messages,
    Preference,
    Prompt,
    Split,
    Splits,
    require_fraction,
    same_prompt,
    uniform_hash,
)

Paths = Path | tuple[Path, ...]
Tell = Callable[[str], Any]
Kind = TypeVar("Kind", bound=Record)


def silent(line: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class FilesData:
    """A user's own data: JSON files or JSON lines, gzipped or not, in our form (docs/data.md) or a public one's."""

    sft: Paths = ()  # conversations to imitate
    preferences: Paths = ()  # comparisons of two or more answers
    prompts: Paths = ()  # prompts to answer; none: those of the other files
    heldout_fraction: float = 0.1  # share of the distinct prompts held out, in all tables alike
    seed: int = 0  # draws which
    form: str | None = None  # what the files look like; None: told from their fields
    tokenizer: Path | None = (
        None  # directory whose tokens lengths are balanced in; None: characters
    )
    filters: FilterConfig = FilterConfig()  # of comparisons; lengths are balanced in training only
    mistakes: OnMistake = OnMistake()

    def paths(self) -> dict[str, Path]:
        """The files to read, by "field number"."""
        tokenizer = sorted(self.tokenizer.iterdir()) if self.tokenizer else []
        fields = {
            "sft": _listed(self.sft),
            "preferences": _listed(self.preferences),
            "prompts": _listed(self.prompts),
            "tokenizer": tuple(path for path in tokenizer if path.is_file()),
            "marks": _listed(self.filters.marks or ()),
        }
        return {
            f"{name} {i}": path for name, paths in fields.items() for i, path in enumerate(paths)
        }

    def splits(self, tell: Tell = silent) -> Splits:
        """All records, in the order of the files; raises UserError naming the file and the line.

        `tell` receives a line for whatever is skipped or filtered out.
        """
        require_fraction(self.heldout_fraction)
        examples = [record for _, record in self._records(self.sft, Example, tell)]
        preferences = self._preferences(tell)
        asked = [record.prompt for _, record in self._records(self.prompts, Prompt, tell)]
        if not _listed(self.prompts):
            asked = [record.prompt for table in (examples, *preferences) for record in table]
        distinct = {same_prompt(prompt): prompt for prompt in reversed(asked)}
        return Splits(
            sft=self._split(examples),
            preferences=preferences,
            prompts=self._split([Prompt(prompt) for prompt in reversed(distinct.values())]),
        )

    def heldout(self, prompt: Messages) -> bool:
        """The side of a prompt; prompts that differ in case, width and blanks only are on one side."""
        return uniform_hash(self.seed, same_prompt(prompt)) < self.heldout_fraction

    def _split(self, records: Sequence[Example] | Sequence[Prompt]) -> Split:
        sides: tuple[list[Record], list[Record]] = ([], [])
        for record in records:
            sides[self.heldout(record.prompt)].append(record)
        return Split(*sides)

    def _records(self, paths: Paths, kind: type[Kind], tell: Tell) -> Iterator[tuple[str, Kind]]:
        """The records of a table's files, all of one kind."""
        first: list[str] = []
        tally = Tally(self.mistakes, lambda skipped: first.append(skipped["where"]))
        for where, record in read_records(_listed(paths), tally, self.form):
            if isinstance(record, kind):
                yield where, record
            else:
                message = f"{_NAMES[type(record)]} where {_NAMES[kind]} is expected"
                tally.meet(Mistake("malformed", message), where)
        for line in tally.lines():
            tell(f"{line}{f', the first at {first[0]}' if first else ''}")

    def _preferences(self, tell: Tell) -> Split:
        """Pairs of either side, filtered."""
        records = self._records(self.preferences, Comparison, tell)
        found = [Found(where, record) for where, record in records]
        surveyed = survey(found, self.filters, length_in(self.tokenizer))
        held = np.array([self.heldout(record.prompt) for _, record in found], bool)
        held = held[surveyed.pairs.comparison]
        sides: list[list[Preference]] = []
        for side in (False, True):
            config = replace(self.filters, balance=self.filters.balance and not side)
            selection = select(Survey(surveyed.pairs.take(held == side), surveyed.refused), config)
            dropped = [f"{s.dropped:,} {s.name}" for s in selection.steps if s.dropped]
            if dropped:
                count = f"{len(selection.pairs):,} of {int((held == side).sum()):,}"
                name = ("training", "held-out")[side]
                tell(f"{count} {name} pairs kept; dropped {', '.join(dropped)}")
            sides.append([pair for _, pair in kept(found, selection)])
        return Split(*sides)


_NAMES = {Example: "a conversation", Comparison: "a comparison", Prompt: "a prompt"}


def _listed(paths: Paths) -> tuple[Path, ...]:
    return (paths,) if isinstance(paths, Path) else tuple(paths)
