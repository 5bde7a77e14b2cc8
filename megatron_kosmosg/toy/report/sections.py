"""Each section of the page as HTML: verdict, story, pictures, numbers, curves, times, commands."""

from __future__ import annotations

import base64
from html import escape

from megatron_kosmosg.toy.report.charts import stage_chart
from megatron_kosmosg.toy.report.history import History
from megatron_kosmosg.toy.report.inputs import Picture, ReportInputs

_STAGE_TITLES = {
    "pretrain": "1. pretrain: reading text and pictures",
    "align": "2. align: the image decoder's language",
    "instruct": "3. instruct: drawing what the pictures show",
}


def verdict(inputs: ReportInputs) -> str:
    """The banner: thresholds met, missed, or not asserted."""
    asserted = [row for row in inputs.rows if row["passed"] is not None]
    missed = [f"{row['group']}: {row['name']}" for row in asserted if not row["passed"]]
    if inputs.mode == "fast":
        text = (
            "Fast run. A few iterations per stage show that every step works; the pictures are "
            "not meant to be good and thresholds do not count. Without <code>--fast</code> the "
            "same command trains properly."
        )
        return _banner("warn", text)
    if not asserted:
        return _banner("warn", "No threshold was evaluated; see the log of the evaluation.")
    if missed:
        names = "; ".join(escape(name) for name in missed)
        return _banner("bad", f"{len(missed)} of {len(asserted)} thresholds are missed: {names}.")
    return _banner("good", f"All {len(asserted)} thresholds are met.")


def tiles(inputs: ReportInputs) -> str:
    """The few numbers a visitor looks for first."""
    cells = []
    asserted = [row for row in inputs.rows if row["passed"] is not None]
    if asserted and inputs.mode != "fast":
        met = sum(row["passed"] for row in asserted)
        cells.append((f"{met} of {len(asserted)}", "quality thresholds met"))
    training = [step for step in inputs.steps if step["name"] in _STAGE_TITLES]
    if training:
        wall = sum(step["seconds"] for step in training)
        busy = sum(step["cpu_seconds"] for step in training)
        cells.append((duration(wall), f"training of the three stages ({duration(busy)} CPU)"))
    updates = [inputs.histories[s].last_iteration for s in _STAGE_TITLES if s in inputs.histories]
    if updates:
        cells.append((" + ".join(map(str, updates)), "updates in pretrain, align, instruct"))
    if inputs.machine:
        cores = inputs.machine["cores"]
        cells.append(("2 ranks", f"on {cores} core(s): {inputs.machine['processor']}"))
    body = "".join(
        f"<div class=tile><b>{escape(a)}</b><span>{escape(b)}</span></div>" for a, b in cells
    )
    return f"<div class=tiles>{body}</div>" if cells else ""


def pictures(inputs: ReportInputs) -> str:
    """Every sheet of the evaluation."""
    if not inputs.pictures:
        return "<p class=soft>The evaluation wrote no pictures.</p>"
    return f"<div class=figures>{''.join(_figure(picture) for picture in inputs.pictures)}</div>"


def numbers(inputs: ReportInputs) -> str:
    """The metrics table; the bar runs from chance (empty) to the judge's ceiling (full)."""
    if not inputs.rows:
        return "<p class=soft>The evaluation wrote no metrics.</p>"
    lines, group = [], None
    order = list(dict.fromkeys(row["group"] for row in inputs.rows))
    for row in sorted(inputs.rows, key=lambda row: order.index(row["group"])):
        if row["group"] != group:
            group = row["group"]
            lines.append(f"<tr class=group><td colspan=9>{escape(group)}</td></tr>")
        lines.append(_metric_row(row))
    head = "".join(
        f"<th{' class=num' if name in _NUMERIC else ''}>{name}</th>"
        for name in ("measure", "value", "threshold", "met", "chance to ceiling", *_NUMERIC[2:])
    )
    where = (
        "<p>All on combinations of shape, pattern and colour that never occurred in training. "
        "Chance is what a guess, or each picture judged against another prompt's truth, gives; the "
        "ceiling is what the judge says of the true scenes.</p>"
    )
    return f"{where}<div class=scroll><table><tr>{head}</tr>{''.join(lines)}</table></div>"


_NUMERIC = ("value", "threshold", "chance", "ceiling", "n", "seed")


def curves(inputs: ReportInputs) -> str:
    """One chart per training, with its speed in words."""
    parts = []
    for name, history in inputs.histories.items():
        title = _STAGE_TITLES.get(name, name.replace("ablations/", "ablation: "))
        image = data_uri(stage_chart(history).encode(), "image/svg+xml")
        parts.append(
            f"<h3>{escape(title)}</h3><figure class=chart>"
            f'<img src="{image}" alt="Training curves: {escape(title)}">'
            f"<figcaption>{escape(_speed(history))}</figcaption></figure>"
        )
    return "".join(parts) or "<p class=soft>No training has written metrics.</p>"


