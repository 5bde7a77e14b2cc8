"""Conditionings as files: read a prompt once, draw from it later without the language model.

A file is safetensors with `positive` and `negative`, float32 [1, c, d] each, and the version of its
form in its metadata.
"""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .prompt_nodes import CATEGORY

FOLDER_NAME = "kosmosg_conditionings"
FORM = {"format": "kosmosg conditioning", "version": "1"}
MAX_BYTES = 64 << 20
"""Of a file; one of the paper's size has half a megabyte."""

folder_paths.folder_names_and_paths[FOLDER_NAME] = (
    [
        str(Path(folder_paths.get_output_directory(), "kosmosg")),
        str(Path(folder_paths.get_input_directory())),
    ],
    {".safetensors"},
)


def only_condition(conditioning: list, name: str) -> torch.Tensor:
    """[1, c, d]. Raises ValueError for what other nodes have combined, or added to."""
    if len(conditioning) != 1 or conditioning[0][1]:
        raise ValueError(
            f"{name} is not one plain conditioning: connect the output of KOSMOS-G Encode itself"
        )
    return conditioning[0][0].detach().float().cpu().contiguous()


class SaveConditioning:
    """Writes output/kosmosg/NAME_00001_.safetensors."""

    RETURN_TYPES = ()
    FUNCTION = "save"
    CATEGORY = CATEGORY
    OUTPUT_NODE = True
    DESCRIPTION = "Keeps both conditionings of a prompt in a file below output/kosmosg."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "filename_prefix": ("STRING", {"default": "prompt"}),
            }
        }

    def save(self, positive, negative, filename_prefix):
        tensors = {
            "positive": only_condition(positive, "positive"),
            "negative": only_condition(negative, "negative"),
        }
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            f"kosmosg/{filename_prefix}", folder_paths.get_output_directory()
        )
        path = Path(folder, f"{name}_{counter:05}_.safetensors")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary, metadata=FORM)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return {"ui": {"text": [path.name]}}


class LoadConditioning:
    """Reads what SaveConditioning wrote."""

    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = "Conditionings that were saved below output/kosmosg, or put into input."

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": (folder_paths.get_filename_list(FOLDER_NAME),)}}

    @classmethod
    def IS_CHANGED(cls, file):
        path = folder_paths.get_full_path(FOLDER_NAME, file)
        return "" if path is None else Path(path).stat().st_mtime_ns

    def load(self, file):
        path = Path(folder_paths.get_full_path_or_raise(FOLDER_NAME, file))
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{file} has more than {MAX_BYTES >> 20} MiB, too many for a prompt")
        try:
            with safe_open(path, "pt") as opened:
                if (opened.metadata() or {}).get("format") != FORM["format"]:
                    raise ValueError(f"{file} was not written by Save KOSMOS-G Conditioning")
                found = [opened.get_tensor(name) for name in ("positive", "negative")]
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        if any(tensor.ndim != 3 or not tensor.is_floating_point() for tensor in found):
            raise ValueError(f"{file} holds no conditionings [1, positions, width]")
        return tuple([[tensor, {}]] for tensor in found)
