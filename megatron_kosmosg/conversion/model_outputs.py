"""What a model of either format returns for random prompts, in float32.

Ours run as the real Megatron-Core model in a process group of one, exported ones as the stock
classes, so that a comparison covers names, layouts and both forward passes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.config.rank_grid import single_process_config
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.conversion.exported_models import load_aligner, load_mllm
from megatron_kosmosg.conversion.stored_names import EMBEDDING
from megatron_kosmosg.conversion.tensors import TensorSource
from megatron_kosmosg.data.random_keys import torch_generator
from megatron_kosmosg.data.tokenizer import IMAGE, TRAILING_SPECIALS, Tokenizer
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.stages import stage_facts

IMAGES_OF_ROW = (2, 1, 0, 0)
"""Images of each random prompt; the last one is `<s>` alone, the null condition."""
WORDS = 6
"""Most words before, between and after images."""


@dataclass(frozen=True)
class PromptShape:
    """What prompts of a model look like; two models with equal shapes can be compared."""

    vocab_size: int
    num_latent_queries: int
    image_size: int


def prompt_shape(config: RunConfig) -> PromptShape:
    """The shape of our model's prompts."""
    model = config.model
    return PromptShape(
        model.vocab_size, model.resampler.num_latent_queries, model.vision.image_size
    )


def random_prompts(shape: PromptShape, seed: int) -> dict[str, torch.Tensor]:
    """Random prompts: tokens, image_mask (True = slot), padding_mask (True = padding) [b, s];
    pixel_values.

    The same for equal shape and seed. Rows as IMAGES_OF_ROW says, padded on the right.
    """
    generator = torch_generator(seed, "verify", 0, "prompts")
    first_special = shape.vocab_size - len(TRAILING_SPECIALS)
    image_id = first_special + TRAILING_SPECIALS.index(IMAGE)
    rows = []
    for number, count in enumerate(IMAGES_OF_ROW):
        tokens, mask = [Tokenizer.bos_id], [False]
        is_null = number == len(IMAGES_OF_ROW) - 1
        for part in range(0 if is_null else count + 1):
            if part:
                tokens += [image_id] * (1 + shape.num_latent_queries) + [image_id + 1]
                mask += [False] + [True] * shape.num_latent_queries + [False]
            words = int(torch.randint(1, WORDS + 1, (), generator=generator))
            tokens += torch.randint(4, first_special, (words,), generator=generator).tolist()
            mask += [False] * words
        rows.append((tokens, mask))
    length = max(len(tokens) for tokens, _ in rows)
    batch = {
        "tokens": torch.full((len(rows), length), Tokenizer.pad_id),
        "image_mask": torch.zeros(len(rows), length, dtype=torch.bool),
        "padding_mask": torch.ones(len(rows), length, dtype=torch.bool),
    }
    for row, (tokens, mask) in enumerate(rows):
        batch["tokens"][row, : len(tokens)] = torch.tensor(tokens)
        batch["image_mask"][row, : len(mask)] = torch.tensor(mask)
        batch["padding_mask"][row, : len(tokens)] = False
    pixels = (sum(IMAGES_OF_ROW), 3, shape.image_size, shape.image_size)
    batch["pixel_values"] = torch.randn(pixels, generator=generator)
    return batch


def outputs_of_native(
    config: RunConfig, source: TensorSource, prompts: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The outputs of a model of ours by name: "hidden", "logits" and, where there is M,
    "condition"; rows [b, s or c, ...] on the CPU.

    source: all weights of a model of ours; N is left out. Call it with gradients enabled: setting
    up Megatron-Core on a CPU checks them.
    """
    alone = dataclasses.replace(
        single_process_config(config),
        training=dataclasses.replace(config.training, precision="fp32", recompute="none"),
        model=dataclasses.replace(
            config.model, vision=dataclasses.replace(config.model.vision, path=None)
        ),
    )
    parts = ("M",) if stage_facts(config.stage).aligner_parts else ()
    context = platform.initialize(alone)
    try:
        model = KosmosG(alone, context, output_head=True, aligner_parts=parts)
        fill(model.eval().requires_grad_(False), source)
        inputs = {name: value.to(context.device) for name, value in prompts.items()}
        output = model(**inputs)
        output["logits"] = output["logits"].transpose(0, 1)[..., : config.model.vocab_size]
        return {name: value.cpu() for name, value in output.items()}
    finally:
        platform.teardown()


@torch.no_grad()
def outputs_of_folder(
    mllm: Path, aligner: Path | None, prompts: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The same outputs from the stock classes in an exported folder."""
    language = load_mllm(mllm, torch.float32)
    stock = language(
        pixel_values=prompts["pixel_values"],
        input_ids=prompts["tokens"],
        image_embeds_position_mask=prompts["image_mask"],
        output_hidden_states=True,
        use_cache=False,
    )
    output = {"hidden": stock.hidden_states[-1], "logits": stock.logits}
    if aligner is not None:
        component = load_aligner(aligner, torch.float32)
        output["condition"] = component(output["hidden"], prompts["padding_mask"])
    return output


def fill(model: KosmosG, source: TensorSource) -> None:
    """Copies every weight of the source into the model; vocabulary padding becomes zero.

    Raises ConversionError when the two do not hold the same tensors (N may be left over).
    """
    parameters: dict[str, Any] = dict(model.named_parameters())
    names = {name for name in source.names() if not name.startswith("aligner_n.")}
    if parameters.keys() != names:
        differing = sorted(parameters.keys() ^ names)
        raise ConversionError(f"{len(differing)} tensors do not fit, for example {differing[0]}")
    for name, parameter in parameters.items():
        value = source.read(name)
        if name == EMBEDDING:
            parameter[len(value) :] = 0
            parameter = parameter[: len(value)]
        parameter.copy_(value)
