"""The folders import each other in one direction, files stay short, and each rule has one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_kosmosg"
NAME = "megatron_kosmosg"

LAYERS = (
    "unusable_packages",
    "config",
    "data",
    "parallel",
    "models",
    "losses",
    "planning.formulae",
    "training",
    "stages",
    "exported",
    "conversion",
    "inference",
    "toy",
    "evaluation",
    "planning",
    "train",
)
"""Each may import itself and what stands before it."""

LAYER_OF_FILE = {
    # The stages report their own FLOPs; these two files import the config only.
    "models/flops.py": "planning.formulae",
    "models/diffusion_flops.py": "planning.formulae",
    # Copied into exported folders, so they import nothing of this package.
    "inference/__init__.py": "exported",
    "hf/modeling_kosmosg_aligner.py": "exported",
    "hf/pipeline_kosmosg.py": "exported",
}

MAX_LINES, LONG = 400, 250

FILES = sorted(PACKAGE.rglob("*.py"))


def layer(path: str) -> str:
    """Layer of a file given relative to the package."""
    return LAYER_OF_FILE.get(path, path.split("/")[0].removesuffix(".py"))


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return found


def own_files(names: set[str]) -> set[str]:
    """Files of this package among the imported names, relative to it."""
    files = set()
    for name in names:
        if name.startswith(f"{NAME}."):
            path = name.removeprefix(f"{NAME}.").replace(".", "/")
            if (PACKAGE / f"{path}.py").is_file():
                files.add(f"{path}.py")
            elif (PACKAGE / path / "__init__.py").is_file():
                files.add(f"{path}/__init__.py")
    return files


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_the_package_was_found():
    assert len(FILES) > 40 and {layer(relative(path)) for path in FILES} >= {"config", "training"}


def test_the_rules_notice_a_breach(tmp_path):
    breach = tmp_path / "x.py"
    breach.write_text(
        "import omegaconf.errors\ndef f():\n    from megatron_kosmosg.training.loop import fit\n"
    )
    assert own_files(imports(breach)) == {"training/loop.py"}
    assert "omegaconf.errors" in imports(breach)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_backwards(path):
    own = relative(path)
    if own == "__init__.py":
        return
    allowed = LAYERS[: LAYERS.index(layer(own)) + 1] if layer(own) != "exported" else ()
    for other in own_files(imports(path)):
        assert other == "__init__.py" or layer(other) in allowed, (
            f"{own} imports {other}: {layer(own)} stands before {layer(other)}"
        )


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_third_party_imports_stay_in_their_place(path):
    own, names = relative(path), imports(path)
    roots = {name.split(".")[0] for name in names}
    if own != "config/load.py":
        assert "omegaconf" not in roots, f"{own}: OmegaConf belongs to config/load.py"
    if layer(own) == "config":
        assert not roots & {"torch", "megatron", "transformers", "diffusers"}, own
    if layer(own) != "parallel":
        state = [name for name in names if "parallel_state" in name.split(".")]
        assert not state, f"{own}: process groups come from the Layout, not from {state}"
    if own in ("toy/world.py", "toy/captions.py"):
        assert own_files(names) <= {"toy/world.py", "toy/__init__.py"}, f"{own} stands alone"
    if own == "toy/judging/toy_judge.py":
        assert not any("training" in other or "models" in other for other in own_files(names)), own


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_the_device_is_chosen_in_parallel_only(path):
    if layer(relative(path)) == "parallel":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "cuda"), (
                f"{relative(path)}:{node.lineno}"
            )
        if isinstance(node, ast.Constant) and node.value in ("cuda", "nccl", "gloo"):
            raise AssertionError(f"{relative(path)}:{node.lineno} names {node.value!r}")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_are_short_and_say_what_they_decide(path):
    text = path.read_text()
    own, length = relative(path), len(text.splitlines())
    assert path.name not in ("utils.py", "helpers.py", "misc.py"), f"name what {own} is about"
    assert length <= MAX_LINES, f"{own} has {length} lines"
    if not text.strip():
        return
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, f"{own} has no module docstring"
    if length > LONG:
        assert "long" in docstring.lower(), f"{own}: {length} lines, the docstring must say why"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_errors_are_not_swallowed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            place = f"{relative(path)}:{node.lineno}"
            assert node.type is not None, f"{place}: bare except"
            nothing = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            broad = isinstance(node.type, ast.Name) and node.type.id in (
                "Exception",
                "BaseException",
            )
            assert not (nothing and broad), f"{place}: error swallowed"
        if isinstance(node, ast.keyword) and node.arg == "strict":
            value = node.value
            is_off = isinstance(value, ast.Constant) and value.value is False
            call_of_zip = _is_zip(path, node)
            assert not is_off or call_of_zip, f"{relative(path)}:{node.value.lineno} strict=False"


def _is_zip(path: Path, keyword: ast.keyword) -> bool:
    """Whether `strict=` belongs to zip, where it is about lengths."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip":
            if any(k.value.lineno == keyword.value.lineno for k in node.keywords):
                return True
    return False
