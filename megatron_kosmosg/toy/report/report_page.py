"""The whole page, in the order in which a sceptic reads it; page.html says what stands where."""

from __future__ import annotations

from pathlib import Path

from megatron_kosmosg.config.overwrites import refuse_to_overwrite
from megatron_kosmosg.files import write_text
from megatron_kosmosg.pages import render_page
from megatron_kosmosg.toy.report import sections
from megatron_kosmosg.toy.report.report_inputs import ReportInputs, read_inputs

_TEMPLATE = Path(__file__).with_name("page.html")


def write_report(out: Path) -> Path:
    """OUT/report.html, replaced atomically. Raises ValueError when `out` holds nothing to show, and
    ConfigError when the page would be written over what it shows."""
    inputs, target = read_inputs(out), out / "report.html"
    refuse_to_overwrite([target], inputs.files, "--output")
    write_text(target, render(inputs))
    return target


def render(inputs: ReportInputs) -> str:
    """The page's HTML; it refers to no other file."""
    return render_page(
        _TEMPLATE,
        inputs=inputs,
        conclusion=sections.conclusion(inputs),
        tiles=sections.tiles(inputs),
        groups=sections.grouped(inputs.rows),
        numeric=sections.NUMERIC,
        charts=sections.charts(inputs),
        number=sections.number,
        duration=sections.duration,
        track=sections.track,
    )
