"""Pictures of a training run: what `metrics.jsonl` holds, as PNG."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#2563eb", "#e8590c", "#0ca678")

Curve = tuple[np.ndarray, np.ndarray]  # steps, values (NaN: not finite)


class Plot(NamedTuple):
    """One picture: some metrics of one stage over its steps."""

    stage: str
    metrics: Mapping[str, str]  # metric -> its name in the legend
    title: str
    unit: str


PLOTS = (
    Plot("ppo", {"reward": "reward"}, "PPO: reward", "reward"),
    Plot("ppo", {"kl": "sampled", "kl_exact": "exact"}, "PPO: KL from SFT", "nats/token"),
    Plot("ppo", {"length": "length"}, "PPO: answer length", "tokens"),
    Plot("ppo", {"ended": "ended by itself"}, "PPO: finished answers", "fraction"),
    Plot("sft", {"loss": "loss"}, "SFT: loss", "nats/token"),
    Plot("reward", {"loss": "loss"}, "Reward model: loss", "nats/pair"),
    Plot("reward", {"accuracy": "accuracy"}, "Reward model: accuracy in training", "fraction"),
    Plot("ppo", {"policy_loss": "policy loss"}, "PPO: policy loss", "loss"),
    Plot("ppo", {"value_loss": "value loss"}, "PPO: value loss", "loss"),
    Plot("ppo", {"sft_loss": "SFT loss"}, "PPO: SFT loss mixed in", "nats/token"),
    Plot("dpo", {"loss": "loss"}, "DPO: loss", "nats/pair"),
    Plot("dpo", {"accuracy": "accuracy"}, "DPO: accuracy in training", "fraction"),
)


def read_curves(path: Path) -> dict[str, dict[str, Curve]]:
    """stage -> metric -> curve of a `metrics.jsonl`; nothing where the file is not there."""
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # the line during which a run was killed, hence the last one
        stage, step, _ = (record.pop(key) for key in ("stage", "step", "wall_s"))
        for metric, value in record.items():
            point = (step, np.nan if value is None else value)
            points.setdefault(stage, {}).setdefault(metric, []).append(point)
    return {
        stage: {metric: (np.array(p)[:, 0], np.array(p)[:, 1]) for metric, p in metrics.items()}
        for stage, metrics in points.items()
    }


def draw(plot: Plot, curves: Mapping[str, Curve]) -> bytes:
    """PNG of some curves (name in the legend -> curve): every step faint, their running mean strong."""
    figure, axes = blank(plot.title, "step", plot.unit)
    for (name, (steps, values)), colour in zip(curves.items(), COLOURS, strict=False):
        if len(values) > 1:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, running_mean(values), color=colour, linewidth=1.8, label=name)
        else:
            axes.plot(steps, values, "o", color=colour, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.margins(x=0.01)
    if len(curves) > 1:
        axes.legend(fontsize=8, frameon=False)
    return png(figure)


def blank(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """An empty picture in that style."""
    figure = Figure(figsize=(4.4, 2.7), layout="constrained")
    axes = figure.add_subplot()
    dress(axes, title, x, y)
    return figure, axes


def dress(axes: Axes, title: str, x: str, y: str) -> None:
    """The style of all pictures; `x` and `y` name the axes."""
    axes.set_title(title, fontsize=10, fontweight="bold", loc="left", color="#1f2933")
    axes.set_xlabel(x, fontsize=8, color="#52606d")
    axes.set_ylabel(y, fontsize=8, color="#52606d")
    axes.tick_params(labelsize=8, colors="#52606d", length=0)
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#cbd2d9")


def png(figure: Figure) -> bytes:
    """The picture as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the last twentieth of all steps at every step; a gap (NaN) counts for nothing."""
    width = max(1, len(values) // 20)
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return np.array([np.nan if np.isnan(w).all() else np.nanmean(w) for w in windows])
