"""The frozen U-Net on its own, as the loss asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.rows import Row, failed, not_run
from benchmarks.gpu.sizes import Sizes, run_config
from benchmarks.gpu.timing import Speed, best_batch, free_memory, speed
from megatron_kosmosg.models.diffusion import load_diffusion

ATTENTION = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)


def unet_rows(sizes: Sizes, folder: Path, device: torch.device) -> Iterator[Row]:
    """Forward pass and gradient of the condition, as the loss asks for them: eager, compiled, and
    as a CUDA graph of the eager kernels."""
    config = run_config(sizes, "instruct", folder)
    diffusion = load_diffusion(config, device)
    aligner = config.model.aligner
    shape = (aligner.num_queries, aligner.hidden_size)

    def pass_of(rows: int) -> Callable[[], torch.Tensor]:
        side = sizes.latent_side
        noisy = torch.randn(rows, 4, side, side, device=device)
        timesteps = torch.randint(0, diffusion.num_timesteps, (rows,), device=device)
        condition = torch.randn(rows, *shape, device=device, requires_grad=True)

        def run() -> torch.Tensor:
            loss = diffusion.predict(noisy, timesteps, condition).square().mean()
            return torch.autograd.grad(loss, condition)[0]

        return run

    def measured(rows: int) -> Speed:
        return speed(pass_of(rows), rows, device, sizes.seconds)

    name = "frozen U-Net, forward and condition's gradient"
    best, seen = best_batch(measured, sizes.batches["unet"])
    details = best.details() | {"batches": seen}
    yield Row("U-Net", name, value=best.per_second, unit="images/s", target=200, details=details)
    if device.type == "cpu":
        yield not_run("U-Net", f"{name}, CUDA graph", "no GPU")
    else:
        try:
            replay, wrong = _graphed(pass_of(best.batch))
            found = speed(replay, best.batch, device, sizes.seconds)
            details = found.details() | {"largest difference from eager": wrong}
            yield Row(
                *("U-Net", f"{name}, CUDA graph"),
                value=found.per_second,
                unit="images/s",
                details=details,
            )
            del replay
        except Exception as error:  # noqa: BLE001 - a row of its own; the next one goes on
            yield failed("U-Net", f"{name}, CUDA graph", error)
    free_memory()
    for backend in ATTENTION:
        yield _with_attention(backend, name, pass_of(best.batch), best.batch, device, sizes.seconds)
    free_memory()
    try:
        run = pass_of(best.batch)
        eager = run()
        diffusion.unet.compile(backend=sizes.compiler, dynamic=False)
        difference = _relative(run(), eager)
        found = speed(run, best.batch, device, sizes.seconds)
    except Exception as error:  # noqa: BLE001 - a compiler fails with whatever it likes
        yield failed("U-Net", f"{name}, torch.compile", error)
        return
    details = found.details() | {"largest difference from eager": difference}
    yield Row(
        *("U-Net", f"{name}, torch.compile"),
        value=found.per_second,
        unit="images/s",
        details=details,
    )


def _with_attention(
    backend: SDPBackend,
    name: str,
    run: Callable[[], torch.Tensor],
    batch: int,
    device: torch.device,
    seconds: float,
) -> Row:
    """The same with one library's attention wherever that takes the shapes; torch's own choice
    differs with its version and the card."""
    title = f"{name}, attention by {backend.name.partition('_')[0].lower()}"
    if device.type == "cpu":
        return not_run("U-Net", title, "no GPU")
    order = [backend, *(other for other in ATTENTION if other != backend), SDPBackend.MATH]
    try:
        chosen = run()
        with sdpa_kernel(order, set_priority=True):
            difference = _relative(run(), chosen)
            found = speed(run, batch, device, seconds)
    except Exception as error:  # noqa: BLE001 - a row of its own; the next one goes on
        return failed("U-Net", title, error)
    details = found.details() | {"largest difference from torch's choice": difference}
    return Row("U-Net", title, value=found.per_second, unit="images/s", details=details)


def _graphed(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], float]:
    """(replays the captured kernels, how far their gradient is from the eager one)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            eager = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    return graph.replay, _relative(captured, eager)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())
