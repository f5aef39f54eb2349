"""The console in a real Chromium, before the demo's service and on the demo's pictures."""

import base64
import io
import os
import re
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from pictures import encoded, noise
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect
from serving import running_server
from synthetic import DEMO_PICTURES
from watching import Watch

from model_store.module_file import read_module, write_module
from model_store.publishing import Publisher
from model_store.store import ModelStore
from service.keys import SCOPES, change_keys, make_key

pytestmark = pytest.mark.slow  # half a minute
TEXTILE = DEMO_PICTURES / "textiles/test/global/020.jpg"
DIGIT = DEMO_PICTURES / "digits/test/7/020.png"
VIEWS = ("predict", "tasks", "revisions")
CONTRAST = (Path(__file__).parent / "contrast.js").read_text()
_DATA_TRANSFER = """([name, type, base64]) => {
  const transfer = new DataTransfer();
  const bytes = Uint8Array.from(atob(base64), (one) => one.charCodeAt(0));
  transfer.items.add(new File([bytes], name, { type }));
  return transfer;
}"""


def carried(path: Path, media_type: str) -> list[str]:
    return [path.name, media_type, base64.b64encode(path.read_bytes()).decode()]


def prediction(api: httpx.Client, picture: Path, **query: object) -> dict[str, Any]:
    answer = api.post("/predict", content=picture.read_bytes(), params=query).raise_for_status()
    found: dict[str, Any] = answer.json()["predictions"][0]
    return found


def expect_answer(page: Page, api: httpx.Client, picture: Path) -> None:
    """The newest card says what the API says."""
    answer = prediction(api, picture, coverage=0.95)
    card = page.locator(".answer").first
    expect(card.get_by_role("heading")).to_have_text(answer["label"])
    expect(card.locator(".eyebrow")).to_contain_text(answer["task"])
    expect(card.locator(".big")).to_contain_text(f"{100 * answer['confidence']:.1f} %")
    expect(card.locator(".typicality .number")).to_have_text(f"{answer['p_value']:.3g}")
    expect(card.locator(".pairs li")).to_have_count(1 + len(answer["alternatives"]))
    expect(card.locator(".badge")).to_have_text("abstains" if answer["abstained"] else "answers")
    pairs = [f"{one['task']} / {one['label']}" for one in answer["prediction_set"]]
    expect(card.locator(".chip")).to_have_text(pairs)
    receipt = answer["receipt"]
    expect(card.locator(".receipt summary")).to_contain_text(f"revision {receipt['revision']}")
    expect(card.locator(".receipt summary")).to_contain_text(receipt["module_sha256"][:10])
    for stage in ("decode", "queue", "backbone", "selection"):
        expect(card.locator(".legend")).to_contain_text(re.compile(rf"{stage} \d+\.\d ms"))


# -- predicting --------------------------------------------------------------------------------------


def test_a_chosen_picture_gets_the_answer_of_the_api(page: Page, api: httpx.Client) -> None:
    page.set_input_files("#pictures", TEXTILE)
    expect_answer(page, api, TEXTILE)
    expect(page.locator("#answer-announcement")).to_contain_text("020.jpg: textiles, global")


def test_a_dropped_picture_gets_the_answer_of_the_api(page: Page, api: httpx.Client) -> None:
    transfer = page.evaluate_handle(_DATA_TRANSFER, carried(TEXTILE, "image/jpeg"))
    page.dispatch_event("#picture-drop", "drop", {"dataTransfer": transfer})
    expect_answer(page, api, TEXTILE)


def test_a_pasted_picture_gets_the_answer_of_the_api(page: Page, api: httpx.Client) -> None:
    page.evaluate(
        f"""(file) => document.body.dispatchEvent(new ClipboardEvent(
            "paste", {{ clipboardData: ({_DATA_TRANSFER})(file), bubbles: true }}))""",
        carried(DIGIT, "image/png"),
    )
    expect_answer(page, api, DIGIT)


