"""For the documents as a site (mkdocs.yml): what links to files outside of docs/ become there."""

from __future__ import annotations

import re
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """mkdocs' hook: the page's text with such links to the repository, if `repo_url` says where
    that is, else without the link, the file's name beside the words."""

    def replaced(found: re.Match) -> str:
        words, file = found[1], found[2]
        if config.repo_url:
            return f"[{words}]({config.repo_url.rstrip('/')}/blob/main/{file})"
        return words if file in words else f"{words} (`{file}`)"

    return LINK.sub(replaced, markdown)
