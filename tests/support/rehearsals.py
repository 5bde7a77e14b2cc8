"""What the tests rehearse on fake devices, at tiny and at full size, and how they read the answers.

Imports no torch: the rehearsal runs in a process of its own, which changes torch for good. Long
because it writes out the sizes of two sets of models.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

from megatron_kosmosg.rehearsal.case import RehearsalCase
from megatron_kosmosg.rehearsal.fake_device import SERVER, FakeDevice
from megatron_kosmosg.rehearsal.rehearsal_report import MICRO_BATCH_PHASES, attention, peak
from megatron_kosmosg.rehearsal.rehearse import behind, rehearse

_TINY_MODEL = (
    "model.vocab_size=101",
    "model.decoder.num_layers=2",
    "model.decoder.hidden_size=32",
    "model.decoder.ffn_hidden_size=48",
    "model.decoder.num_attention_heads=4",
    "model.vision.num_layers=2",
    "model.vision.hidden_size=16",
    "model.vision.ffn_hidden_size=32",
    "model.vision.num_attention_heads=2",
    "model.vision.image_size=28",
    "model.resampler.num_latent_queries=5",
    "model.resampler.num_attention_heads=4",
    "model.aligner.num_layers=1",
    "model.aligner.hidden_size=32",
    "model.aligner.ffn_hidden_size=40",
    "model.aligner.num_attention_heads=4",
    "model.aligner.num_queries=7",
    "model.aligner.max_positions=64",
    "data.seq_length=13",
    "data.target_image_size=16",
)
"""Awkward where the real model is even; heads of 8, so that every attention kernel can take them.
"""

_TINY_FOLDER = {
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 8,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 16,
    },
    "text_encoder/config.json": {
        "vocab_size": 53,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 7,
        "projection_dim": 16,
        "bos_token_id": 51,
        "eos_token_id": 52,
    },
}
_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}


class RehearsalError(RuntimeError):
    """The rehearsed program raised an error: not an AssertionError, which a test may expect."""


class Report:
    """What a rehearsed update did."""

    def __init__(self, answer: dict) -> None:
        self.answer, self._num_micro_batches = answer, answer["num_micro_batches"]

    def phase(self, name: str) -> dict:
        """Counts of one phase (`record.Phase`), over all micro-batches."""
        return self.answer["phases"][name]

    def kernels(self, *phases: str) -> float:
        """A micro-batch's launches in these phases."""
        found = [self.phase(name) for name in phases if name in self.answer["phases"]]
        return sum(sum(x["kernels"].values()) for x in found) / self._num_micro_batches

    def of_a_micro_batch(self, what: str) -> dict[str, float]:
        """{name or place: count} of one micro-batch, with its U-Net and its exchanges."""
        total: Counter[str] = Counter()
        for name in MICRO_BATCH_PHASES:
            total.update(self.answer["phases"].get(name, {}).get(what, {}))
        return {key: count / self._num_micro_batches for key, count in total.most_common()}

    def attention(self) -> dict[str, Counter[str]]:
        """{kernel: calls by shape} of one update."""
        return attention(self.answer)

    @property
    def peak(self) -> int:
        """Bytes."""
        return peak(self.answer)


