"""What the page of `kosmosg demo` does, without the page: requests, generation, batches, sessions.

tests/integration/test_demo_browser.py uses the page.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import subprocess
import sys
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_kosmosg.cli import demo
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.demo import requests
from megatron_kosmosg.demo.batch import generate_batch
from megatron_kosmosg.demo.requests import count_line, generation_request, image_names, page_values
from megatron_kosmosg.demo.serving import check_address
from megatron_kosmosg.demo.sessions import Sessions
from megatron_kosmosg.demo.start_values import TOY_START_VALUES
from megatron_kosmosg.demo.studio import Cancelled, Studio
from megatron_kosmosg.inference.image_files import read_settings
from megatron_kosmosg.inference.model_source import find_model
from megatron_kosmosg.inference.open_model import open_generator
from megatron_kosmosg.inference.prompt_records import PromptError
from megatron_kosmosg.toy import assets
from tests.support.demo_requests import PAGE_VALUES, PROMPT, open_toy, pixels, silent, write_subject


@pytest.fixture(scope="module")
def studio() -> Studio:
    return open_toy()


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Path:
    return write_subject(tmp_path_factory.mktemp("subject"))


def test_the_page_calls_what_the_studio_has(studio):
    """Not by a call, for which it takes a browser."""
    pages = Path(requests.__file__).parent.glob("*.py")
    used = {n for page in pages for n in re.findall(r"\bstudio\.(\w+)", page.read_text("utf-8"))}
    assert "generate" in used and [name for name in used if not hasattr(studio, name)] == ["py"]


@pytest.mark.parametrize(
    ("prompt", "num_images", "fits", "text"),
    [
        ("a <image>", 1, True, "1 <image> in the text, 1 image added"),
        ("a <image>", 0, False, "1 <image> in the text, 0 images added: add 1 more"),
        ("a dog", 2, False, "0 <image> in the text, 2 images added: write <image>"),
        ("a dog", 0, True, "0 <image> in the text, 0 images added"),
    ],
)
def test_the_page_says_both_numbers(prompt, num_images, fits, text):
    found = count_line(prompt, num_images)
    assert found[0] == fits and found[1].startswith(text)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps is a whole number from 1"),
        ({"steps": 10_000}, "steps is a whole number from 1 to 250"),
        ({"steps": 2.5}, "steps is a whole number"),
        ({"num_images": 99}, "num_images is a whole number from 1 to 8"),
        ({"seed": -1}, "seed is a whole number from 0"),
        ({"seed": "x"}, "seed is a whole number"),
        ({"guidance": -1}, "guidance is a number from 0 to 30"),
        ({"guidance": float("nan")}, "guidance is a number from 0 to 30"),
        ({"guidance": None}, "guidance is a number"),
        ({"scheduler": "../x"}, "scheduler is one of saved, dpm"),
        ({"width": 1_000_000}, "width is a whole number from 0 to 2,048"),
        ({"negative_prompt": "x" * 30_000}, "the negative prompt has more than 20,000"),
    ],
)
def test_a_setting_that_no_page_sends_is_refused(changed, message):
    with pytest.raises(PromptError, match=message):
        generation_request(PROMPT, [], PAGE_VALUES | changed)


def huge_png(path: Path) -> Path:
    """A header that says 60,000 x 60,000 pixels, in a hundred bytes."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks + b"\0\0\0\0IEND\xaeB`\x82")
    return path


def test_what_is_no_image_or_too_large_is_refused_by_its_name(tmp_path, subject, monkeypatch):
    text = tmp_path / "text.png"
    text.write_text("no image")
    huge = huge_png(tmp_path / "huge.png")
    for path, reason in ((text, "is not a known"), (huge, "pixels")):
        with pytest.raises(PromptError, match=f"^{path.name} .*{reason}"):
            generation_request("<image>", [path], PAGE_VALUES).record()
    with pytest.raises(PromptError, match="65 images; a prompt takes at most 64"):
        generation_request("<image>" * 65, [subject] * 65, PAGE_VALUES).record()
    monkeypatch.setattr(requests, "MAX_UPLOAD_BYTES", 10)
    with pytest.raises(PromptError, match="subject.png cannot be used"):
        generation_request("<image>", [subject], PAGE_VALUES).record()


def test_a_image_says_settings_that_draw_it_again(studio, subject, tmp_path):
    reports = []
    request = generation_request(PROMPT, [subject], PAGE_VALUES)
    first = studio.generate(
        request,
        tmp_path / "a",
        lambda share, words: reports.append((share, words)),
        threading.Event(),
    )
    assert [path.name for path in first] == ["image-0.png", "image-1.png"]
    assert [share for share, _ in reports] == [0.25, 0.5, 0.75, 1.0]
    assert reports[0][1].startswith("step 1 of 4, ") and reports[0][1].endswith(" s left")
    assert not np.array_equal(pixels(first[0]), pixels(first[1]))
    settings = read_settings(first[1])
    assert image_names(settings) == ["subject.png"] and image_names({"shown": 1}) == []
    assert settings["model"] == studio.model_fingerprint
    values = page_values(settings)
    assert values["prompt"] == PROMPT and values["seed"] == 4 and values["scheduler"] == "dpm++"
    again = studio.generate(
        generation_request(values["prompt"], [subject], values),
        tmp_path / "b",
        silent,
        threading.Event(),
    )
    assert np.array_equal(pixels(again[0]), pixels(first[1]))


def test_a_scheduler_is_of_one_request(studio, subject, tmp_path):
    """Whatever another session has drawn with in between."""

    def generate(scheduler: str) -> np.ndarray:
        request = generation_request(
            PROMPT, [subject], PAGE_VALUES | {"scheduler": scheduler, "num_images": 1}
        )
        return pixels(studio.generate(request, tmp_path, silent, threading.Event())[0])

    first, other, again = generate("dpm++"), generate("ddim"), generate("dpm++")
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_drawing_stops_at_the_next_step(studio, subject, tmp_path):
    stop, seen = threading.Event(), []

    def progress(share: float, words: str) -> None:
        seen.append(words)
        stop.set()

    with pytest.raises(Cancelled, match="stopped after step 2 of 4"):
        studio.generate(
            generation_request(PROMPT, [subject], PAGE_VALUES), tmp_path / "made", progress, stop
        )
    assert len(seen) == 1 and not (tmp_path / "made").exists()
    studio.generate(
        generation_request("a red circle", [], PAGE_VALUES),
        tmp_path / "next",
        silent,
        threading.Event(),
    )


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ("two <image> <image>", 1, "2 <image> in the prompt but 1 image"),
        ("", 0, "write a prompt"),
        ("<image> " * 20, 20, "this model has 96"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(studio, subject, tmp_path, prompt, count, message):
    request = generation_request(prompt, [subject] * count, PAGE_VALUES)
    with pytest.raises(PromptError, match=message):
        studio.generate(request, tmp_path / "made", silent, threading.Event())
    assert not (tmp_path / "made").exists()


def test_as_many_images_fit_as_the_page_says(studio, subject):
    """And no more."""
    parts = [Image.open(subject)] * studio.max_images
    tokens, _ = studio.image_generator.pipeline.prompt_tokens(parts)
    assert len(tokens) == 1 + studio.max_images * studio.image_positions <= studio.longest_prompt
    with pytest.raises(ValueError, match=f"this model has {studio.longest_prompt}"):
        studio.image_generator.pipeline.prompt_tokens([*parts, parts[0]])


def test_the_language_model_goes_on(studio, subject):
    alone = studio.caption("", [subject], 6)
    assert alone == studio.caption("<image>", [subject], 6)
    assert 0 < len(alone.split()) <= 6
    assert studio.caption("a", [subject], 6) == studio.caption("<image>a", [subject], 6)
    with pytest.raises(PromptError, match="add an image"):
        studio.caption(" ", [], 6)
    with pytest.raises(PromptError, match="this model has 96"):
        studio.caption("circle " * 200, [], 6)


@pytest.mark.parametrize(
    "info",
    [
        {},
        {"settings": "{"},
        {"settings": "[]", "prompt": "a"},
        {"settings": "{}"},
        {"settings": '{"steps": 1e9}', "prompt": "a"},
    ],
)
def test_a_png_of_somebody_else_loads_no_settings(tmp_path, info):
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for name, text in info.items():
        chunks.add_text(name, text)
    path = tmp_path / "other.png"
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    with pytest.raises(PromptError):
        page_values(read_settings(path))


def test_a_list_becomes_a_zip(studio, subject, tmp_path):
    records = [
        {"id": "one", "prompt": PROMPT, "images": ["subject.png"]},
        {"id": "two", "prompt": "a red circle", "num_images": 1, "seed": 9, "steps": 2},
    ]
    jsonl = tmp_path / "mine.jsonl"
    jsonl.write_text("".join(json.dumps(record) + "\n" for record in records))
    reports = []
    made = generate_batch(
        studio,
        jsonl,
        [subject],
        generation_request("", [], PAGE_VALUES),
        tmp_path / "made",
        lambda share, words: reports.append((share, words)),
        threading.Event(),
    )
    with zipfile.ZipFile(made) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "out")
    assert names == ["contact_sheet.png", "one-0.png", "one-1.png", "two-0.png"]
    assert reports[-1] == (1.0, "3 of 3 images")
    assert all(0 <= share <= 1 for share, _ in reports)
    settings = read_settings(tmp_path / "out" / "two-0.png")
    assert settings["seed"] == 9 and settings["steps"] == 2 and settings["scheduler"] == "dpm++"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "<image>", "images": ["other.png"]}, "other.png"),
        ({"prompt": "<image>", "images": ["../subject.png"]}, "outside the folder"),
        ({"prompt": "<image>", "images": ["/etc/passwd"]}, "outside the folder"),
        ({"prompt": "a", "num_images": 500}, "num_images is at most 8"),
        ({"prompt": "a", "steps": 9000}, "steps is at most 250"),
        ({"promt": "a"}, "did you mean 'prompt'"),
    ],
)
def test_a_list_that_does_not_fit_draws_nothing(studio, subject, tmp_path, record, message):
    jsonl = tmp_path / "list.jsonl"
    jsonl.write_text(json.dumps(record))
    with pytest.raises(PromptError, match=message):
        generate_batch(
            studio,
            jsonl,
            [subject],
            generation_request("", [], PAGE_VALUES),
            tmp_path / "made",
            silent,
            threading.Event(),
        )
    assert not (tmp_path / "made" / "pictures").exists()


def test_a_list_stops_too(studio, subject, tmp_path):
    jsonl = tmp_path / "list.jsonl"
    jsonl.write_text(json.dumps({"prompt": "a red circle", "num_images": 1}) * 1)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled, match="stopped after 0 of 1 images"):
        generate_batch(
            studio,
            jsonl,
            [],
            generation_request("", [], PAGE_VALUES),
            tmp_path / "made",
            silent,
            stop,
        )


def test_a_tab_stops_and_removes_its_own_only(tmp_path):
    sessions = Sessions(tmp_path)
    (first, made), (second, other) = sessions.begin("a"), sessions.begin("b")
    assert sessions.stop("a") and first.is_set() and not second.is_set()
    assert not sessions.stop("a") and not sessions.stop(None) and not sessions.stop("c")
    again, _ = sessions.begin("a")
    assert not again.is_set()
    sessions.leave("a")
    assert again.is_set() and not made.exists() and other.is_dir()
    _, odd = sessions.begin("../../x")
    assert odd.is_relative_to(tmp_path)


def test_without_gradio_the_command_says_what_is_needed(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert demo.main([]) == 2
    assert "the page needs gradio: pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "70000"], "the last port is 65535"),
        (["--lora-scale", "0.5"], "1 --lora-scale for 0 --lora"),
        (["--model", "missing"], "is no exported folder"),
        (["--control-scale", "3"], "--control-scale 3: at most 2 here"),
        (["--controlnet", "canny=missing"], "--controlnet missing: no config.json there"),
        (["--lora", "missing"], "--lora missing: no such file or folder"),
    ],
)
def test_wrong_arguments_are_one_error(words, message, capsys):
    try:
        code = demo.main(words)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("127.0.0.1", "another program listens there, perhaps another kosmosg demo"),
        ("no-such-host.invalid", "--host no-such-host.invalid: no such address"),
        ("192.0.2.1", "--host 192.0.2.1: not an address of this machine"),
    ],
)
def test_an_address_that_cannot_be_used_is_said_before_the_model_is_opened(host, message):
    """192.0.2.1 is nobody's: RFC 5737."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=message):
            check_address(host, port)
    check_address("127.0.0.1", port)


def test_offloading_needs_a_gpu():
    with pytest.raises(ValueError, match="--offload model needs a GPU"):
        open_generator(
            find_model(assets.path() / "kosmosg"),
            "saved",
            torch.float32,
            torch.device("cpu"),
            "model",
        )


def test_a_wrong_model_is_said_in_one_line_before_libraries_are_loaded(tmp_path):
    """Which take seconds, and print advice of their own."""
    program = (
        "import sys; from megatron_kosmosg.cli import demo; code = demo.main(['--model', 'none']); "
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules]); "
        "sys.exit(code)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert ended.returncode == 2 and ended.stdout == "[]\n"
    assert ended.stderr.startswith("error: --model none") and ended.stderr.count("\n") == 1


def test_the_shipped_toy_s_page_opens_with_a_prompt_that_can_be_drawn():
    assert count_line(TOY_START_VALUES.prompt, 0)[0]
