"""What ComfyUI hands its node packs, as far as comfyui/ asks: paths, devices, and the loading."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

PACK = Path(__file__).parents[2] / "comfyui"


def load_pack(base: Path, patch: pytest.MonkeyPatch) -> ModuleType:
    """The pack as a module of its own, with its folders below `base`."""
    paths = _folder_paths(base)
    management = ModuleType("comfy.model_management")
    cpu = torch.device("cpu")
    management.text_encoder_device = lambda: cpu
    management.text_encoder_offload_device = lambda: cpu
    management.should_use_fp16 = lambda device: True
    comfy = ModuleType("comfy")
    comfy.model_management = management
    modules = {"folder_paths": paths, "comfy": comfy, "comfy.model_management": management}
    for name, module in modules.items():
        patch.setitem(sys.modules, name, module)
    name = str(PACK)  # a path, as ComfyUI names it
    specification = importlib.util.spec_from_file_location(name, PACK / "__init__.py")
    pack = importlib.util.module_from_spec(specification)
    patch.setitem(sys.modules, name, pack)
    specification.loader.exec_module(pack)
    for loaded in [module for module in sys.modules if module.startswith(f"{name}.")]:
        patch.setitem(sys.modules, loaded, sys.modules[loaded])
    return pack


def _folder_paths(base: Path) -> ModuleType:
    paths = ModuleType("folder_paths")
    paths.models_dir = str(base / "models")
    known: dict[str, tuple[list[str], set[str]]] = {}
    paths.folder_names_and_paths = known

    def add_model_folder_path(name: str, path: str) -> None:
        known.setdefault(name, ([], set()))[0].append(path)

    def get_filename_list(name: str) -> list[str]:
        places, endings = known[name]
        found = (f for place in map(Path, places) if place.is_dir() for f in place.iterdir())
        return sorted(file.name for file in found if file.suffix in endings)

    def get_full_path(name: str, file: str) -> str | None:
        for place in known[name][0]:
            if Path(place, file).is_file():
                return str(Path(place, file))
        return None

    def get_full_path_or_raise(name: str, file: str) -> str:
        found = get_full_path(name, file)
        if found is None:
            raise FileNotFoundError(file)
        return found

    def get_save_image_path(prefix: str, output: str) -> tuple[str, str, int, str, str]:
        folder = Path(output, prefix).parent
        if not folder.resolve().is_relative_to(Path(output).resolve()):
            raise Exception("outside the output folder")
        folder.mkdir(parents=True, exist_ok=True)
        name = Path(prefix).name
        counter = 1 + len(list(folder.glob(f"{name}_*")))
        return str(folder), name, counter, str(Path(prefix).parent), prefix

    paths.add_model_folder_path = add_model_folder_path
    paths.get_folder_paths = lambda name: known[name][0]
    paths.get_filename_list = get_filename_list
    paths.get_full_path = get_full_path
    paths.get_full_path_or_raise = get_full_path_or_raise
    paths.get_save_image_path = get_save_image_path
    paths.get_output_directory = lambda: str(base / "output")
    paths.get_input_directory = lambda: str(base / "input")
    return paths
