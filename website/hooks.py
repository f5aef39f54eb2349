"""mkdocs hooks: pages made from the code and from files outside docs/, and links that lead to them."""

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from website.reference import commands_page, http_page, settings_page
from website.repository_links import (
    ROOT,
    ROOT_PAGES,
    documents,
    links_outside_docs,
    page_of,
    site_path,
    with_site_links,
)

GENERATED: dict[str, Callable[[], str]] = {
    "reference/commands.md": commands_page,
    "reference/settings.md": settings_page,
    "reference/http.md": http_page,
}
# The front page of the site is docs/index.md; README.md is that of the repository.
_COPIED = {path: page for path, page in ROOT_PAGES.items() if path != "README.md"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    for path, make in GENERATED.items():
        files.append(File.generated(config, path, content=make()))
    for name, copy in _COPIED.items():
        files.append(File.generated(config, copy, content=(ROOT / name).read_text()))
    linked: set[PurePosixPath] = set()
    for document in documents():
        linked |= links_outside_docs(document, (ROOT / document).read_text())
    for one in sorted(linked):
        target = site_path(one)
        if target.endswith(".md"):
            files.append(File.generated(config, target, content=page_of(one)))
        else:
            files.append(File.generated(config, target, abs_src_path=str(ROOT / one)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    named = {site: PurePosixPath(path) for path, site in _COPIED.items()}
    document = named.get(page.file.src_uri, PurePosixPath("docs", page.file.src_uri))
    return with_site_links(document, markdown)
