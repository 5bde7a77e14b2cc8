"""What a rehearsal found, as text and as rows of tables; every figure is rehearsed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

GIB, MB = 2**30, 1e6
MICRO_BATCH_PHASES = (
    "forward",
    "forward of the U-Net",
    "backward",
    "backward of the U-Net",
    "exchange",
    "images ahead",
    "serve",
)
"""Phases that come once a micro-batch, named again because `phases.py` imports torch."""
CANNOT_SEE = (
    "numbers, time, hangs, NCCL's own errors, kernels that do not exist for a dtype or shape, "
    "the CUDA context, workspaces of cuDNN and cuBLAS, fragmentation, and what torch.compile or "
    "CUDA graphs would do"
)
_HOST, _COPY = "host wait:", "pageable copy"
_SHOWN = 8
"""Lines of each list in the text; the JSON and the page have all."""


@dataclass(frozen=True)
class PhaseRow:
    """What one rank did in one phase."""

    name: str
    of: str
    """Whose counts these are: micro-batch or update."""
    kernels: float
    tflop: float
    moved_gb: float
    """Read and written by the kernels that are no products."""
    alive_gib: float
    peak_gib: float
    waits: float
    pageable_mb: float
    uploaded_mb: float


@dataclass(frozen=True)
class Wait:
    """Something that the GPU would wait for."""

    what: str
    where: str
    """file:line, a group, or autograd."""
    calls: float | None
    """None for copies, of which the bytes are counted."""
    of: str
    num_bytes: float | None


def phase_rows(answer: dict[str, Any]) -> list[PhaseRow]:
    """The rows of a rank's phases in the order in which these came."""
    rows = []
    for name, phase in answer["phases"].items():
        if name == "setup":
            continue
        of, times = _of(name, answer)
        rows.append(
            PhaseRow(
                name,
                of,
                sum(phase["kernels"].values()) / times,
                phase["flops"] / times / 1e12,
                phase["moved"] / times / 1e9,
                phase["alive"] / GIB,
                phase["peak"] / GIB,
                sum(phase["waits"].values()) / times,
                sum(phase["pageable"].values()) / times / MB,
                phase["uploaded"] / times / MB,
            )
        )
    return rows


def waits(answer: dict[str, Any]) -> list[Wait]:
    """Host waits, copies from pageable memory, and what comes from other ranks; each line once."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for name, phase in answer["phases"].items():
        if name == "setup":
            continue
        of, times = _of(name, answer)
        for what, where, calls, num_bytes in _causes(phase):
            total = found.setdefault((what, where, of), [0.0, 0.0])
            total[0] += calls / times
            total[1] += num_bytes / times
    rows = [
        Wait(what, where, calls or None, of, num_bytes or None)
        for (what, where, of), (calls, num_bytes) in found.items()
    ]
    kinds = (_HOST, _COPY)
    order = {
        row: next((i for i, k in enumerate(kinds) if row.what.startswith(k)), 2) for row in rows
    }
    return sorted(rows, key=lambda row: (order[row], row.of != "micro-batch", -(row.calls or 0)))


def _causes(phase: dict[str, Any]) -> Iterator[tuple[str, str, int, int]]:
    """Yields (what, where, calls, bytes) of everything that would wait or copy in a phase."""
    for cause, calls in phase["waits"].items():
        what, _, where = cause.partition(" at ")
        yield f"{_HOST} {what}", where, calls, 0
    for cause, num_bytes in phase["pageable"].items():
        what, _, where = cause.partition(" at ")
        yield f"{_COPY} {what}", where, 0, num_bytes
    for cause, traffic in phase["collectives"].items():
        kind, _, group = cause.partition(" over ")
        yield kind, group, traffic["calls"], traffic["num_bytes"]


def attention(answer: dict[str, Any]) -> dict[str, Counter[str]]:
    """How often one rank calls each attention kernel, by shape: {kernel: Counter}."""
    found: dict[str, Counter[str]] = {}
    for phase in answer["phases"].values():
        for kernel, shapes in phase["attention"].items():
            found.setdefault(kernel, Counter()).update(shapes)
    return found


def peak(answer: dict[str, Any]) -> int:
    """Bytes of tensors on the device, at most."""
    return max(phase["peak"] for phase in answer["phases"].values())


def has_errors(report: dict[str, Any]) -> bool:
    """Whether a rank did not get to the end of its update."""
    return any("phases" not in kind["rehearsed"] for kind in report["kinds"])


def headline(report: dict[str, Any]) -> list[str]:
    """Lines that say what was rehearsed, and the notes."""
    lines = [
        f"{report['stage']} on {report['num_gpus']} x {report['gpu']}, {report['precision']}: "
        "rehearsed on fake GPUs, not measured",
        f"a micro-batch: {report['micro_batch_size']} samples, {report['length']} positions a row, "
        f"{report['images']} prompt images; {report['rehearsed']} of an update's "
        f"{report['num_micro_batches']} micro-batches rehearsed",
    ]
    return lines + [f"note: {note}" for note in report["notes"]]


def title(kind: dict[str, Any]) -> str:
    """The title of one kind of rank."""
    return (
        f"{kind['name']}: {kind['count']} ranks, rehearsed as rank {kind['rank']}; " + kind["holds"]
    )


def failure(kind: dict[str, Any]) -> str | None:
    """Why this kind of rank did not get to the end of its update."""
    rehearsed = kind["rehearsed"]
    if "skipped" in rehearsed:
        return f"{kind['name']}: not rehearsed, {rehearsed['skipped']}"
    if "error" not in rehearsed:
        return None
    error = rehearsed["error"]
    place = error.get("place", "?")
    return f"{kind['name']}: in phase {error['phase']} at {place}: {error['message']}"


def memory_lines(kind: dict[str, Any]) -> list[str]:
    """Peak of the tensors beside the plan's, and what is planned on top of them."""
    answer, planned = kind["rehearsed"], kind["planned"]
    counted, held = peak(answer), answer["held"]["total"]
    line = f"tensors: {counted / GIB:.2f} GiB at most, {held / GIB:.2f} between updates"
    if planned is None:
        return [line]
    over = planned["tensors"] / counted - 1
    return [
        f"{line}; the plan has {planned['tensors'] / GIB:.2f} ({over:+.1%}) and "
        f"{planned['total'] / GIB:.2f} with context, workspaces and fragmentation"
    ]


