"""Commands where packages with GPU kernels are installed and do not work; what `doctor` says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_kosmosg.parallel.kernels import unet_attention

REPOSITORY = Path(__file__).parents[2]


EMPTY = {
    "transformer_engine/__init__.py": (
        "raise RuntimeError('Found empty `transformer-engine` meta package')"
    )
}
"""As PyPI's wheel of 2.11.0 does, which `pip install transformer-engine` installs."""
WITHOUT_TORCH = {
    "transformer_engine/__init__.py": "",
    "transformer_engine/pytorch/__init__.py": "raise OSError('libcudart.so.13')",
}
"""The part for torch is there, what it loads is not."""
WORKING = {
    "transformer_engine/__init__.py": "__version__ = '2.11.0'",
    "transformer_engine/pytorch/__init__.py": "",
}
OTHER_APEX = {"apex/__init__.py": "from pyramid.config import Configurator"}
"""PyPI's package of that name, a web service."""
PYTHON_APEX = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": "class FusedAdam: ...\nclass FusedSGD: ...",
    "apex/multi_tensor_apply.py": "multi_tensor_applier = None",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": "def fused_layer_norm_affine(*_): ...",
}
"""NVIDIA's, built without its CUDA extensions."""
FOR_ANOTHER_TORCH = {
    "fused_weight_gradient_mlp_cuda.py": "raise ImportError('undefined symbol: _ZN2at4_ops')"
}
OLD_DRIVER = {
    "nvidia/__init__.py": "__path__ = __import__('pkgutil').extend_path(__path__, __name__)",
    "nvidia/dali/__init__.py": "raise OSError('CUDA driver version is insufficient\\nfor 13.0')",
}


SECOND_RANK = dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"), "1")


def run(folder: Path, files: dict[str, str], *command: str, **environment: str):
    """The finished command, which finds `files` as installed packages."""
    for name, text in files.items():
        path = folder / name
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


def test_peft_is_not_broken_by_one_either(tmp_path):
    """Commands that draw images import diffusers, and with it peft, before Megatron-Core."""
    alone = run(tmp_path / "alone", EMPTY, "-c", "import peft")
    assert alone.returncode == 1 and "RuntimeError: Found empty" in alone.stderr
    done = run(tmp_path / "with", EMPTY, "-c", "import megatron_kosmosg, peft, megatron.core")
    assert done.returncode == 0 and done.stderr.count("transformer-engine does not work") == 1


@pytest.mark.parametrize("files", [EMPTY, WITHOUT_TORCH], ids=["empty", "half"])
def test_a_command_works_and_says_how_to_repair_it(tmp_path, files):
    command = (
        "-m",
        "megatron_kosmosg",
        "train",
        "--config",
        "toy_align",
        "--dry-run",
        "parallel.world_size=1",
    )
    done = run(tmp_path / "packages", files, *command)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert "Memory per rank" in done.stdout
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
        "import torch; torch.cuda.device_count = lambda: 1\n"
        "from megatron_kosmosg.unusable_packages import hide_unusable\n"
        "assert hide_unusable() == ()\n"
        "import transformer_engine.pytorch as found\n"
        "print(found.__name__)"
    )
    done = run(tmp_path, WORKING, "-c", code)
    assert done.stdout.split() == ["False", "False", "transformer_engine.pytorch"], done.stderr


def test_a_working_one_is_hidden_without_a_word_where_no_gpu_is_visible(tmp_path):
    """TransformerEngine's FusedAdam and its norms cannot run on a CPU."""
    code = (
        "from megatron_kosmosg.parallel import platform, fused_adam\n"
        "print(platform.transformer_impl(), fused_adam.install())"
    )
    done = run(tmp_path, WORKING, "-c", code, CUDA_VISIBLE_DEVICES="")
    assert done.stdout.split() == ["local", "own"], done.stderr
    assert "transformer" not in done.stderr


def test_a_spawned_rank_of_the_tests_hides_it_too(tmp_path):
    """It imports the module of its function after its own, and that one Megatron-Core first."""
    code = (
        "import sys, tests.support.ranks, tests.support.stage_gradients\n"
        "print(sys.modules['transformer_engine'])"
    )
    done = run(tmp_path, WORKING, "-c", code, CUDA_VISIBLE_DEVICES="")
    assert done.stdout.split() == ["None"], done.stderr


def test_doctor_says_that_it_needs_a_gpu(tmp_path):
    found = diagnosis(tmp_path, WORKING)
    assert "not TransformerEngine: it needs a GPU" in found["optimizer"]


def diagnosis(folder: Path, files: dict[str, str]) -> dict[str, str]:
    """{part: what `doctor` says of it}; no other line, on stderr neither."""
    done = run(folder, files, "tools/doctor.py")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert len({line.partition(": ")[0] for line in lines}) == len(lines) >= 15
    return {part: rest for part, _, rest in (line.partition(": ") for line in lines)}


def test_doctor_says_what_a_run_takes_and_why_not_what_is_broken(tmp_path):
    found = diagnosis(tmp_path, EMPTY | OTHER_APEX | FOR_ANOTHER_TORCH | OLD_DRIVER)
    assert found["image decoder"].startswith("Pillow; not DALI: ")
    assert "CUDA driver version is insufficient" in found["image decoder"]
    assert found["optimizer"].startswith("our own AdamW")
    assert "Found empty `transformer-engine` meta package" in found["optimizer"]
    assert "it is not NVIDIA's (No module named 'pyramid')" in found["optimizer"]
    assert "not apex: undefined symbol: _ZN2at4_ops" in found["weight gradients"]
    assert found["layer norm"].startswith("torch's kernel; not apex: ")


def test_doctor_names_the_attention_that_torch_takes(tmp_path):
    """torch can be told which to take; the U-Net's has no mask."""
    cpu = torch.device("cpu")
    for backend, name in (
        (SDPBackend.FLASH_ATTENTION, "torch's flash attention"),
        (SDPBackend.MATH, "torch's matrix products"),
    ):
        with sdpa_kernel(backend):
            assert unet_attention(cpu) == name
    assert diagnosis(tmp_path, {})["attention of the U-Net"] == unet_attention(cpu)


def test_doctor_sees_an_apex_that_imports_and_has_no_kernels(tmp_path):
    found = diagnosis(tmp_path, PYTHON_APEX)
    assert found["optimizer"].startswith("our own AdamW")
    assert "built without its CUDA extensions" in found["optimizer"]
    assert "not installed" in found["layer norm"] and "not installed" in found["weight gradients"]


def test_an_image_decoder_that_cannot_start_is_said_once_and_pillow_decodes(tmp_path):
    code = (
        "from megatron_kosmosg.data.images import ImageDecoder\n"
        "print(*(ImageDecoder('auto').name for _ in range(3)))"
    )
    done = run(tmp_path, OLD_DRIVER, "-c", code)
    assert done.stdout.split() == ["pillow"] * 3
    assert done.stderr.count("DALI is installed and not used") == 1
    second = run(tmp_path / "b", OLD_DRIVER, "-c", code, **SECOND_RANK)
    assert second.stdout.split() == ["pillow"] * 3 and second.stderr == ""
