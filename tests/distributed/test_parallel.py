"""Rows, broadcast, seeds, start-up and failure on several ranks."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import ParallelConfig, RunConfig, TrainingConfig
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.broadcast import broadcast_batch
from megatron_kosmosg.parallel.seeds import set_seeds
from megatron_kosmosg.score.row_split import row_range, sum_over_tensor_ranks, take_rows
from tests.support.layout_case import Case, build, micro_batch
from tests.support.ranks import run_ranks
from tests.support.tiny_models import HIDDEN_SIZE


def _config(tp: int = 1, pp: int = 1, timeout: int = 60) -> RunConfig:
    return RunConfig(
        stage="pretrain",
        parallel=ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            timeout_seconds=timeout,
        ),
        training=TrainingConfig(seed=11),
    )


def rows_gradient(num_rows: int, tp: int) -> tuple[float, list, slice]:
    """Loss and gradient of rows that are scored by the rank that owns them."""
    context = platform.initialize(_config(tp))
    x = torch.arange(num_rows * 2.0).view(num_rows, 2).requires_grad_()
    weights = torch.arange(1.0, num_rows + 1)
    share = take_rows(x * 3, context)
    part = (share.square().sum(dim=1) * weights[row_range(num_rows, context)]).sum()
    loss = sum_over_tensor_ranks(part, context)
    loss.backward()
    platform.teardown()
    return loss.item(), x.grad.tolist(), row_range(num_rows, context)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_split_rows_have_the_gradient_of_all_rows_on_every_rank(num_rows: int, tp: int) -> None:
    x = torch.arange(num_rows * 2.0).view(num_rows, 2).requires_grad_()
    weights = torch.arange(1.0, num_rows + 1)
    expected = ((x * 3).square().sum(dim=1) * weights).sum()
    expected.backward()
    covered = []
    for loss, gradient, rows in run_ranks(tp, rows_gradient, num_rows, tp):
        assert loss == pytest.approx(expected.item())
        assert gradient == x.grad.tolist()
        covered += range(num_rows)[rows]
    assert covered == list(range(num_rows))


def broadcast(tp: int, pp: int) -> dict[str, list]:
    """The batch as this rank receives it; its loader gives the pipeline rank's number."""
    context = platform.initialize(_config(tp, pp))
    batch = None
    if context.tp_rank == 0:
        batch = {
            "ids": torch.full((2, 3), context.pp_rank),
            "mask": torch.tensor([[True, False, True]]),
            "none": torch.zeros(0, 3, 4, 4),
            "half": torch.ones(2, dtype=torch.bfloat16) * 1.5,
            "strided": torch.arange(6.0).view(2, 3).T,
        }
    received = broadcast_batch(batch, context)
    platform.teardown()
    assert received["mask"].dtype == torch.bool and received["half"].dtype == torch.bfloat16
    assert received["none"].shape == (0, 3, 4, 4)
    return {key: value.tolist() for key, value in received.items()}


def test_a_batch_reaches_its_tensor_parallel_group_alone() -> None:
    received = run_ranks(4, broadcast, 2, 2)
    assert [r["ids"][0][0] for r in received] == [0, 0, 1, 1]  # ranks 0,1 and 2,3 are the groups
    for batch in received:
        assert batch["mask"] == [[True, False, True]]
        assert batch["half"] == [1.5, 1.5]
        assert batch["strided"] == [[0, 3], [1, 4], [2, 5]]


def draws() -> tuple[list, list, list]:
    """Dropout from the shared stream, from the rank's own, and from the shared one again."""
    platform.initialize(_config(tp=2))
    ones = torch.ones(64)
    shared = F.dropout(ones, 0.5).tolist()
    with tensor_parallel.get_cuda_rng_tracker().fork():
        own = F.dropout(ones, 0.5).tolist()
    again = F.dropout(ones, 0.5).tolist()
    platform.teardown()
    return shared, own, again


def test_tensor_parallel_ranks_share_one_stream_and_differ_in_the_other() -> None:
    first, second = run_ranks(2, draws)
    assert first[0] == second[0] and first[2] == second[2]
    assert first[1] != second[1]
    assert first[0] != first[2]


