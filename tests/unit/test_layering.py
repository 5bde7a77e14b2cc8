"""The folders import each other in one direction, files stay short, and each rule has one place.

A rule is a function that yields the breaches of one file, and one test, which reports all of them.
Long because it holds every rule, and a breach of each that the rule must notice.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "megatron_kosmosg"
NAME = "megatron_kosmosg"

LAYERS = (
    "foreign_files",
    "files",
    "shards",
    "terminal_text",
    "pages",
    "progress",
    "exit_codes",
    "memory_errors",
    "config",
    "launcher",
    "command_line",
    "unusable_packages",
    "hf",
    "data",
    "parallel",
    "models",
    "losses",
    "monitoring",
    "checkpoint",
    "evaluation",
    "score",
    "training",
    "stages",
    "preprocess",
    "construction",
    "inspection",
    "conversion",
    "inference",
    "toy",
    "planning",
    "rehearsal",
    "demo",
    "cli",
    "train",
    "__main__",
)
"""Each may import itself and what stands before it."""

MAX_LINES, LONG = 400, 250
MOST_LINES_OF = {"hf/pipeline_kosmosg.py": 580}
"""That file travels with exported models, and one file is what diffusers takes along."""

FOLDERS = (NAME, "tools", "examples", "benchmarks", "comfyui", "tests")
"""Where this repository has Python files."""

STATE_OF_THE_PROCESS = {
    "datetime", "getpass", "os", "platform", "random", "secrets", "socket", "sys", "tempfile",
    "time", "uuid",
}  # fmt: skip
"""Modules whose attributes say something else when a function is called than at its import."""
STATE_OF_A_CLASS = {"cwd", "home", "now", "today", "utcnow"}
"""Methods that do, of whatever class: Path.cwd, datetime.now."""


class Source:
    """A file, read and parsed once; `path` is how the rules call it."""

    def __init__(self, path: str, text: str) -> None:
        self.path, self.text = path, text

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All of the tree, in no order."""
        return list(ast.walk(self.tree))

    @cached_property
    def imports(self) -> set[str]:
        """Dotted names of everything the file imports, also inside functions."""
        found = set()
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                found.update({node.module, *names})
        return found

    @property
    def layer(self) -> str:
        """Layer of a file of the package."""
        return self.path.split("/")[0].removesuffix(".py")

    @property
    def own_files(self) -> set[str]:
        """Files of the package among the imports, relative to it."""
        files = set()
        for name in self.imports:
            if name.startswith(f"{NAME}."):
                path = name.removeprefix(f"{NAME}.").replace(".", "/")
                if (PACKAGE / f"{path}.py").is_file():
                    files.add(f"{path}.py")
                elif (PACKAGE / path / "__init__.py").is_file():
                    files.add(f"{path}/__init__.py")
        return files


Rule = Callable[[Source], Iterator[str]]


def sources(folder: Path, relative_to: Path) -> list[Source]:
    return [
        Source(path.relative_to(relative_to).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.py"))
    ]


@pytest.fixture(scope="module")
def package() -> list[Source]:
    """All files of the package; their paths are relative to it."""
    return sources(PACKAGE, PACKAGE)


@pytest.fixture(scope="module")
def repository() -> list[Source]:
    """All files of FOLDERS; their paths are relative to the repository."""
    return [source for name in FOLDERS for source in sources(REPOSITORY / name, REPOSITORY)]


def check(rule: Rule, files: list[Source]) -> None:
    breaches = [breach for file in files for breach in rule(file)]
    assert not breaches, f"{len(breaches)} breaches:\n" + "\n".join(breaches)


def upward_imports(file: Source) -> Iterator[str]:
    if file.path == "__init__.py":
        return
    allowed = LAYERS[: LAYERS.index(file.layer) + 1]
    for other in sorted(file.own_files - {"__init__.py"}):
        layer = Source(other, "").layer
        if layer not in allowed:
            yield f"{file.path} imports {other}: {file.layer} stands before {layer}"


def misplaced_imports(file: Source) -> Iterator[str]:
    own, names = file.path, file.imports
    roots = {name.split(".")[0] for name in names}
    if own != "config/load.py" and "omegaconf" in roots:
        yield f"{own}: OmegaConf belongs to config/load.py"
    if file.layer == "config":
        for heavy in sorted(roots & {"torch", "megatron", "transformers", "diffusers"}):
            yield f"{own} imports {heavy}: config is read without it"
    if file.layer != "parallel":
        state = [name for name in names if "parallel_state" in name.split(".")]
        if state:
            yield f"{own}: process groups come from the ParallelContext, not from {state}"
    if file.layer == "hf":
        for other in sorted(file.own_files):
            yield f"{own} travels with exported folders, and imports {other}"
    if own in ("toy/world.py", "toy/toy_captions.py"):
        for other in sorted(file.own_files - {"toy/world.py", "toy/__init__.py"}):
            yield f"{own} stands alone, and imports {other}"
    if own == "toy/evaluation/scene_reader.py":
        for other in sorted(file.own_files):
            if "training" in other or "models" in other:
                yield f"{own} judges without the model, and imports {other}"


def device_choices(file: Source) -> Iterator[str]:
    if file.layer in ("parallel", "rehearsal"):  # which stands in for the device that others choose
        return
    for node in file.nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) == ("torch", "cuda"):
                yield f"{file.path}:{node.lineno} uses torch.cuda"
        if isinstance(node, ast.Constant) and node.value in ("cuda", "nccl", "gloo"):
            yield f"{file.path}:{node.lineno} names {node.value!r}"


