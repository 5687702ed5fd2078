"""Pictures of a reward model's report card, as PNG."""

from collections.abc import Sequence

import numpy as np

from rlhf.card.calibration import Calibration, Histogram
from rlhf.card.figures import Bucket, Length, Point
from rlhf.plots import COLOURS, Plot, blank, draw, png

Picture = tuple[str, bytes]  # title, PNG
BLUE, ORANGE, GREEN = COLOURS
RECORDED = (
    Plot("reward", {"score_mean": "mean", "score_std": "std"}, "Scores in training", "score"),
    Plot(
        "reward",
        {"accuracy": "in training", "heldout_accuracy": "held out"},
        "Accuracy in training",
        "fraction",
    ),
)


def bucket_name(bucket: Bucket) -> str:
    """Its bounds in whole tokens, both included."""
    if bucket.low is None or bucket.high is None:
        return f"< {bucket.high}" if bucket.low is None else f"≥ {bucket.low}"
    last = bucket.high - 1
    return f"{bucket.low}" if last == bucket.low else f"{bucket.low} to {last}"


def draw_reliability(calibration: Calibration) -> Picture:
    """Accuracy by confidence (Guo et al. 2017, figure 1); the larger the dot, the more pairs."""
    title = "Calibration"
    figure, axes = blank(title, "confidence", "accuracy")
    axes.plot([0.5, 1], [0.5, 1], color="#9aa5b1", linewidth=1, linestyle="--", label="calibrated")
    points = np.array([(x.confidence, x.accuracy, x.count) for x in calibration.bins if x.count])
    confidence, accuracy, count = points.T
    axes.plot(confidence, accuracy, color=BLUE, linewidth=1.2)
    axes.scatter(confidence, accuracy, s=8 + 90 * count / count.max(), color=BLUE)
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(-0.03, 1.03)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    return title, png(figure)


def draw_length(length: Length) -> Picture:
    """Accuracy of model and ruler by how much longer the preferred answer is; empty buckets are left out."""
    title = "Accuracy by length"
    figure, axes = blank(title, "tokens the preferred answer is longer by", "accuracy")
    seen = [found for found in length.buckets if found.accuracy.count]
    bars = np.array([(x.accuracy.value, x.ruler) for x in seen], np.float64).T
    place = np.arange(len(seen))
    axes.bar(place - 0.2, bars[0], 0.4, color=BLUE, label="model")
    axes.bar(place + 0.2, bars[1], 0.4, color="#cbd2d9", label="ruler")
    for x, accuracy in zip(place - 0.2, (found.accuracy for found in seen), strict=True):
        if accuracy.low is not None and accuracy.high is not None:
            axes.vlines(x, accuracy.low, accuracy.high, color="#1f2933", linewidth=1)
    axes.axhline(0.5, color="#9aa5b1", linewidth=1, linestyle="--")
    axes.set_xticks(place, [bucket_name(found) for found in seen], rotation=35)
    axes.set_ylim(0, 1.03)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return title, png(figure)


def draw_margins(margins: Histogram) -> Picture:
    """Pairs by margin, wrong ones left of 0 and right ones right of it."""
    title = "Margins"
    figure, axes = blank(title, "score of the preferred answer - the other's", "pairs")
    edges = np.array(margins.edges)
    colours = [GREEN if edge >= 0 else ORANGE for edge in edges[:-1]]
    axes.bar(edges[:-1], margins.counts, np.diff(edges), align="edge", color=colours)
    axes.margins(x=0.01)
    return title, png(figure)


def draw_history(history: Sequence[Point]) -> list[Picture]:
    """What the steps of training recorded: scores, and accuracy; none of what nobody recorded."""
    pictures = []
    for plot in RECORDED:
        curves = {}
        for field, name in plot.metrics.items():
            points = [(x["step"], x[field]) for x in map(vars, history) if x[field] is not None]
            if points:
                steps, values = np.array(points).T
                curves[name] = (steps, values)
        if curves:
            pictures.append((plot.title, draw(plot, curves)))
    return pictures
