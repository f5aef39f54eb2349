"""Reading the documents of the repository: links, anchors and blocks of code."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath

from markdown import Markdown
from markdown_it import MarkdownIt
from markdown_it.token import Token

from website.repository_links import ROOT


@dataclass(frozen=True)
class Block:
    """A block of code; `language` is "" where the block says none."""

    document: PurePosixPath
    line: int
    language: str
    text: str


def blocks(document: PurePosixPath) -> Iterator[Block]:
    for token in _tokens(document):
        if token.type in ("fence", "code_block"):
            line = token.map[0] + 1 if token.map else 0
            yield Block(document, line, token.info.strip(), token.content)


def links(document: PurePosixPath) -> Iterator[str]:
    """Targets of all links and pictures, in order."""
    for token in _tokens(document):
        for one in token.children or []:
            target = one.attrGet("href") if one.type == "link_open" else one.attrGet("src")
            if one.type in ("link_open", "image") and target is not None:
                yield str(target)


@cache
def anchors(document: PurePosixPath) -> frozenset[str]:
    """What may stand behind # in a link to a document: the ids that the site gives to its headings."""
    converter = Markdown(extensions=["toc", "fenced_code"])
    converter.convert((ROOT / document).read_text())
    ids: set[str] = set()
    waiting = list(converter.toc_tokens)
    while waiting:
        heading = waiting.pop()
        ids.add(heading["id"])
        waiting += heading["children"]
    return frozenset(ids)


@cache
def _tokens(document: PurePosixPath) -> list[Token]:
    return MarkdownIt().enable("table").parse((ROOT / document).read_text())