class Rehearsals:
    """Context manager around the process with the fake device; answers are kept."""

    def __init__(self, folder: Path, server: str = SERVER) -> None:
        """folder: for the configurations of the frozen models. server: of `FakeDevice`."""
        self._folder = folder
        files = _TINY_FOLDER | {"scheduler/scheduler_config.json": _SCHEDULER}
        for name, content in files.items():
            path = folder / "tiny" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        self._answers: dict[RehearsalCase, dict] = {}
        self._device = FakeDevice(server)

    def __enter__(self) -> Rehearsals:
        return self

    def __exit__(self, *_: object) -> None:
        self._device.__exit__()

    def tiny(
        self,
        stage: str,
        *overrides: str,
        tp: int = 1,
        pp: int = 1,
        world_size: int | None = None,
        micro_batches: int | None = None,
        images: int | None = None,
        **fields: object,
    ) -> RehearsalCase:
        """Two rows a micro-batch, one prompt image a row but in `align`; one micro-batch an update
        for every pipeline stage."""
        world_size, micro_batches = world_size or tp * pp, micro_batches or pp
        return RehearsalCase(
            config=None,
            overrides=(
                f"stage={stage}",
                *_TINY_MODEL,
                *self._settings("tiny", tp, pp, 2, 2 * micro_batches * (world_size // tp // pp)),
                *overrides,
            ),
            length=13,
            images=(0 if stage == "align" else 2) if images is None else images,
            world_size=world_size,
            **fields,
        )

    def repeated(self, stage: str, *overrides: str, **fields: object) -> RehearsalCase:
        """`tiny`, in its second update: without what a run does once."""
        return self.tiny(stage, *overrides, num_updates=2, **fields)

    def run(self, stage: str, *overrides: str, num_gpus: int) -> dict:
        """What `kosmosg rehearse` finds of a run at tiny size."""
        settings = [*_TINY_MODEL, *self._settings("tiny", 1, 1, 2, 2)]
        return rehearse(
            self._device, None, [f"stage={stage}", *settings, *overrides], num_gpus, "h100-80",
            lambda *_: None,
        )  # fmt: skip

    def shipped(self, name: str, *, num_gpus: int, with_tiny_models: bool) -> dict:
        """What `kosmosg rehearse --config NAME` finds; with the tiny models in place of its own, or
        as shipped."""
        tiny = self._folder / "tiny"
        models = [*_TINY_MODEL, f"model.diffusion.path={tiny}", f"model.clip_text.path={tiny}"]
        return rehearse(
            self._device, name, models if with_tiny_models else [], num_gpus, "h100-80",
            lambda *_: None,
        )  # fmt: skip

    def full(
        self,
        stage: str,
        *overrides: str,
        micro_batch: int,
        length: int,
        images: int,
        **fields: object,
    ) -> RehearsalCase:
        """The paper's sizes on eight replicas, one micro-batch an update."""
        return RehearsalCase(
            config=f"{stage}_256gpu",
            overrides=(
                *self._settings("full", 1, 1, micro_batch, 8 * micro_batch),
                "score.placement=colocated",
                "model.vision.path=null",
                *overrides,
            ),
            length=length,
            images=images,
            world_size=8,
            **fields,
        )

    def score_rank(self) -> RehearsalCase:
        """A score rank of the paper's size beside four replicas, and eight images."""
        return self.full(
            "instruct",
            "score.placement=dedicated",
            "score.ranks_per_replica=1",
            "training.global_batch_size=32",
            micro_batch=8,
            length=215,
            images=0,
            rank=1,
            do="megatron_kosmosg.rehearsal.rehearsed_score_rank:run_service",
        )

    def planned(self, case: RehearsalCase) -> dict:
        """What `rehearsal_tasks.plan` reckons for the case."""
        return self.answer(dataclasses.replace(case, do="tests.support.rehearsal_tasks:plan"))

    def _settings(self, size: str, tp: int, pp: int, rows: int, samples: int) -> list[str]:
        frozen = self._folder / size  # at full size there is none: Stable Diffusion v1.5's sizes
        return [
            f"parallel.tensor_model_parallel_size={tp}",
            f"parallel.pipeline_model_parallel_size={pp}",
            f"parallel.sequence_parallel={str(tp > 1).lower()}",
            f"training.micro_batch_size={rows}",
            f"training.global_batch_size={samples}",
            "training.precision=bf16",
            f"model.diffusion.path={frozen}",
            f"model.clip_text.path={frozen}",
            f"logging.output_dir={self._folder / 'run'}",
        ]

    def answer(self, case: RehearsalCase) -> dict:
        """What the case's function returned. Raises RehearsalError with its error, if any."""
        if case not in self._answers:
            self._answers[case] = self._device.run(case)
        answer = self._answers[case]
        if "error" in answer:
            error = answer["error"]
            lines = "\n  ".join(error.get("lines", ()))
            raise RehearsalError(f"in phase {error['phase']}: {error['message']}\n  {lines}")
        return answer

    def report(self, case: RehearsalCase) -> Report:
        """Of an update."""
        return Report(self.answer(case))

    def behind(self, case: RehearsalCase, first: RehearsalCase) -> RehearsalCase:
        """`case` on the second pipeline stage, which gets what `first`, on the first one, sends."""
        rank = case.world_size // 2
        return dataclasses.replace(behind(case, self.answer(first)), rank=rank)
