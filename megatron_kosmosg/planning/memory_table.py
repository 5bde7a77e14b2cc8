"""The bytes of every kind of rank as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from megatron_kosmosg.planning.memory import GIB
from megatron_kosmosg.planning.rank_kinds import RankKind

_COLUMNS = {
    "parameters": "weights",
    "gradients": "grads",
    "optimizer": "optim.",
    "activations": "activ.",
    "frozen_helpers": "frozen",
    "score_activations": "U-Net act.",
    "overhead": "other",
    "total": "total",
}


def memory_table(kinds: Sequence[RankKind], gpu_gib: float | None = None) -> str:
    """GiB of each kind of rank; whether they fit, where the GPU's memory is given."""
    lines = [f"{'GiB a rank':<18}{'ranks':>6}" + "".join(f"{h:>11}" for h in _COLUMNS.values())]
    for kind in kinds:
        planned = asdict(kind.memory) | {"total": kind.memory.total}
        values = {name: planned[name] / GIB for name in _COLUMNS}
        line = f"{kind.name:<18}{kind.count:>6}" + "".join(f"{v:>11.2f}" for v in values.values())
        if gpu_gib is not None:
            verdict = "fits" if values["total"] <= gpu_gib else "TOO LARGE"
            line += f" of {gpu_gib:g}: {verdict}"
        lines.append(line)
    return "\n".join(lines)
