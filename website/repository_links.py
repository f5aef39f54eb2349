"""Links of the documents, which are written for readers of the repository, and where they lead on the site.

A document may link to any file of the repository by its path. On the site, pages under docs/ keep their
place, four documents of the root have pages of their own, and other files are copied or shown as code.
"""

import posixpath
import re
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
# Code that a page of the site shows better than the code itself does.
REFERENCE_PAGES = {"service/settings.py": "reference/settings.md"}
# A browser shows these by itself; the others become pages that show their text.
_SHOWN_BY_BROWSERS = {".json", ".txt", ".svg", ".png", ".webp", ".jsonl"}
_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")


def documents(root: Path = ROOT) -> list[PurePosixPath]:
    """Paths of all documents, relative to the repository, in order."""
    under_docs = (PurePosixPath(path.relative_to(root)) for path in (root / "docs").rglob("*.md"))
    return [*map(PurePosixPath, ROOT_PAGES), *sorted(under_docs)]


def is_internal(link: str) -> bool:
    """Whether a link stays inside the repository and names a file; `#anchor` alone names none."""
    return not re.match(r"[a-z][a-z0-9+.-]*:|//|#", link)


def target_of(document: PurePosixPath, link: str) -> tuple[PurePosixPath, str]:
    """The path in the repository that an internal link of a document names, and its anchor ("" for none)."""
    path, _, anchor = link.partition("#")
    return PurePosixPath(posixpath.normpath(document.parent / path)), anchor


def site_path(path: PurePosixPath, root: Path = ROOT) -> str:
    """Where a file or folder of the repository lies among the site's sources."""
    for pages in (ROOT_PAGES, REFERENCE_PAGES):
        if str(path) in pages:
            return pages[str(path)]
    if path.parts[0] == "docs":
        return str(path.relative_to("docs"))
    is_copied = path.suffix in _SHOWN_BY_BROWSERS and not (root / path).is_dir()
    return f"repository/{path}" if is_copied else f"repository/{path}.md"


def links_outside_docs(document: PurePosixPath, text: str, root: Path = ROOT) -> set[PurePosixPath]:
    """What a document links to that is no page yet: existing files and folders outside docs/."""
    targets = {target_of(document, link)[0] for link in _LINK.findall(text) if is_internal(link)}
    return {
        one
        for one in targets
        if site_path(one, root).startswith("repository/") and ".." not in one.parts and (root / one).exists()
    }


def with_site_links(document: PurePosixPath, text: str, root: Path = ROOT) -> str:
    """The text of a document with its links as the site needs them; dead ones stay as they are."""
    here = posixpath.dirname(site_path(document, root))

    def rewritten(match: re.Match[str]) -> str:
        link = match[1]
        if not is_internal(link):
            return link
        target, anchor = target_of(document, link)
        if not (root / target).exists():
            return link
        relative = posixpath.relpath(site_path(target, root), here or ".")
        return f"{relative}#{anchor}" if anchor else relative

    return _LINK.sub(rewritten, text)


def page_of(path: PurePosixPath, root: Path = ROOT) -> str:
    """The page that shows a file's text, or what lies in a folder; not part of the search."""
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
    if (root / path).is_dir():
        return head + "".join(f"- `{one.name}`\n" for one in sorted((root / path).iterdir()))
    language = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml"}.get(path.suffix, "text")
    return f"{head}~~~~~~~~ {language}\n{(root / path).read_text()}\n~~~~~~~~\n"
