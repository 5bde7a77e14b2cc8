"""Curves of one training stage as an SVG: losses large, everything else small beside them."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_kosmosg.toy.report.history import History, Points, smooth

_INK, _FAINT, _GRID = "#1f2933", "#64748b", "#e2e8f0"
_COLOURS = ("#0f766e", "#c2410c", "#6d28d9", "#0369a1", "#a16207")
_MOST_POINTS = 400
_LOG_RANGE = 8.0
"""Ratio of largest to smallest value from which a logarithmic axis is clearer."""
_STYLE: dict[Any, Any] = {  # Any: matplotlib's own names and values of settings
    "font.size": 8.5,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": _FAINT,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "legend.frameon": False,
}


def stage_chart(history: History) -> str:
    """SVG text: losses with their held-out values, other measures, gradient norm, lr, speed."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.4, 4.0), layout="constrained")
        grid = figure.add_gridspec(2, 4)
        _measures(figure.add_subplot(grid[:, :2]), history, history.losses(), "loss", log=True)
        panels = [figure.add_subplot(grid[i, j]) for i in (0, 1) for j in (2, 3)]
        others = history.others()
        if others:
            _measures(panels[0], history, others, ", ".join(_label(name) for name in others))
        else:
            _single(panels[0], history, "tokens_per_sec", "tokens per second", smoothed=True)
        _single(panels[1], history, "samples_per_sec", "samples per second", smoothed=True)
        _single(panels[2], history, "grad_norm", "gradient norm", smoothed=True)
        _single(panels[3], history, "lr", "learning rate", smoothed=False)
        for panel in panels[:2]:
            panel.tick_params(labelbottom=False)
        for panel in (figure.axes[0], *panels[2:]):
            panel.set_xlabel("iteration")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _measures(
    axes: Axes, history: History, names: list[str], title: str, log: bool = False
) -> None:
    values: list[float] = []
    for name, colour in zip(names, _cycle(len(names)), strict=True):
        if name in history.series:
            iterations, raw = history.series[name]
            values += raw
            axes.plot(*_thin((iterations, raw)), color=colour, alpha=0.22, linewidth=0.8)
            line = _thin((iterations, smooth(raw, len(raw) // 20)))
            axes.plot(*line, color=colour, linewidth=1.6, label=_label(name))
        held_out = history.held_out(name)
        if held_out is not None:
            axes.plot(
                *held_out, "o", color=colour, markersize=4.5, markerfacecolor="white",
                label=f"{_label(name)}, held out",
            )  # fmt: skip
    if log and values and min(values) > 0 and max(values) > _LOG_RANGE * min(values):
        axes.set_yscale("log")
    if names:
        axes.legend(fontsize=8)
    _finish(axes, title)


def _single(axes: Axes, history: History, name: str, title: str, smoothed: bool) -> None:
    if name in history.series:
        iterations, raw = history.series[name]
        if smoothed:
            axes.plot(*_thin((iterations, raw)), color=_FAINT, alpha=0.25, linewidth=0.7)
        line = smooth(raw, len(raw) // 20) if smoothed else raw
        axes.plot(*_thin((iterations, line)), color=_INK, linewidth=1.3)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    else:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=_FAINT)
    _finish(axes, title)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.grid(True, color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def _thin(points: Points) -> Points:
    """At most _MOST_POINTS of the points, evenly spaced, the last one among them."""
    iterations, values = points
    step = max(1, -(-len(values) // _MOST_POINTS))
    if step == 1:
        return points
    picked = sorted({*range(0, len(values), step), len(values) - 1})
    return [iterations[i] for i in picked], [values[i] for i in picked]


def _cycle(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _label(name: str) -> str:
    return name.replace("_", " ")
