"""What an evaluation leaves: one JSON file with everything it depends on, and one page.

Nothing in either depends on when, where and by how many processes they were made.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_kosmosg import __version__
from megatron_kosmosg.evaluation.networks import Weights
from megatron_kosmosg.evaluation.preprocessing import read_rgb
from megatron_kosmosg.evaluation.similarity import (
    BOOTSTRAP_DRAWS,
    BOOTSTRAP_SEED,
    METRICS,
    OF_REFERENCES,
    Item,
    summarise,
)
from megatron_kosmosg.files import write_json, write_text
from megatron_kosmosg.pages import data_uri, render_page

RESULT_FILE, PAGE_FILE = "result.json", "report.html"
SHOWN = 4
"""Best, median and worst images of a metric on the page, each."""
THUMBNAIL, JPEG_QUALITY = 160, 85
LIBRARIES = ("torch", "transformers", "pillow", "numpy")
_TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Table:
    """A table of mean scores by one property of the items."""

    title: str
    rows: Sequence[tuple[str, Sequence[float | None]]]
    """(name, one value a column); None where there is none."""
    columns: Sequence[str]


@dataclass(frozen=True)
class PublishedTable:
    """Rows of a paper's table, which the page shows below this evaluation's own."""

    title: str
    columns: Sequence[str]
    """Metrics by their names for people."""
    rows: Sequence[tuple[str, Sequence[float | None]]]
    """(method, one value a column); None where the paper has none."""
    digits: int
    """After the point, as the paper prints them."""


@dataclass(frozen=True)
class Evaluation:
    """Items with their scores, and what is said about them."""

    title: str
    protocol: Mapping[str, Any]
    """What distinguishes these numbers from others, by name."""
    items: Sequence[Item]
    scores: Mapping[str, list[list[float]]]
    """Of similarity.similarities."""
    weights: Mapping[str, Weights]
    fid: Mapping[str, Any] | None = None
    published: Sequence[PublishedTable] = ()
    warnings: Sequence[str] = ()
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """{property: its value of each item}, of which tables are made."""
    references: Sequence[str] = ()
    """What the references of every item are, in their order, where each has its own mean."""


def result_of(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation as the value of result.json."""
    metrics: dict[str, Any] = {
        name: summarise(evaluation.items, scores).to_json() | _by_reference(evaluation, name)
        for name, scores in evaluation.scores.items()
    }
    if evaluation.fid is not None:
        metrics["fid"] = dict(evaluation.fid)
    return {
        "title": evaluation.title,
        "protocol": dict(evaluation.protocol),
        "metrics": metrics,
        "warnings": list(evaluation.warnings),
        "intervals": {
            "share": 0.95,
            "draws": BOOTSTRAP_DRAWS,
            "seed": BOOTSTRAP_SEED,
            "clusters": len({item.cluster or item.name for item in evaluation.items}),
        },
        "weights": {name: found.described() for name, found in sorted(evaluation.weights.items())},
        "versions": {"megatron-kosmosg": __version__}
        | {library: version(library) for library in LIBRARIES},
        "tables": {
            table.title: {name: _named(table, values) for name, values in table.rows}
            for table in tables_of(evaluation)
        },
        "items": [_described(evaluation, i) for i in range(len(evaluation.items))],
    }


def _by_reference(evaluation: Evaluation, metric: str) -> dict[str, Any]:
    """The mean with each reference alone, where the evaluation tells them apart."""
    names, scores = evaluation.references, evaluation.scores[metric]
    if not names or metric not in OF_REFERENCES:
        return {}
    means = [max(0.0, sum(column) / len(column)) for column in zip(*scores, strict=True)]
    values = [round(mean, 6) for mean in means]
    return {"by_reference": dict(zip(names, values, strict=True))}


