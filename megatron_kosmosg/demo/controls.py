"""The page's controls that decide how pictures look."""

from __future__ import annotations

from typing import Any

import gradio as gr

from megatron_kosmosg.demo import requests
from megatron_kosmosg.demo.start_values import StartValues
from megatron_kosmosg.demo.studio import Studio

MODEL_QUEUE = "model"
"""What uses the model waits in one queue."""
CONTROLS = ("negative_prompt", "guidance", "steps", "scheduler", "seed", "num_images")
SIZES = ("height", "width")


def setting_controls(studio: Studio, start: StartValues) -> dict[str, Any]:
    controls: dict[str, Any] = {
        "negative_prompt": gr.Textbox(
            label="Negative prompt", info="What not to draw", lines=1, elem_id="negative"
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
    controls["control_image"] = gr.Image(
        label="Control image, which the ControlNet sees",
        type="filepath",
        sources=["upload", "clipboard"],
        visible=studio.has_control,
        elem_id="control",
    )
    return controls
