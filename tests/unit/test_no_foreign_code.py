"""No product code has a way for a file to run what its maker wrote, but the listed ones."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("megatron_kosmosg", "tools", "examples", "benchmarks", "comfyui")

LISTED = {
    # May name the classes of a checkpoint's description, and nothing else.
    ("megatron_kosmosg/checkpoint/description.py", "pickle.Unpickler"),
    # Makes tensors and plain containers; with --trust-pickle, which says so, whatever is named.
    ("megatron_kosmosg/conversion/torch_file.py", "pickle._Unpickler"),
    # With --trust-remote-code, which says so.
    ("examples/inference/shared.py", "trust_remote_code=True"),
    # Texts of the programs themselves, in a namespace that stands for another package's.
    ("megatron_kosmosg/parallel/cpu_shim_selftest.py", "eval"),
    ("benchmarks/shim_overhead.py", "eval"),
}

ALWAYS = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "pickle._Unpickler",
    "pickle._load",
    "pickle._loads",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "dill.load",
    "dill.loads",
    "cloudpickle.load",
    "cloudpickle.loads",
    "pandas.read_pickle",
    "torch.hub.load",
    "torch.jit.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "eval",
    "exec",
    "runpy.run_path",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}
"""Names whose use alone is a breach."""


def breaches(text: str) -> Iterator[str]:
    """What a file uses that can run foreign code."""
    tree = ast.parse(text)
    modules = _modules(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = _dotted(node, modules)
            if name in ALWAYS:
                yield name
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (name for a in node.names if (name := f"{node.module}.{a.name}") in ALWAYS)
        if not isinstance(node, ast.Call):
            continue
        name = _dotted(node.func, modules)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if name == "torch.load" and not _is(keywords.get("weights_only"), True):
            yield "torch.load without weights_only=True"
        if name == "numpy.load" and not _is(keywords.get("allow_pickle"), False, absent=True):
            yield "numpy.load with allow_pickle"
        for flag in ("shell", "trust_remote_code"):
            if not _is(keywords.get(flag), False, absent=True) and (
                flag == "shell" or isinstance(keywords[flag], ast.Constant)
            ):
                yield f"{flag}=True"


def _modules(tree: ast.Module) -> dict[str, str]:
    """What names of the file stand for: {"np": "numpy"}, {"load": "torch.load"}."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def _dotted(node: ast.AST, modules: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, modules)}.{node.attr}"
    return modules.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def _is(value: ast.expr | None, expected: bool, absent: bool = False) -> bool:
    if value is None:
        return absent
    return isinstance(value, ast.Constant) and value.value is expected


def test_only_the_listed_places_can_run_what_a_file_says():
    found = {
        (path.relative_to(REPOSITORY).as_posix(), breach)
        for folder in FOLDERS
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        for breach in breaches(path.read_text(encoding="utf-8"))
    }
    assert found == LISTED


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\npickle.loads(data)",
        "from pickle import loads",
        "import pickle as p\nclass Own(p.Unpickler): pass",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=flag)",
        "from torch import load\nload(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy\nnumpy.load(path, allow_pickle=flag)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "import os\nos.system(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "Model.from_pretrained(folder, trust_remote_code=True)",
    ],
)
def test_each_way_is_noticed(text):
    assert list(breaches(text))


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path, mmap_mode='r')",
        "import subprocess\nsubprocess.run(['ls'])",
        "Model.from_pretrained(folder, trust_remote_code=given.run_its_code)",
        "model.eval()",
        "json.loads(text)",
    ],
)
def test_what_runs_nothing_is_no_breach(text):
    assert not list(breaches(text))
