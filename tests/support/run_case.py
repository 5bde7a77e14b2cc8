"""A whole run of a real stage through the training loop, for comparison between layouts."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.evaluation.registry import build_evaluators
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.score import stream as score_stream
from megatron_kosmosg.score.connect import join_as_score_rank, open_remote_score
from megatron_kosmosg.score.rank import run_score_rank
from megatron_kosmosg.score.wire import RunEnd
from megatron_kosmosg.stages import align, build_stage, pretrain
from megatron_kosmosg.training.loop import fit
from megatron_kosmosg.training.metrics import METRICS_FILE
from megatron_kosmosg.training.stage import Probe
from tests.support.shares import Share, parameters
from tests.support.tiny_stream import TinyStream


@dataclass(frozen=True)
class Ran:
    """What one rank knows of its run."""

    before: Share
    """Its parameters before the first update."""
    after: Share
    grid: np.ndarray | None
    """The images of held-out prompts, where they were drawn."""


def run_stage(config: RunConfig, defect: str | None = None, *, loads: bool = False) -> Ran | None:
    """Trains on rows that need no files, from the model as it is drawn; None on score ranks.

    defect: see `_break`. loads: from `checkpoint.load`.
    """
    _read_tiny_streams()
    try:
        if platform.holds_unet_alone(config):
            assert run_score_rank(config, join_as_score_rank(config))
            return None
        context = platform.initialize(config)
        remote_score = open_remote_score(config, context)
        stage = build_stage(config, context, remote_score, build_evaluators(config))
        if not loads:
            stage.initial_weights = lambda: None
        kept: list[KosmosG] = []
        before: list[Share] = []
        build = stage.build_model

        def build_and_keep(context: ParallelContext) -> list[torch.nn.Module]:
            kept.extend(build(context))
            before.append(_copy(share_of(kept, context)))
            return list(kept)

        grids: list[np.ndarray] = []
        probe = stage.probe

        def probe_and_keep(model: list[torch.nn.Module], iteration: int) -> Probe:
            found = probe(model, iteration)
            grids.extend(np.asarray(image) for image in found.images.values())
            return found

        stage.build_model, stage.probe = build_and_keep, probe_and_keep
        if defect is not None:
            _break(defect)
        assert fit(stage, config, context)
        if stage.remote_score is not None:
            stage.remote_score.close(RunEnd.DONE)
        return Ran(before[0], share_of(kept, context), grids[0] if grids else None)
    finally:
        platform.teardown()


def run_loaded(config: RunConfig) -> Ran | None:
    """`run_stage` from `checkpoint.load`."""
    return run_stage(config, loads=True)


def records(config: RunConfig) -> list[dict]:
    """The lines of the run's metrics: one per iteration, and one of its evaluation."""
    text = (Path(config.logging.output_dir) / METRICS_FILE).read_text()
    return [json.loads(line) for line in text.splitlines()]


def share_of(chunks: list[KosmosG], context: ParallelContext) -> Share:
    """The parameters of all of a rank's pipeline stages."""
    shares = [parameters(chunk, context) for chunk in chunks]
    return Share(context.tp_rank, {k: v for share in shares for k, v in share.tensors.items()})


def _copy(share: Share) -> Share:
    return Share(share.tp_rank, {name: tensor.copy() for name, tensor in share.tensors.items()})


def _read_tiny_streams() -> None:
    pretrain.pretrain_stream = lambda config, split, *_: TinyStream("pretrain", split)
    align.align_stream = lambda config, split, *_: TinyStream("align", split)
    score_stream.instruct_stream = lambda config, split, device=None, vae=None, reads="all", *_: (
        TinyStream("instruct", split, reads)
    )


def _break(defect: str) -> None:
    """Makes one exchange of gradients do nothing, as a wrong implementation would."""
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    assert callable(getattr(module, defect))
    setattr(module, defect, lambda *arguments, **named: None)


@dataclass(frozen=True)
class Difference:
    """How far two runs are apart, relative."""

    loss: float
    """Largest of an iteration, and of held-out data."""
    grad_norm: float
    update: float


BOUNDS = {
    "fp32": Difference(loss=1e-5, grad_norm=1e-5, update=1e-3),
    "bf16": Difference(loss=2e-3, grad_norm=3e-2, update=0.12),
    # Some CPUs multiply in fp16, others in fp32 and round: norms are 2.4e-3 apart on the former.
    "fp16": Difference(loss=4e-4, grad_norm=5e-3, update=0.07),
}
