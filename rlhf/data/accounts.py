"""Accounts of records: on each side of each table every one is used, or left out for a reason."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from glm_jax.tokenizers import ChatFormatError
from rlhf.data.records import Example, Preference, Prompt, prompt_text
from sharding.disk.directory import write_json
from sharding.errors import UserError

Unfit = Literal["skip", "refuse"]
Kept = TypeVar("Kept", bound=Example | Preference | Prompt)
Tokens = TypeVar("Tokens")
_TOO_LONG = "longer than "
NAMED = 3  # records of a reason that are named
NAMES = {"sft": "SFT examples", "preferences": "pairs", "prompts": "prompts"}
SIDES = {"train": "training ", "heldout": "held-out ", "": ""}


class Account:
    """Records of one side of a table: how many there were, how many are used, and why the others are left out."""

    def __init__(self, table: str, side: str = "", total: int = 0) -> None:
        self.table = table
        self.side = side
        self.total = total
        self.left_out: dict[str, int] = {}  # reason -> records
        self.named: dict[str, list[str]] = {}  # reason -> where the first of them stand

    @property
    def used(self) -> int:
        """Records that are not left out."""
        return self.total - sum(self.left_out.values())

    def leave_out(self, reason: str, count: int = 1, where: str = "") -> None:
        """Count records that are left out."""
        if count:
            self.left_out[reason] = self.left_out.get(reason, 0) + count
            places = self.named.setdefault(reason, [])
            if where and where not in places and len(places) < NAMED:
                places.append(where)

    def line(self) -> str | None:
        """One line that says it all; None where nothing is left out."""
        if not self.left_out:
            return None
        reasons = []
        for reason, count in self.left_out.items():
            places = self.named[reason]
            shown = ", ".join([*places, "..."] if len(places) < count else places)
            reasons.append(f"{count:,} {reason}" + f" ({shown})" * bool(places))
        name = f"{SIDES[self.side]}{NAMES.get(self.table, self.table)}"
        return f"{self.used:,} of {self.total:,} {name} used; left out: {'; '.join(reasons)}"


class Accounts:
    """An account for each side of each table."""

    def __init__(self, accounts: Sequence[Account] = ()) -> None:
        self._accounts = {(account.table, account.side): account for account in accounts}

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts.values())

    def of(self, table: str, side: str, total: int = 0) -> Account:
        """The account of a side, opened with `total` records where there is none."""
        return self._accounts.setdefault((table, side), Account(table, side, total))

    def lines(self) -> list[str]:
        """Lines that describe the accounts, one for each side of a table."""
        return [line for account in self if (line := account.line())]

    def write(self, path: Path) -> None:
        """Write them as JSON."""
        write_json(path, [vars(account) for account in self])

    @classmethod
    def read(cls, path: Path) -> "Accounts":
        """Read what `write` wrote."""
        return cls([_account(fields) for fields in json.loads(path.read_text("utf-8"))])


def _account(fields: Mapping[str, Any]) -> Account:
    account = Account(fields["table"], fields["side"], fields["total"])
    account.left_out, account.named = fields["left_out"], fields["named"]
    return account


def tokenised(
    records: Sequence[Kept],
    tokenise: Callable[[Kept], Tokens],
    problem: Callable[[Tokens], str | None],
    account: Account,
    unfit: Unfit = "skip",
    most: int | None = None,
) -> list[tuple[int, Tokens]]:
    """(row number, tokens) of the records that fit, the first `most` of them (None: all).

    Args:
        tokenise: may raise ChatFormatError: the model's chat format has no words for the record.
        problem: says what is wrong with tokens, None where they fit.
        account: receives whatever is left out; its `total` becomes the number of records, if that is more.
        unfit: "refuse" raises UserError at the first record that does not fit; "skip" leaves it out.

    Raises:
        UserError: none fits.
    """
    account.total = max(account.total, len(records))
    found: list[tuple[int, Tokens]] = []
    for number, record in enumerate(records):
        if len(found) == most:
            account.leave_out(f"beyond the first {most:,}", len(records) - number)
            break
        try:
            tokens = tokenise(record)
            reason, detail = problem(tokens), ""
        except ChatFormatError as error:
            reason, detail = "not in the model's chat format", str(error)
        if reason is None:
            found.append((number, tokens))
            continue
        where = named(record, number)
        if unfit == "refuse":
            raise UserError(
                f"{where}: {detail or reason}; mend it, or leave such records out with unfit = skip"
            )
        new = detail and reason not in account.left_out  # one detail stands for all
        account.leave_out(reason, 1, f"{where}: {detail}" if new else where)
    if not found and most != 0:
        raise UserError(f"{account.table}: {_none_fits(account)}")
    return found


def _none_fits(account: Account) -> str:
    reasons = list(account.left_out)
    if len(reasons) == 1 and reasons[0].startswith(_TOO_LONG):
        places = ", ".join(account.named[reasons[0]])
        return f"no record fits into {reasons[0].removeprefix(_TOO_LONG)}; raise the length ({places}, ...)"
    return f"no record fits: {account.line() or 'there is none'}"


def too_long(size: int, name: str, length: int) -> str | None:
    """The reason to leave out what has `size` tokens, where that is more than `length`."""
    return f"{_TOO_LONG}{name} = {length} tokens" if size > length else None


def named(record: Example | Preference | Prompt, number: int) -> str:
    """The place of a record: its file and line, or its number and how it begins."""
    if record.where:
        return record.where
    text = prompt_text(record.prompt).replace("\n", " ")[:20]
    return f"record {number} {text!r}"
