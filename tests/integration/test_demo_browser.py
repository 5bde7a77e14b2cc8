"""The page of `kosmosg demo`, used in a headless Chromium and through gradio's REST client.

Needs the extra `web`, playwright and a chromium on the PATH (Debian's `chromium`).
tests/demo_page.sh brings the first two, and fails where anything is missing.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from megatron_kosmosg.inference.picture_files import read_settings
from megatron_kosmosg.toy.judging.toy_prompts import subject_picture
from megatron_kosmosg.toy.world import sample_scene
from tests.support.demo_browser import CHROMIUM, MISSING, browser, served

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
    with served(folder) as (address, process):
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
        subject_picture(sample_scene((21, number), 1, True).entities[0], number).save(path)
        files.append(str(path))
    return files


def shot(page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS, f"{name}.png"), full_page=True)


def write(page, text: str, files: list[str]) -> None:
    page.locator("#prompt textarea").fill(text)
    for count, file in enumerate(files, start=1):
        page.locator("#prompt input[type=file]").set_input_files(file)
        page.locator("#count").get_by_text(f"{count} image").wait_for()


def draw(page) -> None:
    page.locator("#draw").click()


def toast(page) -> str:
    said = page.locator(".toast-body").first
    said.wait_for()
    return said.inner_text()


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
    said = page.locator("#loaded").inner_text()
    assert said == "settings loaded; its images were subject-0.png, subject-1.png: add them"
    assert page.locator("#prompt textarea").input_value() == settings["prompt"]
    shot(page, "loaded")


def test_a_wrong_count_is_said_before_and_after_the_button(page, subjects):
    write(page, "a <image> and a <image>", subjects[:1])
    assert "2 <image> in the text, 1 image added: add 1 more" in page.locator("#count").inner_text()
    draw(page)
    said = toast(page)
    shot(page, "wrong-count")
    assert "2 <image> in the prompt but 1 image(s) given" in said
    assert "Traceback" not in page.content() and "/tmp" not in said


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
    said = toast(page)
    shot(page, "cancelled")
    assert re.search(r"stopped after step \d+ of 100", said)


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
    width = phone.evaluate("document.documentElement.scrollWidth")
    shot(phone, "phone")
    phone.close()
    assert width <= 390


def test_every_control_has_a_name(page):
    """For a screen reader, and the button is reached by the keyboard."""
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('input, textarea, button, select')]
        .filter(e => e.offsetParent && e.type !== 'file' && !(e.ariaLabel || e.textContent.trim()
            || e.title || (e.labels && e.labels.length) || e.closest('label') || e.placeholder
            || e.closest('[aria-label]')))
        .map(e => e.outerHTML.slice(0, 120))"""
    )
    assert not unnamed, unnamed
    page.locator("#draw").focus()
    page.keyboard.press("Enter")
    toast(page)


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "{repository}/setup.py"])
def test_no_file_of_the_machine_is_read(address, path):
    path = path.format(repository=Path(__file__).parents[2])
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=20)
    assert refused.value.code in (403, 404)


GIVEN = ["", 2.0, 4, "dpm++", 7, 1, 0, 0, None, False, []]
"""What `/draw` takes after the prompt."""


def called(address: str, prompt: dict) -> str:
    """The events of a raw call of `/draw`; gradio's client would upload a file that it is told."""
    url = f"{address}/gradio_api/call/draw"
    data = json.dumps({"data": [prompt, *GIVEN]}).encode()
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
    gallery, files, seed, _ = client.predict(prompt, *GIVEN, api_name="/draw")
    assert len(gallery) == len(files) == 1 and seed == 7
    assert read_settings(Path(files[0]))["steps"] == 4
    assert client.predict(prompt, 5, api_name="/caption")
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "x", "prompt": "a red circle"}))
    made = client.predict(
        handle_file(str(tmp_path / "p.jsonl")), [], *GIVEN[:8], api_name="/draw_all"
    )
    with zipfile.ZipFile(made) as archive:
        assert "x-0.png" in archive.namelist()
    Image.open(files[0]).verify()


def test_ending_it_leaves_nothing(tmp_path):
    with served(tmp_path) as (_, process):
        assert list(tmp_path.glob("kosmosg-demo-*"))
        process.terminate()
        assert process.wait(30) == 0
    assert not list(tmp_path.glob("kosmosg-demo-*"))
    assert "Traceback" not in (tmp_path / "demo.log").read_text()
