"""Pages, docstrings and comments name files and classes that there are: renames leave none
behind."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "megatron_kosmosg"
FOLDERS = ("benchmarks", "comfyui", "examples", "megatron_kosmosg", "slurm", "tests", "tools")
FILE = re.compile(r"(?<![\w*{}/.])(?:\w+/)*\w+\.py\b")
CLASS = re.compile(r"`([A-Z][a-z]\w*[A-Z]\w*)(?:\([^`]*\))?`")
OF_OTHERS = {
    "NAME.py",  # any tool
    "LIBRARY.py",  # any library that a folder names
    "fused_cross_entropy.py",  # Megatron-Core's
    "AutoModelForImageTextToText",  # transformers'
    "AutoProcessor",
    "Kosmos2TextBlock",
}


@cache
def files() -> set[str]:
    """Every Python file of the checkout as "/path/from/the/checkout.py"."""
    found = [*REPOSITORY.glob("*.py")]
    for folder in FOLDERS:
        found += (REPOSITORY / folder).rglob("*.py")
    return {f"/{path.relative_to(REPOSITORY).as_posix()}" for path in found}


def pages() -> list[Path]:
    found = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
    for folder in FOLDERS:
        found += (REPOSITORY / folder).rglob("*.md")
    return [path for path in found if path.name != "CHANGELOG.md"]


def remarks(source: str) -> str:
    """The docstrings, those of attributes too, and the comments of a file."""
    statements = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr))
    constants = (node.value.value for node in statements if isinstance(node.value, ast.Constant))
    found = [value for value in constants if isinstance(value, str)]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found += [token.string for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join(found)


@cache
def names() -> frozenset[str]:
    """Every name in the package's code."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text("utf-8")
        found.update(re.findall(r"\w+", "\n".join(_code(source))))
    return frozenset(found)


def _code(source: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type == tokenize.NAME]


def absent_files(text: str) -> set[str]:
    named = {name for name in FILE.findall(text) if name.rpartition("/")[2] not in OF_OTHERS}
    return {name for name in named if not any(path.endswith(f"/{name}") for path in files())}


def absent_classes(text: str) -> set[str]:
    return set(CLASS.findall(text)) - names() - OF_OTHERS


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_files_that_a_page_names_exist(path):
    spans = re.findall(r"`[^`\n]+`", path.read_text("utf-8"))
    assert not absent_files("\n".join(spans))


def test_files_and_classes_that_the_code_speaks_of_exist():
    found = {}
    for name in files():
        text = remarks((REPOSITORY / name[1:]).read_text("utf-8"))
        absent = absent_files(text)
        if name.startswith("/megatron_kosmosg/"):
            absent |= absent_classes(text)
        if absent:
            found[name] = sorted(absent)
    assert not found


def unknown_arguments(source: str) -> list[str]:
    """What the `Args:` of a function's docstring explains and the function does not take."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            text = (ast.get_docstring(node) or "").partition("Args:\n")[2]
            text = re.split(r"^\S", text, maxsplit=1, flags=re.MULTILINE)[0]
            named = ",".join(re.findall(r"^    (\w+(?:, \w+)*): ", text, re.MULTILINE))
            known = {
                argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)
            }
            found += [
                f"{node.name}: {name}" for name in re.findall(r"\w+", named) if name not in known
            ]
    return found


def test_arguments_that_docstrings_explain_are_taken():
    found = {
        path.name: unknown_arguments(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")
    }
    assert not {name: names for name, names in found.items() if names}


def test_an_argument_that_is_not_taken_is_noticed():
    code = 'def f({}):\n    """Adds.\n\n    Args:\n        a, b: numbers.\n    """\n'
    assert unknown_arguments(code.format("a")) == ["f: b"] and not unknown_arguments(
        code.format("a, *, b")
    )


@pytest.mark.parametrize(
    ("text", "absent"),
    [
        ("see files.py and kinds/record.py", set()),
        ("see data/records.py, tools/NAME.py", {"data/records.py"}),
        ("`KosmosG(config)` makes a `LayoutPlan`", {"LayoutPlan"}),
    ],
)
def test_a_name_without_anything_behind_it_is_noticed(text, absent):
    assert absent_files(text) | absent_classes(text) == absent


def test_remarks_are_docstrings_and_comments():
    source = '"""Of a file."""\nx = "no.py"\n\n\ndef f():\n    """Of f."""\n    return x  # why\n'
    assert remarks(source).split("\n") == ["Of a file.", "Of f.", "# why"]
