"""The page of `kosmosg demo`, with gradio: layout, and which control calls what.

Long because it is a layout: every control with its label, limits and what it calls.
"""

from __future__ import annotations

import html
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from megatron_kosmosg.demo import requests
from megatron_kosmosg.demo.controls import CONTROLS, IMAGES, MODEL_QUEUE, setting_controls
from megatron_kosmosg.demo.other_tabs import batch_tab, canceller, caption_tab
from megatron_kosmosg.demo.page_errors import errors_for_people
from megatron_kosmosg.demo.requests import count_line, generation_request, image_names, page_values
from megatron_kosmosg.demo.sessions import Sessions
from megatron_kosmosg.demo.start_values import StartValues
from megatron_kosmosg.demo.studio import Studio
from megatron_kosmosg.inference.image_files import read_settings
from megatron_kosmosg.toy.evaluation.toy_prompts import subject_image
from megatron_kosmosg.toy.world import sample_scene

TITLE = "KOSMOS-G"
MAX_WAITING = 16
"""Requests in the queue; later ones are refused."""
MAX_HISTORY = 64
KEPT_SECONDS = 6 * 3600
"""How long uploads stay that no tab has closed."""
CSS = """
.drawn img, .prompt-image img { image-rendering: pixelated; }
.drawn .grid-wrap { max-height: none; }
.prompt-image .grid-wrap { padding-top: 28px; }
.prompt-image button { max-width: 112px; max-height: 112px; }
#count .wrong { font-weight: 600; }
"""
LAUNCH: dict[str, Any] = {
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    "css": CSS,
    "show_error": False,
    "ssr_mode": False,
    "footer_links": ["api"],
    "run_history": False,
}
"""Of `Blocks.launch`. Fonts are the reader's own: none is fetched."""


def build_page(studio: Studio, start: StartValues, folder: Path) -> gr.Blocks:
    """Builds the page; what it draws is written to `folder`."""
    sessions = Sessions(folder / "drawn")
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, delete_cache=(600, KEPT_SECONDS), fill_width=False
    ) as page:
        gr.Markdown(f"# {TITLE}\n{_introduction(studio, start)}")
        with gr.Tab("Draw"):
            controls = _draw_tab(studio, start, folder, sessions)
        with gr.Tab("Caption"):
            caption_tab(studio, start, sessions)
        with gr.Tab("Batch"):
            batch_tab(studio, sessions, controls)
        page.unload(_leaving(sessions))
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    return page


def _introduction(studio: Studio, start: StartValues) -> str:
    kind = "The toy world's model: 32-pixel scenes of coloured shapes. " if start.is_toy else ""
    return (
        f"{kind}Add images to the prompt (drop, paste or choose them) and write `<image>` where "
        f"each of them goes. A prompt has {studio.longest_prompt} positions; an image takes "
        f"{studio.image_positions}, so at most {studio.max_images} images fit."
    )


def _leaving(sessions: Sessions) -> Callable[..., None]:
    def leave(request: gr.Request) -> None:
        sessions.leave(request.session_hash)

    return leave


