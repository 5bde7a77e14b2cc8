"""Whether a node is fit for a long run, from nvidia-smi and the file system; needs no torch.

Each function gives a list of problems (or warnings) in words; an empty one means fit. What
nvidia-smi does not tell (ECC on cards without it, NVLink on cards without links) is no problem.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

QUERY = ("--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits")
SECONDS = 60
"""An nvidia-smi that takes longer hangs, which a GPU that has fallen off the bus causes."""


def gpu_problems(expected: int, program: str = "nvidia-smi") -> list[str]:
    """Missing GPUs, uncorrected memory errors, dead links. expected: GPUs of this node; 0: none
    is looked for."""
    if expected == 0:
        return []
    try:
        counters = _output_of(program, *QUERY)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"{expected} GPUs promised, but {program} does not work: {_reason(error)}"]
    try:
        links = _output_of(program, "nvlink", "--status")
    except subprocess.SubprocessError:  # a card or a driver without NVLink
        links = ""
    return [*count_problems(counters, expected), *ecc_problems(counters), *link_problems(links)]


def count_problems(counters: str, expected: int) -> list[str]:
    """The problems that nvidia-smi's answer to QUERY shows, which has a line for each GPU."""
    found = len(counters.splitlines())
    return [] if found == expected else [f"{expected} GPUs promised, {found} answer"]


def ecc_problems(counters: str) -> list[str]:
    """GPUs with uncorrected memory errors since the last reset."""
    problems = []
    for line in counters.splitlines():
        index, errors = (field.strip() for field in line.split(",", 1))
        if errors.isdigit() and int(errors) > 0:
            problems.append(
                f"GPU {index} had {errors} uncorrected memory errors; reset or drain it"
            )
    return problems


def link_problems(status: str) -> list[str]:
    """GPUs with fewer live NVLinks than the best of the node. status: of nvidia-smi nvlink."""
    active: dict[str, int] = {}
    gpu = ""
    for line in status.splitlines():
        if heading := re.match(r"GPU (\d+):", line):
            gpu = heading[1]
            active[gpu] = 0
        elif re.match(r"\s+Link \d+: [\d.]+ GB/s", line):
            active[gpu] += 1
    most = max(active.values(), default=0)
    return [
        f"GPU {gpu} has {count} live NVLinks, others have {most}"
        for gpu, count in active.items()
        if count < most
    ]


def disk_problems(folder: Path, gib: float) -> list[str]:
    """The problem of a folder, which may not exist yet, on a disk with less than `gib` GiB free."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        return [f"{existing} is a file; the run needs a folder"]
    try:
        free = shutil.disk_usage(existing).free / 2**30
    except OSError as error:
        return [f"{existing} cannot be used: {error.strerror}"]
    return [] if free >= gib else [f"{existing} has {free:.1f} GiB free, {gib:g} are needed"]


def memory_warnings(gib: float, root: Path = Path("/")) -> list[str]:
    """Whether the run may need more of the machine's memory than there is for it.

    Args:
        gib: memory that it may need.
        root: folder that holds proc/ and sys/.
    """
    free = memory_gib(root)
    if free is None or free >= gib:
        return []
    return [
        f"{free:.0f} GiB of memory are free, the run is planned to take up to {gib:.0f}: a rank "
        "that the kernel kills leaves no message; ask for more (sbatch --mem=0), or give "
        "a node fewer ranks"
    ]


def memory_gib(root: Path = Path("/")) -> float | None:
    """What a program may still take here: free on the machine, and below the limits of its control
    groups (a job's); None where the kernel does not say."""
    try:
        meminfo = (root / "proc" / "meminfo").read_text()
        groups = (root / "proc" / "self" / "cgroup").read_text()
    except OSError:
        return None
    available = re.search(r"^MemAvailable: +(\d+) kB", meminfo, re.MULTILINE)
    if available is None:
        return None
    least = int(available[1]) * 1024
    for line in groups.splitlines():
        innermost = Path(line.split(":", 2)[2].lstrip("/"))
        for group in (innermost, *innermost.parents):
            folder = root / "sys" / "fs" / "cgroup" / group
            limit, used = (_number(folder / name) for name in ("memory.max", "memory.current"))
            if limit is not None and used is not None:
                least = min(least, limit - used)
    return least / 2**30


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _output_of(program: str, *arguments: str) -> str:
    command = [program, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=True
    ).stdout


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit code {error.returncode}"
    return "no answer in time" if isinstance(error, subprocess.TimeoutExpired) else str(error)
