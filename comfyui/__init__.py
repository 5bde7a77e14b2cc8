"""KOSMOS-G for ComfyUI: prompts of text and images as CONDITIONING of Stable Diffusion 1.5."""

from __future__ import annotations

from .conditioning_nodes import LoadConditioning, SaveConditioning
from .prompt_nodes import EncodePrompt, LoadModel

NODE_CLASS_MAPPINGS = {
    "KosmosGLoader": LoadModel,
    "KosmosGEncode": EncodePrompt,
    "KosmosGSaveConditioning": SaveConditioning,
    "KosmosGLoadConditioning": LoadConditioning,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "KosmosGLoader": "Load KOSMOS-G",
    "KosmosGEncode": "KOSMOS-G Encode",
    "KosmosGSaveConditioning": "Save KOSMOS-G Conditioning",
    "KosmosGLoadConditioning": "Load KOSMOS-G Conditioning",
}
WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
