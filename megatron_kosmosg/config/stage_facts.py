"""What is to know of a training stage without building it: for checks, plans and conversion.

Here is the form alone. Each stage says its own facts beside its class, in `stages/`, from where
`stages.stage_facts` gives them by name; none of it loads torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StageFacts:
    """What is known of one training stage without building it."""

    name: str
    """As in the setting `stage`."""
    trained: tuple[str, ...]
    """Parts of the model that train, by their names in KosmosG; of `vision_encoder` the last blocks
    and the post-norm alone."""
    aligner_parts: tuple[str, ...] = ()
    """Halves of AlignerNet that the model has."""
    has_output_head: bool = False
    """Whether the model has the tied language head."""
    frozen_helper: Literal["clip_text", "diffusion"] | None = None
    """Frozen network behind the model, by its section of `model`: the text encoder whose states
    are the targets, or U-Net and VAE, which score the condition."""
    packs_rows: bool = False
    """Whether documents fill rows of data.seq_length; else each sample is a prompt, a row."""
    deals_by_length: bool = False
    """Whether data.balance_tokens deals samples to micro-batches by their length."""
    has_null_row: bool = False
    """Whether every micro-batch has one more row, for the null condition."""
    needs: tuple[str, ...] = ()
    """Settings that must have a value, beside those of every stage."""
    folders: tuple[str, ...] = ()
    """Settings that name a model folder which it reads, where they have a value."""

    @property
    def trains_decoder(self) -> bool:
        """Whether gradients pass through the decoder, and into what comes before it."""
        return "decoder" in self.trained

    @property
    def has_text_encoder(self) -> bool:
        """Whether CLIP's frozen text encoder gives the targets."""
        return self.frozen_helper == "clip_text"

    @property
    def has_unet(self) -> bool:
        """Whether the frozen U-Net scores the condition against target images."""
        return self.frozen_helper == "diffusion"
