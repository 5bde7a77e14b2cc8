"""A stage small enough to train in seconds, made of real Megatron-Core parts.

A regression on images: tokens are ignored except for their number, so that padding and order do
not matter. Column- and row-parallel linears, a replicated norm, and dropout on request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from PIL import Image
from torch import Tensor

from megatron_kosmosg.config.batching import model_parallel_size
from megatron_kosmosg.config.schema import (
    BlendEntry,
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.training.stage import InitialWeights, Probe

WIDTH = 8
NOTHING = {"x": BlendEntry("none")}
BAD_ABOVE = 1.0
"""A sample whose first number is larger counts as one with a bad image."""


def fake_config(output_dir: str, **sections: dict) -> RunConfig:
    """A run of the fake stage; each keyword is a section with the fields to change."""
    given = {name: dict(fields) for name, fields in sections.items()}
    training = {
        "train_iters": 6,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "precision": "fp32",
        "eval_iters": 2,
        "seed": 11,
    } | given.get("training", {})
    optimizer = {"lr": 0.02, "lr_warmup_iters": 2} | given.get("optimizer", {})
    return RunConfig(
        stage="align",
        data=DataConfig(
            **({"num_workers": 1, "blend": NOTHING, "heldout": NOTHING} | given.get("data", {}))
        ),
        parallel=ParallelConfig(timeout_seconds=60, **given.get("parallel", {})),
        training=TrainingConfig(**training),
        optimizer=OptimizerConfig(**optimizer),
        checkpoint=CheckpointConfig(**({"save_interval": 100} | given.get("checkpoint", {}))),
        logging=LoggingConfig(
            output_dir=output_dir, **({"tensorboard": False} | given.get("logging", {}))
        ),
    )


class FakeDataset:
    """Position p gives WIDTH numbers drawn from p, and their image under a fixed map."""

    def __init__(self, split: str, content: str = "same") -> None:
        self._content = content
        self._offset = {"train": 0, "heldout": 10**6}[split]

    def __getitem__(self, position: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._offset + position)
        return torch.randn(WIDTH, generator=generator)

    def fingerprints(self) -> dict[str, str]:
        return {"x": self._content}

    def lengths(self, positions: Sequence[int]) -> None:
        return None

    def pad_to(self, positions: Sequence[int], global_positions: Sequence[int]) -> int:
        return 3

    def collate(self, samples: Sequence[Tensor], pad_to: int) -> dict[str, Tensor]:
        inputs = torch.stack(list(samples))
        return {
            "tokens": torch.zeros(len(samples), pad_to, dtype=torch.int64),
            "padding_mask": torch.zeros(len(samples), pad_to, dtype=torch.bool),
            "pixel_values": torch.zeros(0, 3, 2, 2),
            "bad_samples": (inputs[:, 0] > BAD_ABOVE).sum(),
            "inputs": inputs,
            "targets": torch.sin(2 * inputs) + inputs.roll(1, dims=1),
        }


class FakeModel(MegatronModule):
    """A frozen linear; then linear, GELU, linear over the tensor ranks and a norm on every rank.

    Split over two pipeline stages, the first holds only the frozen linear.
    """

    def __init__(self, config: TransformerConfig, context: ParallelContext, dropout: float) -> None:
        super().__init__(config)
        self.pre_process, self.post_process = (
            context.is_first_pipeline_stage,
            context.is_last_pipeline_stage,
        )
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self._received: Tensor | None = None
        torch.manual_seed(3)
        frozen = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        if self.pre_process:
            self.frozen = frozen
        if self.post_process:
            shared = {"config": config, "init_method": config.init_method, "skip_bias_add": False}
            self.up = ColumnParallelLinear(
                WIDTH, 4 * WIDTH, bias=True, gather_output=False, **shared
            )
            self.down = RowParallelLinear(
                4 * WIDTH, WIDTH, bias=True, input_is_parallel=True, **shared
            )
            self.norm = torch.nn.LayerNorm(WIDTH)
            self.dropout = torch.nn.Dropout(dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.pre_process:
            boundary = self.frozen(inputs.clone().requires_grad_())[None]  # [1, b, WIDTH]
        else:
            boundary = self._received
        if not self.post_process:
            return boundary
        hidden, _ = self.up(boundary[0])
        output, _ = self.down(torch.nn.functional.gelu(hidden))
        return self.norm(self.dropout(output) + inputs.to(output.dtype))

    def set_input_tensor(self, input_tensor: list[Tensor] | None) -> None:
        """Megatron-Core's hook: what the pipeline stage before this one sent."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor


class FakeStage:
    """`poison`: iterations (from 0) whose loss is not a number. `dropout`: probability."""

    name = "align"
    remote_score = None

    def __init__(
        self,
        config: RunConfig,
        *,
        dropout: float = 0.0,
        poison: Sequence[int] = (),
        initial: InitialWeights | None = None,
        hook=None,
        content: str = "same",
    ) -> None:
        """content: fingerprint of the dataset."""
        self._content = content
        self.config, self._dropout, self._poison = config, dropout, set(poison)
        self._initial, self._hook, self._calls = initial, hook, 0

    def build_model(self, context: ParallelContext) -> list[torch.nn.Module]:
        precision = self.config.training.precision
        settings = TransformerConfig(
            num_layers=2,
            hidden_size=WIDTH,
            num_attention_heads=2,
            use_cpu_initialization=True,
            calculate_per_token_loss=True,
            tensor_model_parallel_size=context.tp_size,
            pipeline_model_parallel_size=context.pp_size,
            pipeline_dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(
                precision, torch.float32
            ),
            variable_seq_lengths=True,
            moe_token_dispatcher_type="alltoall",
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            gradient_accumulation_fusion=False,
        )
        return [FakeModel(settings, context, self._dropout).to(context.device)]

    def build_dataset(self, split: str) -> FakeDataset:
        return FakeDataset(split, self._content)

    def forward_step(self, data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module):
        batch = next(data_iterator)
        output = model(batch["inputs"])
        if self._hook is not None:
            self._hook(self._calls)
        poisoned = model.training and self._calls // self._micro_batches() in self._poison
        self._calls += int(model.training)

        def loss_func(output: Tensor):
            error = (output.float() - batch["targets"]).square().mean(dim=1)
            loss = error.sum() * (float("nan") if poisoned else 1.0)
            count = torch.tensor(len(error), dtype=torch.int)
            pair = torch.stack([loss.detach(), torch.tensor(float(len(error)))])
            largest = torch.stack([error.detach().max(), torch.tensor(1.0)])
            return loss, count, {"loss": pair, "largest_loss": largest}

        return output, loss_func

    def initial_weights(self) -> InitialWeights | None:
        return self._initial

    def probe(self, model: list[torch.nn.Module], iteration: int) -> Probe:
        torch.rand(5)  # a careless probe that draws from the global stream
        return Probe({"answer": 42.0}, {"grid": Image.new("RGB", (4, 4), "red")})

    def flops_per_iteration(self, num_tokens: int, num_images: int, num_targets: int) -> float:
        return 1e6 * num_targets

    def _micro_batches(self) -> int:
        training, world = self.config.training, torch.distributed.get_world_size()
        replicas = world // model_parallel_size(self.config)
        return training.global_batch_size // training.micro_batch_size // replicas
