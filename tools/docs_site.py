"""Hooks of `mkdocs build` (mkdocs.yml): pages made from files outside docs/, and links to such files.

The site has CONTRIBUTING.md and CHANGELOG.md, which are at the root of the repository, as pages. A link to another file
outside docs/ becomes a link to that file at `repo_url`, or its path as text if no `repo_url` is set. A link to a file
that does not exist is a warning, which `strict` makes an error.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# Files at the root that become pages, and the names of the pages.
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

# [text](target), unless the target is a URL or an anchor of the same page.
_LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
_log = logging.getLogger("mkdocs.plugins.docs_site")


def on_files(files: Files, config: Mapping[str, Any]) -> Files:
    """Add the pages that are made from files at the root of the repository."""
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Mapping[str, Any], **_: Any) -> str:
    """Replace the links of a page that lead out of docs/."""
    uri = page.file.src_uri
    sources = {page: ROOT / source for source, page in ROOT_PAGES.items()}
    source = sources.get(uri, DOCS / uri)
    return replace_links(markdown, source, DOCS / uri, config["repo_url"])


def replace_links(markdown: str, source: Path, page: Path, repo_url: str | None) -> str:
    """`markdown` of the file `source`, with links that are valid on the site.

    Args:
        source: the file that the text was read from, to which its links are relative.
        page: the path of the page in docs/, to which the returned links are relative.
        repo_url: the URL of the repository, or None.
    """

    def replaced(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = Path(os.path.normpath(source.parent / target))
        if not path.exists():
            _log.warning("%s links to %s, which does not exist", source.relative_to(ROOT), target)
            return match[0]
        inside = path.relative_to(ROOT).as_posix()
        if inside in ROOT_PAGES:
            path = DOCS / ROOT_PAGES[inside]
        if path.is_relative_to(DOCS):
            return f"[{text}]({os.path.relpath(path, page.parent)}{anchor})"
        if repo_url:
            return f"[{text}]({repo_url.rstrip('/')}/blob/main/{inside}{anchor})"
        return f"`{inside}`" if inside.endswith(text.strip("`")) else f"{text} (`{inside}`)"

    return _LINK.sub(replaced, markdown)