def timings(inputs: ReportInputs) -> str:
    """Wall and CPU time of every step."""
    if not inputs.steps:
        return "<p class=soft>Times are recorded when examples/quickstart.sh runs the steps.</p>"
    longest = max(step["seconds"] for step in inputs.steps) or 1.0
    lines = [
        f"<tr><td>{escape(step['title'])}</td>"
        f"<td class=num>{duration(step['seconds'])}</td>"
        f"<td class=num>{duration(step['cpu_seconds'])}</td>"
        f"<td><span class=bar style='width:{max(2, 280 * step['seconds'] / longest):.0f}px'>"
        "</span></td></tr>"
        for step in inputs.steps
    ]
    lines.append(
        "<tr class=group><td>all</td>"
        f"<td class=num>{duration(sum(s['seconds'] for s in inputs.steps))}</td>"
        f"<td class=num>{duration(sum(s['cpu_seconds'] for s in inputs.steps))}</td><td></td></tr>"
    )
    head = "<tr><th>step</th><th class=num>wall</th><th class=num>CPU</th><th></th></tr>"
    return f"<table>{head}{''.join(lines)}</table>"


def commands(inputs: ReportInputs) -> str:
    """The commands as they were run, ready to paste."""
    if not inputs.steps:
        return "<p class=soft>No commands were recorded.</p>"
    lines = "\n".join(
        f"<span class=note># {escape(step['title'])} ({duration(step['seconds'])})</span>\n"
        f"{escape(step['command'])}"
        for step in inputs.steps
    )
    where = "<p>Run from the repository's root, in the environment that the quickstart made.</p>"
    return f"{where}<pre class=wrap><code>export OMP_NUM_THREADS=1\n{lines}</code></pre>"


def duration(seconds: float) -> str:
    """`8.4 s`, `3 min 20 s` or `1 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def data_uri(content: bytes, kind: str) -> str:
    """The content inside an address, so that the page needs no other file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _banner(kind: str, text: str) -> str:
    return f'<div class="banner {kind}"><p>{text}</p></div>'


def _figure(picture: Picture) -> str:
    source = data_uri(picture.path.read_bytes(), "image/png")
    image = f'<img src="{source}" alt="{escape(picture.title)}">'
    if picture.columns or picture.rows:
        labels = [
            f"<div class={kind}>{''.join(f'<span>{escape(text)}</span>' for text in texts)}</div>"
            for kind, texts in (("columns", picture.columns), ("rows", picture.rows))
            if texts
        ]
        image = f"<div class=sheet>{''.join(labels)}{image}</div>"
    caption = f"<figcaption><b>{escape(picture.title)}</b>{escape(picture.caption)}</figcaption>"
    return f"<figure>{caption}{image}</figure>"


def _metric_row(row: dict) -> str:
    unit = f" {escape(row['unit'])}" if row["unit"] else ""
    sign = {">=": "&ge;", "<=": "&le;"}.get(row["direction"], "")
    threshold = "" if row["threshold"] is None else f"{sign} {_number(row['threshold'])}"
    mark = {True: "<span class='mark yes'>&#10003;</span>", None: ""}.get(
        row["passed"], "<span class='mark no'>&#10007; missed</span>"
    )
    plain = "".join(f"<td class=num>{_number(row[key])}</td>" for key in _NUMERIC[2:])
    return (
        f"<tr><td>{escape(row['name'])}</td><td class=num><b>{_number(row['value'])}</b>{unit}</td>"
        f"<td class=num>{threshold}</td><td>{mark}</td><td>{_track(row)}</td>{plain}</tr>"
    )


def _track(row: dict) -> str:
    """Where the value (bar) and the threshold (tick) lie between chance and ceiling."""
    chance, ceiling = row["chance"], row["ceiling"]
    if chance is None or ceiling is None or chance == ceiling or row["value"] is None:
        return ""

    def place(value: float) -> float:
        return 100 * min(max((value - chance) / (ceiling - chance), 0.0), 1.0)

    kind = {True: "yes", False: "no", None: "open"}[row["passed"]]
    tick = ""
    if row["threshold"] is not None:
        tick = f"<u style='left:{place(row['threshold']):.1f}%'></u>"
    bar = f"<i class={kind} style='width:{place(row['value']):.1f}%'></i>"
    return f"<div class=track>{bar}{tick}</div>"


def _number(value: float | int | None) -> str:
    if value is None:
        return "&ndash;"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _speed(history: History) -> str:
    words = [f"{history.last_iteration} updates"]
    for name, unit, scale in (
        ("samples_per_sec", "samples/s", 1.0),
        ("tokens_per_sec", "tokens/s", 1.0),
        ("tflops", "GFLOP/s", 1000.0),
    ):
        value = history.median(name)
        if value is not None:
            words.append(f"{value * scale:.4g} {unit}")
    return f"{words[0]}; median {', '.join(words[1:])}." if words[1:] else f"{words[0]}."
