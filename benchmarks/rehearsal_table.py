"""The table of docs/scaling.md: what an update of every shipped configuration does, rehearsed.

usage: python -m benchmarks.rehearsal_table [NAME ...] > table.md

About a CPU-minute for each kind of rank. Nothing is measured.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

from megatron_kosmosg.cli import rehearse
from megatron_kosmosg.rehearsal.rehearsal_report import GIB, peak, phase_rows

NAMES = (
    "pretrain_8gpu",
    "pretrain_256gpu",
    "align_1gpu",
    "align_8gpu",
    "align_256gpu",
    "instruct_1gpu",
    "instruct_8gpu",
    "instruct_256gpu",
)
HEAD = (
    "| config, kind of rank | kernels a micro-batch | an update | TFLOP a micro-batch "
    "| GB moved besides | GiB of tensors, planned | host waits a micro-batch, an update |\n"
    "|---|---|---|---|---|---|---|"
)


def rows(name: str, report: dict) -> list[str]:
    """A line for every kind of rank. report: what `kosmosg rehearse --json` wrote."""
    lines = []
    for kind in report["kinds"]:
        answer = kind["rehearsed"]
        phases = phase_rows(answer)
        often = [row for row in phases if row.of == "micro-batch"]
        once = [row for row in phases if row.of == "update"]
        planned = kind["planned"]
        beside = "" if planned is None else f", {planned['tensors'] / GIB:.1f}"
        cells = [
            f"{name}, {kind['name']}",
            f"{sum(row.kernels for row in often):,.0f}",
            f"{sum(row.kernels for row in once):,.0f}" if once else "",
            f"{sum(row.tflop for row in often):.1f}",
            f"{sum(row.moved_gb for row in often):.0f}",
            f"{peak(answer) / GIB:.1f}{beside}",
            f"{sum(row.waits for row in often):.3g}, {sum(row.waits for row in once):.3g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> int:
    """Prints the table, or its lines for the configs given; 1 where a rehearsal fails."""
    print(HEAD)
    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            counts = Path(folder) / "counts.json"
            with contextlib.redirect_stdout(io.StringIO()):
                code = rehearse.main(["--config", name, "--json", str(counts)])
            if code:
                return code
            print("\n".join(rows(name, json.loads(counts.read_text()))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
