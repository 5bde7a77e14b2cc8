"""How long arithmetic takes on a GPU: products at a share of the peak, small kernels at a share of
the memory's bandwidth, and no pass faster than the host launches it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_kosmosg.planning.gpus import Efficiency, Gpu


@dataclass(frozen=True)
class ModuleWork:
    """FLOPs of one module on one rank for one micro-batch."""

    module: str
    kind: str
    """Which efficiency applies: decoder, aligner, vision, unet or vae."""
    forward: float
    backward: float
    batch: float
    """What the efficiency saturates with: positions per tensor rank, or images."""


MOVED = {"unet": 2.4e-3, "vae": 3.1e-3}
"""Bytes a FLOP that norms, elementwise arithmetic and copies read and write in half precision, as
a rehearsal counts them: 3.94 GB and 3.47 GB an image of 512 x 512."""
_MEASURED_PEAK = 989e12
"""FLOP/s of the GPU on which `half_images` was measured."""


@dataclass(frozen=True)
class Rates:
    """How fast arithmetic goes, on one GPU in one precision."""

    gpu: Gpu
    precision: str
    efficiency: Efficiency

    def seconds(self, work: ModuleWork, flops: float) -> float:
        """The seconds that `flops` of some work take, at the share of the peak that its batch
        reaches."""
        if not flops:
            return 0.0
        reached = {
            "decoder": self.efficiency.decoder,
            "aligner": self.efficiency.aligner,
            "vision": self.efficiency.vision,
            "unet": self.efficiency.unet,
            "vae": self.efficiency.vae,
        }[work.kind]
        peak = self.gpu.peak_flops(self.precision)
        half = self.efficiency.half_images * peak / _MEASURED_PEAK
        if work.kind in ("decoder", "aligner"):
            half = self.efficiency.half_tokens
        products = flops / (peak * reached * work.batch / (work.batch + half))
        wide = 2 if self.precision == "fp32" else 1
        moved = flops * MOVED.get(work.kind, 0.0) * wide
        return products + moved / (self.gpu.memory_gb_s * 1e9 * self.efficiency.small_kernels)

    def launching(self, kernels: float) -> float:
        """Seconds in which the host launches so many: no pass is shorter."""
        return kernels * self.efficiency.launch_us * 1e-6
