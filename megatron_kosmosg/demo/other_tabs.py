"""The page's tabs for captions and for lists of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from megatron_kosmosg.demo.batch import generate_batch
from megatron_kosmosg.demo.controls import CONTROLS, IMAGES, MODEL_QUEUE
from megatron_kosmosg.demo.page_errors import errors_for_people
from megatron_kosmosg.demo.requests import generation_request
from megatron_kosmosg.demo.sessions import Sessions
from megatron_kosmosg.demo.start_values import StartValues
from megatron_kosmosg.demo.studio import Studio
from megatron_kosmosg.inference.prompt_records import PromptError


def caption_tab(studio: Studio, start: StartValues, sessions: Sessions) -> None:
    gr.Markdown(
        "The language model continues a prompt of images and words. It was trained to do so in "
        "`pretrain`; `instruct`, whose loss is that of drawn images, may have made it forget"
        f"{', as it has the toy: it repeats a word' if start.is_toy else ''}."
    )
    prompt = gr.MultimodalTextbox(
        label="Images, and words to begin with",
        value={"text": start.caption_prompt, "files": []},
        file_types=["image"],
        file_count="multiple",
        sources=["upload"],
        submit_btn=False,
        elem_id="caption-prompt",
    )
    length = gr.Slider(1, 128, 24, step=1, label="Most words")
    button = gr.Button("Caption", variant="primary", elem_id="caption")
    words = gr.Textbox(label="What the model says", lines=3, interactive=False, elem_id="said")

    def caption(prompt: dict[str, Any], length: float) -> str:
        images = [Path(file) for file in prompt.get("files") or []]
        with errors_for_people(*images):
            return studio.caption(prompt.get("text") or "", images, min(int(length), 128))

    button.click(caption, [prompt, length], [words], concurrency_id=MODEL_QUEUE, api_name="caption")


def batch_tab(studio: Studio, sessions: Sessions, controls: dict[str, Any]) -> None:
    gr.Markdown(
        "A JSONL file of prompts, as `kosmosg generate --prompts` reads, and the images that it "
        "names (without folders): a zip of images. What a record does not say is as the tab Draw "
        "shows it."
    )
    jsonl = gr.File(label="Prompts (.jsonl)", file_types=[".jsonl", ".json"], elem_id="jsonl")
    images = gr.File(
        label="Images of the prompts",
        file_count="multiple",
        file_types=["image"],
        elem_id="batch-images",
    )
    with gr.Row():
        button = gr.Button("Draw all", variant="primary", elem_id="draw-all")
        cancel = gr.Button("Cancel")
    result = gr.File(label="Drawn images (.zip)", interactive=False, elem_id="zip")

    def draw_all(
        jsonl: str | None,
        images: list[str] | None,
        negative_prompt: str,
        guidance: float,
        steps: float,
        scheduler: str,
        seed: float,
        num_images: float,
        height: float,
        width: float,
        strength: float,
        controlnet: str,
        control_scale: float,
        lora_scale: float,
        request: gr.Request,
        start_image: str | None = None,
        control_image: str | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how gradio finds it
    ) -> str:
        stop, made = sessions.begin(request.session_hash)
        paths = [Path(image) for image in images or []]
        values = {
            "negative_prompt": negative_prompt, "guidance": guidance, "steps": steps,
            "scheduler": scheduler, "seed": seed, "num_images": num_images,
            "height": height, "width": width, "strength": strength, "controlnet": controlnet,
            "control_scale": control_scale, "lora_scale": lora_scale,
            "start_image": start_image, "control_image": control_image,
        }  # fmt: skip
        with errors_for_people(*paths, made / "prompts" / "x", made / "images" / "x"):
            if jsonl is None:
                raise PromptError("add a JSONL file of prompts")
            defaults = generation_request("", [], values)
            # For records with a start image of their own.
            options = dataclasses.replace(defaults.options, strength=float(strength))
            defaults = dataclasses.replace(defaults, options=options)
            return str(
                generate_batch(
                    studio, Path(jsonl), paths, defaults, made,
                    lambda share, words: progress(share, words), stop,
                )
            )  # fmt: skip

    settings = [controls[name] for name in (*CONTROLS, *IMAGES)]
    button.click(
        draw_all,
        [jsonl, images, *settings],
        [result],
        concurrency_id=MODEL_QUEUE,
        api_name="draw_all",
    )
    cancel.click(canceller(sessions), None, None, queue=False, api_visibility="private")


def canceller(sessions: Sessions) -> Callable[..., None]:
    def cancel(request: gr.Request) -> None:
        if not sessions.stop(request.session_hash):
            gr.Info("nothing is being drawn", duration=2)

    return cancel
