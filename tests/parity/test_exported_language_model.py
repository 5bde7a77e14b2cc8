"""Stock Kosmos-2, filled through our tables, gives the authors' numbers and our own model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Kosmos2ForConditionalGeneration

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.conversion.authors import authors_table
from megatron_kosmosg.conversion.checkpoint_writer import model_tensors
from megatron_kosmosg.conversion.hf_aligner import aligner_arguments, aligner_weights
from megatron_kosmosg.conversion.kosmos2 import HEAD, kosmos2_config, kosmos2_weights
from megatron_kosmosg.conversion.model_outputs import (
    outputs_of_native,
    prompt_shape,
    random_prompts,
)
from megatron_kosmosg.conversion.tensors import InMemory, TensorSource, as_native
from megatron_kosmosg.hf.modeling_kosmosg_aligner import KosmosGAligner
from tests.support.authors_files import load_golden
from tests.support.conversion_models import conversion_config, random_weights
from tests.support.golden_case import golden_config


def stock_model(source: TensorSource, config: RunConfig) -> Kosmos2ForConditionalGeneration:
    weights = kosmos2_weights(source, config)
    state = {name: weights.read(name) for name in weights.names()}
    state[HEAD] = state["text_model.model.embed_tokens.weight"]
    model = Kosmos2ForConditionalGeneration(kosmos2_config(config))
    model.load_state_dict(state, strict=True)
    return model.eval()


def stock_aligner(source: TensorSource, config: RunConfig) -> KosmosGAligner:
    weights = aligner_weights(source, config)
    model = KosmosGAligner(**aligner_arguments(config))
    model.load_state_dict({name: weights.read(name) for name in weights.names()}, strict=True)
    return model.eval()


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"off by {error:.1e} of the maximum"


@pytest.mark.parametrize("number", [1, 2])
@torch.no_grad()
def test_the_authors_numbers_without_megatron(number: int) -> None:
    torch.set_num_threads(1)
    golden = load_golden(number)
    config = golden_config(golden, "align", {})
    external = InMemory(golden["model"])
    native = as_native(authors_table(config.model), external, list(model_tensors(config)))
    inputs, expected = golden["inputs"], golden["outputs"]
    output = stock_model(native, config)(
        pixel_values=inputs["images"],
        input_ids=inputs["tokens"],
        image_embeds_position_mask=inputs["image_slots"],
        output_hidden_states=True,
    )
    close(output.image_embeds.flatten(0, 1), expected["image_features"])
    close(output.hidden_states[-1], expected["hidden"])
    close(output.logits, expected["logits"])
    condition = stock_aligner(native, config)(output.hidden_states[-1], inputs["tokens"] == 1)
    close(condition, expected["condition"])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Kosmos2ForConditionalGeneration, dict, dict]:
    """The stock model, random prompts (two images, one, none, `<s>`), our model's outputs."""
    torch.set_num_threads(1)
    config = conversion_config("pretrain", tmp_path_factory.mktemp("models"))
    source = InMemory(random_weights(config))
    prompts = random_prompts(prompt_shape(config), seed=0)
    native = outputs_of_native(config, source, prompts)
    return stock_model(source, config), prompts, native


def test_random_prompts_are_keyed_and_of_all_kinds(models) -> None:
    _, prompts, _ = models
    shape = prompt_shape(conversion_config("pretrain", Path("unused")))
    again, other = random_prompts(shape, seed=0), random_prompts(shape, seed=1)
    assert all(torch.equal(prompts[name], again[name]) for name in prompts)
    assert prompts["tokens"].tolist() != other["tokens"].tolist()
    slots = prompts["image_mask"].sum(dim=1) // shape.num_latent_queries
    assert slots.tolist() == [2, 1, 0, 0]
    assert (~prompts["padding_mask"]).sum(dim=1)[-1] == 1


@torch.no_grad()
def test_two_images_in_a_row_beside_shorter_rows(models) -> None:
    model, prompts, native = models
    output = model(
        pixel_values=prompts["pixel_values"],
        input_ids=prompts["tokens"],
        image_embeds_position_mask=prompts["image_mask"],
        output_hidden_states=True,
    )
    real = ~prompts["padding_mask"]
    close(output.hidden_states[-1][real], native["hidden"][real])
    close(output.logits[real], native["logits"][real])


@torch.no_grad()
def test_text_alone_through_inputs_embeds(models) -> None:
    model, prompts, native = models
    for row in (2, 3):
        real = ~prompts["padding_mask"][row]
        tokens = prompts["tokens"][row, real][None]
        with pytest.raises(ValueError, match="pixel_values"):
            model(input_ids=tokens)
        embeddings = model.get_input_embeddings()(tokens)
        output = model.text_model(inputs_embeds=embeddings, output_hidden_states=True)
        close(output.hidden_states[-1][0], native["hidden"][row, real])
        close(output.logits[0], native["logits"][row, real])
