"""Files -> records: read, filtered and split by dialogue."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rlhf.data.accounts import Accounts, Kept
from rlhf.data.filter_config import Debiasing, FilterConfig
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
    dialogue_key,
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
    heldout_fraction: float = 0.1  # share of the distinct dialogues held out, in all tables alike
    seed: int = 0  # draws which
    form: str | None = None  # what the files look like; None: told from their fields
    # directory of the tokenizer that lengths are balanced in; None: a run's own, or characters outside a run
    tokenizer: Path | None = None
    filters: FilterConfig = FilterConfig()  # of comparisons; lengths are balanced in training only
    mistakes: OnMistake = OnMistake()

    def paths(self) -> dict[str, Path]:
        """The files to read, by "field number"."""
        folder = self.tokenizer
        tokenizer = sorted(folder.iterdir()) if folder and folder.is_dir() else []
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
        splits, accounts = self.accounted(tell)
        for line in accounts.lines():
            tell(line)
        return splits

    def accounted(self, tell: Tell = silent) -> tuple[Splits, Accounts]:
        """`splits`, with the accounts of what was filtered out; `tell` receives a line for what was skipped."""
        require_fraction(self.heldout_fraction)
        accounts = Accounts()
        examples = [
            record._replace(where=where) for where, record in self._records(self.sft, Example, tell)
        ]
        preferences, pairs = self._preferences(accounts, tell)
        if _listed(self.prompts):
            found = self._records(self.prompts, Prompt, tell)
            asked = [record._replace(where=where) for where, record in found]
        else:  # of a dialogue's records the first says where the prompt is from
            asked = [Prompt(x.prompt, x.task, x.where) for x in examples]
            asked += [Prompt(x.prompt, x.task, x.where) for x in pairs]
            asked = list({same_prompt(x.prompt): x for x in reversed(asked)}.values())[::-1]
        prompts = self._split(self._distinct(asked, accounts))
        for side, records in prompts._asdict().items():
            accounts.of("prompts", side).total += len(records)
        sft = self._split(examples)
        for side, records in sft._asdict().items():
            accounts.of("sft", side, len(records))
        return Splits(sft, preferences, prompts), accounts

    def undebiased(self) -> "FilesData":
        """The same data with pairs that are neither balanced nor weighed: a run does that with what fits."""
        return replace(self, filters=replace(self.filters, balance=False, weigh="pair"))

    def debiasing(self) -> Debiasing | None:
        """Settings by which a run balances and weighs the pairs that fit."""
        return Debiasing(self.filters, self.tokenizer)

    def heldout(self, prompt: Messages) -> bool:
        """The side of a prompt: that of its dialogue."""
        return uniform_hash(self.seed, dialogue_key(prompt)) < self.heldout_fraction

    def _split(self, records: Sequence[Kept]) -> Split:
        sides: tuple[list[Kept], list[Kept]] = ([], [])
        for record in records:
            sides[self.heldout(record.prompt)].append(record)
        return Split(*sides)

    def _distinct(self, records: Sequence[Prompt], accounts: Accounts) -> list[Prompt]:
        """The first of prompts that are the same; the others are left out."""
        found: dict[str, Prompt] = {}
        for record in records:
            if found.setdefault(same_prompt(record.prompt), record) is not record:
                account = accounts.of("prompts", Split._fields[self.heldout(record.prompt)])
                account.total += 1
                account.leave_out("repeating another prompt", 1, record.where)
        return list(found.values())

    def _records(self, paths: Paths, kind: type[Kind], tell: Tell) -> Iterator[tuple[str, Kind]]:
        """The records of a table's files, all of one kind."""
        first: dict[str, str] = {}  # kind of mistake -> where
        tally = Tally(self.mistakes, lambda x: first.setdefault(x["kind"], x["where"]))
        for where, record in read_records(_listed(paths), tally, self.form):
            if isinstance(record, kind):
                yield where, record
            else:
                message = f"{_NAMES[type(record)]} where {_NAMES[kind]} is expected"
                tally.take_back(Mistake("malformed", message), where)
        for line in tally.lines():
            place = first.get(line.rpartition(": ")[2])
            tell(f"{line}, the first at {place}" if place else line)

    def _preferences(self, accounts: Accounts, tell: Tell) -> tuple[Split, list[Preference]]:
        """Pairs of either side, filtered; and those that all filters but length balancing leave."""
        records = self._records(self.preferences, Comparison, tell)
        found = [Found(where, record) for where, record in records]
        surveyed = survey(
            found, self.filters, length_in(self.tokenizer if self.filters.balance else None)
        )
        held = np.array([self.heldout(record.prompt) for _, record in found], bool)
        held = held[surveyed.pairs.comparison]
        sides: list[list[Preference]] = []
        asked: list[Preference] = []
        for number, side in enumerate(Split._fields):
            here = held == bool(number)
            config = replace(self.filters, balance=self.filters.balance and not number)
            selection = select(Survey(surveyed.pairs.take(here), surveyed.refused), config)
            account = accounts.of("preferences", side, int(here.sum()))
            for step in selection.steps:
                account.leave_out(f"by filter {step.name!r}", step.dropped)
            sides.append([pair for _, pair in kept(found, selection)])
            if config.balance:
                left = selection.before_balance
                selection = selection._replace(pairs=left, weight=np.ones(len(left)))
            asked += [pair for _, pair in kept(found, selection)] if config.balance else sides[-1]
        return Split(*sides), asked


_NAMES = {Example: "a conversation", Comparison: "a comparison", Prompt: "a prompt"}


def _listed(paths: Paths) -> tuple[Path, ...]:
    return (paths,) if isinstance(paths, Path) else tuple(paths)
