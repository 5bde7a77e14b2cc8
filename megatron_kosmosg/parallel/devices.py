"""Which device a process uses (its GPU where there is one, otherwise the CPU), its clock and its
random state."""

from __future__ import annotations

from typing import TypeVar

import torch

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.launcher import RankInfo

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)


def choose_device(rank_info: RankInfo) -> torch.device:
    """The GPU of this rank (made current) or the CPU."""
    found = torch.cuda.device_count()
    if not found:
        return torch.device("cpu")
    # Slurm may show each task one GPU only, which is then number 0.
    chosen = torch.device("cuda", rank_info.local_rank % found)
    torch.cuda.set_device(chosen)
    return chosen


def named_device(name: str | None, rank_info: RankInfo) -> torch.device:
    """The device of --device, `choose_device` without one. Raises ConfigError for one that is not
    there, or does not compute, as "meta"."""
    if name is None:
        return choose_device(rank_info)
    try:
        one = torch.ones(1, device=name)
        (one + one).item()
        return one.device
    except (RuntimeError, AssertionError, ImportError) as error:
        said = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: {said}; give cpu, cuda or cuda:N") from error


def on_device(module: ModuleT, device: torch.device) -> ModuleT:
    """The module, moved. By the annotations of diffusers and transformers, `to` of their models
    has lost its `self`; here it is that of every module."""
    return module.to(device)


def gpu_name_and_gib() -> tuple[str, float] | None:
    """The driver's name for this process's first GPU, and its memory in GiB; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return properties.name, properties.total_memory / 2**30


def peak_gib(device: torch.device) -> float | None:
    """GiB of the device that were taken at once, by PyTorch at its peak and by all else now; None
    for the CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    beside = total - free - torch.cuda.memory_reserved(device)
    return (beside + torch.cuda.max_memory_reserved(device)) / 2**30


def collective_backend(device: torch.device) -> str:
    """The backend of torch.distributed for tensors on this device."""
    return "nccl" if device.type == "cuda" else "gloo"


def has_stream(device: torch.device) -> bool:
    """Whether work on `device` runs beside the program, on a stream with a clock of its own."""
    return device.type == "cuda"


def convolution_format(device: torch.device) -> torch.memory_format:
    """Memory format in which a frozen network's convolutions and norms are fastest as they are.

    On a CPU channels last. On a GPU its convolutions would be faster, too, but torch's GroupNorm
    copies to contiguous and back: on one H200 in bf16, 64 rows, the frozen U-Net made 139 passes a
    second channels last and 155 contiguous, the VAE's encoder 134 and 184 images
    (docs/gpu_results.md).
    """
    return torch.contiguous_format if has_stream(device) else torch.channels_last


def hardware_name(device: torch.device) -> str:
    """Kind of device and library: on the same kind the numbers are the same to the bit."""
    if has_stream(device):
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()  # sums are split among them
        name = f"CPU {torch.backends.cpu.get_cpu_capability()} x {threads}"
    return f"{name}, torch {torch.__version__}"


def timing_event() -> torch.cuda.Event:
    """A point on the current GPU's stream; the time between two of them can be asked for."""
    return torch.cuda.Event(enable_timing=True)


def device_rng_state() -> torch.Tensor | None:
    """State of the current GPU's random generator; None in a process without a GPU."""
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_device_rng_state(state: torch.Tensor) -> None:
    """Puts the current GPU's random generator back to a state of `device_rng_state`."""
    torch.cuda.set_rng_state(state)
