"""Small programs that do what the stand-ins claim to see, for tests of the stand-ins themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_kosmosg.rehearsal.case import RehearsalCase
from megatron_kosmosg.rehearsal.stand_ins import StandIns

CUDA = "cuda"


def count(_: RehearsalCase, stand_ins: StandIns) -> dict:
    """{"phases": one for each of the programs}."""
    recorder = stand_ins.recorder
    with stand_ins.device():
        for program in (kernels, nothing, waits, copies, memory, backward, attention):
            with recorder.phase(program.__name__):
                program()
    return {"phases": recorder.as_dict()}


def kernels() -> None:
    """A fill, a product, an addition in place, a division by one and a list in place; no views."""
    a, b = torch.zeros(4, 8, device=CUDA), torch.empty(8, 16, device=CUDA)
    c = (a @ b).add_(1)
    torch._foreach_mul_([c.T, c[1:], c.view(-1)], 2)
    c / 1.0


def nothing() -> None:
    """A product of an empty matrix, and work on the CPU."""
    torch.empty(0, 8, device=CUDA) @ torch.empty(8, 16, device=CUDA)
    torch.zeros(4, 8) @ torch.zeros(8, 16)


def waits() -> None:
    """Six of them."""
    a = torch.empty(3, device=CUDA)
    float(a[0])
    a.tolist()
    a.cpu()
    torch.empty(3).to(CUDA)
    torch.cuda.synchronize()
    torch.cuda.Event().synchronize()


def copies() -> None:
    """40 bytes from pageable memory, 40 from pinned."""
    torch.empty(10).to(CUDA, non_blocking=True)
    torch.empty(10).pin_memory().to(CUDA, non_blocking=True)


def memory() -> None:
    """4 KiB, then another 4 KiB after the first are free, and a view of them."""
    a = torch.empty(1024, device=CUDA)
    del a
    b = torch.empty(1000, device=CUDA)
    b[10:].view(-1, 3)


def backward() -> None:
    """A backward pass, in which the host waits for a mask."""
    source = torch.empty(4, device=CUDA, requires_grad=True)
    target = torch.empty(8, device=CUDA, requires_grad=True)
    mask = torch.empty(8, dtype=torch.bool, device=CUDA)
    target.mul(2).masked_scatter(mask, source.mul(2)).sum().backward()


def attention() -> None:
    """One call for each kernel."""
    half = torch.empty(2, 4, 16, 64, dtype=torch.bfloat16, device=CUDA)
    mask = torch.empty(2, 1, 1, 16, dtype=torch.bool, device=CUDA)
    F.scaled_dot_product_attention(half, half, half, is_causal=True)
    F.scaled_dot_product_attention(half, half, half, attn_mask=mask)
    odd = half[..., :63]
    F.scaled_dot_product_attention(odd, odd, odd, attn_mask=mask)


def fail(_: RehearsalCase, stand_ins: StandIns) -> dict:
    """{"errors": by what was wrong}, an empty text where nothing was raised."""
    dist.init_process_group("nccl", rank=0, world_size=2)
    host, device = torch.empty(4, 4), "cuda"
    wrong: dict[str, Callable[[], object]] = {
        "device": lambda: torch.empty(4, 4, device=device) + host,
        "dtype": lambda: torch.empty(4, 4, device=device) @ torch.empty(4, 4, device=device).half(),
        "shape": lambda: torch.empty(4, 4, device=device) @ torch.empty(3, 4, device=device),
        "collective on the host": lambda: dist.all_reduce(host),
        "collective of a transposed tensor": lambda: dist.broadcast(
            torch.empty(4, 3, device=device).T, 0
        ),
        "gather of another size": lambda: dist.all_gather_into_tensor(
            torch.empty(4, device=device), torch.empty(4, device=device)
        ),
        "gloo": lambda: dist.init_process_group("gloo", rank=0, world_size=2),
    }
    errors = {}
    with stand_ins.device():
        for what, program in wrong.items():
            try:
                program()
                errors[what] = ""
            except Exception as error:  # whatever is raised, the test reads it
                errors[what] = str(error) or type(error).__name__
    return {"errors": errors}
