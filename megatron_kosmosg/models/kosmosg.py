"""KOSMOS-G without its image decoder: image tower, resampler, language decoder, AlignerNet.

Each rank builds what its pipeline stages hold (pipeline_stage_specs.py); an attribute of a part
that lives elsewhere is None. Composition only: the parts are in their own files. Long because what
is built, received, sent on and saved depends alike on which parts a rank has.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import nn
from torch.distributed import ProcessGroup

from megatron_kosmosg.config.rank_grid import single_process_config
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models import boundary
from megatron_kosmosg.models.aligner import build_aligner_m, build_aligner_n
from megatron_kosmosg.models.initialise import initialise, mark_tensor_parallel
from megatron_kosmosg.models.layer_specs import block_spec, causal_layer
from megatron_kosmosg.models.mcore_configs import decoder_config
from megatron_kosmosg.models.multimodal_lm import MultimodalEmbedding, OutputHead
from megatron_kosmosg.models.packed_prompts import pack_prompts
from megatron_kosmosg.models.pipeline_stage_specs import pipeline_stage_specs
from megatron_kosmosg.models.resampler import Resampler
from megatron_kosmosg.models.vision_encoder import VisionEncoder, load_tower
from megatron_kosmosg.parallel.context import ParallelContext, single_process_context


class KosmosG(LanguageModule):
    """One pipeline stage's part of the model, on `context.device`, initialised: in float32, or as
    `parameters_in` (training/wrapping.py) says.

    After `requires_grad` is decided, all ranks call `agree_on_freezing` (chunks.py).

    Args:
        config: the whole run's config.
        context: this rank's place.
        output_head: build the tied language head (`pretrain`).
        aligner_parts: (), ("M",) or ("M", "N").
        chunk: which of this rank's pipeline stages, where it holds several.
    """

    tp_group: ProcessGroup

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        *,
        output_head: bool,
        aligner_parts: tuple[str, ...] = (),
        chunk: int = 0,
    ) -> None:
        specs = pipeline_stage_specs(config, aligner_parts)
        with context.device:  # on the meta device, layers and switches are others
            super().__init__(decoder_config(config, specs), pg_collection=context.process_groups)
        self.model_type = ModelType.encoder_or_decoder
        pipeline_stage = chunk * context.pp_size + context.pp_rank
        self.vp_stage = chunk if self.vp_size is not None else None
        self.pre_process = pipeline_stage == 0
        self.post_process = pipeline_stage == len(specs) - 1
        self.share_embeddings_and_output_weights = output_head
        self.input_tensor: torch.Tensor | None = None
        self._run_config, self._context, self._spec = config, context, specs[pipeline_stage]
        # None: nothing arrives; False: its gradient is needed upstream; True: nothing there trains.
        self._is_upstream_frozen = None if self.pre_process else False
        with context.device:
            self._build(config, output_head)
        self.to(context.device)  # TransformerEngine allocates on the CPU first
        mark_tensor_parallel(self)
        if context.device.type != "meta":
            self._initialise(config)

    def _build(self, config: RunConfig, output_head: bool) -> None:
        groups, spec = self._context.process_groups, self._spec
        self.vision_encoder = self.resampler = self.embedding = None
        self.decoder = self.output_layer = self.aligner_m = self.aligner_n = None
        if self.pre_process:
            self.vision_encoder = VisionEncoder(config)
            self.resampler = Resampler(config, groups)
            self.embedding = MultimodalEmbedding(self.config, config.model.vocab_size, groups)
        if spec.has_decoder:
            self.decoder = TransformerBlock(
                self.config,
                block_spec(spec.num_decoder_layers, causal_layer(config.lora)),
                post_process=spec.ends_decoder,
                pg_collection=groups,
                vp_stage=self.vp_stage,
            )
        if output_head and self.post_process:
            self.output_layer = OutputHead(
                self.config, config.model.vocab_size, groups, holds_weight=not self.pre_process
            )
        if "M" in spec.aligner_parts:
            self.aligner_m = build_aligner_m(config, groups)
        if "N" in spec.aligner_parts:
            self.aligner_n = build_aligner_n(config, groups)

    def _initialise(self, config: RunConfig) -> None:
        initialise(
            self,
            config.model,
            config.training.seed,
            self._context,
            self._spec.first_decoder_layer,
        )
        if self.vision_encoder is not None and config.model.vision.path is not None:
            load_tower(self.vision_encoder, config.model.vision)
        if self.share_embeddings_and_output_weights and (self.pre_process or self.post_process):
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor) -> None:
        """Take what the pipeline stage before sent (Megatron's schedules call this)."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    @property
    def trains(self) -> bool:
        """Whether any parameter on this pipeline stage is trained."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def set_upstream_frozen(self, is_frozen: bool) -> None:
        """Whether nothing before this pipeline stage trains, so that no gradient is computed for it
        (the schedule is sent zeros). Of no meaning to the first pipeline stage."""
        if not self.pre_process:
            self._is_upstream_frozen = is_frozen

    def trainable_vision_modules(self) -> list[nn.Module]:
        """The last `model.vision.num_trainable_layers` blocks of the tower and its post-norm."""
        if self.vision_encoder is None:
            return []
        return self.vision_encoder.trainable_modules(
            self._run_config.model.vision.num_trainable_layers
        )

    def forward(
        self,
        tokens: torch.Tensor,
        image_mask: torch.Tensor,
        padding_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        packed: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor] | torch.Tensor:
        """On the last pipeline stage returns a dict of results, elsewhere the tensor for the next
        stage (boundary.py).

        tokens [b, s] int; image_mask [b, s] bool, True = image slot; padding_mask [b, s] bool,
        True = padding; pixel_values [n, 3, H, W], n may be 0. packed: int64 [t], where the tokens
        lie in the flattened [b, s], which the decoder then computes as one row, without padding.

        The dict: "hidden" [b, s, h] after the final LayerNorm; "logits" [s, b, v/tp] with an output
        head; "condition" [b, c, d] with M; "reconstruction" [b, s, h] with N. Packed, padding is
        zero in "hidden" and has no influence on the reconstruction of the rest.
        """
        condition = prompts = None
        if packed is not None:
            multiple = self.tp_group.size() if self.config.sequence_parallel else 1
            prompts = pack_prompts(packed, padding_mask, multiple)
        tower, resampler, embedding = self.vision_encoder, self.resampler, self.embedding
        if tower is None or resampler is None or embedding is None:  # all of them are, or none
            hidden, condition = self._receive()
        else:
            images = resampler(tower(pixel_values))
            hidden = embedding(tokens, image_mask, padding_mask, images, packed)
        hidden = self._with_gradient(hidden)
        if self.decoder is not None:
            hidden = self.decoder(hidden, attention_mask=None, packed_seq_params=prompts)
            if self._spec.ends_decoder:
                length = tokens.shape[1] if packed is None else len(packed)
                hidden = self._whole_sequence(hidden, length)
                if prompts is not None:
                    hidden = prompts.unpacked(hidden)
        output = {"hidden": hidden.transpose(0, 1)}
        if self.aligner_m is not None:
            condition = self.aligner_m(output["hidden"], padding_mask)
        if condition is not None:
            output["condition"] = condition
        if self.aligner_n is not None:
            hidden_padding = None if packed is None else padding_mask
            output["reconstruction"] = self.aligner_n(condition, tokens.shape[1], hidden_padding)
        if self.output_layer is not None:
            shared = None if embedding is None else embedding.word_embeddings.weight
            output["logits"] = self.output_layer(hidden, shared)
        return self._send(output, hidden)

    def _with_gradient(self, hidden: torch.Tensor) -> torch.Tensor:
        """What enters the decoder. Recomputation drops the gradients of layers none of whose inputs
        wants one, as where adapters train and nothing before them."""
        if self.decoder is None or hidden.requires_grad or not torch.is_grad_enabled():
            return hidden
        trains = any(parameter.requires_grad for parameter in self.decoder.parameters())
        return hidden.detach().requires_grad_() if trains else hidden

    def _received(self) -> torch.Tensor:
        if self.input_tensor is None:
            raise RuntimeError("nothing has come from the pipeline stage before")
        return self.input_tensor

    def _receive(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        received = self._received()
        if self._is_upstream_frozen:
            received = received.detach()
        if "N" in self._spec.aligner_parts and self.aligner_m is None:
            aligner = self._run_config.model.aligner
            return boundary.unpack_boundary(received, aligner.num_queries, aligner.hidden_size)
        return received, None

    def _send(self, output: dict[str, torch.Tensor], hidden: torch.Tensor):
        if self.post_process:
            if self._is_upstream_frozen:
                last = "reconstruction" if "reconstruction" in output else "condition"
                last = last if last in output else "hidden"
                output[last] = boundary.with_zero_gradient(output[last], self._received())
            return output
        condition = output.get("condition")
        sent = hidden if condition is None else boundary.pack_boundary(hidden, condition)
        if self._is_upstream_frozen:
            sent = boundary.with_zero_gradient(sent, self._received())
        return sent

    def _whole_sequence(self, hidden: torch.Tensor, length: int) -> torch.Tensor:
        """Undo sequence parallelism and its padding: [s/tp, b, h] -> [s, b, h]."""
        if not self.config.sequence_parallel:
            return hidden
        # What follows is the same on every rank, so the gradient needs a slice, not a sum.
        whole = tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False, group=self.tp_group
        )
        # Not a view: where this is sent on, Megatron's schedule frees its storage.
        return whole if whole.shape[0] == length else whole[:length].clone()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None):
        """Megatron's description of every weight; keys depend on no layout and no pipeline stage.

        The output head appears as the embedding it is tied to. Megatron's empty `_extra_state`
        entries are left out.
        """
        # LanguageModule's version takes a last pipeline stage without output head for an error.
        owner = LanguageModule if self.share_embeddings_and_output_weights else MegatronModule
        state = owner.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        return {key: value for key, value in state.items() if not key.endswith("_extra_state")}


def meta_model(config: RunConfig, output_head: bool, aligner_parts: tuple[str, ...]) -> KosmosG:
    """The whole model on one rank, without memory (meta device), to ask for names, shapes and
    counts."""
    return KosmosG(
        single_process_config(config),
        single_process_context(torch.device("meta")),
        output_head=output_head,
        aligner_parts=aligner_parts,
    )