def to_text(report: dict[str, Any]) -> str:
    """The report as text for people; its lists are cut short."""
    lines = headline(report)
    for kind in report["kinds"]:
        lines += ["", title(kind)]
        wrong = failure(kind)
        lines += [f"  ERROR {wrong}"] if wrong else _kind_lines(kind)
    return "\n".join([*lines, "", f"cannot be seen: {CANNOT_SEE}"])


def _kind_lines(kind: dict[str, Any]) -> list[str]:
    answer = kind["rehearsed"]
    header = f"  {'phase':<22}{'of a':<13}{'kernels':>8}{'TFLOP':>9}{'moved GB':>10}"
    lines = [f"{header}{'GiB':>8}{'peak':>8}{'waits':>8}{'pageable MB':>13}{'to GPU MB':>11}"]
    lines += [
        f"  {row.name:<22}{row.of:<13}{row.kernels:>8.0f}{row.tflop:>9.3f}{row.moved_gb:>10.2f}"
        f"{row.alive_gib:>8.2f}{row.peak_gib:>8.2f}{row.waits:>8.4g}{row.pageable_mb:>13.3g}{row.uploaded_mb:>11.3g}"
        for row in phase_rows(answer)
    ]
    lines += [f"  {line}" for line in memory_lines(kind)]
    lines.append("  what the GPU would wait for:")
    found = waits(answer)
    lines += [f"    {_in_words(wait)}" for wait in found[:_SHOWN]]
    if len(found) > _SHOWN:
        lines.append(f"    and {len(found) - _SHOWN} more lines (--json and --page have all)")
    for kernel, shapes in attention(answer).items():
        most = ", ".join(f"{calls} x {shape}" for shape, calls in shapes.most_common(2))
        lines.append(f"  attention, {kernel}: {sum(shapes.values())} calls ({most})")
    return lines


def _in_words(wait: Wait) -> str:
    size = "" if wait.num_bytes is None else f", {wait.num_bytes / MB:.3g} MB"
    calls = "" if wait.calls is None else f"{wait.calls:.4g} "
    return f"{calls}a {wait.of}: {wait.what} at {wait.where}{size}"


def _of(phase: str, answer: dict[str, Any]) -> tuple[str, int]:
    """Whose counts a phase's are, and how many of them there were."""
    if phase in MICRO_BATCH_PHASES:
        return "micro-batch", answer["num_micro_batches"]
    return "update", 1
