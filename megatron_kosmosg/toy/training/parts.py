"""The frozen parts of the toy world, each trained and written by one method."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

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


class Parts:
    """The parts that are trained in one run folder."""

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
        unet = decoder.build(codec.config["latent_channels"], text_model.config.hidden_size)
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
