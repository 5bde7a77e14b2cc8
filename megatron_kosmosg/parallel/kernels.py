"""Which implementation of each part a process of this machine takes, and why not the others.

It asks the functions that training asks; only the words are its own.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch.nn.attention import SDPBackend

from megatron_kosmosg.parallel import fused_adam, platform
from megatron_kosmosg.parallel.devices import collective_backend
from megatron_kosmosg.unusable_packages import Unusable

_ATTENTION = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN's",
    SDPBackend.FLASH_ATTENTION: "torch's flash attention",
    SDPBackend.EFFICIENT_ATTENTION: "torch's memory-efficient attention",
    SDPBackend.MATH: "torch's matrix products",
}
_LARGEST_UNET_ATTENTION = (1, 8, 4096, 40)
"""Stable Diffusion 1.5's at 512 x 512 pixels: heads, positions, width of a head."""


@dataclass(frozen=True)
class KernelChoice:
    """Which implementation one part of a run takes on this machine, and why."""

    part: str
    taken: str
    others: tuple[str, ...] = ()
    """"NAME: why it is not taken"."""


def device_choices() -> list[KernelChoice]:
    """The device, what carries collectives on it, and torch's attention there."""
    device = platform.device()
    if device.type == "cpu":
        chosen = KernelChoice("device", "CPU", (f"a GPU: {_why_no_gpu()}",))
    else:
        facts = torch.cuda.get_device_properties(device)
        chosen = KernelChoice(
            "device",
            f"{torch.cuda.device_count()} GPUs, the first {facts.name} with "
            f"{facts.total_memory / 2**30:.0f} GiB, capability {facts.major}.{facts.minor}, "
            f"CUDA {torch.version.cuda}",
        )
    return [
        chosen,
        KernelChoice("collectives", collective_backend(device)),
        KernelChoice("attention of the U-Net", unet_attention(device)),
    ]


def kernel_choices(unusable: Mapping[str, Unusable]) -> list[KernelChoice]:
    """Layers, optimizer and fusions. unusable: what was hidden, by module."""
    on_gpu = platform.device().type != "cpu"
    engine = _why_not("transformer_engine", unusable) or "" if on_gpu else "it needs a GPU"
    apex = _why_not("apex", unusable)
    layers = {
        "transformer_engine": "TransformerEngine's linears and causal attention",
        "local": "Megatron-Core's linears and torch's attention",
    }
    adam = {
        "transformer_engine": "TransformerEngine's FusedAdam",
        "apex": "NVIDIA apex's FusedAdam",
        "own": "our own AdamW around torch's fused kernel",
    }
    flags = platform.transformer_flags()
    norm_kernel = _why_not("fused_layer_norm_cuda", unusable) or apex
    gradient_kernel = _why_not("fused_weight_gradient_mlp_cuda", unusable)
    needs_gpu = None if on_gpu else "it needs a GPU"
    return [
        KernelChoice(
            "layers",
            layers[platform.transformer_impl()],
            _others(("TransformerEngine", engine)),
        ),
        KernelChoice(
            "optimizer",
            adam[fused_adam.install()],
            _others(
                ("TransformerEngine", _why_not("transformer_engine", unusable)), ("apex", apex)
            ),
        ),
        KernelChoice(
            "layer norm",
            "apex's kernel" if on_gpu and norm_kernel is None else "torch's kernel",
            _others(("apex", norm_kernel or needs_gpu)),
        ),
        KernelChoice(
            "weight gradients",
            _weight_gradients(flags["gradient_accumulation_fusion"]),
            _others(("apex", gradient_kernel or needs_gpu)),
        ),
        KernelChoice(
            "bias, dropout and sum",
            "fused by torch's compiler" if flags["bias_dropout_fusion"] else "torch's kernels",
            _others(("torch's compiler", needs_gpu or platform.why_no_compiler())),
        ),
    ]


def unet_attention(device: torch.device) -> str:
    """The kernel that torch takes for the U-Net's attention in this process, in half precision.

    It depends on the card, on cuDNN and on what else is loaded: on an H200 torch took cuDNN's, and
    flash attention, which took half as long again, where TransformerEngine was installed
    (docs/gpu_results.md).
    """
    dtype = torch.bfloat16
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        dtype = torch.float16
    states = torch.empty(_LARGEST_UNET_ATTENTION, dtype=dtype, device=device)
    chosen = torch._fused_sdp_choice(states, states, states)
    taken = next((name for which, name in _ATTENTION.items() if which.value == chosen), "another")
    version = torch.backends.cudnn.version() if device.type == "cuda" else None
    return taken if version is None else f"{taken}, with cuDNN {_dotted(version)}"


def _dotted(version: int) -> str:
    """cuDNN's number in its usual form: 91900 is 9.19.0."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _weight_gradients(fused: bool) -> str:
    if not fused:
        return "added into their buffer by a kernel of their own"
    by = "apex's kernel"
    if platform.transformer_impl() == "transformer_engine":
        by = "TransformerEngine's matrix products"
    return f"added into their buffer by {by}"


def _others(*reasons: tuple[str, str | None]) -> tuple[str, ...]:
    return tuple(f"{name}: {reason}" for name, reason in reasons if reason)


def _why_not(module: str, unusable: Mapping[str, Unusable]) -> str | None:
    """The reason why a package cannot be used; None for one that works."""
    if module in unusable:
        found = unusable[module]
        return f"{found.reason}; to repair: {found.repair}" if found.repair else found.reason
    return None if find_spec(module) else "not installed"


def _why_no_gpu() -> str:
    """The reason in torch's words, which name the driver where the driver is the reason."""
    version = importlib.metadata.version("torch")
    if torch.version.cuda is None:
        return f"torch {version} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())[:200]
    return f"torch {version} for CUDA {torch.version.cuda} sees none"
