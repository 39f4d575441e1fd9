"""Hooks of the documentation site (mkdocs.yml).

The README is the site's first page. Links to files that are not part of the site lead to the
repository where mkdocs.yml names one (`repo_url`), and are plain text where it does not.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# [text](target); the text may hold code and brackets, but no other link.
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\](?!\())+)\]\((?!https?:|#|mailto:)([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    # Seen from docs/: what the README calls docs/x is x, everything else is one folder up.
    readme = re.sub(r"\]\((?!https?:|#)(?!docs/)", "](../", readme).replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files, **_: Any
) -> str:
    def outside(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        if path == "../README.md":
            return f"[{text}](index.md{'#' + anchor if anchor else ''})"
        if not path.startswith("../"):
            return match[0]
        if not config.repo_url:
            return text
        inside = PurePosixPath(path).relative_to("..")
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{inside})"

    return LINK.sub(outside, markdown)
