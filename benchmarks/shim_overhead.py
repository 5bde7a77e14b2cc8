"""What the CPU shim and Megatron-Core cost per pretrain update on one CPU process.

Two figures per model size. (1) Calls that pass through the shim in one update, counted, times what
a call costs more than the plain torch call, measured: the shim's own share. (2) The whole update
(Megatron's layers, schedule, gradient buffers, clipping, optimizer) against the same arithmetic in
plain PyTorch, alternating, after checking that both give the same loss. One thread, fp32, the CPU
time of the process. The plain side clips and steps AdamW, too; it has no image tower and resampler
(no images are in the batch), no buffer to which micro-batches add their gradients, and no check
that they are finite.

    OMP_NUM_THREADS=1 python benchmarks/shim_overhead.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
from plain_decoder import PlainDecoder
from torch.nn.functional import cross_entropy

from megatron_kosmosg.config import schema
from megatron_kosmosg.parallel import cpu_shim, platform
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.stages.pretrain import PretrainStage
from megatron_kosmosg.training.batches import UpdateWork
from megatron_kosmosg.training.optimizer import build_lr_scheduler, build_optimizer
from megatron_kosmosg.training.step import Reporter, configure_schedules, train_step
from megatron_kosmosg.training.wrapping import wrap_model
from tests.support.shares import unwrap_model

SIZES = {
    "toy (4 x 128, 32 rows of 64)": (4, 128, 32, 64, 10),
    "larger (6 x 512, 8 rows of 128)": (6, 512, 8, 128, 2),
}
"""layers, width, rows, tokens per row, updates per round"""
VOCAB_SIZE = 128


class FixedFeed:
    """The same text batch again and again, so that loading costs nothing on either side."""

    def __init__(self, rows: int, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(4, VOCAB_SIZE - 8, (rows, length + 1), generator=generator)
        self.batch = {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(rows, length),
            "image_mask": torch.zeros(rows, length, dtype=torch.bool),
            "padding_mask": torch.zeros(rows, length, dtype=torch.bool),
            "pixel_values": torch.zeros(0, 3, 16, 16),
        }

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        return self.batch

    def pop_work(self) -> UpdateWork:
        return UpdateWork(self.batch["tokens"].numel(), 0, len(self.batch["tokens"]))

    def pop_wait(self) -> float:
        return 0.0


def run_config(size: tuple[int, ...], folder: str) -> schema.RunConfig:
    """A pretrain run of that size in fp32 without dropout, with a tiny image tower."""
    layers, width, rows, _, _ = size
    heads = width // 32
    return schema.RunConfig(
        stage="pretrain",
        model=schema.ModelConfig(
            vocab_size=VOCAB_SIZE,
            decoder=schema.DecoderConfig(layers, width, 4 * width, heads, hidden_dropout=0.0),
            vision=schema.VisionConfig(None, 1, 16, 16, 2, image_size=16, patch_size=8),
            resampler=schema.ResamplerConfig(2, heads, attention_dropout=0.0),
        ),
        parallel=schema.ParallelConfig(timeout_seconds=60),
        training=schema.TrainingConfig(
            train_iters=10**6, micro_batch_size=rows, global_batch_size=rows, precision="fp32"
        ),
        logging=schema.LoggingConfig(output_dir=folder),
    )


def megatron_update(config: schema.RunConfig, context: ParallelContext, feed: FixedFeed):
    """(function that makes one update and returns its loss, the bare model)."""
    stage = PretrainStage(config, context)
    chunks = wrap_model(stage.build_model(context), config)
    optimizer = build_optimizer(config, chunks)
    scheduler = build_lr_scheduler(config, optimizer)
    configure_schedules(chunks, optimizer, stage.remote_score)
    reporter = Reporter(context)

    def update() -> float:
        scheduler.step(1)
        made = train_step(stage, config, context, chunks, optimizer, feed, [feed], reporter)
        return made.totals.losses["loss"]

    return update, unwrap_model(chunks)[0]


def plain_update(config: schema.RunConfig, model: torch.nn.Module, feed: FixedFeed) -> Callable:
    """One update of the plain decoder with torch's own AdamW and clipping; returns its loss."""
    settings, batch = config.optimizer, feed.batch
    decoder = config.model.decoder
    plain = PlainDecoder(
        model, decoder.num_layers, decoder.num_attention_heads, batch["tokens"].shape[1]
    )
    optimizer = torch.optim.AdamW(
        plain.parameters(),
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
    )
    warmup = settings.lr_warmup_iters
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / warmup))

    def update() -> float:
        optimizer.zero_grad()
        logits = plain(batch["tokens"])[..., :VOCAB_SIZE]
        loss = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), settings.clip_grad)
        optimizer.step()
        scheduler.step()
        return loss.item()

    return update


