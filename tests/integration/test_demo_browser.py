"""The page of `kosmosg demo`, used in a headless Chromium and through gradio's REST client.

Needs the extra `web`, playwright and a chromium on the PATH (Debian's `chromium`).
tests/demo_page.sh brings the first two, and fails where anything is missing.
"""

from __future__ import annotations

import base64
import json
import os
import re
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from megatron_kosmosg.hf.pipeline_kosmosg import KosmosGPipeline
from megatron_kosmosg.inference.image_files import read_settings
from megatron_kosmosg.toy import assets
from megatron_kosmosg.toy.evaluation.toy_prompts import subject_image
from megatron_kosmosg.toy.world import sample_scene
from tests.support.demo_browser import CHROMIUM, MISSING, browser, served
from tests.support.unet_additions import write_additions

REQUIRED = "KOSMOSG_REQUIRE_BROWSER" in os.environ
pytestmark = [
    pytest.mark.skipif(
        bool(MISSING) and not REQUIRED, reason=f"not installed: {', '.join(MISSING)}"
    ),
    pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="no chromium on the PATH"),
    pytest.mark.timeout(600),
]

SHOTS = os.environ.get("KOSMOSG_SCREENSHOTS")
"""A folder for screenshots, to be looked at."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def address(folder):
    """The toy with a ControlNet and a LoRA of random weights."""
    toy = KosmosGPipeline.from_pretrained(assets.path() / "kosmosg")
    added = write_additions(toy, folder / "additions")
    options = ("--controlnet", f"canny={added / 'net'}", "--lora", str(added / "lora"))
    with served(folder, *options, "--lora-scale", "0") as (address, process):
        yield address
        assert process.poll() is None, "it is still there"


@pytest.fixture(scope="module")
def context(address):
    with browser() as context:
        yield context


@pytest.fixture
def page(context, address):
    page = context.new_page()
    page.goto(address)
    page.get_by_role("button", name="Draw", exact=True).wait_for()
    yield page
    page.close()


@pytest.fixture(scope="module")
def subjects(folder) -> list[str]:
    files = []
    for number in range(2):
        path = folder / f"subject-{number}.png"
        subject_image(sample_scene((21, number), 1, True).entities[0], number).save(path)
        files.append(str(path))
    return files


def shot(page, name: str) -> None:
    if SHOTS:
        loaded = "[...document.querySelectorAll('#drawn img')].every(image => image.complete)"
        page.wait_for_function(loaded)
        page.screenshot(path=Path(SHOTS, f"{name}.png"), full_page=True)


def write(page, text: str, files: list[str]) -> None:
    page.locator("#prompt textarea").fill(text)
    for count, file in enumerate(files, start=1):
        page.locator("#prompt input[type=file]").set_input_files(file)
        page.locator("#count").get_by_text(f"{count} image").wait_for()


def draw(page) -> None:
    page.locator("#draw").click()


def toast(page) -> str:
    shown = page.locator(".toast-body").first
    shown.wait_for()
    return shown.inner_text()


def test_two_images_are_drawn_and_say_their_settings(page, subjects, tmp_path):
    write(page, "a <image> and a <image> on a cyan background", subjects)
    assert "2 <image> in the text, 2 images added" in page.locator("#count").inner_text()
    draw(page)
    page.locator("#drawn img").first.wait_for()
    page.locator("#files a").nth(3).wait_for()
    shot(page, "drawn")
    with page.expect_download() as started:
        page.locator("#files a").first.click()
    path = tmp_path / started.value.suggested_filename
    started.value.save_as(path)
    settings = read_settings(path)
    assert settings["prompt"] == "a <image> and a <image> on a cyan background"
    assert settings["steps"] == 8 and settings["seed"] == 0
    page.reload()
    page.get_by_role("button", name="Draw", exact=True).wait_for()
    page.locator("#load-settings input[type=file]").set_input_files(path)
    page.locator("#loaded").get_by_text("settings loaded").wait_for()
    shown = page.locator("#loaded").inner_text()
    assert shown == "settings loaded; its images were subject-0.png, subject-1.png: add them"
    assert page.locator("#prompt textarea").input_value() == settings["prompt"]
    shot(page, "loaded")


def test_a_wrong_count_is_said_before_and_after_the_button(page, subjects):
    write(page, "a <image> and a <image>", subjects[:1])
    assert "2 <image> in the text, 1 image added: add 1 more" in page.locator("#count").inner_text()
    draw(page)
    shown = toast(page)
    shot(page, "wrong-count")
    assert "2 <image> in the prompt but 1 image(s) given" in shown
    assert "Traceback" not in page.content() and "/tmp" not in shown


GIVE_FILE = """(element, [kind, data]) => {
    const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0));
    const files = new DataTransfer();
    files.items.add(new File([bytes], `${kind}.png`, {type: 'image/png'}));
    const how = {bubbles: true, cancelable: true};
    element.dispatchEvent(kind === 'paste'
        ? new ClipboardEvent('paste', {...how, clipboardData: files})
        : new DragEvent('drop', {...how, dataTransfer: files}));
}"""


def test_images_are_pasted_and_dropped(page, subjects):
    data = base64.b64encode(Path(subjects[0]).read_bytes()).decode()
    for count, kind in enumerate(("paste", "drop"), start=1):
        page.locator("#prompt textarea").evaluate(GIVE_FILE, [kind, data])
        page.locator("#count").get_by_text(f"{count} image").last.wait_for()
        page.locator("#prompt-images img").nth(count - 1).wait_for()


def test_images_are_moved(page, subjects):
    write(page, "<image> <image>", subjects)
    shown = page.locator("#prompt-images img")
    before = [shown.nth(i).get_attribute("src").rpartition("/")[2] for i in range(2)]
    page.locator("#prompt-images button.thumbnail-item, #prompt-images .grid-container button").nth(
        1
    ).click()
    page.get_by_role("button", name="Move image earlier").click()
    page.wait_for_function(
        "name => document.querySelector('#prompt-images img').src.endsWith(name)", arg=before[1]
    )


def test_cancel_stops_a_long_drawing(page):
    write(page, "a red circle", [])
    page.locator("#steps input[type=number]").fill("100")
    draw(page)
    page.get_by_text(re.compile(r"step \d+ of 100")).first.wait_for()
    page.locator("#cancel").click()
    shown = toast(page)
    shot(page, "cancelled")
    assert re.search(r"stopped after step \d+ of 100", shown)


def test_two_tabs_draw_one_after_the_other(context, address, page):
    other = context.new_page()
    other.goto(address)
    other.get_by_role("button", name="Draw", exact=True).wait_for()
    for tab, colour in ((page, "red"), (other, "blue")):
        write(tab, f"a {colour} circle on a yellow background", [])
        draw(tab)
    for tab in (page, other):
        tab.locator("#drawn img").first.wait_for()
    shown = [tab.locator("#drawn img").first.get_attribute("src") for tab in (page, other)]
    other.close()
    assert shown[0] != shown[1]


def test_a_huge_file_and_no_image_are_refused(page, tmp_path):
    huge = tmp_path / "huge.png"
    huge.write_bytes(b"\x89PNG" + bytes(40 << 20))
    page.locator("#prompt input[type=file]").set_input_files(str(huge))
    assert "maximum" in toast(page).lower() or "size" in toast(page).lower()
    shot(page, "huge")


def choose(page, tab: str) -> None:
    page.get_by_role("tab", name=tab, exact=True).click()


def test_a_start_image_and_a_controlnet_are_drawn_from_and_loaded_again(page, subjects, tmp_path):
    write(page, "a red circle", [])
    choose(page, "Start image")
    page.locator("#start input[type=file]").set_input_files(subjects[0])
    page.locator("#start img").first.wait_for()
    page.locator("#strength input[type=number]").fill("0.5")
    shot(page, "start-image")
    choose(page, "ControlNet")
    assert "canny: edges, as thin white lines on black" in page.locator("body").inner_text()
    page.locator("#control input[type=file]").set_input_files(subjects[1])
    page.locator("#control img").first.wait_for()
    draw(page)
    assert "choose a ControlNet for the control image" in toast(page)
    page.locator("#controlnet input").click()
    page.get_by_role("option", name="canny").click()
    shot(page, "controlnet")
    draw(page)
    page.locator("#files a").nth(3).wait_for()
    with page.expect_download() as started:
        page.locator("#files a").first.click()
    path = tmp_path / "drawn.png"
    started.value.save_as(path)
    settings = read_settings(path)
    assert settings["strength"] == 0.5 and settings["controlnet"][1] == 1.0
    assert {"start_image", "control_image", "loras"} <= set(settings)
    page.locator("text=History of this tab").click()
    page.locator("#history img").nth(3).wait_for()
    page.reload()
    page.get_by_role("button", name="Draw", exact=True).wait_for()
    page.locator("#load-settings input[type=file]").set_input_files(path)
    page.locator("#loaded").get_by_text("settings loaded").wait_for()
    shown = page.locator("#loaded").inner_text()
    assert shown == "settings loaded; add its start image; add its control image"
    choose(page, "ControlNet")
    assert page.locator("#controlnet input").input_value() == "canny"


def test_a_lora_is_offered(page):
    choose(page, "LoRA")
    assert page.locator("#lora input[type=number]").input_value() == "1"
    shot(page, "lora")
    choose(page, "Batch")
    page.locator("#draw-all").wait_for()
    shot(page, "batch")


def test_a_list_of_prompts_becomes_a_zip(page, subjects, tmp_path):
    choose(page, "Batch")
    record = {"id": "cat", "prompt": "a <image>", "images": ["subject-0.png"], "num_images": 2}
    (tmp_path / "p.jsonl").write_text(json.dumps(record))
    page.locator("#draw-all").click()
    assert "add a JSONL file of prompts" in toast(page)
    page.locator("#jsonl input[type=file]").set_input_files(str(tmp_path / "p.jsonl"))
    page.locator("#batch-images input[type=file]").set_input_files(subjects[0])
    page.get_by_text("subject-0").first.wait_for()
    page.locator("#draw-all").click()
    page.locator("#zip a").first.wait_for()
    with page.expect_download() as started:
        page.locator("#zip a").first.click()
    started.value.save_as(tmp_path / "made.zip")
    with zipfile.ZipFile(tmp_path / "made.zip") as archive:
        assert archive.namelist() == ["cat-0.png", "cat-1.png", "contact_sheet.png"]


def test_a_caption_is_said(page, subjects):
    page.get_by_role("tab", name="Caption").click()
    page.locator("#caption-prompt input[type=file]").set_input_files(subjects[0])
    page.locator("#caption-prompt img").first.wait_for()
    page.locator("#caption").click()
    page.wait_for_function("() => document.querySelector('#said textarea').value.length > 0")
    shot(page, "caption")


def test_it_fits_a_phone(address, context):
    phone = context.new_page()
    phone.set_viewport_size({"width": 390, "height": 844})
    phone.goto(address)
    phone.get_by_role("button", name="Draw", exact=True).wait_for()
    widths = {}
    for tab in TABS:
        _open(phone, tab)
        widths[tab] = phone.evaluate("document.documentElement.scrollWidth")
        shot(phone, f"phone-{tab.replace(' ', '-').lower()}")
    phone.close()
    assert max(widths.values()) <= 390, widths


TABS = ("Settings", "Start image", "ControlNet", "LoRA", "Caption", "Batch")
"""The first four are in the tab Draw."""


def _open(page, tab: str) -> None:
    """A tab that does not fit beside the others is in a menu."""
    entry = page.get_by_role("tab", name=tab, exact=True)
    if not entry.is_visible():
        page.locator(".overflow-menu > button:visible").first.click()
        entry = page.locator(".overflow-dropdown:visible").get_by_text(tab, exact=True)
    entry.click()
    page.wait_for_timeout(200)


@pytest.mark.parametrize("tab", TABS)
def test_every_control_has_a_name(page, tab):
    """For a screen reader."""
    _open(page, tab)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('input, textarea, button, select')]
        .filter(e => e.offsetParent && e.type !== 'file' && !(e.ariaLabel || e.textContent.trim()
            || e.title || (e.labels && e.labels.length) || e.closest('label') || e.placeholder
            || e.closest('[aria-label]')))
        .map(e => e.outerHTML.slice(0, 120))"""
    )
    assert not unnamed, unnamed


