"""Words that a pipeline's language model says after a prompt of words and images.

Stock Kosmos-2 hands several images to the wrong beams; the embedded prompt is built first here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from megatron_kosmosg.hf.pipeline_kosmosg import KosmosGPipeline


@torch.no_grad()
def continue_prompt(
    pipeline: KosmosGPipeline, parts: Sequence[str | Image.Image], max_new_tokens: int
) -> str:
    """Greedy, up to the end that the model gives or the last of its positions.

    Raises ValueError for a prompt that leaves no position, or has too many.
    """
    mllm, tokenizer = pipeline.mllm, pipeline.tokenizer
    tokens, slots = pipeline.prompt_tokens(list(parts))
    room = mllm.config.text_config.max_position_embeddings - len(tokens)
    if room < 1:
        raise ValueError(f"the prompt fills all {len(tokens)} positions of this model")
    device = pipeline._execution_device
    embeds = mllm.text_model.get_input_embeddings()(torch.tensor(tokens, device=device))
    pixels = pipeline._pixels([list(parts)], device)
    if pixels is not None:
        embeds[torch.tensor(slots, device=device)] = _features(pipeline, pixels).flatten(0, 1)
    ids = mllm.text_model.generate(
        inputs_embeds=embeds[None],
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long, device=device),
        max_new_tokens=min(max_new_tokens, room),
        do_sample=False,
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def _features(pipeline: KosmosGPipeline, pixels: torch.Tensor) -> torch.Tensor:
    """The embeddings of pixel values [n, 3, size, size] in the decoder's input, [n, slots, h]."""
    patches = pipeline.mllm.vision_model(pixels)[0]
    patches = pipeline.mllm.vision_model.model.post_layernorm(patches)
    patches = torch.nn.functional.normalize(patches, dim=-1)
    return pipeline.mllm.image_to_text_projection(patches)[0]
