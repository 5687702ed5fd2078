"""Records from files of any form; the form is told from the first entry that can be read, or named."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf.data.entries import Entry, read_entries
from rlhf.data.forms.form import Form, Record
from rlhf.data.forms.instructions import ALPACA, LLMBAR, PANDALM, ULTRAFEEDBACK
from rlhf.data.forms.ours import EXAMPLE, PAIR, PROMPT, RANKING
from rlhf.data.forms.sharegpt import SHAREGPT
from rlhf.data.forms.transcripts import CHATS, HH
from rlhf.data.forms.trees import TREE
from rlhf.data.mistakes import Mistake, Tally
from sharding.errors import UserError

FORMS = {
    form.name: form
    for form in (
        PAIR,
        RANKING,
        EXAMPLE,
        PROMPT,
        HH,
        CHATS,
        TREE,
        ULTRAFEEDBACK,
        PANDALM,
        LLMBAR,
        SHAREGPT,
        ALPACA,
    )
}


def check_form(name: str | None) -> None:
    """Raise UserError where there is no form of this name."""
    if name is not None and name not in FORMS:
        raise UserError(f"form {name!r} is not known: choose one of {', '.join(FORMS)}")


class Found(NamedTuple):
    """A record and where its entry stands."""

    where: str  # "file:line"
    record: Record


def read_records(paths: Sequence[Path], tally: Tally, form: str | None = None) -> Iterator[Found]:
    """The records of files, in order; entries that are not as they should be go to `tally`.

    `form`: a key of FORMS; None: told from the first entry of each file, and every entry of our own form may be of
    another kind (a prompt, an example, a pair, a ranking). Raises UserError on a file that cannot be read or has no
    form we know, and where the policy refuses.
    """
    check_form(form)
    for path in paths:
        entries = read_entries(path, tally)
        first = next(entries, None)
        if first is None:
            continue
        chosen = FORMS[form] if form else _recognised(first)
        for entry in itertools.chain([first], entries):
            yield from _records(entry, chosen if form else _own_kind(entry, chosen), tally)


def _records(entry: Entry, form: Form, tally: Tally) -> Iterator[Found]:
    try:
        unknown = form.unknown(entry.fields)
        if unknown and tally.policy.unknown_field != "ignore":
            known = ", ".join(sorted(form.required | form.optional))
            raise Mistake("unknown_field", f"unknown field {unknown[0]!r}: {form.name} has {known}")
        missing = sorted(form.required - entry.fields.keys())
        if missing:
            raise Mistake("malformed", f"field {missing[0]!r} is missing")
        records = form.parse(entry.fields)
        tally.ignored.update(unknown)
        tally.ignored.update(form.unread & entry.fields.keys())
        tally.read += 1
    except Mistake as mistake:
        tally.meet(mistake, entry.where)
        return
    for record in records:
        yield Found(entry.where, record)


def _recognised(entry: Entry) -> Form:
    """The form that has most of the entry's fields, of those whose required fields it has."""
    candidates = [form for form in FORMS.values() if form.required <= entry.fields.keys()]
    if candidates:
        return min(
            candidates, key=lambda form: (len(form.unknown(entry.fields)), -len(form.required))
        )
    fields = ", ".join(sorted(entry.fields)) or "none"
    raise UserError(
        f"{entry.where}: no form that is known has the fields {fields}: name one of {', '.join(FORMS)}"
    )


def _own_kind(entry: Entry, form: Form) -> Form:
    """Lines of our own form may be mixed; the fields of each say what it is."""
    if form not in (PAIR, RANKING, EXAMPLE, PROMPT):
        return form
    names = entry.fields.keys()
    if "responses" in names or "ranks" in names:
        return RANKING
    if "chosen" in names or "rejected" in names:
        return PAIR
    return EXAMPLE if "response" in names else PROMPT