def test_the_bars_are_as_long_as_the_probabilities(page: Page, api: httpx.Client) -> None:
    page.set_input_files("#pictures", TEXTILE)
    page.locator(".answer").wait_for()
    answer = prediction(api, TEXTILE)
    shares = page.locator(".pairs .meter").evaluate_all(
        "(all) => all.map((one) => parseFloat(getComputedStyle(one, '::before').width) / one.clientWidth)"
    )
    expected = [answer["confidence"], *(one["probability"] for one in answer["alternatives"])]
    assert shares == pytest.approx(expected, abs=0.02)


def test_a_named_task_answers_alone(page: Page, api: httpx.Client) -> None:
    page.select_option("#task", "textiles")
    page.set_input_files("#pictures", DIGIT)
    card = page.locator(".answer")
    expect(card.locator(".eyebrow")).to_contain_text("textiles")
    abstained = prediction(api, DIGIT, task="textiles")["abstained"]
    expect(card.locator(".badge")).to_have_text("abstains" if abstained else "answers")


def test_what_is_no_picture_is_refused_in_a_sentence(page: Page, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("hello")
    page.set_input_files("#pictures", tmp_path / "notes.png")
    said = page.locator("#ask-notice .notice")
    expect(said).to_contain_text("notes.png:")
    expect(said).to_contain_text(re.compile(r"[Nn]ot a picture.*\.$"))
    expect(page.locator(".answer")).to_have_count(0)


# -- registering and going back ----------------------------------------------------------------------


def test_a_module_is_registered_after_its_impact_was_read(
    page: Page, api: httpx.Client, digits_module: Path
) -> None:
    before = api.get("/tasks").json()
    page.get_by_role("link", name="Tasks").click()
    page.get_by_role("button", name="Register a module").click()
    page.set_input_files("#module", digits_module)
    expect(page.locator("#impact")).to_contain_text("Would add digits")
    rows = page.locator("#impact tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.first).to_contain_text("digits")
    assert api.get("/tasks").json() == before, "a dry run changes nothing"
    page.get_by_role("dialog").get_by_label("Reason").fill("from the console")
    page.get_by_role("button", name="Register digits").click()
    expect(page.locator("#tasks-notice")).to_contain_text(
        f"Revision {before['revision'] + 1} is being served."
    )
    expect(page.locator("#task-table tbody tr")).to_have_count(2)
    expect(page.locator("#service-state")).to_contain_text(f"revision {before['revision'] + 1}, 2 tasks")
    assert api.get("/revisions").json()[0]["reason"] == "from the console"


def test_a_harmful_module_needs_a_second_thought(
    page: Page, api: httpx.Client, digits_module: Path, tmp_path: Path
) -> None:
    file = read_module(digits_module.read_bytes())
    twin = tmp_path / "numerals.safetensors"
    twin.write_bytes(write_module(file.manifest.model_copy(update={"task": "numerals"}), file.module))
    api.post("/tasks", content=digits_module.read_bytes()).raise_for_status()
    page.get_by_role("link", name="Tasks").click()
    page.get_by_role("button", name="Register a module").click()
    page.set_input_files("#module", twin)
    expect(page.locator("#impact .notice")).to_have_text("Lowers digits by more than the margin.")
    confirm = page.get_by_role("button", name="Register numerals")
    expect(confirm).to_be_disabled()
    page.get_by_label("although other tasks lose").check()
    confirm.click()
    expect(page.locator("#task-table tbody th")).to_contain_text(["digits", "numerals", "textiles"])


def test_a_bad_module_is_refused_in_a_sentence(page: Page, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    page.get_by_role("link", name="Tasks").click()
    page.get_by_role("button", name="Register a module").click()
    page.set_input_files("#module", tmp_path / "bad.safetensors")
    expect(page.locator("#impact .notice.bad")).to_contain_text(re.compile(r"safetensors.*\.$"))
    expect(page.locator("#do-register")).to_be_disabled()


def test_the_table_says_how_good_large_old_and_busy_a_task_is(page: Page, api: httpx.Client) -> None:
    prediction(api, TEXTILE)
    [task] = api.get("/tasks").json()["tasks"]
    page.get_by_role("link", name="Tasks").click()
    row = page.locator("#task-table tbody tr")
    expect(row).to_have_count(1)
    cells = {
        one: row.locator(f"[data-column={one}]") for one in ("Accuracy", "Size", "Active", "Traffic", "Drift")
    }
    expect(cells["Accuracy"]).to_have_text(f"{100 * task['metrics']['accuracy']:.1f} %")
    expect(cells["Size"]).to_have_text(f"{round(task['size_bytes'] / 1e3)} kB")
    expect(cells["Active"]).to_contain_text(re.compile("now|ago"))
    [traffic] = api.get("/traffic").json()["tasks"]
    expect(cells["Traffic"]).to_contain_text(f"{100 * traffic['share']:.1f} %")
    expect(cells["Drift"]).to_contain_text(re.compile("too few|steady|drifting"))


def test_a_rollback_shows_what_it_changes_and_asks(
    page: Page, api: httpx.Client, digits_module: Path
) -> None:
    first = api.get("/revisions").json()[0]
    added = api.post("/tasks", content=digits_module.read_bytes()).raise_for_status().json()
    page.get_by_role("link", name="Revisions").click()
    newest = page.locator(".timeline > li").first
    expect(newest.locator(".changes li")).to_have_text(re.compile(r"\+.*digits.*added"))
    page.get_by_role("button", name=f"Roll back to revision {first['number']}", exact=True).click()
    expect(page.locator("#rollback-diff li")).to_have_text(re.compile("−.*digits.*removed"))
    assert api.get("/tasks").json()["revision"] == added["revision"], "asking changes nothing"
    page.get_by_role("dialog").get_by_label("Reason").fill("second thoughts")
    page.get_by_role("button", name="Roll back", exact=True).click()
    expect(page.locator("#revisions-notice")).to_contain_text(
        f"Revision {added['revision'] + 1} serves the tasks of revision {first['number']}."
    )
    expect(newest).to_contain_text("second thoughts")
    assert api.get("/revisions").json()[0]["tasks"] == first["tasks"]


# -- who uses it, and how ----------------------------------------------------------------------------


def tab_to(page: Page, name: str) -> None:
    """Press Tab until the element of this accessible name has the focus, which must be seen."""
    for _ in range(30):
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        text = focused.evaluate(
            "(one) => (one.ariaLabel ?? one.labels?.[0]?.textContent ?? one.textContent).trim()"
        )
        if text.startswith(name):
            ring = (
                "(one) => getComputedStyle(one.matches('.drop input') ? one.parentElement : one).outlineStyle"
            )
            assert focused.evaluate(ring) == "solid", f"the focus on {name!r} cannot be seen"
            return
    raise AssertionError(f"{name!r} cannot be reached with the keyboard")


def test_everything_can_be_done_with_the_keyboard(page: Page, api: httpx.Client, digits_module: Path) -> None:
    first = api.get("/revisions").json()[0]["number"]
    page.on("filechooser", lambda _: None)  # from here on: what is opened before anybody listens is lost
    expect(page.locator("#service-state")).to_contain_text("revision")
    tab_to(page, "Choose pictures")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(TEXTILE)
    expect(page.locator(".answer h2")).to_have_text("global")

    page.reload()
    tab_to(page, "Tasks")
    page.keyboard.press("Enter")
    expect(page.locator("#tasks")).to_be_visible()
    tab_to(page, "Register a module")
    page.keyboard.press("Enter")
    expect(page.locator("#module")).to_be_focused()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(digits_module)
    expect(page.locator("#do-register")).to_be_enabled()
    tab_to(page, "Register digits")
    page.keyboard.press("Enter")
    expect(page.locator("#task-table tbody tr")).to_have_count(2)

    page.reload()
    tab_to(page, "Revisions")
    page.keyboard.press("Enter")
    page.locator(".timeline > li").first.wait_for()
    tab_to(page, f"Roll back to revision {first}")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.keyboard.press("Enter")  # the focus is back on the button
    tab_to(page, "Roll back")
    page.keyboard.press("Enter")
    expect(page.locator("#revisions-notice")).to_contain_text("serves the tasks of revision")


def test_a_phone_scrolls_in_one_direction(page: Page, digits_module: Path) -> None:
    page.set_viewport_size({"width": 360, "height": 760})
    page.set_input_files("#pictures", TEXTILE)
    page.locator(".answer").wait_for()
    for view in VIEWS:
        page.goto(f"{page.url.split('#')[0]}#{view}")
        page.locator(
            {"predict": ".answer", "tasks": "tbody tr", "revisions": ".timeline li"}[view]
        ).first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, view
    page.goto(f"{page.url.split('#')[0]}#tasks")
    page.get_by_role("button", name="Register a module").click()
    page.set_input_files("#module", digits_module)
    page.locator("#impact tbody tr").first.wait_for()
    wide = page.get_by_role("dialog").evaluate("(one) => [one.scrollWidth, one.clientWidth]")
    assert wide[0] <= wide[1] <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(scheme: str, page: Page, digits_module: Path) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_input_files("#pictures", TEXTILE)
    page.locator(".answer").wait_for()
    for view in VIEWS:
        page.goto(f"{page.url.split('#')[0]}#{view}")
        page.locator(
            {"predict": ".answer", "tasks": "tbody tr", "revisions": ".timeline li"}[view]
        ).first.wait_for()
        found = page.evaluate(CONTRAST)
        assert found["seen"] > 10 and found["faults"] == [], view
    page.goto(f"{page.url.split('#')[0]}#tasks")
    page.get_by_role("button", name="Register a module").click()
    page.set_input_files("#module", digits_module)
    page.locator("#impact tbody tr").first.wait_for()
    assert page.evaluate(CONTRAST)["faults"] == []


def test_a_chosen_theme_outlives_the_visit(page: Page) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_role("button", name="Theme: auto").click()
    page.get_by_role("button", name="Theme: light").click()
    expect(page.get_by_role("button", name="Theme: dark")).to_be_visible()
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    expect(page.get_by_role("button", name="Theme: dark")).to_be_visible()
    assert page.evaluate(ground) == dark


def test_a_service_that_is_gone_is_said_to_be(page: Page, context: BrowserContext) -> None:
    expect(page.locator("#service-state")).to_contain_text("revision")
    context.set_offline(True)
    page.set_input_files("#pictures", TEXTILE)
    expect(page.locator("#ask-notice")).to_contain_text("The service does not answer.")
    context.set_offline(False)


def test_the_watch_sees_violations_and_strangers(page: Page, watch: Watch) -> None:
    page.evaluate("document.body.setAttribute('style', 'color: red')")
    page.evaluate("document.body.append(Object.assign(new Image(), { src: 'http://127.0.0.1:9/x.png' }))")
    page.evaluate("fetch('http://127.0.0.1:9/').catch(() => null)")
    page.evaluate("try { document.body.innerHTML = '<p>hello' } catch { /* Trusted Types */ }")
    seen = " ".join(watch.complaints)
    for directive in ("style-src", "img-src", "connect-src"):
        assert f"violation of {directive}" in seen
    assert "TrustedHTML" in seen
    watch.complaints.clear()
    watch.strangers.clear()


# -- keys and planes ---------------------------------------------------------------------------------


def test_with_keys_and_an_admin_port_the_page_asks_for_a_key_and_keeps_it_to_itself(
    browser: Browser,
    context: BrowserContext,
    tiny_store: ModelStore,
    make_module: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    Publisher(tiny_store).register(make_module("birds"))
    key, token = make_key("ops", SCOPES, now=datetime.now(UTC))
    reader, reader_token = make_key("viewer", ("predict", "read"), now=datetime.now(UTC))
    change_keys(tmp_path / "keys.json", lambda _: (key, reader))
    (tmp_path / "noise.png").write_bytes(encoded(noise()))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        admin_port = probe.getsockname()[1]
    settings = {"keys_file": tmp_path / "keys.json", "admin_port": admin_port, "store_poll_s": 0}
    with running_server(tiny_store.url, tmp_path / "log", **settings):
        url = f"http://127.0.0.1:{admin_port}"
        watch = Watch(url)
        page = context.new_page()
        watch.over(page)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{url}/console/#revisions")
        expect(page.locator("#revisions-notice")).to_contain_text("This needs an API key with scope 'admin'.")

        def give(value: str) -> None:
            page.get_by_role("button", name="API key").first.click()
            page.get_by_label("Key", exact=True).fill(value)
            page.keyboard.press("Enter")

        give("tosca_wrong")
        expect(page.locator("#revisions-notice")).to_contain_text(
            "The API key is unknown, revoked or expired."
        )
        give(reader_token)
        expect(page.locator("#revisions-notice")).to_contain_text("Key 'viewer' has no scope 'admin'.")
        page.get_by_role("link", name="Tasks").click()
        expect(page.locator("#task-table tbody tr")).to_have_count(1)
        give(token)
        page.get_by_role("link", name="Revisions").click()
        expect(page.locator(".timeline > li")).to_have_count(2)
        expect(page.locator("#revisions-notice")).to_be_empty()
        page.get_by_role("link", name="Predict").click()
        page.set_input_files("#pictures", tmp_path / "noise.png")
        expect(page.locator(".answer")).to_have_count(1)

        kept = "JSON.stringify([{ ...localStorage }, { ...sessionStorage }, document.cookie, location.href])"
        for secret in (token, reader_token):
            assert secret not in page.evaluate(kept) and secret not in page.content()
            assert not [one for one in asked if secret in one]
        page.reload()
        page.get_by_role("link", name="Revisions").click()
        expect(page.locator("#revisions-notice")).to_contain_text("This needs an API key")
        assert watch.complaints == watch.strangers == []


# -- what it looks like ------------------------------------------------------------------------------


def test_screenshots(page: Page, api: httpx.Client, digits_module: Path, tmp_path: Path) -> None:
    """Into TOSCA_SCREENSHOTS, where `make screenshots` keeps those of the documents."""
    folder = Path(os.environ.get("TOSCA_SCREENSHOTS", tmp_path))

    def shoot(name: str) -> None:
        picture = Image.open(io.BytesIO(page.screenshot(animations="disabled")))
        picture.save(folder / f"console-{name}.webp", quality=82, method=6)
        assert picture.width == page.viewport_size["width"] and len(picture.getcolors(2**24) or ()) > 20

    page.set_input_files("#pictures", DIGIT)  # textiles, alone, is asked about a digit
    expect(page.locator(".answer .badge")).to_have_text("abstains")
    api.post("/tasks", content=digits_module.read_bytes(), params={"reason": "add digits"}).raise_for_status()
    page.set_input_files("#pictures", TEXTILE)
    expect(page.locator(".answer")).to_have_count(2)
    expect(page.locator("#service-state")).to_contain_text("2 tasks")  # the answer's revision is a new one
    shoot("predict-light")
    page.goto(f"{page.url.split('#')[0]}#revisions")
    page.emulate_media(color_scheme="dark")
    expect(page.locator(".timeline > li").first).to_contain_text("add digits")
    page.get_by_role("button", name=re.compile("Roll back to revision 4$")).click()
    shoot("rollback-dark")
    page.keyboard.press("Escape")
    prediction(api, DIGIT)
    page.set_viewport_size({"width": 1280, "height": 420})
    page.goto(f"{page.url.split('#')[0]}#tasks")
    page.locator("#task-table tbody tr").nth(1).wait_for()
    shoot("tasks-dark")
    page.set_viewport_size({"width": 360, "height": 760})
    shoot("phone-dark")
    page.goto(f"{page.url.split('#')[0]}#predict")
    page.emulate_media(color_scheme="light")
    page.locator(".answer").first.scroll_into_view_if_needed()
    shoot("phone-light")
