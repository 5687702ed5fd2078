"""The doctor's findings as a table."""

from collections.abc import Mapping

from rich.table import Table

from rlhf.doctor.finding import Finding

STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def findings_table(findings: Mapping[str, Finding]) -> Table:
    """A row a check: its name, how it went, what was seen and what to do."""
    table = Table("check", "", "what was seen, and what to do", title="doctor")
    for name, (status, seen, advice) in findings.items():
        text = f"{seen}. {advice[:1].upper()}{advice[1:]}" if advice else seen
        table.add_row(name, f"[{STYLES[status]}]{status}[/]", text)
    return table
