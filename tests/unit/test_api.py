"""The names that a user imports from the package itself."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

import megatron_kosmosg


@pytest.mark.parametrize("name", [n for n in megatron_kosmosg.__all__ if n != "__version__"])
def test_each_name_is_the_one_of_its_room(name):
    value = getattr(megatron_kosmosg, name)
    assert value is getattr(importlib.import_module(value.__module__), name)
    assert value.__module__.startswith("megatron_kosmosg.")
    assert value.__doc__


def test_the_package_alone_loads_no_torch():
    code = (
        "import sys, megatron_kosmosg\n"
        "assert 'load_config' in dir(megatron_kosmosg)\n"
        "megatron_kosmosg.load_config('toy_align', [])\n"
        "heavy = {'torch', 'megatron', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_no_help_text_needs_a_heavy_package():
    """All commands in one process, in which the first would be blamed for what it imports."""
    code = (
        "import contextlib, io, sys\n"
        "from megatron_kosmosg.cli.main import COMMANDS, main\n"
        "heavy = {'torch', 'numpy', 'megatron', 'diffusers', 'transformers'}\n"
        "for name in COMMANDS:\n"
        "    shown = io.StringIO()\n"
        "    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):\n"
        "        main([*name.split(), '--help'])\n"
        "    assert 'usage:' in shown.getvalue(), name\n"
        "    assert not heavy & set(sys.modules), (name, heavy & set(sys.modules))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dry-run", "training.train_iter=3"], "training.train_iters"),
        (["parallel.tensor_model_parallel_size=5"], "model.decoder.num_attention_heads"),
        (["parallel.pipeline_model_parallel_size=9"], "parallel.pipeline_layout"),
    ],
)
def test_wrong_settings_are_refused_without_torch(arguments, words):
    """Also those that depend on what the stage builds."""
    code = (
        "import sys\n"
        "from megatron_kosmosg import train\n"
        f"assert train.main(['--config', 'toy_align', *{arguments}]) == 2\n"
        "heavy = {'torch', 'megatron', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert words in ended.stderr


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'KosmosPipeline'"):
        _ = megatron_kosmosg.KosmosPipeline


def test_the_version_is_the_installed_one():
    try:
        installed = version("megatron-kosmosg")
    except PackageNotFoundError:
        pytest.skip("the package is not installed")
    assert megatron_kosmosg.__version__ == installed
