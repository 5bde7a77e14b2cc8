"""What a plan takes for granted: GPUs as their makers state them, and how much of that is reached.

Peaks are those of dense matrices with float32 sums, without the factor of two for sparse ones that
data sheets print first. Memory is what PyTorch sees, which is less than the sheet says.

Efficiencies are assumptions, printed with every plan and replaceable on the command line. Their
origin: Megatron-LM publishes 41 % for 24 layers of width 2048 on A100; U-Net, VAE, launches and
the memory's share in small kernels were measured on one H200 (docs/gpu_results.md) and carried to
other GPUs by their data sheets; the small stacks' are estimates.
"""

from __future__ import annotations

import math
import os
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import read_yaml


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, in its usual node of eight."""

    name: str
    memory_gib: float
    """What the driver reports, GiB."""
    bf16_tflops: float
    """Dense peak, TFLOP/s; 0 where the GPU has no bf16 arithmetic."""
    fp16_tflops: float
    fp32_tflops: float
    memory_gb_s: float
    """GB/s to its own memory."""
    link_gb_s: float
    """GB/s to the other GPUs of the node, one direction."""
    network_gb_s: float
    """GB/s to other nodes, one direction, this GPU's share of the node's adapters."""
    capability: tuple[int, int]
    """Compute capability, which decides about kernels."""
    per_node: int = 8
    source: str = ""
    """Where the figures are from."""

    def peak_flops(self, precision: str) -> float:
        """FLOP/s in a `training.precision`. Raises ConfigError where the GPU lacks it."""
        peak = {"bf16": self.bf16_tflops, "fp16": self.fp16_tflops, "fp32": self.fp32_tflops}
        if not peak[precision]:
            raise ConfigError(
                f"{self.name} has no {precision} arithmetic; add training.precision=fp16"
            )
        return peak[precision] * 1e12


_ETHERNET = "network: 100 Gbit/s of Ethernet for a node of eight, an assumption"

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "rtx4090-24", 23.6, 165.2, 165.2, 82.6, 1008, 32, 1.56, (8, 9),
            source="NVIDIA Ada GPU Architecture whitepaper, table 2; no NVLink, PCIe 4.0 x16; "
            f"memory: PyTorch's out-of-memory messages; {_ETHERNET}",
        ),
        Gpu(
            "v100-32", 31.7, 0, 125, 15.7, 900, 150, 6.25, (7, 0),
            source="NVIDIA V100 data sheet (SXM2); network: DGX-1, 4 x 100 Gbit/s for eight",
        ),
        Gpu(
            "a100-40", 39.5, 312, 312, 19.5, 1555, 300, 25, (8, 0),
            source="NVIDIA A100 data sheet (SXM4 40 GB); network: DGX A100, 8 x 200 Gbit/s; "
            "memory: PyTorch's out-of-memory messages",
        ),
        Gpu(
            "l40s-48", 44.4, 362, 362, 91.6, 864, 32, 1.56, (8, 9),
            source="NVIDIA L40S data sheet; no NVLink, PCIe 4.0 x16; memory: PyTorch's "
            f"out-of-memory messages; {_ETHERNET}",
        ),
        Gpu(
            "a6000-48", 47.5, 154.8, 154.8, 38.7, 768, 32, 1.56, (8, 6),
            source="NVIDIA RTX A6000 data sheet (154.8 is half of its 309.7 with sparsity); PCIe "
            "4.0 x16, since bridges of NVLink join two cards and not eight; memory: with ECC off, "
            f"an assumption from 48 GiB; {_ETHERNET}",
        ),
        Gpu(
            "a100-80", 79.1, 312, 312, 19.5, 2039, 300, 25, (8, 0),
            source="NVIDIA A100 data sheet (SXM4 80 GB); network: DGX A100, 8 x 200 Gbit/s",
        ),
        Gpu(
            "h100-80", 79.1, 989, 989, 67, 3350, 450, 50, (9, 0),
            source="NVIDIA H100 data sheet (SXM5); network: DGX H100, 8 x 400 Gbit/s",
        ),
        Gpu(
            "h200-141", 139.8, 989, 989, 67, 4800, 450, 50, (9, 0),
            source="NVIDIA H200 data sheet (SXM5); network: DGX H200, 8 x 400 Gbit/s",
        ),
        Gpu(
            "b200-180", 178.3, 2250, 2250, 80, 7672, 900, 50, (10, 0),
            source="NVIDIA Blackwell architecture brief (HGX B200, 1,000 W); memory and its speed: "
            "what the driver says, pytorch/ao pull request 4002; network: DGX B200, 8 x 400 Gbit/s",
        ),
    )
}  # fmt: skip


def gpu_named(name: str) -> Gpu:
    """The GPU of the table, or of a YAML file of one's own with the same figures.

    Raises ConfigError, which names what is missing or no number.
    """
    if name in GPUS:
        return GPUS[name]
    if Path(name).suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"GPU {name!r} is none of {', '.join(GPUS)}; for another one give a YAML file with "
            f"{', '.join(_needed())}"
        )
    return _gpu_of(Path(name), read_yaml(Path(name), "GPU"))


def name_from_anywhere(name: str) -> str:
    """A name for `gpu_named` that does not depend on the current folder."""
    return name if name in GPUS else os.path.abspath(name)


def recognised_gpu(device_name: str, memory_gib: float) -> Gpu | None:
    """The GPU of the table that a driver calls `device_name`; None for another one.

    Args:
        memory_gib: GiB that the device has, which tells apart what is sold in two sizes.
    """
    words = device_name.upper().replace("RTX ", "RTX").replace("-", " ").split()
    for gpu in GPUS.values():
        model = gpu.name.partition("-")[0].upper()
        named = model in words or f"RTX{model}" in words
        if named and math.isclose(gpu.memory_gib, memory_gib, rel_tol=0.05):
            return gpu
    return None


def _needed() -> list[str]:
    return [f.name for f in fields(Gpu) if f.default is MISSING and f.name != "name"]


def _gpu_of(path: Path, values: Mapping[str, Any]) -> Gpu:
    """The GPU that a file describes; it has the file's name where the file gives it none."""
    types = typing.get_type_hints(Gpu)
    unknown, missing = sorted(values.keys() - types), [k for k in _needed() if k not in values]
    if unknown or missing:
        wrong = [f"{', '.join(unknown)} is unknown"] if unknown else []
        wrong += [f"{', '.join(missing)} is missing"] if missing else []
        raise ConfigError(f"GPU {path}: {'; '.join(wrong)}")
    figures: dict[str, Any] = {"name": path.stem}
    for key, value in values.items():
        least = 0 if key == "bf16_tflops" else 1 if key == "per_node" else 1e-9
        if types[key] is str:
            figures[key], right = value, isinstance(value, str) and bool(value)
        elif key == "capability":
            right = isinstance(value, list) and [type(v) for v in value] == [int, int]
            figures[key] = tuple(value) if right else value
        else:
            whole = key == "per_node"
            right = type(value) is int or (type(value) is float and not whole)
            right = right and math.isfinite(value) and value >= least
            figures[key] = value
        if not right:
            needed = {"capability": "two whole numbers, as [8, 0]", "per_node": "a whole number"}
            words = "a text" if types[key] is str else "a number above 0"
            raise ConfigError(f"GPU {path}: {key}={value!r} has to be {needed.get(key, words)}")
    return Gpu(**figures)


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peak, and what costs time without being arithmetic."""

    decoder: float = 0.45
    """Decoder and output head, in large micro-batches."""
    aligner: float = 0.25
    """AlignerNet, resampler and text encoder, in large micro-batches."""
    vision: float = 0.35
    unet: float = 0.38
    """Products of the U-Net, forward and backward to the condition, in large batches: what makes
    154.8 images/s of an H200 together with `small_kernels`."""
    vae: float = 0.32
    """Products of the VAE's encoder: 184.1 images/s of an H200 likewise."""
    half_tokens: float = 512
    """Positions of a micro-batch on one rank (divided by its tensor ranks) at which the stacks
    reach half of their share."""
    half_images: float = 1.1
    """Images of a batch on one rank at which U-Net, VAE and image tower reach half, on a GPU of
    989 TFLOP/s (138.9 images/s of an H200 with 64, 132.1 with 16); with the peak of others."""
    bandwidth: float = 0.75
    """Share of link, network and memory bandwidth that is reached."""
    small_kernels: float = 0.44
    """Share of the memory's bandwidth that norms, elementwise arithmetic and copies reach: 783 GB,
    as a rehearsal counts them, in the 374 ms that an H200 took for them."""
    launch_us: float = 50
    """Microseconds of the host for each kernel of a rehearsal, Python included: an update of
    `instruct` with 6,107 takes 310 ms on an H200's host even with few rows."""
    collective_us: float = 10
    """Microseconds that a collective takes whatever its size, for every doubling of its ranks."""
    score_link_gb_s: float = 0.23
    """GB/s of a condition and its gradient, encrypted, between a decoder and a score rank: 5.7 MB
    there and back took 25 ms over loopback, and 17 on a quieter day (benchmarks/score_link.py)."""
    iteration_ms: float = 15
    """Milliseconds per update for what does not scale: batches, loss totals, launches."""
    context_gib: float = 1.3
    """GiB of the CUDA context with its kernels: what "Model training anatomy" in the documentation
    of transformers measures for a process with one element on the GPU."""
    nccl_gib: float = 0.7
    """GiB of NCCL's buffers: 4 MiB (NCCL_BUFFSIZE) a channel and direction of a communicator; about
    six communicators of up to 16 channels are reckoned with."""
    workspace_gib: float = 0.5
    """GiB: cuBLAS's 32 MiB on Hopper (8 before) a handle and stream, as PyTorch's notes say,
    and cuDNN's for convolutions, which are an assumption."""
    fragmentation: float = 0.08
    """Share of the tensors' bytes that the allocator holds besides: an assumption, until a GPU has
    shown `reserved` beside `allocated`."""
    memory_error: float = 0.05
    """By how much more than planned a rank may take, as a share of the plan: rehearsed updates lie
    within 5 %. What fits only without it is not recommended."""


_OLD_NAMES = {"overhead_gib": ("context_gib", "nccl_gib", "workspace_gib")}
"""What was one assumption once: the first takes its number, the others are in it."""


def efficiency_with(settings: list[str]) -> Efficiency:
    """The defaults with NAME=NUMBER replaced. Raises ConfigError for others."""
    names = [field.name for field in fields(Efficiency)]
    changes = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        name = _OLD_NAMES.get(key, (key,))[0]
        if name not in names:
            raise ConfigError(f"--assume {setting}: {name!r} is none of {', '.join(names)}")
        try:
            changes |= dict.fromkeys(_OLD_NAMES.get(key, ())[1:], 0.0)
            changes[name] = float(text)
        except ValueError:
            raise ConfigError(f"--assume {setting}: {text!r} is not a number") from None
    return replace(Efficiency(), **changes)
