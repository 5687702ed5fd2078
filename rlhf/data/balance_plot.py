"""The picture of length balancing: who won in every bucket, before and after."""

import io
from collections.abc import Sequence

from matplotlib.figure import Figure

from rlhf.data.balance import Bucket

LONGER, SHORTER = "#e8590c", "#2563eb"


def draw_balance(before: Sequence[Bucket], after: Sequence[Bucket], unit: str) -> bytes:
    """PNG: pairs whose longer response is preferred upwards, those whose shorter one is downwards."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for panel, title, found in zip(axes, ("before", "after"), (before, after), strict=True):
        names = [bucket.range.replace(" or more", "+").replace(" to ", "-") for bucket in found]
        panel.bar(names, [b.longer_wins for b in found], color=LONGER, label="longer preferred")
        panel.bar(names, [-b.shorter_wins for b in found], color=SHORTER, label="shorter preferred")
        panel.axhline(0, color="#52606d", linewidth=0.8)
        panel.set_title(f"Length balancing: {title}", fontsize=10, fontweight="bold", loc="left")
        panel.set_xlabel(f"{unit} apart", fontsize=8)
        panel.tick_params(labelsize=7, length=0)
        panel.yaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
        panel.spines[["top", "right", "left"]].set_visible(False)
    axes[0].set_ylabel("pairs", fontsize=8)
    axes[0].legend(fontsize=8, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()
