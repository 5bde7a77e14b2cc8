"""docs/settings.md from config/schema.py: every setting with its type, default and meaning.

usage, in the repository:
    python -m tests.support.settings_page [--write]
"""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from megatron_kosmosg.config import schema

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
HEAD = """\
# Settings

Written by `python -m tests.support.settings_page --write` from `megatron_kosmosg/config/schema.py`.

A setting is `section.name=value` on the command line of `kosmosg train`, `plan`, `rehearse` and the
others that take `--config`, or the same as YAML. Later ones win: the defaults below, then the
`--config` file (and what it includes), then the command line. An unknown name is an error that says
the nearest one; `--dry-run` prints all of them as resolved. `null` is "none". Names without a
meaning beside them are Megatron's. [What each config needs](recipes.md#what-each-config-needs) says
what to set for the memory of a card.
"""


def page() -> str:
    """The page's text: a table for each section."""
    texts = _texts()
    parts = [HEAD]
    for name, of_section in _sections("", schema.RunConfig):
        documented = inspect.getdoc(of_section) or ""
        if documented.startswith(f"{of_section.__name__}("):  # what dataclasses write themselves
            documented = ""
        rows = []
        for field in fields(of_section):
            default = _default(field)
            if is_dataclass(default):
                continue
            shown = f"{name}.{field.name}".lstrip(".")
            text = texts.get((of_section.__name__, field.name), "")
            kind = _kind(str(field.type))
            rows.append(f"| `{shown}` | {kind} | {_value(default)} | {text} |")
        if rows:
            parts.append(f"## {name or 'the run'}\n")
            parts += [f"{_joined(documented)}\n"] if documented else []
            parts += ["| setting | type | default | |", "|---|---|---|---|", *rows, ""]
    return "\n".join(parts)


def _sections(prefix: str, section: type) -> list[tuple[str, type]]:
    """(dotted name, class) of a section and of those in it, in order."""
    found = [(prefix, section)]
    for field in fields(section):
        default = _default(field)
        if is_dataclass(default):
            found += _sections(f"{prefix}.{field.name}".lstrip("."), type(default))
        elif "BlendEntry" in str(field.type) and field.name == "blend":
            found += _sections(f"{prefix}.blend.NAME".lstrip("."), schema.BlendEntry)
    return found


def _default(field: Any) -> Any:
    return field.default_factory() if field.default is MISSING else field.default


def _kind(annotation: str) -> str:
    if annotation.startswith("Literal["):
        return annotation[len("Literal[") : -1].replace("'", "`")
    return annotation.replace("|", "or")


def _value(default: Any) -> str:
    if default == "???":
        return "must be given"
    if default is None:
        return "`null`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`"


def _joined(text: str) -> str:
    return " ".join(text.split())


def _texts() -> dict[tuple[str, str], str]:
    """{(class, field): the string below the field}."""
    found = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, node.body[1:], strict=False):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and is_text:
                text = _joined(str(after.value.value)).replace("|", "\\|")
                found[node.name, field.target.id] = text
    return found


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE} is not what config/schema.py says; add --write")
