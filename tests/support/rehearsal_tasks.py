"""What is rehearsed besides a training update: functions for `Case.do`, run by the fake device."""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

import torch

from megatron_kosmosg.config.rank_grid import rank_grid
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.images import ImageDecoder
from megatron_kosmosg.data.normalise import prompt_transform
from megatron_kosmosg.models import norms
from megatron_kosmosg.models.diffusion import load_diffusion
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.planning.gpus import Efficiency
from megatron_kosmosg.planning.memory import decoder_memory, score_memory
from megatron_kosmosg.planning.model_counts import count_model
from megatron_kosmosg.planning.workload import MicroBatch
from megatron_kosmosg.rehearsal import rank_update
from megatron_kosmosg.rehearsal.case import RehearsalCase
from megatron_kosmosg.rehearsal.fake_links import FakeMembership
from megatron_kosmosg.rehearsal.made_up_stream import MadeUpStream
from megatron_kosmosg.rehearsal.rank_update import resolved_config, run_update, take_rank
from megatron_kosmosg.rehearsal.recorder import Recorder
from megatron_kosmosg.rehearsal.stand_ins import StandIns
from megatron_kosmosg.score.connect import ScoreRank
from megatron_kosmosg.score.generation import generate_images
from megatron_kosmosg.score.loss import DenoisingLoss
from megatron_kosmosg.score.member import ReceivedRequest
from megatron_kosmosg.score.messages import Kind, Rows, ScoreRequest
from megatron_kosmosg.score.service import serve
from tests.support.data_helpers import noise_image
from tests.support.image_cases import CLIP
from tests.support.tiny_models import tiny_config, write_stable_diffusion

_APEX = {
    "__init__.py": "",
    "normalization/__init__.py": "",
    "normalization/fused_layer_norm.py": """
def fused_layer_norm_affine(*_):
    import fused_layer_norm_cuda
""",
}
"""NVIDIA's apex installed without its CUDA extensions: it imports, and fails when it is used."""


