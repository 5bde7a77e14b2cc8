"""Trains the frozen parts that the toy world ships with, and writes them as package data."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from megatron_kosmosg.toy import assets
from megatron_kosmosg.toy.training import (
    checkpoint,
    clip,
    clip_probe,
    clip_tokenizer,
    decoder,
    export,
    latents,
    text,
    tokenizer,
    vae,
)

STEPS = {"vae": 2600, "text": 700, "clip": 850, "decoder": 5500}
EPILOG = """\
parts, in the order of `all`:
  tokenizer  ASSETS/sentencepiece.model, and CLIP's vocabulary in RUN/stable-diffusion/tokenizer
  vae        AutoencoderKL into RUN/vae_fp32                       (about 1000 CPU seconds)
  text       CLIPTextModel into RUN/stable-diffusion/text_encoder  (100)
  clip       CLIPVisionModel into ASSETS/clip-vision               (300)
  decoder    UNet2DConditionModel, averaged weights in RUN/decoder.pt; needs vae and text (1500)
  export     RUN -> ASSETS/stable-diffusion in fp16; needs vae, text and decoder

Each part continues from its checkpoint in RUN, prints its progress with the seconds left, and
leaves a finished part as it is. `export` also works while the decoder is being trained.
"""


class Parts:
    """The parts of one run folder."""

    def __init__(self, run: Path, target: Path, steps: dict[str, int], files: int) -> None:
        self.run, self.target, self.steps, self.files = run, target, steps, files
        self.codec_folder = run / "vae_fp32"
        self.text_folder = run / "stable-diffusion" / "text_encoder"
        self.tokenizer_folder = run / "stable-diffusion" / "tokenizer"

    def tokenizer(self) -> None:
        tokenizer.train(self.target / "sentencepiece.model", seed=0)
        if not self.tokenizer_folder.is_dir():
            clip_tokenizer.write(self.tokenizer_folder)

    def vae(self) -> None:
        codec = vae.train(self.run, self.steps["vae"], 32, 2e-3, seed=11)
        codec.save_pretrained(self.codec_folder)

    def text(self) -> None:
        text.train(self.run, self.text_folder, self._tokenizer(), self.steps["text"], 2e-3, seed=5)

    def clip(self) -> None:
        model = clip.train(self.run, self.steps["clip"], 192, 1.5e-3, seed=0)
        clip.export(model, self.target / "clip-vision")
        print("linear probe of all tokens:", clip_probe.probe(model.vision, mean=False))
        print("linear probe of their mean:", clip_probe.probe(model.vision, mean=True))

    def decoder(self) -> None:
        torch.manual_seed(1)
        codec, text_model = self._codec(), self._text_model()
        unet = decoder.build(codec.config.latent_channels, text_model.config.hidden_size)
        decoder.train(
            self.run,
            latents.posteriors(self.run, codec, self.files, seed=777),
            decoder.Conditions(text_model, self._tokenizer()),
            unet,
            steps=self.steps["decoder"],
            batch_size=32,
            learning_rate=2e-3,
            seed=9,
        )

    def export(self) -> None:
        state = checkpoint.load(self.run / "decoder.pt")
        if state is None:
            raise FileNotFoundError(f"{self.run / 'decoder.pt'} is missing; run `decoder` first")
        folder = self.target / "stable-diffusion"
        words = _existing(self.tokenizer_folder, "tokenizer")
        export.stable_diffusion(state["ema"], self._codec(), self._text_model(), words, folder)
        print(f"{folder}: decoder after {state['step']} steps")

    def _codec(self) -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(_existing(self.codec_folder, "vae")).eval()

    def _text_model(self) -> CLIPTextModel:
        model = CLIPTextModel.from_pretrained(_existing(self.text_folder, "text"))
        return model.eval().requires_grad_(False)

    def _tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(_existing(self.tokenizer_folder, "tokenizer"))


def _existing(folder: Path, part: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; run `{part}` first")
    return folder


PARTS = ("tokenizer", "vae", "text", "clip", "decoder", "export")


def main() -> int:
    """0 when the parts are made, 1 (message on stderr) when one could not be."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=(*PARTS, "all"))
    parser.add_argument(
        "--run", type=Path, default=Path("runs/toy_assets"), metavar="RUN", help="working folder"
    )
    parser.add_argument(
        "--assets", type=Path, default=assets.path(), help="where the shipped files go (package)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of this one part")
    parser.add_argument(
        "--latent-files", type=int, default=40, metavar="N", help="2048 scenes each (40)"
    )
    given = parser.parse_args()
    if given.steps is not None and (given.part not in STEPS or given.steps < 1):
        parser.error(f"--steps {given.steps} goes with one of {', '.join(STEPS)} and is at least 1")
    torch.set_num_threads(1)
    steps = STEPS if given.steps is None else STEPS | {given.part: given.steps}
    parts = Parts(given.run, given.assets, steps, given.latent_files)
    try:
        for name in PARTS if given.part == "all" else (given.part,):
            getattr(parts, name)()
    except (FileNotFoundError, ValueError) as error:
        print(f"train_toy_assets: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
