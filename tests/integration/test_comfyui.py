"""comfyui/ inside of a real ComfyUI: its loader, validation, executor, KSampler and ControlNet.

COMFYUI_DIR names a source tree of ComfyUI, whose packages (torchsde, aiohttp, scipy, av, alembic,
SQLAlchemy, pydantic-settings) are installed. It is no dependency: nothing of it is in this project.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_kosmosg.toy import assets
from megatron_kosmosg.toy.evaluation.toy_prompts import subject_image
from megatron_kosmosg.toy.world import sample_scene
from tests.support.comfyui_stand_in import PACK

TREE = os.environ.get("COMFYUI_DIR")
NEEDED = ("torchsde", "aiohttp", "scipy", "av", "alembic", "sqlalchemy", "pydantic_settings")
MISSING = [name for name in NEEDED if find_spec(name) is None]

pytestmark = [
    pytest.mark.skipif(TREE is None, reason="COMFYUI_DIR names no source tree of ComfyUI"),
    pytest.mark.skipif(bool(MISSING), reason=f"ComfyUI needs {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """What became of each workflow, by name."""
    folder = tmp_path_factory.mktemp("comfyui")
    for part in ("models/kosmosg", "input", "output", "custom_nodes"):
        (folder / part).mkdir(parents=True)
    (folder / "models/kosmosg/toy").symlink_to(assets.path() / "kosmosg")
    (folder / "custom_nodes/kosmosg").symlink_to(PACK)
    image = subject_image(sample_scene(5, 1, True).entities[0], 5)
    image.save(folder / "input" / "subject.png")
    image.resize((128, 128)).save(folder / "input" / "control.png")
    program = Path(__file__).parents[1] / "support" / "comfyui_graph.py"
    done = subprocess.run(
        [sys.executable, str(program), str(TREE), str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["kosmosg_text_and_images", "kosmosg_controlnet"])
def test_a_workflow_draws(found, name):
    assert found[name] == {"valid": True, "errors": "", "messages": [], "image": [16, 16, 3]}


def test_a_wrong_count_of_images_is_said_on_the_page(found):
    (message,) = found["wrong count"]["messages"]
    assert "the text has 2 <image>, and 1 image(s) are connected" in message


def test_a_workflow_opens_nothing_outside_of_the_models(found):
    refused = found["wrong model"]
    assert not refused["valid"] and "Value not in list" in refused["errors"]


def test_another_kind_in_an_image_socket_is_refused(found):
    refused = found["wrong kind"]
    assert not refused["valid"] and "Return type mismatch" in refused["errors"]
