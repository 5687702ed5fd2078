"""What was measured, for people: lines for the terminal, and a page that needs no other file."""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

from rlhf.bench.case import Row
from rlhf.plots import COLOURS, blank, png
from rlhf.report import MISSING, PAGE, STYLE, html_pictures

SHORT = {
    "all-gather": "gather",
    "all-reduce": "reduce",
    "reduce-scatter": "scatter",
    "all-to-all": "all-to-all",
    "collective-permute": "permute",
}
# heading, width on the screen, meaning
COLUMNS = (
    ("layout", 20, "as --layouts names or spells it"),
    ("job", 7, "a step is an update; of PPO a whole iteration"),
    ("compile s", 9, "all programs of the step, one after the other"),
    ("step s", 9, "median of the timed steps"),
    ("min to max", 19, "of the timed steps"),
    ("tokens/s", 10, "prompts and answers with their padding, all devices together"),
    ("MFU", 6, "FLOPs that the model asks for / what the devices can do in the time, in bfloat16"),
    ("predicted s", 11, "from the schedule of the compiled programs and the chip's figures"),
    ("ratio", 6, "measured / predicted"),
    ("MiB", 10, "a device at the peak, by the compiler; in brackets by its allocator"),
    ("collectives", 0, "runs of a step, and the bytes that a device sends"),
)


def heading() -> str:
    """The line above the rows."""
    return _line([name for name, _, _ in COLUMNS])


def line(row: Row) -> str:
    """A row on the screen."""
    return _line([row.layout, row.job, row.failure] if row.failure else cells(row))


def _line(texts: Sequence[str]) -> str:
    widths = [width for _, width, _ in COLUMNS]
    return "  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=False)).rstrip()


def cells(row: Row) -> list[str]:
    """The row's numbers, a text a column."""
    return [
        row.layout,
        row.job,
        f"{row.compile_s:.1f}",
        _seconds(row.median_s),
        f"{_seconds(min(row.step_s))} to {_seconds(max(row.step_s))}",
        _number(row.tokens_per_s, "{:,.0f}"),
        _number(row.mfu, "{:.1%}"),
        _seconds(row.predicted_s),
        _number(row.ratio, "{:.2f}"),
        _number(row.memory_bytes / 2**20, "{:,.1f}")
        + _number(row.allocated_bytes and row.allocated_bytes / 2**20, " ({:,.1f})", ""),
        _collectives(row),
    ]


def _collectives(row: Row) -> str:
    found = ", ".join(
        f"{row.collectives[kind].runs:,} {word}"
        for kind, word in SHORT.items()
        if kind in row.collectives
    )
    sent = sum(moved.sent_bytes for moved in row.collectives.values())
    return f"{found}: {_bytes(sent)}" if found else "none"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _number(value: float | None, form: str, missing: str = MISSING) -> str:
    return missing if value is None else form.format(value)


def _seconds(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return MISSING
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"


def page(facts: Mapping[str, str], rows: Sequence[Row]) -> str:
    """The page: facts, pictures, the table, the programs of every row."""
    body = f"<h2>Steps</h2>\n{_table(rows)}"
    pictures = [_picture(job, rows) for job in dict.fromkeys(row.job for row in rows if row.step_s)]
    body += f"<h2>Step time by layout</h2>\n{html_pictures(pictures)}" if pictures else ""
    body += f"<h2>Programs</h2>\n{_programs(rows)}" if pictures else ""
    meanings = "".join(f"<dt>{name}</dt><dd>{what}</dd>" for name, _, what in COLUMNS)
    body += f"<h2>What the columns say</h2>\n<dl>{meanings}</dl>"
    told = "".join(f"<dt>{x}</dt><dd>{html.escape(text)}</dd>" for x, text in facts.items())
    return PAGE.format(title="glm-jax: layouts", style=STYLE, facts=told, body=body)


def _table(rows: Sequence[Row]) -> str:
    def of(row: Row) -> str:
        if not row.failure:
            return _html_row(cells(row), 2)
        names = "".join(f"<td>{html.escape(text)}</td>" for text in (row.layout, row.job))
        span = len(COLUMNS) - 2
        return (
            f'<tr>{names}<td class="meaning" colspan="{span}">{html.escape(row.failure)}</td></tr>'
        )

    heads = [name for name, _, _ in COLUMNS]
    return _html_table(heads, "".join(map(of, rows)), 2)


def _programs(rows: Sequence[Row]) -> str:
    heads = ("layout", "job", "program", "runs", "s a run", "predicted s", "compile s", "MiB")
    lines = "".join(
        _html_row(
            [
                row.layout,
                row.job,
                x.name,
                f"{x.runs}",
                _seconds(x.step_s),
                _seconds(x.predicted_s),
                f"{x.compile_s:.1f}",
                f"{x.memory_bytes / 2**20:,.1f}",
            ],
            3,
        )
        for row in rows
        for x in row.programs
    )
    return _html_table(heads, lines, 3)


def _html_table(heads: Sequence[str], lines: str, names: int) -> str:
    head = "".join(
        f"<th{'' if place < names else NUMBER}>{name}</th>" for place, name in enumerate(heads)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


NUMBER = ' class="number"'


def _html_row(texts: Sequence[str], names: int) -> str:
    """The first `names` columns are words."""
    found = "".join(
        f"<td{'' if place < names else NUMBER}>{html.escape(text)}</td>"
        for place, text in enumerate(texts)
    )
    return f"<tr>{found}</tr>"


def _picture(job: str, rows: Sequence[Row]) -> tuple[str, bytes]:
    """Medians as bars, all steps as a line, what is predicted as a mark."""
    of = [row for row in rows if row.job == job and row.step_s]
    title = f"{job}: seconds of a step"
    figure, axes = blank(title, "", "s")
    place = np.arange(len(of))
    axes.bar(place, [float(row.median_s or 0) for row in of], 0.6, color=COLOURS[0])
    lows, highs = ([edge(row.step_s) for row in of] for edge in (min, max))
    axes.vlines(place, lows, highs, color="#1f2933", linewidth=1)
    known = [(x, row.predicted_s) for x, row in zip(place, of, strict=True) if row.predicted_s]
    if known:
        at, seconds = np.array(known).T
        axes.plot(at, seconds, "_", color=COLOURS[1], markersize=16, label="predicted")
        axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    axes.set_xticks(place, [row.layout for row in of], rotation=35, ha="right")
    return title, png(figure)
