"""What may be wrong with an entry of a data file, and what becomes of it: nothing is dropped in silence."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from sharding.errors import UserError

Kind = Literal[
    "unreadable", "malformed", "unknown_field", "empty", "equal", "single", "prompt_differs"
]
Action = Literal["refuse", "skip"]


@dataclasses.dataclass(frozen=True)
class OnMistake:
    """What happens to an entry that is not as it should be: refuse the file, or skip the entry and count it."""

    unreadable: Action = "refuse"  # not UTF-8, not a JSON object, longer than `max_entry_mib`
    malformed: Action = (
        "refuse"  # a field is missing or of another type, a message has no role, ...
    )
    # a field that the format does not have; ignore: count it and take the rest of the entry
    unknown_field: Literal["refuse", "skip", "ignore"] = "refuse"
    empty: Action = "refuse"  # a prompt or a response without a letter
    equal: Action = "refuse"  # two responses of a comparison are the same text
    single: Action = "refuse"  # a ranking of one response
    prompt_differs: Action = "refuse"  # two transcripts of a pair whose prompts differ
    max_entry_mib: float = 16.0  # longest line that is read

    @classmethod
    def skip_all(cls) -> "OnMistake":
        """Skip every entry that is not as it should be, and only count fields that the format does not have."""
        names = {field.name for field in dataclasses.fields(cls)} - {"max_entry_mib"}
        return cls(**{**dict.fromkeys(names, "skip"), "unknown_field": "ignore"})  # type: ignore[arg-type]


class Mistake(Exception):
    """One entry is not as it should be."""

    def __init__(self, kind: Kind, message: str) -> None:
        self.kind = kind
        self.message = message
        super().__init__(message)


class Tally:
    """Counts what was read and what was skipped, and why; hands every skipped entry on as it is met."""

    def __init__(
        self, policy: OnMistake, tell: Callable[[dict[str, str]], Any] | None = None
    ) -> None:
        self.policy = policy
        self.read = 0  # entries taken
        self.skipped: Counter[str] = Counter()  # kind -> entries
        self.ignored: Counter[str] = Counter()  # field that is not read -> entries that have it
        self._tell = tell
        self._taken_back = ""

    def meet(self, mistake: Mistake, where: str) -> None:
        """Count a mistake at "file:line", or raise UserError where the policy refuses its kind."""
        if getattr(self.policy, mistake.kind) == "refuse":
            raise UserError(
                f"{where}: {mistake.message}; mend it, or skip such entries with {mistake.kind} = skip"
            )
        self.skipped[mistake.kind] += 1
        if self._tell is not None:
            self._tell({"where": where, "kind": mistake.kind, "message": mistake.message})

    def take_back(self, mistake: Mistake, where: str) -> None:
        """`meet` for an entry that was counted as read; its other records are the same mistake."""
        if where != self._taken_back:
            self.meet(mistake, where)
            self.read -= 1
            self._taken_back = where

    def lines(self) -> list[str]:
        """What there is to say, a line a kind."""
        said = [
            f"{count:,} entries skipped: {kind}" for kind, count in sorted(self.skipped.items())
        ]
        return said + [
            f"field {name!r} ignored in {count:,} entries"
            for name, count in sorted(self.ignored.items())
        ]


def write_line(file: Any, value: dict[str, Any]) -> None:
    """One JSON object, as a line."""
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
