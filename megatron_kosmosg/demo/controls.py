"""The page's controls that decide how images look, in tabs below the prompt."""

from __future__ import annotations

from typing import Any

import gradio as gr

from megatron_kosmosg.demo import requests
from megatron_kosmosg.demo.controlnets import CONTROL_IMAGES, control_image_of
from megatron_kosmosg.demo.start_values import StartValues
from megatron_kosmosg.demo.studio import Studio
from megatron_kosmosg.inference.image_plan import STRENGTH

MODEL_QUEUE = "model"
"""What uses the model waits in one queue."""
CONTROLS = (
    *("negative_prompt", "guidance", "steps", "scheduler", "seed", "num_images", "height", "width"),
    *("strength", "controlnet", "control_scale", "lora_scale"),
)
"""What a drawn PNG says of them is loaded again."""
IMAGES = ("start_image", "control_image")
SIZES = ("height", "width")


def setting_controls(studio: Studio, start: StartValues) -> dict[str, Any]:
    """The controls by name: CONTROLS, IMAGES and randomize, in tabs."""
    with gr.Tabs():
        with gr.Tab("Settings"):
            controls = _sampling_controls(start)
        with gr.Tab("Start image"):
            controls |= _start_controls()
        with gr.Tab("ControlNet"):
            controls |= _controlnet_controls(studio, start)
        with gr.Tab("LoRA"):
            controls["lora_scale"] = _lora_control(studio)
    return controls


def _sampling_controls(start: StartValues) -> dict[str, Any]:
    controls: dict[str, Any] = {
        "negative_prompt": gr.Textbox(
            "", label="Negative prompt", info="What not to draw", lines=1, elem_id="negative"
        )
    }
    with gr.Row():
        controls["guidance"] = gr.Slider(
            0,
            requests.MAX_GUIDANCE,
            start.guidance,
            step=0.5,
            label="Guidance",
            info="1 or less: none",
        )
        controls["steps"] = gr.Slider(
            1, requests.MAX_STEPS, start.steps, step=1, label="Steps", elem_id="steps"
        )
    with gr.Row():
        controls["scheduler"] = gr.Dropdown(
            list(requests.SCHEDULER_NAMES), value=start.scheduler, label="Scheduler"
        )
        controls["num_images"] = gr.Slider(
            1, requests.MAX_NUM_IMAGES, start.num_images, step=1, label="Number of images"
        )
    with gr.Row():
        controls["seed"] = gr.Number(
            0, label="Seed", precision=0, minimum=0, maximum=requests.MAX_PAGE_SEED, elem_id="seed"
        )
        controls["randomize"] = gr.Checkbox(False, label="Another seed each time")
    with gr.Accordion("Size", open=False), gr.Row():
        for name in SIZES:
            controls[name] = gr.Number(
                0,
                label=f"{name.capitalize()} in pixels",
                info="0: the model's own; else a multiple of 8",
                precision=0,
                minimum=0,
                maximum=requests.MAX_SIDE,
            )
    return controls


def _start_controls() -> dict[str, Any]:
    gr.Markdown(
        "Sampling starts from this image under noise, not from noise alone. It is cut and scaled "
        "to the size that is drawn."
    )
    return {
        "start_image": _image("Start image", "start"),
        "strength": gr.Slider(
            requests.MIN_STRENGTH,
            1,
            STRENGTH,
            step=0.05,
            label="Strength",
            info="Share of the steps; at 1 little of the image is left",
            elem_id="strength",
        ),
    }


def _controlnet_controls(studio: Studio, start: StartValues) -> dict[str, Any]:
    names = studio.controlnet_names
    if names:
        kinds = {name: control_image_of(name) for name in names}
        gr.Markdown("The network sees the control image as it is; nothing is made of a photograph:")
    else:
        kinds = CONTROL_IMAGES
        gr.Markdown(
            "None was given: `kosmosg demo --controlnet NAME=FOLDER` offers one, and more where it "
            "is repeated. It sees the control image as it is, which is for"
        )
    gr.Markdown("\n".join(f"- {name}: {image}" for name, image in kinds.items()))
    has_any = bool(names)
    return {
        "controlnet": gr.Dropdown(
            [requests.NONE, *names],
            value=requests.NONE,
            label="ControlNet",
            visible=has_any,
            elem_id="controlnet",
        ),
        "control_image": _image("Control image", "control", has_any),
        "control_scale": gr.Slider(
            0,
            requests.MAX_SCALE,
            start.control_scale,
            step=0.05,
            label="Control strength",
            visible=has_any,
        ),
    }


def _lora_control(studio: Studio) -> gr.Slider:
    names = ", ".join(f"`{name}`" for name in studio.lora_names)
    gr.Markdown(
        f"Given on the command line: {names}"
        if names
        else "None was given: `kosmosg demo --lora FILE` adds one to the U-Net."
    )
    return gr.Slider(
        0,
        requests.MAX_SCALE,
        1.0,
        step=0.05,
        label="Strength of the LoRAs",
        info="Times what the command line says (--lora-scale); 0 draws without them",
        visible=bool(names),
        elem_id="lora",
    )


def _image(label: str, name: str, visible: bool = True) -> gr.Image:
    return gr.Image(
        label=label,
        type="filepath",
        sources=["upload", "clipboard"],
        height=240,
        visible=visible,
        elem_id=name,
    )