def long_or_silent_files(file: Source) -> Iterator[str]:
    length = len(file.text.splitlines())
    if Path(file.path).name in ("utils.py", "helpers.py", "misc.py"):
        yield f"name what {file.path} is about"
    if length > MOST_LINES_OF.get(file.path, MAX_LINES):
        yield f"{file.path} has {length} lines"
    if not file.text.strip():
        return
    docstring = ast.get_docstring(file.tree)
    if not docstring:
        yield f"{file.path} has no module docstring"
    elif length > LONG and "long" not in docstring.lower():
        yield f"{file.path}: {length} lines, the docstring must say why"


def swallowed_errors(file: Source) -> Iterator[str]:
    # `strict=` of zip is about lengths.
    calls = [node for node in file.nodes if isinstance(node, ast.Call)]
    zips = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "zip"]
    of_zip = {keyword for call in zips for keyword in call.keywords}
    for node in file.nodes:
        if isinstance(node, ast.ExceptHandler):
            place = f"{file.path}:{node.lineno}"
            if node.type is None:
                yield f"{place}: bare except"
            nothing = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            broad = ("Exception", "BaseException")
            if nothing and isinstance(node.type, ast.Name) and node.type.id in broad:
                yield f"{place}: error swallowed"
        if isinstance(node, ast.keyword) and node.arg == "strict" and node not in of_zip:
            if isinstance(node.value, ast.Constant) and node.value.value is False:
                yield f"{file.path}:{node.value.lineno} strict=False"


def defaults_read_at_import(file: Source) -> Iterator[str]:
    """Of arguments and of a class's fields: sys.stderr, say, which a test or a caller replaces."""
    state = set(STATE_OF_THE_PROCESS)
    for node in file.nodes:
        if isinstance(node, ast.Import):
            state.update(a.asname for a in node.names if a.asname and a.name.split(".")[0] in state)
        elif isinstance(node, ast.ImportFrom) and node.module in STATE_OF_THE_PROCESS:
            state.update(alias.asname or alias.name for alias in node.names)
    for default in _defaults(file):
        for part in ast.walk(default):
            named = isinstance(part, ast.Name) and part.id in state
            method = isinstance(part, ast.Attribute) and part.attr in STATE_OF_A_CLASS
            if named or method:
                yield (
                    f"{file.path}:{default.lineno} default {ast.unparse(default)} is read at the "
                    "import: None, and read it in the body"
                )
                break


def _defaults(file: Source) -> Iterator[ast.expr]:
    """What is evaluated once: defaults of arguments, and values of annotated fields."""
    for node in file.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from node.args.defaults
            yield from (default for default in node.args.kw_defaults if default is not None)
        elif isinstance(node, ast.ClassDef):
            fields = (each for each in node.body if isinstance(each, ast.AnnAssign))
            for value in (field.value for field in fields if field.value is not None):
                parts = [part for part in ast.walk(value) if isinstance(part, ast.keyword)]
                if all(part.arg != "default_factory" for part in parts):
                    yield value


def imports_of_other_tests(file: Source) -> Iterator[str]:
    if not file.path.startswith("tests/"):
        return
    for name in sorted(file.imports):
        if name.startswith("tests.") and not name.startswith("tests.support"):
            if (REPOSITORY / f"{name.replace('.', '/')}.py").is_file():
                yield f"{file.path} imports {name}: what tests share is in tests/support"


def telegrams(file: Source) -> Iterator[str]:
    """Docstrings whose subject is somewhere else: "Of the content.", "See Reader."."""
    for node in file.nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text = ast.get_docstring(node) or ""
            if re.match(r"(Of|See)\b", text):
                yield f"{file.path}:{node.body[0].lineno}: {text[:40]!r} is no sentence"


