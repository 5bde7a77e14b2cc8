"""A trace.json as an image for documents: one row per rank, micro-batches numbered."""

from __future__ import annotations

from typing import Any

_WIDTH, _LABEL, _ROW, _GAP, _TOP = 1000, 190, 34, 10, 30
_COLOURS = {
    "forward": ("#2b6cb0", "forward"),
    "backward": ("#63a4dc", "backward"),
    "U-Net": ("#c53030", "U-Net"),
    "wait for answer": ("#dddddd", "waits"),
    "idle": ("#dddddd", "waits"),
    "forward-recv": ("#dddddd", "waits"),
    "backward-recv": ("#dddddd", "waits"),
    "wait for data": ("#d69e2e", "data"),
    "send condition": ("#222222", "sends"),
    "send answer": ("#222222", "sends"),
    "all-grads-sync": ("#805ad5", "gradients, optimizer"),
    "optimizer-inner-step": ("#805ad5", "gradients, optimizer"),
}
"""(colour, word of the legend) of the stretches that are drawn, later ones over earlier ones."""

_NUMBERED = ("forward", "backward", "U-Net")


def draw_trace(trace: dict[str, Any]) -> str:
    """SVG of the program's lane of every rank."""
    events = trace["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    drawn = [e for e in events if e["ph"] == "X" and e["cat"] in _COLOURS and not e["tid"]]
    end = max(e["ts"] + e["dur"] for e in events if e["ph"] == "X")
    scale = (_WIDTH - _LABEL - 10) / end
    height = _TOP + len(names) * (_ROW + _GAP) + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{_LABEL}" y="18">{end / 1000:.0f} ms from left to right</text>',
    ]
    tops = {rank: _TOP + row * (_ROW + _GAP) for row, rank in enumerate(sorted(names))}
    for rank, top in tops.items():
        rank_name, role = names[rank].split(": ", 1)
        lines.append(f'<text x="4" y="{top + 14}">{rank_name}</text>')
        lines.append(f'<text x="4" y="{top + 28}">{role}</text>')
    order, numbers = list(_COLOURS), []
    for event in sorted(drawn, key=lambda e: order.index(e["cat"])):
        left, top = _LABEL + event["ts"] * scale, tops[event["pid"]]
        width = max(event["dur"] * scale, 0.8)
        lines.append(
            f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_ROW}" '
            f'fill="{_COLOURS[event["cat"]][0]}"><title>{event["name"]}</title></rect>'
        )
        if event["cat"] in _NUMBERED and width > 12:
            # A backward pass begins with the wait for its gradient, which is drawn over it.
            x = left + (width - 10 if event["cat"] == "backward" else 3)
            number = event["args"]["micro_batch"]
            numbers.append(f'<text x="{x:.1f}" y="{top + 21}" fill="white">{number}</text>')
    lines += numbers
    left = _LABEL
    for word, colour in {word: colour for colour, word in _COLOURS.values()}.items():
        lines.append(f'<rect x="{left}" y="{height - 26}" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{left + 16}" y="{height - 16}">{word}</text>')
        left += 30 + 7 * len(word)
    return "\n".join([*lines, "</svg>"]) + "\n"