def dropped(tp: int, sequence_parallel: bool, recompute: str) -> list[float]:
    """Gradient norm of a training forward with dropout, twice from the same seeds."""
    case = Case(tp=tp, sequence_parallel=sequence_parallel, recompute=recompute)
    config = _with_dropout(case.config(), 0.3)
    context = platform.initialize(config)
    model = KosmosG(config, context, output_head=False)
    norms = []
    for seed in (3, 3, 4):
        set_seeds(seed, context)
        batch = micro_batch(0)
        output = model(
            batch["tokens"], batch["image_mask"], batch["padding_mask"], batch["pixel_values"]
        )
        model.zero_grad()
        output["hidden"].square().mean(dim=-1).max().backward()
        norms.append(sum(float(p.grad.norm()) for p in model.decoder.parameters()))
    platform.teardown()
    return norms


def _with_dropout(config: RunConfig, probability: float) -> RunConfig:
    replace = dataclasses.replace
    decoder = replace(config.model.decoder, hidden_dropout=probability, attention_dropout=0.1)
    resampler = replace(config.model.resampler, attention_dropout=0.1)
    return replace(config, model=replace(config.model, decoder=decoder, resampler=resampler))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_is_reproducible_and_recompute_repeats_it(sequence_parallel: bool) -> None:
    plain = run_ranks(2, dropped, 2, sequence_parallel, "none")
    for norms in plain:
        assert norms[0] == norms[1] != norms[2]
    recomputed = run_ranks(2, dropped, 2, sequence_parallel, "full")
    for before, after in zip(plain, recomputed, strict=True):
        assert after == pytest.approx(before, rel=1e-5)


def too_many_images() -> str:
    """The error of a batch with more images than slots."""
    case = Case()
    context = platform.initialize(case.config())
    model = build(case, context)
    batch = micro_batch(0)
    images = torch.cat([batch["pixel_values"]] * 2)
    try:
        model(batch["tokens"], batch["image_mask"], batch["padding_mask"], images)
    except ValueError as error:
        return str(error)
    return ""


def test_images_that_do_not_match_the_slots_are_named() -> None:
    (message,) = run_ranks(1, too_many_images)
    assert "10 image slots" in message and "4 images of 5 slots" in message


def wrong_world() -> None:
    """Three ranks cannot hold copies of a model split over two."""
    platform.initialize(_config(tp=2))


def test_indivisible_world_is_an_error_on_every_rank() -> None:
    with pytest.raises(RuntimeError, match=ConfigError.__name__):
        run_ranks(3, wrong_world)


def one_fails() -> None:
    """Rank 1 raises, rank 0 waits for it in a collective."""
    context = platform.initialize(_config(tp=2, timeout=5))
    try:
        if context.tp_rank == 1:
            raise ArithmeticError("this rank's own trouble")
        torch.distributed.all_reduce(torch.ones(1), group=context.tp_group)
    finally:
        platform.teardown()


def test_a_failing_rank_ends_the_others_within_the_timeout() -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="own trouble|Connection|Timed out"):
        run_ranks(2, one_fails, timeout=60)
    assert time.monotonic() - start < 30


def frozen_backward(pp: int) -> tuple[int, int]:
    """(parameters that train, gradients computed by the decoder's frozen linears) on this rank."""
    case = Case(pp=pp, aligner_parts=("M", "N"), frozen=True)
    context = platform.initialize(case.config())
    model = build(case, context)
    calls = []
    for module in model.decoder.modules():
        if type(module).__name__ == "ColumnParallelLinear":
            module.register_full_backward_hook(lambda *args: calls.append(1))
    if not context.is_first_pipeline_stage:
        model.set_input_tensor([torch.randn(15, 3, HIDDEN_SIZE, requires_grad=True)])
    batch = micro_batch(0)
    output = model(
        batch["tokens"], batch["image_mask"], batch["padding_mask"], batch["pixel_values"]
    )
    trains = sum(p.requires_grad for p in model.parameters())
    if context.is_last_pipeline_stage:
        output["reconstruction"].sum().backward()
        assert not model.input_tensor.grad.any()
    platform.teardown()
    return trains, len(calls)


def test_frozen_layers_compute_no_backward() -> None:
    first, last = run_ranks(2, frozen_backward, 2)
    assert first == (0, 0)
    assert last[0] > 0 and last[1] == 0
