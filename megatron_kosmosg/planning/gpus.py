"""What a plan takes for granted: GPUs as their makers state them, and how much of that is reached.

Efficiencies are assumptions, printed with every plan and replaceable on the command line. Their
origin: Megatron-LM publishes 41 % for 24 layers of width 2048 on A100; the U-Net's and the small
stacks' are estimates, since no GPU was measured for this table.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megatron_kosmosg.config.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One GPU in its usual node of eight."""

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

    def peak_flops(self, precision: str) -> float:
        """FLOP/s in a `training.precision`. Raises ConfigError where the GPU lacks it."""
        peak = {"bf16": self.bf16_tflops, "fp16": self.fp16_tflops, "fp32": self.fp32_tflops}
        if not peak[precision]:
            raise ConfigError(
                f"{self.name} has no {precision} arithmetic; add training.precision=fp16"
            )
        return peak[precision] * 1e12


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("v100-32", 31.7, 0, 125, 15.7, 900, 150, 6.25, (7, 0)),
        Gpu("a100-80", 79.1, 312, 312, 19.5, 2039, 300, 25, (8, 0)),
        Gpu("h100-80", 79.1, 989, 989, 67, 3350, 450, 50, (9, 0)),
        Gpu("h200-141", 139.8, 989, 989, 67, 4800, 450, 50, (9, 0)),
    )
}


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peak, and what costs time without being arithmetic."""

    decoder: float = 0.45
    """Decoder and output head, in large micro-batches."""
    aligner: float = 0.25
    """AlignerNet, resampler and text encoder, in large micro-batches."""
    vision: float = 0.35
    unet: float = 0.38
    """U-Net forward and backward to the condition, in large batches."""
    vae: float = 0.35
    half_tokens: float = 512
    """Positions of a micro-batch on one rank (divided by its tensor ranks) at which the stacks
    reach half of their share."""
    half_images: float = 4
    """Images of a batch on one rank at which U-Net, VAE and image tower reach half."""
    bandwidth: float = 0.75
    """Share of link, network and memory bandwidth that is reached."""
    collective_us: float = 15
    """Microseconds that a collective takes whatever its size."""
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


_OLD_NAMES = {"overhead_gib": ("context_gib", "nccl_gib", "workspace_gib")}
"""What was one assumption once: the first takes its number, the others are in it."""


def efficiency_with(settings: list[str]) -> Efficiency:
    """The defaults with NAME=NUMBER replaced. Raises ConfigError for others."""
    names = [field.name for field in fields(Efficiency)]
    changes = {}
    for setting in settings:
        given, _, text = setting.partition("=")
        name = _OLD_NAMES.get(given, (given,))[0]
        if name not in names:
            raise ConfigError(f"--assume {setting}: {name!r} is none of {', '.join(names)}")
        try:
            changes |= dict.fromkeys(_OLD_NAMES.get(given, ())[1:], 0.0)
            changes[name] = float(text)
        except ValueError:
            raise ConfigError(f"--assume {setting}: {text!r} is not a number") from None
    return replace(Efficiency(), **changes)