def _draw_tab(
    studio: Studio, start: StartValues, folder: Path, sessions: Sessions
) -> dict[str, Any]:
    """Returns the controls that decide how images look, by name."""
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            prompt = gr.MultimodalTextbox(
                label="Prompt with images",
                value={"text": start.prompt, "files": []},
                file_types=["image"],
                file_count="multiple",
                sources=["upload"],
                lines=2,
                max_plain_text_length=requests.MAX_WORDS,
                submit_btn=False,
                elem_id="prompt",
            )
            count = gr.HTML(_count_html(start.prompt, 0), elem_id="count")
            shown = gr.Gallery(
                label="Images of the prompt, in their order",
                columns=6,
                height=180,
                object_fit="contain",
                interactive=False,
                elem_classes="prompt-image",
                elem_id="prompt-images",
            )
            chosen = gr.State(None)
            with gr.Row():
                earlier = gr.Button("Move image earlier", size="sm")
                later = gr.Button("Move image later", size="sm")
            controls = setting_controls(studio, start)
            with gr.Row():
                button = gr.Button("Draw", variant="primary", elem_id="draw")
                cancel = gr.Button("Cancel", elem_id="cancel")
        with gr.Column(scale=1, min_width=320):
            gallery = gr.Gallery(
                label="Drawn",
                columns=2,
                height="auto",
                format="png",
                object_fit="contain",
                interactive=False,
                elem_classes="drawn",
                elem_id="drawn",
            )
            files = gr.File(
                label="Full files, which say their settings",
                file_count="multiple",
                interactive=False,
                elem_id="files",
            )
            old = gr.File(
                label="Load settings from a drawn PNG",
                file_types=[".png"],
                height=150,
                elem_id="load-settings",
            )
            loaded = gr.HTML("", elem_id="loaded")
            with gr.Accordion("History of this tab", open=False):
                history = gr.Gallery(
                    label="Earlier images",
                    columns=4,
                    format="png",
                    object_fit="contain",
                    interactive=False,
                    elem_classes="drawn",
                    elem_id="history",
                )
                noise_of_batch = gr.State([])
    if start.is_toy:
        gr.Examples(_toy_examples(folder / "examples"), [prompt], label="Examples")

    def changed(value: dict[str, Any]) -> tuple[str, list[str]]:
        return _count_html(value["text"], len(value["files"])), value["files"]

    gr.on(
        [prompt.change],
        changed,
        [prompt],
        [count, shown],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    shown.select(_index, None, [chosen], queue=False, api_visibility="private")
    for moving, by in ((earlier, -1), (later, 1)):
        moving.click(
            _mover(by), [prompt, chosen], [prompt, chosen], queue=False, api_visibility="private"
        )
    old.upload(
        _settings_loader(studio),
        [old, prompt],
        [prompt, *(controls[name] for name in (*CONTROLS, *IMAGES, "randomize")), loaded],
        queue=False,
        api_visibility="private",
    )

    def draw(
        prompt: dict[str, Any],
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
        randomize: bool,
        noise_of_batch: list[str],
        request: gr.Request,
        start_image: str | None = None,
        control_image: str | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how gradio finds it
    ) -> tuple[list[str], list[str], int, list[str], list[str]]:
        stop, made = sessions.begin(request.session_hash)
        images = [Path(file) for file in prompt.get("files") or []]
        if randomize:
            seed = random.SystemRandom().randint(0, requests.MAX_RANDOM_SEED)
        values = {
            "negative_prompt": negative_prompt, "guidance": guidance, "steps": steps,
            "scheduler": scheduler, "seed": seed, "num_images": num_images,
            "height": height, "width": width, "strength": strength, "controlnet": controlnet,
            "control_scale": control_scale, "lora_scale": lora_scale,
            "start_image": start_image, "control_image": control_image,
        }  # fmt: skip
        with errors_for_people(*images, made / "image"):
            generation = generation_request(prompt.get("text") or "", images, values)
            drawn = studio.generate(
                generation, made, lambda share, words: progress(share, words), stop
            )
        names = [str(path) for path in drawn]
        shown = [*names, *noise_of_batch][:MAX_HISTORY]
        return names, names, int(seed), shown, shown

    settings = [controls[name] for name in (*CONTROLS, "randomize")]
    images = [controls[name] for name in IMAGES]
    gr.on(
        [button.click],
        draw,
        [prompt, *settings, noise_of_batch, *images],
        [gallery, files, controls["seed"], history, noise_of_batch],
        concurrency_id=MODEL_QUEUE,
        show_progress_on=[gallery],
        api_name="draw",
    )
    cancel.click(canceller(sessions), None, None, queue=False, api_name="cancel")
    return controls


def _count_html(prompt: str, num_images: int) -> str:
    fits, text = count_line(prompt, num_images)
    kind = "right" if fits else "wrong"
    return f'<div role="status" aria-live="polite" class="{kind}">{html.escape(text)}</div>'


def _index(event: gr.SelectData) -> int:
    return event.index


def _mover(by: int) -> Callable[..., tuple[dict[str, Any], int | None]]:
    def move(value: dict[str, Any], chosen: int | None) -> tuple[dict[str, Any], int | None]:
        files = list(value["files"])
        if chosen is None or not 0 <= chosen < len(files):
            gr.Info("choose one of the prompt's images first", duration=2)
            return value, None
        place = min(max(chosen + by, 0), len(files) - 1)
        files.insert(place, files.pop(chosen))
        return {"text": value["text"], "files": files}, place

    return move


def _settings_loader(studio: Studio) -> Callable[[str, dict[str, Any]], list[Any]]:
    def load(path: str, prompt: dict[str, Any]) -> list[Any]:
        """The prompt, CONTROLS, IMAGES, randomize, and what is said of them."""
        with errors_for_people(Path(path)):
            settings = read_settings(Path(path))
            values = page_values(settings) | studio.additions(settings)
            missing = studio.missing_additions(settings)
        names = image_names(settings)
        needed = [name for name in IMAGES if name in settings]
        notes = ["settings loaded"]
        notes += [f"its images were {', '.join(names)}: add them"] * bool(names)
        notes += [f"add its {name.replace('_', ' ')}" for name in needed]
        notes += [f"its {kind} is not here" for kind in missing]
        if settings.get("model") != studio.model_fingerprint:
            notes.append("another model has drawn it")
        controls = [values[name] for name in CONTROLS]
        # An image of the page that the PNG was not drawn with would change what is drawn.
        images = [gr.skip() if name in needed else None for name in IMAGES]
        text = {"text": values["prompt"], "files": prompt["files"]}
        note = f'<div role="status" aria-live="polite">{html.escape("; ".join(notes))}</div>'
        return [text, *controls, *images, False, note]

    return load


def _toy_examples(folder: Path) -> list[list[dict[str, Any]]]:
    """Held-out subjects of the toy world, in prompts of one and of two images."""
    folder.mkdir(parents=True)
    files = []
    for number in range(4):
        entity = sample_scene((17, number), 1, True).entities[0]
        files.append(str(folder / f"subject-{number + 1}.png"))
        subject_image(entity, number).save(files[-1])
    texts = {
        "a <image> on a yellow background": files[:1],
        "a <image> and a <image> on a cyan background": files[1:3],
        "<image> make it blue": files[3:],
    }
    return [[{"text": text, "files": chosen}] for text, chosen in texts.items()]