def tables_of(evaluation: Evaluation) -> list[Table]:
    """A table of mean scores for each property of the items."""
    return [
        Table(name, _means(evaluation, values), list(evaluation.scores))
        for name, values in evaluation.groups.items()
    ]


def write_evaluation(folder: Path, evaluation: Evaluation) -> tuple[Path, Path]:
    """The two files, each whole or not at all."""
    result = result_of(evaluation)
    page = render_page(
        _TEMPLATE,
        result=result,
        names=METRICS,
        tables=tables_of(evaluation),
        published=evaluation.published,
        own=_by_names_for_people(result),
        grids=list(_grids(evaluation)),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULT_FILE, result)
    write_text(folder / PAGE_FILE, page)
    return folder / RESULT_FILE, folder / PAGE_FILE


def _by_names_for_people(result: Mapping[str, Any]) -> dict[str, float]:
    """The values by the columns of published tables."""
    return {METRICS.get(name, "FID"): found["value"] for name, found in result["metrics"].items()}


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """The numbers of a result in lines for a terminal."""
    lines = []
    for name, found in result["metrics"].items():
        if name == "fid":
            counts = f"{found['n_generated']:,} generated, {found['n_real']:,} real"
            lines.append(f"FID     {found['value']:.4f}  ({found['protocol']}; {counts})")
        else:
            span = f"{found['low']:.4f} to {found['high']:.4f}"
            lines.append(f"{METRICS[name]:7} {found['value']:.4f}  ({span}; n = {found['n']:,})")
    return lines + [f"warning: {text}" for text in result["warnings"]]


def _named(table: Table, values: Sequence[float | None]) -> dict[str, float | None]:
    return dict(zip(table.columns, values, strict=True))


def _means(
    evaluation: Evaluation, values: Sequence[str]
) -> list[tuple[str, Sequence[float | None]]]:
    rows = []
    for value in dict.fromkeys(values):
        found: list[float | None] = []
        for scores in evaluation.scores.values():
            means = [
                sum(each) / len(each)
                for each, named in zip(scores, values, strict=True)
                if named == value and each
            ]
            found.append(round(sum(means) / len(means), 6) if means else None)
        rows.append((value, found))
    return rows


def _described(evaluation: Evaluation, index: int) -> dict[str, Any]:
    item = evaluation.items[index]
    found: dict[str, Any] = {"name": item.name, "generated": item.generated.name}
    if item.references:
        found["references"] = [path.name for path in item.references]
    if item.text is not None:
        found["text"] = item.text
    for name, scores in evaluation.scores.items():
        rounded = [round(value, 6) for value in scores[index]]
        if rounded:
            found[name] = rounded[0] if len(rounded) == 1 else rounded
    return found


def _grids(evaluation: Evaluation) -> list[dict[str, Any]]:
    """For each metric a grid of its best, median and worst images."""
    grids = []
    for name, scores in evaluation.scores.items():
        means = [(sum(each) / len(each), i) for i, each in enumerate(scores) if each]
        ranked = [i for _, i in sorted(means, key=lambda mean: (-mean[0], mean[1]))]
        middle = max(0, (len(ranked) - SHOWN) // 2)
        spans = {
            "best": ranked[:SHOWN],
            "median": ranked[middle : middle + SHOWN],
            "worst": ranked[-SHOWN:],
        }
        values = {i: mean for mean, i in means}
        rows = [
            {"title": title, "cards": [_card(evaluation.items[i], values[i]) for i in chosen]}
            for title, chosen in spans.items()
        ]
        grids.append({"metric": METRICS[name], "rows": rows})
    return grids


def _card(item: Item, value: float) -> dict[str, Any]:
    shown = [item.generated, *item.references[:2]]
    return {
        "images": [_thumbnail(path) for path in shown],
        "text": item.text or item.name,
        "value": value,
    }


def _thumbnail(path: Path) -> str:
    image = read_rgb(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=JPEG_QUALITY)
    return data_uri(out.getvalue(), "image/jpeg")
