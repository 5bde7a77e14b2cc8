"""The connector: latent queries attend to an image's patch features (Kosmos-1's xconnector).

out = W_o attention(latents, keys) with keys = values = [dense(patches); latents]; no residual, norm
or feed-forward. Heads are split over tensor-parallel ranks.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.layer_specs import cross_attention_spec
from megatron_kosmosg.models.mcore_configs import resampler_config
from megatron_kosmosg.models.no_images import no_images


class Resampler(MegatronModule):
    """Turns patch features [n, p+1, h_v] into [n, q, h], the embeddings of an image in the
    decoder's input."""

    def __init__(self, config: RunConfig, process_groups: ProcessGroupCollection) -> None:
        super().__init__(resampler_config(config))
        self.tp_group = process_groups.tp
        hidden_size = config.model.decoder.hidden_size
        self.dense = torch.nn.Linear(config.model.vision.hidden_size, hidden_size)
        self.latent_query = torch.nn.Parameter(
            torch.empty(config.model.resampler.num_latent_queries, hidden_size)
        )
        self.cross_attention = build_module(
            cross_attention_spec(),
            config=self.config,
            layer_number=1,
            pg_collection=process_groups,
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The embeddings [n, q, h] of features [n, p+1, h_v]; n may be 0."""
        num_images = features.shape[0]
        if num_images == 0:
            shape = (0, *self.latent_query.shape)
            return no_images(self.latent_query.new_empty(shape), [features, *self.parameters()])
        keys = self.dense(features).transpose(0, 1)  # [p+1, n, h]
        latents = self.latent_query[:, None].expand(-1, num_images, -1)
        output, bias = self.cross_attention(
            latents.contiguous(),
            attention_mask=None,
            key_value_states=torch.cat([keys, latents]),
        )
        if bias is not None:
            output = output + bias
        return output.transpose(0, 1)