def count_shim_calls(update: Callable) -> int:
    """Calls of one update that reach a function or method which the shim replaced."""
    calls = 0

    def counting(function: Callable) -> Callable:
        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return counted

    seen = [view for m in shimmed_modules() for view in (m.torch, m.torch.cuda)]
    views = {id(view): view for view in seen}.values()
    saved = [(view, dict(vars(view))) for view in views]
    caller, checked = "_called_by_megatron", cpu_shim._called_by_megatron
    for view, attributes in saved:
        real = torch if view.__name__ == "torch" else torch.cuda
        for name, value in attributes.items():
            if callable(value) and value is not vars(real).get(name) and name != "__getattr__":
                setattr(view, name, counting(value))

    # What the replaced Tensor.cuda and Tensor.type ask on every call.
    def called_by_megatron() -> bool:
        nonlocal calls
        calls += 1
        return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core")

    setattr(cpu_shim, caller, called_by_megatron)
    try:
        update()
    finally:
        setattr(cpu_shim, caller, checked)
        for view, attributes in saved:
            vars(view).update(attributes)
    return calls


def shimmed_modules() -> list:
    """Megatron-Core's modules that see the shim's torch."""
    loaded = [m for name, m in sys.modules.items() if name.startswith("megatron.core")]
    seen = [m for m in loaded if "torch" in vars(m) and m.torch is not torch]
    return [m for m in seen if m.torch.__name__ == "torch"]  # not a submodule of that name


def extra_seconds_per_call() -> float:
    """Most of what any replaced function costs more than the call it stands for."""
    view = shimmed_modules()[0].torch
    tensor = torch.zeros(1)
    scope = {"__name__": "megatron.core.benchmark", "tensor": tensor}
    ask = eval("lambda: tensor.type()", scope)
    baseline = torch._C.TensorBase.type
    return max(
        seconds_per_call(lambda: view.zeros(1, device="cuda"))
        - seconds_per_call(lambda: torch.zeros(1, device="cpu")),
        seconds_per_call(ask) - seconds_per_call(lambda: baseline(tensor)),
    )


def seconds_per_call(function: Callable, repeats: int = 20000) -> float:
    """Best of five timings."""
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(repeats):
            function()
        best = min(best, (time.perf_counter() - started) / repeats)
    return best


def compare(name: str, size: tuple[int, ...], rounds: int, extra: float, folder: str) -> str:
    """The line of one model size."""
    config = run_config(size, folder)
    context = platform.initialize(config)
    try:
        feed = FixedFeed(size[2], size[3])
        megatron, model = megatron_update(config, context, feed)
        plain = plain_update(config, model, feed)
        updates = size[4]
        for _ in range(2):
            first, second = megatron(), plain()
            if abs(first - second) > 1e-4 * abs(second):
                raise SystemExit(f"{name}: losses differ: {first} and {second}")
        times: dict[Callable, list[float]] = {megatron: [], plain: []}
        for _ in range(rounds):
            spent = dict.fromkeys(times, 0.0)
            for _ in range(updates):  # in turn one by one: other work on the machine slows both
                for update in times:
                    started = time.process_time()
                    update()
                    spent[update] += time.process_time() - started
            for update, measured in times.items():
                measured.append(spent[update] / updates)
        megatron_seconds, plain_seconds = (
            statistics.median(times[update]) for update in (megatron, plain)
        )
        calls = count_shim_calls(megatron)
        share = calls * extra / megatron_seconds
        return (
            f"{name}: {calls} calls x {extra * 1e6:.2f} us = {share:.3%} of the update; "
            f"{megatron_seconds * 1e3:.1f} ms, plain PyTorch {plain_seconds * 1e3:.1f} ms CPU "
            f"({megatron_seconds / plain_seconds:.2f}x)"
        )
    finally:
        platform.teardown()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    platform.prepare_megatron(torch.device("cpu"))
    extra = extra_seconds_per_call()
    with tempfile.TemporaryDirectory() as folder:
        for name, size in SIZES.items():
            line = compare(name, size, arguments.rounds, extra, folder)
            print(line, flush=True)


if __name__ == "__main__":
    main()
