"""HTML pages from templates: what a page is told is text in it, whatever stands in that text.

A page is one file and refers to no other.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render_page(template: Path, **values: Any) -> str:
    """The page of `template` (Jinja), which finds the style beside it (page.css) as `style`."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style = template.with_name("page.css").read_text(encoding="utf-8")
    return environment.get_template(template.name).render(style=style, **values)


def data_uri(content: bytes, kind: str) -> str:
    """The content inside an address, so that the page needs no other file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
