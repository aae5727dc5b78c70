"""curves.png: loss, CIDEr and learning rate of a training run over its steps. Needs matplotlib (the extra `train`)."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from capcli.training.output.history import Point

Series = npt.NDArray[np.float64]  # [2, n]: steps and values

WIDTH, TALL, LOW = 9.0, 3.6, 1.9  # inches: width of the picture, heights of the panel of losses and of the others
DPI = 120
DARK, GREY, GRID = "#22252b", "#7d8590", "#e6e8eb"
BLUE, ORANGE, GREEN, VIOLET = "#3565c4", "#e07b29", "#2f9d6a", "#8a63b8"
SMOOTH_FROM = 40  # points; fewer are drawn without smoothing
LOGARITHMIC_FROM = 4.0  # largest loss / smallest loss; on a linear axis the steep start would flatten the rest
FEW = 60  # points up to which each is marked


def curves_png(points: Sequence[Point]) -> bytes | None:
    """A PNG with a panel each for the losses, CIDEr and the learning rate, where there are points of them.

    None when there are none at all. Numbers that are not finite are left out.
    """
    loss, val_loss = series(points, lambda p: p.loss), series(points, lambda p: p.val_loss)
    cider, rate = series(points, lambda p: p.scores.get("CIDEr")), series(points, lambda p: p.learning_rate)
    panels: list[tuple[float, Callable[[Any], None]]] = []
    if loss.size or val_loss.size:
        panels.append((TALL, lambda axes: losses(axes, loss, val_loss)))
    if cider.size:
        panels.append((LOW, lambda axes: ciders(axes, cider)))
    if rate.size:
        panels.append((LOW, lambda axes: rates(axes, rate)))
    if not panels:
        return None
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg", "font.size": 9.5}):
        return picture(panels, points)


def picture(panels: Sequence[tuple[float, Callable[[Any], None]]], points: Sequence[Point]) -> bytes:
    heights = [height for height, _ in panels]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.7), dpi=DPI, layout=ConstrainedLayoutEngine(h_pad=0.11))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)
    for (_, fill), axes in zip(panels, grid[:, 0], strict=True):
        plain(axes)
        fill(axes)
    bottom = grid[-1, 0]
    bottom.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    bottom.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    bottom.tick_params(axis="x", length=3)
    bottom.set_xlabel(f"step ({points[-1].epoch:.3g} epochs in all)", color=GREY)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def plain(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, length=0)
    axes.margins(x=0.02, y=0.1)


def losses(axes: Any, loss: Series, val_loss: Series) -> None:
    smooth = smoothed(loss)
    if smooth is None:
        axes.plot(*loss, color=BLUE, linewidth=1.6, label="loss", **marks(loss))
    else:
        axes.plot(*loss, color=BLUE, linewidth=0.6, alpha=0.25)
        axes.plot(*smooth, color=BLUE, linewidth=1.8, label="loss, smoothed")
    if val_loss.size:
        axes.plot(*val_loss, color=ORANGE, linewidth=1.8, label="validation loss", **marks(val_loss))
        mark_best(axes, val_loss, int(val_loss[1].argmin()), ORANGE)
    heading(axes, "loss")
    above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
    axes.legend(frameon=False, labelcolor=DARK, ncols=2, **above)
    values = np.concatenate([loss[1], val_loss[1]])
    if values.min() > 0 and values.max() > LOGARITHMIC_FROM * values.min():
        axes.set_yscale("log")
        decades = np.log10(values.max() / values.min())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def ciders(axes: Any, cider: Series) -> None:
    axes.plot(*cider, color=GREEN, linewidth=1.8, **marks(cider))
    mark_best(axes, cider, int(cider[1].argmax()), GREEN)
    axes.set_ylim(bottom=min(0.0, float(cider[1].min())))
    heading(axes, "CIDEr of validation captions")


def rates(axes: Any, rate: Series) -> None:
    axes.plot(*rate, color=VIOLET, linewidth=1.6, **marks(rate))
    axes.set_ylim(bottom=min(0.0, float(rate[1].min())))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}".replace("e-0", "e-")))
    heading(axes, "learning rate")


def heading(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", color=DARK, fontsize=10.5, fontweight="bold")


def mark_best(axes: Any, values: Series, at: int, colour: str) -> None:
    """Circles the best value and writes it next to the circle."""
    step, value = values[:, at]
    axes.plot([step], [value], "o", color=colour, markersize=8, markerfacecolor="white", markeredgewidth=2, zorder=5)
    begin, end = axes.get_xlim()
    late = step > begin + 0.85 * (end - begin)
    axes.annotate(
        f"{value:.3f}" if abs(value) < 1e4 else f"{value:.3g}",
        (step, value),
        xytext=(4 if late else -4, 8),
        textcoords="offset points",
        ha="right" if late else "left",
        va="bottom",
        color=colour,
        fontweight="bold",
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )


def marks(values: Series) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4.5} if values.shape[1] <= FEW else {}


def series(points: Sequence[Point], value: Callable[[Point], float | None]) -> Series:
    """The steps and values of the points with a finite value: [2, n]."""
    known = [(point.step, number) for point in points if (number := value(point)) is not None]
    pairs = np.array(known, dtype=np.float64).reshape(-1, 2).T
    return pairs[:, np.isfinite(pairs[1])]


def smoothed(values: Series) -> Series | None:
    """A moving average over a thirtieth of the points, over fewer at both ends; None for too few points."""
    count = values.shape[1]
    if count < SMOOTH_FROM:
        return None
    half = max(2, count // 60)
    sums = np.concatenate([[0.0], np.cumsum(values[1])])
    at = np.arange(count)
    before = np.minimum(at, half)
    after = np.minimum(count - 1 - at, before)  # symmetric windows: the steep start is not flattened
    means = (sums[at + after + 1] - sums[at - before]) / (after + before + 1)
    return np.stack([values[0], means])