def test_the_keyboard_alone_draws(page):
    page.locator("#prompt textarea").fill("a red circle")
    page.locator("#prompt textarea").focus()
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "draw":
            break
    else:
        raise AssertionError("Tab does not reach the button")
    page.keyboard.press("Enter")
    page.locator("#drawn img").first.wait_for()


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "{repository}/setup.py"])
def test_no_file_of_the_machine_is_read(address, path):
    path = path.format(repository=Path(__file__).parents[2])
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=20)
    assert refused.value.code in (403, 404)


PAGE_VALUES = ["", 2.0, 4, "dpm++", 7, 1, 0, 0, 0.75, "none", 1.0, 1.0]
"""What `/draw` and `/draw_all` take of settings, in their order."""


def called(address: str, prompt: dict) -> str:
    """The events of a raw call of `/draw`; gradio's client would upload a file that it is told."""
    url = f"{address}/gradio_api/call/draw"
    data = json.dumps({"data": [prompt, *PAGE_VALUES, False, None, None]}).encode()
    post = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(post, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{url}/{event}", timeout=60) as answer:
        return answer.read().decode()


def test_a_path_in_a_request_is_not_opened(address, subjects):
    """An image of the machine that nobody has uploaded."""
    words = {"text": "a red circle", "files": []}
    assert "event: complete" in called(address, words)
    kind = {"meta": {"_type": "gradio.FileData"}, "mime_type": "image/png", "orig_name": "a.png"}
    found = called(address, {"text": "a <image>", "files": [{"path": subjects[0], **kind}]})
    assert "event: error" in found and "event: complete" not in found
    assert "Traceback" not in found and str(Path(__file__).parents[2]) not in found


def test_the_rest_client_draws(address, subjects, tmp_path):
    from gradio_client import Client, handle_file

    client = Client(address, download_files=str(tmp_path), verbose=False)
    prompt = {"text": "a <image>", "files": [handle_file(subjects[0])]}
    gallery, files, seed, _ = client.predict(
        prompt=prompt, steps=4, seed=7, num_images=1, api_name="/draw"
    )
    assert len(gallery) == len(files) == 1 and seed == 7
    assert read_settings(Path(files[0]))["steps"] == 4
    assert client.predict(prompt, 5, api_name="/caption")
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "x", "prompt": "a red circle"}))
    made = client.predict(
        handle_file(str(tmp_path / "p.jsonl")), [], *PAGE_VALUES, None, None, api_name="/draw_all"
    )
    with zipfile.ZipFile(made) as archive:
        assert "x-0.png" in archive.namelist()
    Image.open(files[0]).verify()
    control, start = map(handle_file, subjects)
    added = {"controlnet": "canny", "control_image": control, "start_image": start}
    _, files, _, _ = client.predict(
        prompt=prompt, num_images=1, strength=0.5, lora_scale=0.5, **added, api_name="/draw"
    )
    settings = read_settings(Path(files[0]))
    assert settings["strength"] == 0.5 and {"controlnet", "loras", "start_image"} <= set(settings)


def test_ending_it_leaves_nothing(tmp_path):
    with served(tmp_path) as (_, process):
        assert list(tmp_path.glob("kosmosg-demo-*"))
        process.terminate()
        assert process.wait(30) == 0
    assert not list(tmp_path.glob("kosmosg-demo-*"))
    assert "Traceback" not in (tmp_path / "demo.log").read_text()
