"""Commands with a TransformerEngine that is installed and does not work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

TOKENIZER = REPOSITORY / "megatron_kosmosg/toy/assets/sentencepiece.model"

EMPTY = {"__init__.py": "raise RuntimeError('Found empty `transformer-engine` meta package')"}
"""As PyPI's wheel of 2.11.0 does, which `pip install transformer-engine` installs."""
WITHOUT_TORCH = {"__init__.py": "", "pytorch/__init__.py": "raise OSError('libcudart.so.13')"}
"""The part for torch is there, what it loads is not."""
WORKING = {"__init__.py": "__version__ = '2.11.0'", "pytorch/__init__.py": ""}


def run(folder: Path, files: dict[str, str], *command: str, **environment: str):
    """The finished command, which finds `files` as the package transformer_engine."""
    for name, text in files.items():
        path = folder / "transformer_engine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    information = folder / "transformer_engine-2.11.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.4\nName: transformer_engine\n")
    environment = os.environ | {"PYTHONPATH": f"{folder}:{REPOSITORY}"} | environment
    return subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_megatron_alone_would_end_in_a_traceback(tmp_path):
    """What this is for; when Megatron-Core bears it by itself, the module can go."""
    done = run(tmp_path, EMPTY, "-c", "import megatron.core")
    assert done.returncode == 1 and "RuntimeError: Found empty" in done.stderr


@pytest.mark.parametrize("files", [EMPTY, WITHOUT_TORCH], ids=["empty", "half"])
def test_a_command_works_and_says_how_to_repair_it(tmp_path, files):
    missing = tmp_path / "no-such-dataset"
    command = ("tools/inspect_data.py", str(missing), "--tokenizer-model", str(TOKENIZER))
    done = run(tmp_path / "packages", files, *command)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(missing) in done.stderr.splitlines()[-1]
    warnings = [line for line in done.stderr.splitlines() if "transformer-engine" in line]
    assert len(warnings) == 1 and "transformer-engine[pytorch,core_cu13]" in warnings[0]


def test_layers_and_optimizer_are_then_our_own_and_one_rank_says_it_for_all(tmp_path):
    code = (
        "import torch; torch.cuda.is_available = lambda: True\n"
        "from megatron_kosmosg.parallel import platform, fused_adam\n"
        "print(platform.transformer_impl(), fused_adam.install())"
    )
    done = run(tmp_path, EMPTY, "-c", code, RANK="3")
    assert done.stdout.split() == ["local", "own"], done.stderr
    assert "transformer-engine" not in done.stderr


def test_a_working_one_is_left_in_place_and_not_looked_at_early(tmp_path):
    code = (
        "import sys, megatron_kosmosg.config.schema\n"
        "print('transformer_engine' in sys.modules, 'torch' in sys.modules)\n"
        "from megatron_kosmosg.unusable_packages import _hide_unusable_transformer_engine\n"
        "_hide_unusable_transformer_engine()\n"
        "import transformer_engine.pytorch as found\n"
        "print(found.__name__)"
    )
    done = run(tmp_path, WORKING, "-c", code)
    assert done.stdout.split() == ["False", "False", "transformer_engine.pytorch"], done.stderr
