"""Hooks of the documentation site (mkdocs.yml).

README, CONTRIBUTING and CHANGELOG are pages of the site. Links to files that are not part of it
lead to the repository where mkdocs.yml names one (`repo_url`), and are plain text where it does
not.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
# [text](target); the text may hold code and brackets, but no other link.
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\](?!\())+)\]\((?!https?:|#|mailto:)([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        # Seen from docs/: what they call docs/x is x, everything else is one folder up.
        text = re.sub(r"\]\((?!https?:|#)(?!docs/)", "](../", text).replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files, **_: Any
) -> str:
    def outside(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        page_here = PAGES.get(path.removeprefix("../"))
        if page_here is not None:
            return f"[{text}]({page_here}{'#' + anchor if anchor else ''})"
        if not path.startswith("../"):
            return match[0]
        if not config.repo_url:
            return text
        inside = PurePosixPath(path).relative_to("..")
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{inside})"

    return LINK.sub(outside, markdown)
