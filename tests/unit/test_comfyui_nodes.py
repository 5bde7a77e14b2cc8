"""The nodes of comfyui/ through ComfyUI's contract of a node, with a stand-in for ComfyUI.

tests/integration/test_comfyui.py runs them inside of a real one.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_kosmosg import __version__
from megatron_kosmosg.inference.model_source import find_model
from megatron_kosmosg.inference.open_model import open_pipeline
from megatron_kosmosg.toy import assets
from tests.support.comfyui_stand_in import PACK, load_pack

WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """ComfyUI's folders; models/kosmosg holds the toy."""
    folder = tmp_path_factory.mktemp("comfyui")
    (folder / "models" / "kosmosg").mkdir(parents=True)
    (folder / "models" / "kosmosg" / "toy").symlink_to(assets.path() / "kosmosg")
    (folder / "input").mkdir()
    return folder


@pytest.fixture(scope="module")
def pack(base):
    with pytest.MonkeyPatch.context() as patch:
        yield load_pack(base, patch)


@pytest.fixture(scope="module")
def model(pack: ModuleType):
    loader = pack.NODE_CLASS_MAPPINGS["KosmosGLoader"]
    required = loader.INPUT_TYPES()["required"]
    assert required["model"][0] == ["toy"]
    (model,) = getattr(loader(), loader.FUNCTION)(model="toy", dtype="auto")
    return model


def images(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    """IMAGEs [1, h, w, 3], each of its own size."""
    generator = torch.Generator().manual_seed(4)
    return [torch.rand(1, *size, 3, generator=generator) for size in sizes]


def encode(pack: ModuleType, model, text: str, negative: str = "", **connected):
    node = pack.NODE_CLASS_MAPPINGS["KosmosGEncode"]
    return getattr(node(), node.FUNCTION)(kosmosg=model, text=text, negative=negative, **connected)


def test_every_node_keeps_the_contract(pack):
    assert set(pack.NODE_CLASS_MAPPINGS) == set(pack.NODE_DISPLAY_NAME_MAPPINGS)
    assert (PACK / pack.WEB_DIRECTORY / "growing_images.js").is_file()
    for name, node in pack.NODE_CLASS_MAPPINGS.items():
        assert callable(getattr(node, node.FUNCTION)) and node.CATEGORY, name
        assert len(node.RETURN_TYPES) == len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES))
        for group in node.INPUT_TYPES().values():
            assert all(isinstance(entry, tuple) for entry in group.values()), name


def test_a_prompt_of_two_sizes_is_what_the_pipeline_reads(pack, model):
    first, second = images((40, 56), (90, 33))
    text = "a <image> and a <image> on a blue background"
    (positive, negative) = encode(pack, model, text, "a circle", image1=first, image2=second)
    ((found, extras),), ((null, more),) = positive, negative
    assert extras == {} and more == {} and found.dtype == null.dtype == torch.float32
    source = find_model(assets.path() / "kosmosg")
    pipeline = open_pipeline(source, torch.float32, torch.device("cpu"))
    opened = [
        Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8))
        for image in (first, second)
    ]
    expected, wanted_null = pipeline.encode_prompt(text, images=opened, negative_prompt="a circle")
    assert found.shape == expected.shape == (1, 21, 96)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(null, wanted_null)
    assert (found - null).abs().max() > 0.1


def test_sockets_count_by_their_number(pack, model):
    """image10 comes after image2, whatever order ComfyUI hands them in."""
    first, second = images((20, 20), (30, 20))
    text = "<image> <image>"
    straight = encode(pack, model, text, image2=first, image10=second)[0][0][0]
    handed = encode(pack, model, text, image10=second, image2=first, image3=None)[0][0][0]
    exchanged = encode(pack, model, text, image2=second, image10=first)[0][0][0]
    assert torch.equal(straight, handed) and not torch.allclose(straight, exchanged)


