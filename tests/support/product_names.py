"""The names of the package that a rehearsal on fake devices uses: a move changes this file alone.

Import it after the stand-ins are installed: the package takes names out of torch as it is imported.
The stages are named so that they are imported once, and not again in the process of every case.
"""

from megatron_kosmosg.config.batching import num_microbatches
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.world import world_layout
from megatron_kosmosg.models import norms
from megatron_kosmosg.models.diffusion import load_diffusion
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.layout import Layout
from megatron_kosmosg.planning.gpus import Efficiency
from megatron_kosmosg.planning.memory import decoder_memory
from megatron_kosmosg.planning.model_counts import count_model
from megatron_kosmosg.planning.pipeline_balance import with_default_layout
from megatron_kosmosg.planning.workload import MicroBatch
from megatron_kosmosg.score.connect import ScoreRank, open_remote_score
from megatron_kosmosg.score.drawing import draw_pictures
from megatron_kosmosg.score.loss import DenoisingLoss
from megatron_kosmosg.score.messages import Kind, Request
from megatron_kosmosg.score.service import serve
from megatron_kosmosg.stages import align, build_stage, instruct, pretrain
from megatron_kosmosg.training.batches import BatchFeed
from megatron_kosmosg.training.setup import Trained, build_trained
from megatron_kosmosg.training.stage import Stage
from megatron_kosmosg.training.step import Reporter, forward_losses, train_step

__all__ = [
    "BatchFeed",
    "DenoisingLoss",
    "Efficiency",
    "Kind",
    "Layout",
    "MicroBatch",
    "Reporter",
    "Request",
    "RunConfig",
    "ScoreRank",
    "Stage",
    "Trained",
    "align",
    "build_stage",
    "build_trained",
    "count_model",
    "decoder_memory",
    "draw_pictures",
    "forward_losses",
    "instruct",
    "load_config",
    "load_diffusion",
    "norms",
    "num_microbatches",
    "open_remote_score",
    "platform",
    "pretrain",
    "serve",
    "train_step",
    "with_default_layout",
    "world_layout",
]
