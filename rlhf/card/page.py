"""The report card of a reward model for people: a table for the terminal, and a page that needs no other file."""

import html
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table

from rlhf.card.card import Card, as_json
from rlhf.card.figures import Preference
from rlhf.card.intervals import Estimate
from rlhf.card.plots import (
    bucket_name,
    draw_history,
    draw_length,
    draw_margins,
    draw_reliability,
)
from rlhf.card.verdict import GRADES
from rlhf.report import MISSING, PAGE, STYLE, html_pictures
from sharding.disk.directory import explained, write_json

LISTED = 10  # tasks and annotators on the screen, those with most pairs; the page has all

HEADS = ("Measure", "Value", "95% interval", "Pairs")


class Row(NamedTuple):
    """One line of the card; what does not apply is empty."""

    label: str
    value: str
    interval: str = ""
    pairs: str = ""
    meaning: str = ""


Section = tuple[str, list[Row]]


def card_table(card: Card) -> Table:
    """The card for the screen: grade and verdict below the figures."""
    grade = card.verdict.grade
    sentences = "\n".join(card.verdict.sentences)
    table = Table(
        title=f"Reward model: [bold]{escape(grade)}[/bold] - {escape(GRADES[grade])}",
        caption=escape(sentences),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column(HEADS[0], overflow="fold")
    for head in HEADS[1:]:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("What it means", style="dim")
    for name, rows in _sections(card, LISTED):
        table.add_row(f"[bold]{name}")
        for row in rows:
            label, *numbers, meaning = map(escape, row)
            table.add_row(f"  {label}", *numbers, meaning)
        table.add_section()
    return table


def write_card(card: Card, directory: Path) -> Path:
    """Write `card.json` and `card.html` into `directory`, and return the page's path.

    Raises UserError where they cannot be written.
    """
    grade = card.verdict.grade
    tables = "".join(f"<h2>{name}</h2>\n{_html_rows(rows)}" for name, rows in _sections(card, None))
    pictures = [
        draw_reliability(card.calibration),
        draw_length(card.length),
        draw_margins(card.margins),
        *draw_history(card.history),
    ]
    sentences = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in card.verdict.sentences)
    facts = f"<dt>Grade</dt><dd><strong>{html.escape(grade)}</strong>: {html.escape(GRADES[grade])}</dd>"
    body = f"<h2>Verdict</h2>\n{sentences}<h2>Pictures</h2>\n{html_pictures(pictures)}{tables}"
    path = directory / "card.html"
    with explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "card.json", as_json(card))
    text = PAGE.format(title="glm-jax: reward model", style=STYLE, facts=facts, body=body)
    with explained(path):
        path.write_text(text, encoding="utf-8")
    return path


def _sections(card: Card, listed: int | None) -> Iterator[Section]:
    """(name, rows) of the card; of tasks and annotators the `listed` with most pairs, None: all."""
    yield "Accuracy", _accuracy(card)
    if card.annotators:
        yield "Agreement with annotators", _annotators(card, listed)
    yield "Length", _length(card)
    yield "Position", _position(card)
    yield "Calibration", _calibration(card)
    yield "Scores", _scores(card)
    if card.tasks.rows:
        yield "Tasks", _tasks(card, listed)
    if card.triples.complete:
        yield "Triples", _triples(card)


def _accuracy(card: Card) -> list[Row]:
    return [
        _estimate(
            "Accuracy", card.accuracy, "share of pairs, by weight, that it orders as the judges do"
        ),
        Row("Chance", "50.0%"),
        _estimate("Longer answer wins", card.length.ruler, "a ruler in the model's place"),
        _estimate("Model - ruler", card.length.over_ruler, "on the same pairs"),
    ]


def _length(card: Card) -> list[Row]:
    buckets = [
        _estimate(
            f"Longer by {bucket_name(found)}",
            found.accuracy,
            "tokens" if found.ruler is None else f"tokens; ruler {found.ruler:.1%}",
        )
        for found in card.length.buckets
    ]
    correlation = _number(card.length.correlation)
    return [
        *_preference(card.verbosity, "longer", "shorter"),
        Row("Score with length", correlation, meaning="Spearman's rank correlation"),
        *buckets,
    ]