def test_a_batch_of_images_is_so_many_images(pack, model):
    (one,) = images((24, 24))
    both = torch.cat([one, 1 - one])
    batch = encode(pack, model, "<image> <image>", image1=both)[0][0][0]
    each = encode(pack, model, "<image> <image>", image1=one, image2=1 - one)[0][0][0]
    assert torch.equal(batch, each)


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("a <image> and a <image>", 1, "the text has 2 <image>, and 1 image"),
        ("a red circle", 1, "the text has 0 <image>, and 1 image"),
        ("<image> " * 30, 30, "this model has"),
    ],
)
def test_a_wrong_prompt_is_said_in_words(pack, model, text, count, message):
    connected = {f"image{i}": images((20, 20))[0] for i in range(1, count + 1)}
    with pytest.raises(ValueError, match=message):
        encode(pack, model, text, **connected)


def test_a_conditioning_comes_back_from_its_file(pack, model, base):
    positive, negative = encode(pack, model, "a red circle", "a square")
    save, load = (
        pack.NODE_CLASS_MAPPINGS[f"KosmosG{name}Conditioning"]() for name in ("Save", "Load")
    )
    shown = save.save(positive=positive, negative=negative, filename_prefix="red")
    (name,) = shown["ui"]["text"]
    files = sorted((base / "output" / "kosmosg").iterdir())
    assert [file.name for file in files] == [name], "nothing else is left"
    assert set(load_file(files[0])) == {"positive", "negative"}
    assert load.INPUT_TYPES()["required"]["file"][0] == [name]
    before = load.IS_CHANGED(name)
    found = load.load(name)
    assert torch.equal(found[0][0][0], positive[0][0]) and found[0][0][1] == {}
    assert torch.equal(found[1][0][0], negative[0][0])
    save_file(load_file(files[0]), files[0])
    assert load.IS_CHANGED(name) != before
    with pytest.raises(ValueError, match="was not written by Save KOSMOS-G Conditioning"):
        load.load(name)
    files[0].write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load.load(name)


def test_combined_conditionings_are_not_saved(pack, model, base):
    positive, negative = encode(pack, model, "a red circle")
    save = pack.NODE_CLASS_MAPPINGS["KosmosGSaveConditioning"]()
    for other in (positive + negative, [[positive[0][0], {"strength": 0.5}]]):
        with pytest.raises(ValueError, match="not one plain conditioning"):
            save.save(positive=other, negative=negative, filename_prefix="other")
    with pytest.raises(Exception, match="outside"):
        save.save(positive=positive, negative=negative, filename_prefix="../../other")
    assert not list(base.rglob("other*"))


def test_a_changed_model_is_opened_again(pack, base, tmp_path):
    loader = pack.NODE_CLASS_MAPPINGS["KosmosGLoader"]
    run = base / "models" / "kosmosg" / "run"
    run.mkdir()
    empty = loader.IS_CHANGED("run", "auto")
    (run / "weights.safetensors").write_bytes(b"1")
    assert loader.INPUT_TYPES()["required"]["model"][0] == ["run", "toy"]
    assert loader.IS_CHANGED("run", "auto") != empty
    with pytest.raises(ValueError, match="is no exported folder"):
        loader().load("run", "fp32")
    (run / "weights.safetensors").unlink()
    run.rmdir()
    assert loader.IS_CHANGED("run", "auto") == ""


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_names_sockets_that_its_nodes_have(pack, path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    for node in nodes.values():
        known = pack.NODE_CLASS_MAPPINGS.get(node["type"])
        if known is None:
            continue
        inputs = known.INPUT_TYPES()
        sockets = {**inputs["required"], **inputs.get("optional", {})}
        assert {socket["name"] for socket in node["inputs"]} <= set(sockets)
        assert [output["type"] for output in node["outputs"]] == list(known.RETURN_TYPES)
    for number, source, out, target, socket, kind in graph["links"]:
        assert nodes[source]["outputs"][out]["type"] == kind
        assert number in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][socket]["link"] == number
    encoder = next(node for node in nodes.values() if node["type"] == "KosmosGEncode")
    assert all(output["links"] for output in encoder["outputs"]), "the negative is used, too"


def test_the_registry_reads_what_the_package_says():
    text = (PACK / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    assert project["version"] == __version__
    assert project["dependencies"] == ["megatron-kosmosg"]
    assert "comfyui" not in project["name"].lower()
