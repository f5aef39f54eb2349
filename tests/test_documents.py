"""The documents hold: every link leads somewhere, every command exists, and the site builds without asking anybody."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

import pytest
import typer
from documents import Block, anchors, blocks, links
from typer.core import TyperGroup

from website.diagrams import DIAGRAMS, draw_all
from website.reference import commands_page, leaf_commands, settings_page, whole_command
from website.repository_links import ROOT, documents, is_internal, site_path, target_of, with_site_links

DOCUMENTS = documents()
_ASSIGNMENT = re.compile(r"[A-Z][A-Z0-9_]*=")
_SETTING = re.compile(r"\bTOSCA_[A-Z0-9_]+\b")


# -- links -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_internal_link_and_anchor_resolves(document: PurePosixPath) -> None:
    assert broken_links(document) == []


def broken_links(document: PurePosixPath) -> list[str]:
    broken = []
    for link in links(document):
        if link.startswith("#"):
            target, anchor = document, link[1:]
        elif is_internal(link):
            target, anchor = target_of(document, link)
        else:
            continue
        is_there = (ROOT / target).exists()
        if not is_there or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    return broken


def test_a_broken_link_or_anchor_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        "guarantees.md#refusals",
        "guarantees.md#no-such",
        "no-such.md",
        "../README.md",
        "https://example.org/x",
    ]
    monkeypatch.setattr(sys.modules[__name__], "links", lambda _: given)
    assert broken_links(PurePosixPath("docs/module-format.md")) == ["guarantees.md#no-such", "no-such.md"]


def test_links_into_the_repository_become_links_of_the_site() -> None:
    text = "[a](../service/settings.py) [b](../benchmarks/results/soak.json) [c](decisions/0003-runtimes.md) [d](#x)"
    assert with_site_links(PurePosixPath("docs/guarantees.md"), text) == (
        "[a](reference/settings.md) [b](repository/benchmarks/results/soak.json) [c](decisions/0003-runtimes.md) [d](#x)"
    )
    deep = with_site_links(PurePosixPath("docs/decisions/0003-runtimes.md"), "[a](../../SECURITY.md#limits)")
    assert deep == "[a](../security.md#limits)"


# -- commands ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_tosca_command_in_a_block_exists(document: PurePosixPath) -> None:
    assert [fault for block in blocks(document) for fault in command_faults(block)] == []


def command_faults(block: Block) -> list[str]:
    faults = []
    for words in tosca_calls(block.text):
        try:
            parse(words)
        except typer.Exit:
            pass  # --help
        except Exception as error:  # whatever it is, the line does not work
            faults.append(f"{block.document}:{block.line}: tosca {shlex.join(words)}: {error}")
    return faults


def tosca_calls(text: str) -> Iterator[list[str]]:
    """The arguments of each call of `tosca` in the shell lines of a block: also after a pipe or an assignment."""
    for line in text.replace("\\\n", " ").splitlines():
        try:
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = list(lexer)
        except ValueError:  # prose, JSON or another language
            continue
        call: list[str] | None = None
        is_start = True
        for word in words:
            if word in ("|", "||", "&&", ";", "&", "(", ")", ">", ">>", "<"):
                if call is not None:
                    yield call
                call, is_start = None, True
            elif call is not None:
                call.append(word)
            elif is_start and word == "tosca":
                call = []
            elif not _ASSIGNMENT.match(word):
                is_start = False
        if call is not None:
            yield call


def parse(words: list[str]) -> None:
    """Parse arguments as `tosca` does, without doing anything; whatever it would refuse is raised."""
    command, name = whole_command(), "tosca"
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        name, *words = words
        if name not in command.commands:
            raise LookupError(f"no such command {name!r}")
        command = command.commands[name]
    if not isinstance(command, TyperGroup):
        command.make_context(name, list(words))


def test_wrong_commands_and_options_would_be_found() -> None:
    text = (
        "tosca train --task birds --data pictures/birds\n"
        "tosca train --task birds --data pictures/birds --epochs 3\n"
        "TOSCA_PORT=1 tosca bake cake\n"
        "curl localhost/predict | tosca replay - bird.jpg --selektion lda\n"
        "tosca revisions rollback seven\n"
        "TOSCA_STORE=x tosca tasks list --json | head\n"
    )
    faults = command_faults(Block(PurePosixPath("x.md"), 1, "", text))
    assert [one.split(":")[2].split()[1] for one in faults] == ["train", "bake", "replay", "revisions"]


def test_the_documents_show_most_commands() -> None:
    """So that the two tests above have something to look at."""
    shown = {
        words[0] for document in DOCUMENTS for block in blocks(document) for words in tosca_calls(block.text)
    }
    assert shown >= {
        "serve",
        "train",
        "evaluate",
        "replay",
        "tasks",
        "revisions",
        "keys",
        "backbone",
        "predict",
    }


@pytest.mark.parametrize("path", [" ".join(path) for path, _ in leaf_commands(whole_command())])
def test_the_page_of_commands_describes_every_option(path: str) -> None:
    section = commands_page().split(f"\n## {path}\n")[1].split("\n## ")[0]
    command = next(one for words, one in leaf_commands(whole_command()) if " ".join(words) == path)
    for parameter in command.params:
        assert all(
            f"`{option}`" in section
            for option in parameter.opts
            if option.startswith("--") and option != "--help"
        )


# -- settings ----------------------------------------------------------------------------------------


def test_every_setting_is_described() -> None:
    rows = [line for line in settings_page().splitlines() if line.startswith("| `TOSCA_")]
    assert len(rows) > 45
    assert all(row.rsplit("|", 2)[1].strip() for row in rows if "TOSCA_LOG_LEVEL" not in row)


# -- the site ----------------------------------------------------------------------------------------


def build(project: Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it: any warning of mkdocs, such as a dead link, fails it."""
    folder = tmp_path_factory.mktemp("site")
    result = build(ROOT, folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_a_dead_link_or_anchor_stops_the_build(tmp_path: Path) -> None:
    """With the site's own settings: `mkdocs --strict --quiet`, for one, lets it pass."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text(f"INHERIT: {ROOT}/mkdocs.yml\nnav: [index.md]\nhooks: []\n")
    for text, is_sound in (("# A\n[b](#a)", True), ("# A\n[b](no.md)", False), ("# A\n[b](#b)", False)):
        (tmp_path / "docs" / "index.md").write_text(text)
        assert (build(tmp_path, tmp_path / "site").returncode == 0) is is_sound, text


class _Requests(HTMLParser):
    """What a browser asks for by itself when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        named = given.get("href") if tag == "link" and given.get("rel") != "canonical" else given.get("src")
        if named:
            self.urls.append(named)


def test_the_site_has_every_document(site: Path) -> None:
    for document in DOCUMENTS:
        assert (site / site_path(document)).with_suffix(".html").is_file()
    assert "TOSCA_ABSTAIN_LEVEL" in (site / "reference/settings.html").read_text()
    assert "POST /predict" in (site / "reference/http.html").read_text()


def test_pages_of_the_site_ask_no_other_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert pages
    for page in pages:
        requests = _Requests()
        requests.feed(page.read_text())
        assert [one for one in requests.urls if re.match(r"(https?:)?//", one)] == [], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text()), sheet.name


def test_the_drawings_are_those_of_the_script(tmp_path: Path) -> None:
    """By name and size: their numbers may differ in a last digit on another machine."""
    kept = {path.name: path for path in (ROOT / "docs/figures").glob("method-*.svg")}
    assert set(kept) == {f"method-{name}.svg" for name in DIAGRAMS}
    draw_all(tmp_path)
    for name, path in kept.items():
        assert (tmp_path / name).stat().st_size == pytest.approx(path.stat().st_size, rel=0.02)
