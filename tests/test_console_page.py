"""The console's files: where they are served, under which policy, and that they ask nobody else."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from starlette.testclient import TestClient

from model_store.backbone import Backbone
from model_store.store import ModelStore
from service.app import create_admin_app, create_app
from service.planes import Planes
from service.settings import Settings

PAGE_FILES = {one.name: one.read_text() for one in files("service").joinpath("console_page").iterdir()}


@pytest.fixture
def settings(tiny_store: ModelStore) -> Settings:
    return Settings(store=tiny_store.url, store_poll_s=0.0)


@pytest.fixture
def client(settings: Settings, tiny_backbone: Backbone) -> Iterator[TestClient]:
    with TestClient(create_app(settings, tiny_backbone)) as client:
        yield client


class _Markup(HTMLParser):
    """Names of attributes and elements, addresses, and text inside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: set[str] = set()
        self.addresses: set[str] = set()
        self.inline: list[str] = []
        self._element = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._element = tag
        for name, value in attrs:
            self.attributes.add(name)
            if name in ("src", "href") and value and not value.startswith("#"):
                self.addresses.add(value)

    def handle_data(self, data: str) -> None:
        if self._element in ("script", "style") and data.strip():
            self.inline.append(data)


def test_the_page_allows_its_own_files_and_nothing_else(client: TestClient) -> None:
    page = client.get("/console/")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    directives = dict(one.strip().split(" ", 1) for one in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == directives["style-src"] == directives["connect-src"] == "'self'"
    assert directives["require-trusted-types-for"] == "'script'" and directives["trusted-types"] == "'none'"
    assert "unsafe" not in policy and "http" not in policy


def test_the_markup_holds_no_script_no_style_and_no_foreign_address() -> None:
    markup = _Markup(PAGE_FILES["index.html"])
    assert markup.inline == []
    assert not {one for one in markup.attributes if one == "style" or one.startswith("on")}
    assert markup.addresses == {"icon.svg", "style.css", "main.js"}


def test_no_file_names_another_server_or_parses_markup() -> None:
    for name, text in PAGE_FILES.items():
        foreign = [one for one in re.findall(r"https?://[^\s\"']+", text) if "www.w3.org/2000/svg" not in one]
        assert foreign == [], name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\b|new Function", text), name


def test_every_module_that_is_imported_is_served(client: TestClient) -> None:
    imported = {one for text in PAGE_FILES.values() for one in re.findall(r'from "\./([\w.]+)"', text)}
    assert imported, "the page is made of modules"
    for name in {*imported, "main.js", "style.css", "icon.svg"}:
        served = client.get(f"/console/{name}")
        assert served.status_code == 200 and served.text == PAGE_FILES[name]
        assert served.headers["cache-control"] == "no-cache", "or an older release stays in the cache"
        assert served.headers["x-content-type-options"] == "nosniff"
    assert client.get("/console/main.js").headers["content-type"].startswith("text/javascript")


def test_an_unchanged_file_is_not_sent_again(client: TestClient) -> None:
    tag = client.get("/console/main.js").headers["etag"]
    assert client.get("/console/main.js", headers={"if-none-match": tag}).status_code == 304


@pytest.mark.parametrize(
    "path", ["/console/../settings.py", "/console/%2e%2e/settings.py", "/console/none.js"]
)
def test_nothing_beside_the_page_is_served(path: str, client: TestClient) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def test_the_root_leads_to_the_page(client: TestClient) -> None:
    assert client.get("/", follow_redirects=False).headers["location"] == "console/"
    assert client.get("/").url.path == "/console/"
    assert "/" not in client.get("/openapi.json").json()["paths"]


def test_the_page_can_be_left_out(settings: Settings, tiny_backbone: Backbone) -> None:
    without = settings.model_copy(update={"show_console": False})
    with TestClient(create_app(without, tiny_backbone)) as client:
        assert client.get("/console/").status_code == client.get("/").status_code == 404


def test_with_an_admin_port_the_page_is_there_alone(settings: Settings, tiny_backbone: Backbone) -> None:
    separate = settings.model_copy(update={"admin_port": 9999})
    main = create_app(separate, tiny_backbone)
    planes = Planes(main)
    planes.put(9999, create_admin_app(separate, main))
    with TestClient(planes, base_url="http://testserver:8000") as client:
        assert client.get("/console/").status_code == 404
        assert client.get("http://testserver:9999/console/").status_code == 200
