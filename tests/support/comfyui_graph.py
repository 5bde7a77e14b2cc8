"""Runs the example workflows of comfyui/ in a real ComfyUI, on a CPU and without its server.

    python tests/support/comfyui_graph.py COMFYUI_SOURCE_TREE FOLDER

FOLDER has models/kosmosg/toy and input/*.png. ComfyUI's own loader, validation, executor, KSampler
and ControlNet application run; a small random U-Net of Stable Diffusion's kind, VAE and ControlNet
stand for the checkpoints that nobody can download here. The last line printed is JSON: {"workflow":
{"valid": bool, "errors": text, "messages": [text], "image": [h, w, 3] or null}}.
"""

from __future__ import annotations

import asyncio
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

PACK = Path(__file__).parents[2] / "comfyui"
WIDTH = 96
"""Of the toy's conditions."""
LISTED = ("STRING", "INT", "FLOAT", "BOOLEAN")


def start(tree: Path, folder: Path) -> None:
    """Makes ComfyUI's modules importable, without its server, frontend and torchvision."""
    # Before the stand-in below, which transformers would take for torchvision.
    from transformers import AutoImageProcessor, CLIPImageProcessor  # noqa: F401 - loads them now

    sys.argv = ["main.py", "--cpu"]
    sys.path.insert(0, str(tree))
    for name in (
        *("torchvision", "torchvision.transforms", "torchvision.transforms.functional"),
        *("torchvision.ops", "torchaudio", "torchaudio.transforms", "torchaudio.functional"),
    ):
        module = MagicMock(name=name, __path__=[], __version__="0")
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
    import comfy.options

    comfy.options.enable_args_parsing()
    import folder_paths

    folder_paths.models_dir = str(folder / "models")
    folder_paths.set_output_directory(str(folder / "output"))
    folder_paths.set_input_directory(str(folder / "input"))
    server = types.ModuleType("server")
    server.PromptServer = type("PromptServer", (), {"instance": Server()})
    sys.modules["server"] = server


class Server:
    """Takes what the executor tells the page."""

    client_id = last_node_id = last_prompt_id = None
    sockets_metadata: dict = {}

    def __getattr__(self, name: str) -> MagicMock:
        return MagicMock()


def unet_settings() -> dict:
    import torch

    return {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32,
        "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 0],
        "transformer_depth_middle": 1, "context_dim": WIDTH, "num_heads": 8,
        "num_head_channels": -1, "use_spatial_transformer": True, "legacy": False,
        "adm_in_channels": None, "use_linear_in_transformer": False,
        "use_temporal_attention": False, "dtype": torch.float32,
    }  # fmt: skip


def random_weights(module) -> None:
    import torch

    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.05)


