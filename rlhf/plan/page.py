"""A plan for people: a table for the terminal, JSON, and a page that needs no other file."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from rlhf.plan.plan import Judged, Plan
from rlhf.plan.plots import draw_memory, draw_scatter, draw_times
from rlhf.plan.verdict import as_json
from rlhf.programs import step_tokens
from rlhf.report import MISSING, PAGE, STYLE, html_pictures
from sharding.chips import GIB
from sharding.disk.directory import explained, new_file
from sharding.layout import spell_layout

HEADS = (
    "Layout",
    "Remat",
    "Samples in",
    "Step s",
    "Tokens/s",
    "MFU",
    "GiB",
    "Waits s",
    "Rollout",
    "Roughly",
    "",
)
COMPILED = "Memory and schedule are the compiler's; seconds, a walk of the schedule against the chip's limits."
ROUGH = "Counted from shapes alone: no compiler was asked."


def plan_table(plan: Plan) -> Table:
    """The layouts of a plan, best first, and below what rules out the others."""
    task, work = plan.task, plan.task.workload
    title = (
        f"{task.job} of {task.model} on {plan.pod.name}: {work.batch} x ({work.prompt_length} + "
        f"{work.response_length}) tokens"
    )
    reasons = "\n".join(
        f"{count} layouts out: {reason}" for reason, count in plan.ruled_out.most_common()
    )
    note = COMPILED if plan.compiled else ROUGH
    caption = (
        f"{note}\n{plan.candidates} more or less fit; {len(plan.judged)} are shown.\n{reasons}"
    )
    table = Table(
        title=escape(title), caption=escape(caption), caption_justify="left", box=box.SIMPLE_HEAD
    )
    *heads, last = HEADS
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < 3 else "right", no_wrap=True)
    table.add_column(last, overflow="fold")
    for one in plan.judged:
        table.add_row(*map(escape, cells(one, plan)), style=None if one.fits else "dim")
    return table


def cells(one: Judged, plan: Plan) -> list[str]:
    """A row of the table, under `HEADS`."""
    layout, generation, rough = one.candidate
    names = [
        spell_layout(layout),
        layout.remat,
        MISSING if generation is None else spell_layout(generation),
    ]
    verdict, roughly = one.verdict, f"{rough.step_s:.2f} s, {rough.peak_bytes / GIB:.1f} GiB"
    if verdict is None:
        share = f"{rough.rollout_s / rough.step_s:.0%}" if rough.rollout_s else MISSING
        waits = sum(rough.seconds[x] for x in ("weights", "gradients", "activations"))
        numbers = [f"{rough.step_s:.3f}", _rate(plan, rough.step_s), MISSING]
        return [*names, *numbers, f"{rough.peak_bytes / GIB:.2f}", f"{waits:.3f}", share, "", ""]
    if verdict.error is not None:
        return [*names, *[MISSING] * 6, roughly, verdict.error]
    if verdict.failing is not None:
        memory = f"{verdict.peak_bytes / GIB:.2f}"
        said = f"out of memory in {verdict.failing.name}: {advice(one, plan)}"
        return [*names, *[MISSING] * 3, memory, *[MISSING] * 2, roughly, said]
    waits = sum(p.runs * p.exposed_s for p in verdict.programs)
    share = f"{verdict.rollout_share:.0%}" if verdict.rollout_share else MISSING
    return [
        *names,
        f"{verdict.step_s:.3f}",
        _rate(plan, verdict.step_s),
        f"{verdict.mfu(plan.pod):.1%}",
        f"{verdict.peak_bytes / GIB:.2f}",
        f"{waits:.3f}",
        share,
        roughly,
        "",
    ]


def advice(one: Judged, plan: Plan) -> str:
    """What would make a layout fit that does not."""
    layout = one.candidate.layout
    over = one.peak_bytes - plan.pod.chip.memory_bytes
    ways = []
    if layout.remat != "full":
        ways.append("remat full")
    if layout.data > 1 and plan.pod.slices == 1:
        ways.append("fsdp in place of data")
    ways.append("accumulate 2")
    offload = [role for role in ("start", "reference", "reward model") if _size(one, role) >= over]
    if offload:
        ways.append(f"{offload[0]} in the host's memory")
    return f"{over / GIB:.2f} GiB too much; try {' or '.join(ways)}"


def _size(one: Judged, role: str) -> int:
    return one.verdict.residents.get(role, 0) if one.verdict is not None else 0


def _rate(plan: Plan, seconds: float) -> str:
    return (
        f"{step_tokens(plan.task.job, plan.task.workload) / seconds:,.0f}" if seconds else MISSING
    )


def report(plan: Plan) -> dict[str, Any]:
    """The plan as JSON."""

    def row(one: Judged) -> dict[str, Any]:
        layout, generation, rough = one.candidate
        verdict = one.verdict if one.fits else None
        return {
            "layout": spell_layout(layout),
            "remat": layout.remat,
            "generation_layout": None if generation is None else spell_layout(generation),
            "fits": one.fits,
            "step_s": one.step_s if one.fits else None,
            "peak_bytes": one.peak_bytes,
            "mfu": verdict.mfu(plan.pod) if verdict else None,
            "rollout_share": verdict.rollout_share if verdict else None,
            "rough": {"seconds": rough.seconds, "memory": rough.memory},
            "compiled": as_json(one.verdict) if one.verdict else None,
        }

    work = plan.task.workload
    return {
        "job": plan.task.job,
        "model": plan.task.model,
        "pod": plan.pod.name,
        "devices": plan.pod.num_devices,
        "batch": work.batch,
        "prompt_length": work.prompt_length,
        "response_length": work.response_length,
        "objective": plan.task.objective,
        "compiled": plan.compiled,
        "candidates": plan.candidates,
        "ruled_out": dict(plan.ruled_out),
        "layouts": [row(one) for one in plan.judged],
    }


def write_page(plan: Plan, path: Path) -> None:
    """Write the plan as one HTML file. Raises UserError where it cannot be written."""
    pictures = [draw_memory(plan), draw_times(plan), draw_scatter(plan)]
    facts = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in _facts(plan)
    )
    rows: Sequence[Sequence[str]] = [cells(one, plan) for one in plan.judged]
    head = "".join(f"<th>{html.escape(x)}</th>" for x in HEADS)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    out = "".join(
        f"<li>{count} layouts: {html.escape(reason)}</li>"
        for reason, count in plan.ruled_out.most_common()
    )
    text = PAGE.format(
        title=f"glm-jax: {plan.task.job} on {plan.pod.name}",
        style=STYLE,
        facts=facts,
        body=f"<h2>Layouts</h2><table><tr>{head}</tr>{body}</table>{html_pictures(pictures)}"
        f"<h2>Ruled out</h2><ul>{out}</ul>",
    )
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        file.write(text.encode())


def _facts(plan: Plan) -> list[tuple[str, str]]:
    work, chip = plan.task.workload, plan.pod.chip
    return [
        ("Job", f"{plan.task.job} of {plan.task.model}"),
        (
            "Pod",
            f"{plan.pod.name}: {plan.pod.num_devices} devices of {chip.memory_bytes / GIB:.2f} GiB",
        ),
        ("Step", f"{work.batch} x ({work.prompt_length} + {work.response_length}) tokens"),
        ("How", COMPILED if plan.compiled else ROUGH),
    ]