def _position(card: Card) -> list[Row]:
    if not card.position.model.count:
        return [Row("Order of the answers", "unknown", meaning="the data does not say it")]
    return _preference(card.position, "first", "second")


def _preference(found: Preference, side: str, other: str) -> list[Row]:
    return [
        _estimate(f"Better one {side}", found.accuracy_with, "accuracy"),
        _estimate(f"Better one {other}", found.accuracy_against, "accuracy"),
        _estimate(f"Model prefers {side}", found.model),
        _estimate(f"Judges prefer {side}", found.judges),
        _estimate("Model - judges", found.difference),
        _estimate(f"Leans to {side}", found.lean, "bias were the judges' share 50%"),
    ]


def _calibration(card: Card) -> list[Row]:
    found = card.calibration
    return [
        Row("Calibration error", f"{found.ece:.1%}", meaning="ECE: how far confidence is off"),
        Row("Confidence", f"{found.confidence:.1%}", meaning="mean; to compare with accuracy"),
        Row("Loss", f"{found.nll:.4f}", meaning=f"nats/pair; chance {found.chance_nll:.4f}"),
    ]


def _scores(card: Card) -> list[Row]:
    found = card.scores
    return [
        Row(
            "Mean ± std",
            f"{found.mean:.3f} ± {found.std:.3f}",
            meaning=f"of {found.answers:,} distinct answers",
        ),
        Row("Smallest, largest", f"{found.min:.3f}, {found.max:.3f}"),
        Row("Equal scores", f"{found.equal:.1%}", meaning="share of pairs"),
    ]


def _annotators(card: Card, listed: int | None) -> list[Row]:
    found = sorted(card.annotators, key=lambda annotator: -annotator.accuracy.count)
    rows = [
        _estimate(annotator.name, annotator.accuracy, f"kappa {_number(annotator.kappa)}")
        for annotator in found[:listed]
    ]
    return rows + _more(len(found), listed)


def _tasks(card: Card, listed: int | None) -> list[Row]:
    found = sorted(card.tasks.rows, key=lambda task: -task.accuracy.count)
    rows = [
        _estimate(
            task.name,
            task.accuracy,
            f"scores {task.mean:.3f} ± {task.std:.3f} of {task.answers:,} answers",
        )
        for task in found[:listed]
    ]
    explained = card.tasks.explained
    return [
        *rows,
        *_more(len(found), listed),
        Row("Spread of means", _number(card.tasks.spread), meaning="largest - smallest: task bias"),
        Row(
            "Explained by task",
            MISSING if explained is None else f"{explained:.1%}",
            meaning="share of the variance of scores",
        ),
    ]


def _triples(card: Card) -> list[Row]:
    found = card.triples
    left = found.prompts_left_out
    return [
        Row("All pairs judged", f"{found.complete:,}"),
        Row("Ordered by judges", f"{found.ordered:,}", meaning="without contradiction"),
        _estimate("Ordered alike", found.alike, f"chance {found.chance:.1%}"),
        *([Row("Prompts left out", f"{left:,}", meaning="too many pairs")] if left else []),
    ]


def _more(count: int, listed: int | None) -> list[Row]:
    hidden = 0 if listed is None else count - listed
    return [Row(f"and {hidden:,} more", "")] if hidden > 0 else []


def _estimate(label: str, found: Estimate, meaning: str = "") -> Row:
    interval = ""
    if found.low is not None and found.high is not None:
        interval = f"{found.low:.1%} to {found.high:.1%}"
    value = MISSING if found.value is None else f"{found.value:.1%}"
    return Row(label, value, interval, f"{found.count:,}", meaning)


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _html_rows(rows: Iterable[Row]) -> str:
    lines = []
    for label, *numbers, meaning in rows:
        cells = "".join(f'<td class="number">{html.escape(cell)}</td>' for cell in numbers)
        lines.append(
            f'<tr><td>{html.escape(label)}</td>{cells}<td class="meaning">{html.escape(meaning)}</td></tr>'
        )
    heads = "".join(f'<th class="number">{name}</th>' for name in HEADS[1:])
    head = f"<tr><th>{HEADS[0]}</th>{heads}<th>What it means</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>"
