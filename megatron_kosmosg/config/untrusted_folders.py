"""What a model folder of somebody else may make its reader do: open weights and settings.

model_index.json names a library and a class for each part, and diffusers before 0.38 runs
`PART/LIBRARY.py` where there is such a file, and imports whatever library is named; `config.json`
may name an attention kernel that transformers would download and run. Both are checked before a
library opens the folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.foreign_files import read_json

INDEX_FILE = "model_index.json"

_OWN_MODULE = "modeling_kosmosg_aligner"
_CLASSES = {
    "vae": ("diffusers", ("AutoencoderKL",)),
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "scheduler": ("diffusers", None),
    "tokenizer": ("transformers", None),
    "mllm": ("transformers", ("Kosmos2ForConditionalGeneration",)),
    "mllm_image_processor": ("transformers", None),
    "aligner": (_OWN_MODULE, ("KosmosGAligner",)),
    "text_encoder": ("transformers", ("CLIPTextModel", "CLIPTextModelWithProjection")),
    "image_encoder": ("transformers", ("CLIPVisionModelWithProjection", "CLIPVisionModel")),
    "feature_extractor": ("transformers", None),
    "safety_checker": ("stable_diffusion", ("StableDiffusionSafetyChecker",)),
}
"""Library and classes of each part that a pipeline of ours may have; None: any of the library whose
name ends as below."""
_ENDINGS = {
    "scheduler": ("Scheduler",),
    "tokenizer": ("Tokenizer", "TokenizerFast", "TokenizersBackend", "SentencePieceBackend"),
    "mllm_image_processor": ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil"),
    "feature_extractor": ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "Extractor"),
}
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flex_attention")
"""What transformers implements itself; another name may be that of a repository of kernels."""


def check_pipeline_folder(folder: Path) -> None:
    """Raises ConversionError where opening the exported folder could run code of its maker."""
    index = _read(folder / INDEX_FILE)
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        named = ".".join(str(word) for word in entry)
        if part not in _CLASSES or not _is_known(part, entry):
            raise ConversionError(
                f"{folder / INDEX_FILE} names {named} for the part {part!r}, which is none of a "
                "KOSMOS-G pipeline's; it could run code of whoever made the folder, so the folder "
                "is not opened"
            )
        planted = folder / part / f"{entry[0]}.py"
        if entry[0] != _OWN_MODULE and planted.exists():
            raise ConversionError(
                f"{planted} would run in place of the library {entry[0]}; remove it if you trust "
                "the rest of the folder"
            )
    for config in sorted(folder.glob("*/config.json")):
        check_model_config(config)


def check_model_config(path: Path) -> None:
    """Raises ConversionError where a model's config.json asks for attention from elsewhere."""
    for key, value in _items(_read(path)):
        if key not in _ATTENTION_KEYS:
            continue
        implementations = list(value.values()) if isinstance(value, dict) else [value]
        for name in implementations:
            if name not in _ATTENTION:
                raise ConversionError(
                    f"{path} asks for the attention implementation {name!r}, which may be code "
                    f"from elsewhere; remove {key} from it to use torch's own"
                )


def _is_known(part: str, entry: list[Any]) -> bool:
    library, classes = _CLASSES[part]
    if len(entry) != 2 or entry[0] != library or not isinstance(entry[1], str):
        return False
    return entry[1] in classes if classes else entry[1].endswith(_ENDINGS[part])


def _items(content: Any) -> Iterator[tuple[str, Any]]:
    """All keys with their values, however deep."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield key, value
            yield from _items(value)
    elif isinstance(content, list):
        for value in content:
            yield from _items(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content
