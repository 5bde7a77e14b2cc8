"""Folders import only from the ones before them, and each outside library only where it belongs."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_kosmosg"
NAME = PACKAGE.name
ORDER = (
    *("config", "data", "parallel", "models", "losses", "planning", "training", "stages"),
    *("conversion", "toy", "inference", "evaluation", "train"),
)
"""`planning` counts FLOPs and parameters, which stages report; it knows no stage itself."""

FILES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN = {
    "config": ("torch", "megatron"),
    "data": ("megatron.core.parallel_state", "diffusers"),
    "toy/world.py": (NAME,),
    "toy/captions.py": (f"{NAME}.config", f"{NAME}.training", f"{NAME}.models", "torch"),
    "evaluation/toy_judge": (
        *(f"{NAME}.training", f"{NAME}.stages", f"{NAME}.models", f"{NAME}.toy.training"),
    ),
}
"""What a folder or file may not import, by the start of its path inside the package."""


@cache
def imports(path: Path) -> frozenset[str]:
    """Full names of everything the file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def layer(name: str) -> str | None:
    """`models` for `megatron_kosmosg.models.kosmosg`; None for names outside the package."""
    parts = name.split(".")
    return parts[1] if parts[0] == NAME and len(parts) > 1 and parts[1] in ORDER else None


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def starts_with(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def test_every_folder_and_file_has_its_place_in_the_order():
    tops = {relative(path).split("/")[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert tops <= set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_backwards(path):
    own = relative(path).split("/")[0].removesuffix(".py")
    if own == "__init__":
        return
    used = {name: layer(name) for name in imports(path) if layer(name) is not None}
    later = sorted(n for n, where in used.items() if ORDER.index(where) > ORDER.index(own))
    assert not later, f"{own} may not import {later}"


@pytest.mark.parametrize("place", sorted(FORBIDDEN))
def test_forbidden_imports(place):
    files = [path for path in FILES if relative(path).startswith(place)]
    assert files, f"no file under {place}; the rule guards nothing"
    for path in files:
        bad = [n for n in imports(path) for prefix in FORBIDDEN[place] if starts_with(n, prefix)]
        assert not bad, f"{relative(path)} imports {bad}"


@pytest.mark.parametrize(
    "library, place",
    [("omegaconf", "config/load.py"), ("megatron.core.parallel_state", "parallel/")],
)
def test_a_library_is_used_in_one_place_only(library, place):
    users = [relative(p) for p in FILES if any(starts_with(n, library) for n in imports(p))]
    assert users, f"{library} is used nowhere; the rule guards nothing"
    assert all(user.startswith(place) for user in users), users


def test_every_folder_with_code_is_a_package():
    folders = {path.parent for path in FILES}
    assert not [relative(f) for f in folders if not (f / "__init__.py").is_file()]
