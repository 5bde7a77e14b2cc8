"""The page of a rehearsal: memory over time as an image, and what the GPU would wait for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kosmosg.pages import render_page
from megatron_kosmosg.rehearsal import rehearsal_report as report_of

WIDTH, HEIGHT = 1000, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 8, 10, 26
_COLOURS = {
    "update": "#d5dbe3",
    "forward": "#bfdbfe",
    "forward of the U-Net": "#fde68a",
    "backward": "#bbf7d0",
    "backward of the U-Net": "#fed7aa",
    "exchange": "#e9d5ff",
    "serve": "#d5dbe3",
}
_OTHER_COLOUR = "#eef2f6"
_TICKS = 4


@dataclass(frozen=True)
class MemoryChart:
    """Geometry of an image of WIDTH x HEIGHT."""

    outline: str
    """Points of the polygon under the curve."""
    bands: list[tuple[float, float, str]]
    """Phases from left to right: x, width, colour."""
    legend: list[tuple[str, str]]
    """(name, colour) of the phases that occur."""
    ticks: list[tuple[float, str]]
    """y and GiB."""
    lines: list[tuple[float, str]]
    """y and name of levels: between updates, planned."""
    kernels: int


def write_chart(kind: dict[str, Any]) -> MemoryChart:
    """The chart of one kind of rank that got to the end of its update."""
    answer, planned = kind["rehearsed"], kind["planned"]
    timeline = answer["timeline"]
    heights, total = timeline["bytes"], timeline["kernels"]
    levels = {"between updates": answer["held"]["total"]}
    if planned is not None:
        levels["planned peak"] = planned["tensors"]
    top = max([*heights, *levels.values()]) * 1.06

    def x(share: float) -> float:
        return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

    def y(num_bytes: float) -> float:
        return round(HEIGHT - _BOTTOM - num_bytes / top * (HEIGHT - _TOP - _BOTTOM), 1)

    count = len(heights)
    points = [(x(i / max(count - 1, 1)), y(height)) for i, height in enumerate(heights)]
    outline = [(x(0), y(0)), *points, (x(1), y(0))]
    spans = timeline["spans"]
    ends = [start for _, start in spans[1:]] + [total]
    bands = [
        (x(start / total), round(x(end / total) - x(start / total), 1), _colour(name))
        for (name, start), end in zip(spans, ends, strict=True)
        if end > start
    ]
    names = dict.fromkeys(
        name for (name, start), end in zip(spans, ends, strict=True) if end > start
    )
    return MemoryChart(
        outline=" ".join(f"{a},{b}" for a, b in outline),
        bands=bands,
        legend=[(name, _colour(name)) for name in names],
        ticks=[
            (y(top * i / _TICKS / 1.06), f"{top * i / _TICKS / 1.06 / report_of.GIB:.3g}")
            for i in range(_TICKS + 1)
        ],
        lines=[(y(level), name) for name, level in levels.items()],
        kernels=total,
    )


def to_page(report: dict[str, Any], command: str) -> str:
    """A self-contained HTML page. command: how to make it again."""
    kinds = []
    for kind in report["kinds"]:
        shown: dict[str, Any] = {"title": report_of.title(kind), "wrong": report_of.failure(kind)}
        if shown["wrong"] is None:
            answer = kind["rehearsed"]
            shown |= {
                "chart": write_chart(kind),
                "memory": report_of.memory_lines(kind),
                "phases": report_of.phase_rows(answer),
                "waits": report_of.waits(answer),
                "attention": report_of.attention(answer),
            }
        kinds.append(shown)
    return render_page(
        Path(__file__).with_name("page.html"),
        headline=report_of.headline(report),
        command=command,
        kinds=kinds,
        cannot_see=report_of.CANNOT_SEE,
        width=WIDTH,
        height=HEIGHT,
        left=_LEFT,
        right=WIDTH - _RIGHT,
        bottom=HEIGHT - _BOTTOM,
        top=_TOP,
    )


def _colour(phase: str) -> str:
    return _COLOURS.get(phase, _OTHER_COLOUR)