def stand_ins() -> dict[str, type]:
    """Nodes for those that open downloaded files; the rest is ComfyUI's."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models
    import torch

    cpu = torch.device("cpu")
    config = comfy.supported_models.SD15(
        {**unet_settings(), "transformer_depth_output": [1, 1, 0, 0]}
    )
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu").eval()
    random_weights(model)
    patcher = comfy.model_patcher.ModelPatcher(model, cpu, cpu)
    control = comfy.cldm.cldm.ControlNet(
        hint_channels=3, operations=comfy.ops.disable_weight_init,
        **{name: value for name, value in unet_settings().items() if name != "out_channels"},
    )  # fmt: skip
    random_weights(control)

    class Vae:
        def decode(self, samples):
            """[b, h, w, 3]: three channels of the latents, in 0 to 1."""
            return torch.sigmoid(samples[:, :3]).movedim(1, -1)

    def node(kinds: tuple, name: str, values: tuple) -> type:
        inputs = {"required": {name: ("STRING", {})}}
        return type("StandIn", (), {
            "INPUT_TYPES": classmethod(lambda cls: inputs), "RETURN_TYPES": kinds,
            "FUNCTION": "open", "CATEGORY": "test", "open": lambda self, **arguments: values,
        })  # fmt: skip

    net = comfy.controlnet.ControlNet(control, load_device=cpu)
    return {
        "CheckpointLoaderSimple": node(
            ("MODEL", "CLIP", "VAE"), "ckpt_name", (patcher, None, Vae())
        ),
        "ControlNetLoader": node(("CONTROL_NET",), "control_net_name", (net,)),
    }


def as_prompt(graph: dict, classes: dict[str, type]) -> dict:
    """What the page posts for a saved workflow: links, and widgets by name."""
    origin = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        values = list(node["widgets_values"])
        linked = {s["name"]: origin[s["link"]] for s in node["inputs"] if s["link"] is not None}
        types_ = classes[node["type"]].INPUT_TYPES()
        inputs: dict = {}
        for name, entry in {**types_["required"], **types_.get("optional", {})}.items():
            if isinstance(entry[0], list) or entry[0] in LISTED:
                inputs[name] = values.pop(0)
                if name == "seed":
                    values.pop(0)  # what the page does with the seed afterwards
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs | linked}
    return prompt


def changed(graph: dict, **widgets: dict[int, object]) -> dict:
    """The graph with other values in widgets, {kind of node: {place: value}}."""
    graph = json.loads(json.dumps(graph))
    for node in graph["nodes"]:
        for place, value in widgets.get(node["type"], {}).items():
            node["widgets_values"][place] = value
    return graph


def run(graph: dict) -> dict:
    import execution
    import nodes

    prompt = as_prompt(graph, nodes.NODE_CLASS_MAPPINGS)
    valid, error, _, details = asyncio.run(execution.validate_prompt("id", prompt, None))[:4]
    if not valid:
        errors = json.dumps([error, details], default=str)
        return {"valid": False, "errors": errors, "messages": [], "image": None}
    executor = execution.PromptExecutor(
        Server(), cache_type=execution.CacheType.CLASSIC, cache_size=0
    )
    (saver,) = [number for number, node in prompt.items() if node["class_type"] == "SaveImage"]
    executor.execute(prompt, "id", {}, [saver])
    messages = [message[1].get("exception_message") for message in executor.status_messages]
    return {
        "valid": True,
        "errors": "",
        "messages": [message for message in messages if message],
        "image": newest_image() if executor.success else None,
    }


def newest_image() -> list[int]:
    import folder_paths
    from PIL import Image

    files = Path(folder_paths.get_output_directory()).glob("*.png")
    with Image.open(max(files, key=lambda file: file.stat().st_mtime_ns)) as image:
        return [image.height, image.width, len(image.getbands())]


def main(tree: Path, folder: Path) -> None:
    start(tree, folder)
    import nodes
    import torch

    torch.set_num_threads(1)
    pack = folder / "custom_nodes" / "kosmosg"
    assert asyncio.run(nodes.load_custom_node(str(pack), module_parent="custom_nodes"))
    nodes.NODE_CLASS_MAPPINGS.update(stand_ins())
    small = {
        "KosmosGLoader": {0: "toy"},
        "EmptyLatentImage": {0: 128, 1: 128},
        "KSampler": {2: 3},
    }
    graphs = {
        path.stem: changed(json.loads(path.read_text()), **small)
        for path in sorted((PACK / "example_workflows").glob("*.json"))
    }
    plain = graphs["kosmosg_text_and_images"]
    graphs["wrong count"] = changed(plain, KosmosGEncode={0: "<image> and <image>"})
    graphs["wrong model"] = changed(plain, KosmosGLoader={0: "../../toy"})
    graphs["wrong kind"] = changed(plain)
    latents = next(n for n in plain["nodes"] if n["type"] == "EmptyLatentImage")
    encoder = next(n for n in plain["nodes"] if n["type"] == "KosmosGEncode")
    for link in graphs["wrong kind"]["links"]:
        if link[3] == encoder["id"] and link[5] == "IMAGE":
            link[1], link[2] = latents["id"], 0
    found = {name: run(graph) for name, graph in graphs.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
