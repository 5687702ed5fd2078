"""The picture of length balancing: who won in every bucket, before and after."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from rlhf.data.balance import Bucket
from rlhf.plots import COLOURS, dress, png

BLUE, ORANGE, _ = COLOURS


def draw_balance(before: Sequence[Bucket], after: Sequence[Bucket], unit: str) -> bytes:
    """PNG: pairs whose longer response is preferred upwards, those whose shorter one is downwards."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title, found in zip(panels, ("before", "after"), (before, after), strict=True):
        dress(axes, f"Length balancing: {title}", f"{unit} apart", "pairs")
        names = [bucket.range.replace(" or more", "+").replace(" to ", "-") for bucket in found]
        axes.bar(names, [b.longer_wins for b in found], color=ORANGE, label="longer preferred")
        axes.bar(names, [-b.shorter_wins for b in found], color=BLUE, label="shorter preferred")
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
    panels[0].legend(fontsize=8, frameon=False)
    return png(figure)
