"""Pictures of a plan, as PNG: memory by role, time by kind of work, and one against the other."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rlhf.plan.plan import Judged, Plan
from rlhf.plots import COLOURS, blank, png
from sharding.chips import GIB
from sharding.layout import spell_layout

Picture = tuple[str, bytes]  # title, PNG
SHADES = ("#2563eb", "#e8590c", "#0ca678", "#9333ea", "#ca8a04", "#64748b", "#db2777", "#0891b2")


def draw_memory(plan: Plan) -> Picture:
    """Bars of what lies in a device's memory at the fullest moment."""
    return _bars(plan, "Memory of a device", "GiB", _memory, plan.pod.chip.memory_bytes / GIB)


def draw_times(plan: Plan) -> Picture:
    """Bars of what a device does in a step."""
    return _bars(plan, "Time of a step", "seconds", _times, None)


def draw_scatter(plan: Plan) -> Picture:
    """Memory against time; what does not fit is pale, and its time is the rough one."""
    title = "Memory against time"
    figure, axes = blank(title, "seconds a step", "GiB a device")
    for one in plan.judged:
        place = (one.step_s, one.peak_bytes / GIB)
        axes.scatter(*place, color=COLOURS[0], alpha=1.0 if one.fits else 0.3, s=24)
        axes.annotate(_name(one), place, fontsize=6, xytext=(4, 2), textcoords="offset points")
    axes.axhline(plan.pod.chip.memory_bytes / GIB, color="#9aa5b1", linewidth=1, linestyle="--")
    return title, png(figure)


def _bars(
    plan: Plan,
    title: str,
    unit: str,
    parts_of: Callable[[Judged], Mapping[str, float]],
    limit: float | None,
) -> Picture:
    figure, axes = blank(title, unit, "")
    parts: Sequence[Mapping[str, float]] = [parts_of(one) for one in plan.judged]
    names = list(dict.fromkeys(name for part in parts for name in part))
    place = np.arange(len(parts))
    left = np.zeros(len(parts))
    for name, shade in zip(names, SHADES, strict=False):
        width = np.array([part.get(name, 0.0) for part in parts])
        axes.barh(place, width, left=left, color=shade, label=name)
        left += width
    if limit is not None:
        axes.axvline(limit, color="#1f2933", linewidth=1, linestyle="--")
    axes.set_yticks(place, [_name(one) for one in plan.judged], fontsize=6)
    axes.invert_yaxis()
    axes.legend(fontsize=6, frameon=False, loc="lower right")
    return title, png(figure)


def _name(one: Judged) -> str:
    return f"{spell_layout(one.candidate.layout)} {one.candidate.layout.remat}"


def _memory(one: Judged) -> dict[str, float]:
    """GiB by role; what a program takes beside its arguments is its working memory."""
    if one.verdict is None or not one.verdict.programs:
        return {name: size / GIB for name, size in one.candidate.rough.memory.items()}
    roles = {name: size / GIB for name, size in one.verdict.residents.items()}
    return roles | {"working": max(one.peak_bytes / GIB - sum(roles.values()), 0.0)}


def _times(one: Judged) -> dict[str, float]:
    if one.verdict is None or not one.verdict.fits:
        return dict(one.candidate.rough.seconds)
    kinds = {
        "products": "products_s",
        "attention": "kernels_s",
        "memory": "memory_s",
        "waiting for others": "exposed_s",
    }
    return {
        name: sum(p.runs * getattr(p, field) for p in one.verdict.programs)
        for name, field in kinds.items()
    }