def plan(case: RehearsalCase, stand_ins: StandIns) -> dict:
    """What the planner reckons for the case's rank and micro-batches, in bytes, and the number of
    trained parameters."""
    config = resolved_config(case, stand_ins)
    rows = config.training.micro_batch_size
    decoder_rows = rows + (config.stage == "instruct")  # the null condition's
    batch = MicroBatch(rows, decoder_rows, case.length, case.images)
    counts = count_model(config)
    world = rank_grid(config, case.world_size)
    coordinates = world.coordinates(case.rank)
    if coordinates.role == "score":
        memory = score_memory(config, rows, Efficiency())
        return vars(memory) | {"tensors": memory.tensors}
    pp_rank = coordinates.pp_rank
    spec, count = counts.shares.specs[pp_rank], counts.shares.counts[pp_rank]
    one_each = [batch] * (config.training.global_batch_size // rows // world.num_replicas)
    memory = decoder_memory(config, world, spec, pp_rank, count, one_each, Efficiency())
    return vars(memory) | {"tensors": memory.tensors, "trainable": counts.trainable}


def gradients_of_a_stage(case: RehearsalCase, stand_ins: StandIns) -> dict:
    """What tests/gpu runs on the device: {"loss": of one global batch, "gradients": their names}.

    On the tiny models of that test; of the case only the stage counts.
    """
    folder = Path(tempfile.mkdtemp())
    config = tiny_config(
        resolved_config(case, stand_ins).stage, write_stable_diffusion(folder), folder
    )
    with stand_ins.device():
        gpu_test = importlib.import_module("tests.gpu.test_stages_on_gpu")
        loss, share = gpu_test.gradients_on_gpu(config, "local")
    return {"loss": loss, "gradients": sorted(share.tensors)}


def images(case: RehearsalCase, stand_ins: StandIns) -> dict:
    """{"shape", "device": of held-out images, "phases": "draw"}."""
    config, recorder = resolved_config(case, stand_ins), stand_ins.recorder
    take_rank(case, stand_ins)
    with stand_ins.device():
        context = platform.initialize(config)
        diffusion = load_diffusion(config, context.device)
        aligner = config.model.aligner
        shape = (config.logging.num_images + 1, aligner.num_queries, aligner.hidden_size)
        condition = torch.zeros(shape, device=context.device)
        positions = torch.arange(config.logging.num_images)
        recorder.forget()
        with recorder.phase("draw"):
            drawn = generate_images(
                config, diffusion, condition, positions, config.data.target_image_size
            )
    return {
        "shape": tuple(drawn.shape),
        "device": drawn.device.type,
        "phases": recorder.as_dict(),
    }


def update_with_bare_apex(case: RehearsalCase, stand_ins: StandIns) -> dict:
    """`run_update` where apex is installed without its CUDA extensions."""
    folder = Path(tempfile.mkdtemp())
    for name, text in _APEX.items():
        path = folder / "apex" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    importlib.reload(norms)
    return run_update(case, stand_ins)


def update_with_decoded_images(case: RehearsalCase, stand_ins: StandIns) -> dict:
    """`run_update` whose prompt images are files, which DALI decodes for the device."""
    return _update_with_files(case, stand_ins, first=noise_image(99, 30, 40))


def update_with_a_bad_image(case: RehearsalCase, stand_ins: StandIns) -> dict:
    """The same, the first image of every micro-batch being no image."""
    return _update_with_files(case, stand_ins, first=b"no image")


def a_gpu_test_of_images(case: RehearsalCase, stand_ins: StandIns) -> dict:
    """The one of tests/gpu that compares no pixels: which device a list with a bad image is on."""
    _decode_for_the_device()
    gpu_test = importlib.import_module("tests.gpu.test_images_on_gpu")
    with stand_ins.device():
        gpu_test.test_a_list_with_a_bad_image_comes_to_the_cpu()
        pixels, bad = ImageDecoder("dali", device_id=0).try_levels([noise_image(0, 30, 40)], CLIP)
    return {"good": [pixels.device.type, len(bad)]}


def _decode_for_the_device() -> None:
    """DALI's pipelines decode on the CPU, and what is copied from them has the device alone: its
    own "mixed" decoder asks for a driver."""
    from megatron_kosmosg.data import images_dali  # where DALI is installed

    build = images_dali._build
    images_dali._build = lambda transform, has_mask, _: build(transform, has_mask, None)
    images_dali._copied = lambda output, device: torch.zeros(
        output.as_tensor().shape(), dtype=torch.uint8, device=device
    )
    ImageDecoder._require_working = lambda *_: None  # which compares numbers


def _update_with_files(case: RehearsalCase, stand_ins: StandIns, first: bytes) -> dict:
    _decode_for_the_device()
    seen = []

    class Files(MadeUpStream):
        def _prompts(self, rows: int, length: int) -> dict[str, torch.Tensor]:
            batch = super()._prompts(rows, length)
            files = [noise_image(i, 30, 40) for i in range(len(batch["pixel_values"]))]
            files[:1] = [first]
            decoder = ImageDecoder("dali", device_id=0)
            levels, bad = decoder.try_levels(files, prompt_transform(self._config))
            assert levels.shape == batch["pixel_values"].shape and levels.dtype is torch.uint8
            seen.append([levels.device.type, len(bad)])
            return batch | {"pixel_values": levels}

    rank_update.MadeUpStream = Files
    return run_update(case, stand_ins) | {"read": seen}


def score_rank_order(case: RehearsalCase, stand_ins: StandIns) -> dict:
    """{"events": in the order in which a score rank on the CPU does things for two micro-batches}.

    "encode": the VAE turns target images into moments; "request": a condition has arrived.
    """
    config = resolved_config(case, stand_ins)
    cpu = torch.device("cpu")
    diffusion = load_diffusion(config, cpu)
    events: list[str] = []
    encode = diffusion.vae.encode

    def noted(*args, **named):
        events.append("encode")
        return encode(*args, **named)

    diffusion.vae.encode = noted
    world = rank_grid(config, case.world_size)
    links = _Links(config, events)
    rank = ScoreRank(cpu, "score rank", links, world, world.coordinates(case.rank))
    serve(
        config,
        rank,
        DenoisingLoss(diffusion, config.score, config.training.seed),
        generate=None,
        open_stream=lambda _: MadeUpStream(config, case.length, case.images, reads="targets"),
        encode=diffusion.moments,
    )
    return {"events": events}


class _Links(FakeMembership):
    """Of a decoder rank that asks for the gradients of two micro-batches and ends."""

    def __init__(self, config: RunConfig, events: list[str]) -> None:
        rows, aligner = config.training.micro_batch_size, config.model.aligner
        shape = rows, aligner.num_queries, aligner.hidden_size
        requests = [
            ScoreRequest(
                Kind.GRADIENT,
                Rows(tuple(range(first, first + rows)), (0,) * rows),
                torch.zeros(shape),
                torch.ones(()),
            )
            for first in (0, rows)
        ]
        super().__init__(Recorder(), requests)
        self._events = events

    def take(self, seconds: float | None = None) -> ReceivedRequest | None:
        asked = super().take(seconds)
        if asked is not None:
            self._events.append("request")
        return asked
