"""A real Chromium before a real `tosca serve`."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Playwright, sync_playwright
from serving import RunningServer, running_server
from watching import REPORT_VIOLATIONS, Watch

from model_store.store import ModelStore, without_task

# As root in a container, without a screen, and asking no server but ours.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    # Not longer than a module: while it runs, no test of another module could start an event loop.
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine: `make browser` installs Debian's")
    browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def server(
    browser: Browser, demo_store: ModelStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """The demo's store without the task digits, which is left for tests to register."""
    folder = tmp_path_factory.mktemp("console")
    shutil.copytree(demo_store.url, folder / "store", copy_function=_link)
    ModelStore(folder / "store").publish(without_task("digits"), "leave digits to the tests")
    with running_server(str(folder / "store"), folder / "log", store_poll_s=0, torch_threads=1) as server:
        yield server


def _link(source: str, target: str) -> None:
    """Files of a store never change, so the backbone need not be copied where it can be linked."""
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


@pytest.fixture
def api(server: RunningServer) -> Iterator[httpx.Client]:
    """The same service without a browser, put back to the revision it started with."""
    with httpx.Client(base_url=server.url, timeout=60.0) as client:
        first = next(
            one["number"]
            for one in client.get("/revisions").json()
            if one["reason"] == "leave digits to the tests"
        )
        client.post(f"/revisions/{first}/rollback").raise_for_status()
        yield client


@pytest.fixture
def watch(server: RunningServer) -> Watch:
    return Watch(server.url)


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 860}, color_scheme="light")
    context.add_init_script(REPORT_VIOLATIONS)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, server: RunningServer, api: httpx.Client, watch: Watch) -> Iterator[Page]:
    """The console, opened; it must not have complained or strayed when the test ends."""
    page = context.new_page()
    page.set_default_timeout(20_000)
    watch.over(page)
    page.goto(f"{server.url}/console/")
    yield page
    assert watch.complaints == []
    assert watch.strangers == []


@pytest.fixture(scope="session")
def digits_module(demo_store: ModelStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("modules") / "digits.safetensors"
    path.write_bytes(demo_store.module(demo_store.require_head().tasks["digits"]))
    return path