def exceptions_without_reason(file: Source) -> Iterator[str]:
    """Checkers that are told to be silent, without a word behind it that says why."""
    for token in tokenize.generate_tokens(io.StringIO(file.text).readline):
        told = re.search(r"(noqa|(type|pyright): ignore)(: [A-Z]+\d+|\[[\w-]+\])?", token.string)
        if token.type == tokenize.COMMENT and told and not token.string[told.end() :].strip(" -#"):
            yield f"{file.path}:{token.start[0]}: say why behind {told[0]!r}"


def test_the_files_were_found(package, repository):
    assert len(package) > 40 and {file.layer for file in package} >= {"config", "training"}
    assert {file.path.split("/")[0] for file in repository} == set(FOLDERS)


def test_imports_point_backwards(package):
    check(upward_imports, package)


def test_third_party_imports_stay_in_their_place(package):
    check(misplaced_imports, package)


def test_tests_import_no_other_test(repository):
    check(imports_of_other_tests, repository)


def test_the_device_is_chosen_in_parallel_only(package):
    check(device_choices, package)


def test_files_are_short_and_say_what_they_decide(package):
    check(long_or_silent_files, package)


def test_errors_are_not_swallowed(package):
    check(swallowed_errors, package)


def test_no_default_is_read_at_the_import(repository):
    check(defaults_read_at_import, repository)


def test_docstrings_are_sentences(package):
    check(telegrams, package)


def test_what_a_checker_is_told_to_let_pass_has_a_reason(repository):
    check(exceptions_without_reason, repository)


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (upward_imports, "data/x.py", f"def f():\n    from {NAME}.training.loop import fit\n"),
        (misplaced_imports, "hf/pipeline_kosmosg.py", f"import {NAME}.config.load"),
        (misplaced_imports, "data/x.py", "import omegaconf.errors"),
        (misplaced_imports, "config/x.py", "import torch"),
        (misplaced_imports, "models/x.py", "from megatron.core import parallel_state"),
        (misplaced_imports, "toy/world.py", f"import {NAME}.config.load"),
        (misplaced_imports, "toy/evaluation/scene_reader.py", f"import {NAME}.training.loop"),
        (device_choices, "data/x.py", "torch.cuda.current_device()"),
        (device_choices, "data/x.py", "init('nccl')"),
        (long_or_silent_files, "data/utils.py", "'''Says.'''"),
        (long_or_silent_files, "data/x.py", "x = 1"),
        (long_or_silent_files, "data/x.py", "'''Says.'''" + "\n" * LONG + "x = 1"),
        (long_or_silent_files, "data/x.py", "'''Is long.'''" + "\n" * MAX_LINES + "x = 1"),
        (swallowed_errors, "data/x.py", "try:\n    f()\nexcept:\n    g()"),
        (swallowed_errors, "data/x.py", "try:\n    f()\nexcept Exception:\n    pass"),
        (swallowed_errors, "data/x.py", "zip(load(strict=False), strict=False)"),
        (imports_of_other_tests, "tests/x.py", "from tests.unit.test_layering import check"),
        (defaults_read_at_import, "tools/x.py", "def f(stream=sys.stderr): ..."),
        (defaults_read_at_import, "tools/x.py", "def f(*, e=dict(os.environ)): ..."),
        (defaults_read_at_import, "tools/x.py", "from time import monotonic as m\nlambda x=m(): x"),
        (defaults_read_at_import, "tools/x.py", "def f(folder=pathlib.Path.cwd()): ..."),
        (defaults_read_at_import, "tools/x.py", "class C:\n    at: float = time.time()"),
        (telegrams, "data/x.py", "def f():\n    'Of the content; see fingerprint.py.'"),
        (exceptions_without_reason, "tools/x.py", "import x  # noqa: F401"),
        (exceptions_without_reason, "tools/x.py", "x = None  # type: ignore[assignment]"),
    ],
)
def test_each_rule_notices_its_breach(rule, path, text):
    assert len(list(rule(Source(path, text)))) == 1


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (upward_imports, "training/x.py", f"from {NAME}.config import load"),
        (misplaced_imports, "config/load.py", "import omegaconf"),
        (device_choices, "parallel/x.py", "torch.cuda.current_device()"),
        (long_or_silent_files, "data/__init__.py", ""),
        (swallowed_errors, "data/x.py", "zip(a, b, strict=False)"),
        (telegrams, "data/x.py", "def f():\n    'Offsets of the samples.'"),
        (exceptions_without_reason, "tools/x.py", "import x  # noqa: F401 - is it there?"),
        (
            defaults_read_at_import,
            "tools/x.py",
            "class C:\n    at: float = field(default_factory=time.time)",
        ),
    ],
)
def test_each_rule_lets_the_rest_be(rule, path, text):
    assert not list(rule(Source(path, text)))
