"""The commands of `glm-jax data`: what files hold, which pairs to learn from, and other forms into ours."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from rlhf.data.filter_config import FilterConfig
from rlhf.data.mistakes import OnMistake, Tally, write_line

if TYPE_CHECKING:  # slow to import, and --help has no use for them
    from rlhf.data.balance import Bucket
    from rlhf.data.filters import Selection
    from rlhf.data.stats import Stats

Job = Callable[[], int | None]
Files = tyro.conf.Positional[tuple[Path, ...]]
SHOWN = 5  # skipped entries that are named on the screen


def add_commands(app: tyro.extras.SubcommandApp) -> None:
    """Add `data` and its commands; their docstrings are what --help prints."""
    data = tyro.extras.SubcommandApp()
    app.command(data, name="data", help="Preference data: count it, filter it, convert it.")

    @data.command
    def stats(
        files: Files,
        form: str | None = None,
        tokenizer: Path | None = None,
        json: Path | None = None,
        mistakes: OnMistake = OnMistake.skip_all(),
    ) -> Job:
        """Print what files hold beside table 2 of ChatGLM-RLHF, and how often the longer response wins.

        Args:
            files: Comparisons, conversations or prompts; JSON or JSON lines, gzipped or not.
            form: What the files look like (pair, ranking, example, prompt, hh, chats, tree, ultrafeedback, pandalm,
                llmbar, sharegpt, alpaca); default: told from their fields.
            tokenizer: Directory of a model whose tokens are counted; default: characters.
            json: Write it there too.
            mistakes: What becomes of entries that are not as they should be.
        """
        return partial(_stats, files, form, tokenizer, json, mistakes)

    @data.command(name="filter")
    def filter_(
        files: Files,
        out: Path,
        form: str | None = None,
        tokenizer: Path | None = None,
        filters: FilterConfig = FilterConfig(),
        mistakes: OnMistake = OnMistake.skip_all(),
    ) -> Job:
        """Write the pairs that a reward model should learn from, and tell what every filter dropped.

        OUT becomes a directory with pairs.jsonl, report.json, skipped.jsonl (every entry that was not as it should
        be, and why) and balance.png (lengths before and after).

        Args:
            files: Comparisons of any form, as for `stats`.
            out: Directory to write; must not exist.
            form: What the files look like; default: told from their fields.
            tokenizer: Directory of a model whose tokens lengths are counted in; default: characters.
            filters: The filters' settings.
            mistakes: What becomes of entries that are not as they should be.
        """
        return partial(_filter, files, out, form, tokenizer, filters, mistakes)

    @data.command
    def convert(
        file: tyro.conf.Positional[Path],
        out: tyro.conf.Positional[Path],
        form: str | None = None,
        mistakes: OnMistake = OnMistake.skip_all(),
    ) -> Job:
        """Write records of any form as lines of our own (docs/data.md), texts as they are.

        Args:
            file: JSON or JSON lines of any form, as for `stats`.
            out: File to write.
            form: What the files look like; default: told from their fields.
            mistakes: What becomes of entries that are not as they should be.
        """
        return partial(_convert, file, out, form, mistakes)


def _unit(tokenizer: Path | None) -> str:
    return "characters" if tokenizer is None else "tokens"


@contextmanager
def tallied(mistakes: OnMistake, file: Any = None) -> Iterator[Tally]:
    """A tally that names the first skipped entries on the screen and writes all to `file`; the sums at the end."""
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    shown = 0

    def tell(skipped: dict[str, str]) -> None:
        nonlocal shown
        shown += 1
        if shown <= SHOWN:
            console.print(f"skipped {skipped['where']}: {skipped['message']}")
        if file is not None:
            write_line(file, skipped)

    tally = Tally(mistakes, tell)
    yield tally
    for line in tally.lines():
        console.print(line)


def _stats(
    files: tuple[Path, ...],
    form: str | None,
    tokenizer: Path | None,
    json: Path | None,
    mistakes: OnMistake,
) -> None:
    from rich.console import Console

    from rlhf.data.pairs import length_in
    from rlhf.data.reading import check_form, read_records
    from rlhf.data.stats import statistics
    from sharding.disk.directory import write_json

    check_form(form)
    with tallied(mistakes) as tally:
        found = statistics(read_records(files, tally, form), length_in(tokenizer), _unit(tokenizer))
    console = Console(soft_wrap=True, highlight=False)
    for table in _tables(found):
        console.print(table)
    if json is not None:
        skipped = {"skipped": dict(tally.skipped), "ignored_fields": dict(tally.ignored)}
        write_json(json, {"files": [str(path) for path in files], **found.as_json(), **skipped})


def _tables(found: "Stats") -> Iterator[Any]:
    """Table 2, the length buckets and the annotators, for the screen."""
    from rich import box
    from rich.table import Table

    from rlhf.data.stats import PAPER

    table = Table("", "here", "ChatGLM-RLHF", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("comparisons (pairs)", f"{found.comparisons:,}", f"{PAPER['comparisons']:,}")
    for name, text in (
        ("rankings", "rankings"),
        ("examples", "conversations"),
        ("prompts", "prompts"),
    ):
        if getattr(found, name):
            table.add_row(text, f"{getattr(found, name):,}")
    for name, what in (
        ("turns", "turns a dialogue"),
        ("history", f"{found.unit} of history"),
        ("prompt", f"{found.unit} of prompt"),
        ("response", f"{found.unit} of response"),
    ):
        table.add_row(what, f"{getattr(found, name):.1f}", f"{PAPER[name]:.1f}")
    yield table
    if found.comparisons:
        lengths = Table(f"{found.unit} apart", "pairs", "longer wins", box=box.SIMPLE_HEAD)
        for bucket in found.length_buckets:
            if bucket.win_rate is not None:
                pairs = bucket.longer_wins + bucket.shorter_wins + bucket.equal
                lengths.add_row(bucket.range, f"{pairs:,}", f"{bucket.win_rate:.1%}")
        yield lengths
        if found.ties:
            yield f"{found.ties:,} ties"
    if found.agreement.between:
        people = Table("annotators", "pairs", "agree", "Cohen's kappa", box=box.SIMPLE_HEAD)
        for pair in found.agreement.between:
            kappa = "–" if pair.kappa is None else f"{pair.kappa:.3f}"
            people.add_row(
                f"{pair.one}, {pair.other}", f"{pair.pairs:,}", f"{pair.same:.1%}", kappa
            )
        yield people
    if found.agreement.alpha is not None:
        twice = f"{found.agreement.judged_twice:,} pairs judged more than once"
        yield f"Krippendorff's alpha {found.agreement.alpha:.3f} of {twice}"


def _filter(
    files: tuple[Path, ...],
    out: Path,
    form: str | None,
    tokenizer: Path | None,
    config: FilterConfig,
    mistakes: OnMistake,
) -> None:
    from rich.console import Console

    from rlhf.data.balance import buckets
    from rlhf.data.balance_plot import draw_balance
    from rlhf.data.filters import kept, select, survey
    from rlhf.data.forms.ours import pair_line
    from rlhf.data.pairs import length_in
    from rlhf.data.reading import check_form, read_records
    from sharding.disk.directory import new_directory, write_json

    check_form(form)
    unit = _unit(tokenizer)
    with new_directory(out) as directory:
        with (
            (directory / "skipped.jsonl").open("w", encoding="utf-8") as skipped,
            tallied(mistakes, skipped) as tally,
        ):
            surveyed = survey(read_records(files, tally, form), config, length_in(tokenizer))
        selection = select(surveyed, config)
        again = read_records(files, Tally(mistakes), form)  # what was skipped has been told
        with (directory / "pairs.jsonl").open("w", encoding="utf-8") as lines:
            for _, pair in kept(again, selection):
                write_line(lines, pair_line(pair, pair.weight))
        before = buckets(selection.before_balance, config.edges)
        after = buckets(selection.pairs, config.edges, selection.weight)
        (directory / "balance.png").write_bytes(draw_balance(before, after, unit))
        report = _report(selection, before, after, tally, unit)
        write_json(directory / "report.json", {**report, "no_comparisons": surveyed.others})
    console = Console(soft_wrap=True, highlight=False)
    if surveyed.others:
        console.print(f"{surveyed.others:,} records left out: no comparisons")
    console.print(_steps_table(selection))
    console.print(f"{out}: {len(selection.pairs):,} pairs")


def _report(
    selection: "Selection", before: "list[Bucket]", after: "list[Bucket]", tally: Tally, unit: str
) -> dict[str, Any]:
    return {
        "entries": tally.read,
        "skipped": dict(tally.skipped),
        "ignored_fields": dict(tally.ignored),
        "steps": [step._asdict() for step in selection.steps],
        "pairs": len(selection.pairs),
        "unit": unit,
        "length_buckets": {
            "before": [bucket.as_json() for bucket in before],
            "after": [bucket.as_json() for bucket in after],
        },
    }


def _steps_table(selection: "Selection") -> Any:
    from rich import box
    from rich.table import Table

    table = Table("filter", "pairs", "dropped", box=box.SIMPLE_HEAD)
    for step in selection.steps:
        table.add_row(step.name, f"{step.pairs:,}", f"{step.dropped:,}" if step.dropped else "–")
    return table


def _convert(file: Path, out: Path, form: str | None, mistakes: OnMistake) -> None:
    import os

    from rich.console import Console

    from rlhf.data.forms.ours import line_of
    from rlhf.data.reading import check_form, read_records
    from sharding.disk.directory import explained

    check_form(form)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    with explained(out):
        try:
            with temporary.open("w", encoding="utf-8") as lines, tallied(mistakes) as tally:
                for _, record in read_records([file], tally, form):
                    write_line(lines, line_of(record))
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"{out}: {tally.read:,} entries")
