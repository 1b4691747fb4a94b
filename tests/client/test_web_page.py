"""The page as its owner sees it: a real browser, a real device, what it does to the files of the home."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.client.browser import FOCUS, FOREIGN, chromium, low_contrast, nameless, overflows, repeated_ids
from tests.client.devices import adapter_folder
from tests.client.test_participation import order
from tests.client.web_server import ATTACK, device_with_documents, served

from stillroom_client.device import Device
from stillroom_client.participation import Consent
from stillroom_client.web import WebServer
from stillroom_client.web.server import page_files
from stillroom_shared.errors import BudgetError
from stillroom_shared.release import Release

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from stillroom_shared.signing import SigningKey

Opener = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def device(tmp_path: Path, tiny_release: Release) -> Iterator[Device]:
    with device_with_documents(tmp_path, tiny_release) as device:
        yield device


@pytest.fixture
def server(device: Device) -> Iterator[WebServer]:
    with served(device) as server:
        yield server


@pytest.fixture
def opened(browser: Browser, server: WebServer) -> Iterator[Opener]:
    """Opens the page; errors of its script fail the test at the end."""
    contexts, errors = [], []

    def open_page(width: int = 1280, height: int = 800, url: str | None = None, **options: Any) -> Page:
        contexts.append(
            browser.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce", **options)
        )
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if "Content Security" in message.text else None)
        page.goto(url or server.url)
        page.wait_for_selector("#empty h2, .hit")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def search(page: Page, query: str) -> list[str]:
    """Type a query letter by letter; the titles of the results, once they are those of the whole query."""
    page.fill("#query", "")
    with page.expect_response(lambda answer: f'"query":"{query}"' in (answer.request.post_data or "")):
        page.type("#query", query)
    page.wait_for_function("() => document.querySelector('.hit, #empty h2')")
    page.wait_for_timeout(50)
    return page.locator(".hit-title").all_inner_texts()


def test_a_result_appears_while_its_owner_types_and_opens_with_enter(opened: Opener, device: Device) -> None:
    """Guards against a page that only looks alive: keys, marks, neighbours, and the opening that the store keeps."""
    page = opened()
    assert page.evaluate("document.activeElement.id") == "query"
    search(page, "leaves near river number 7")
    assert re.match(r"\d+ results, [\d.]+ ms", page.inner_text("#count"))
    found = page.locator(".hit").all_inner_texts()
    place = next(n for n, text in enumerate(found) if "number 7." in text)
    for _ in range(place):
        page.keyboard.press("ArrowDown")
    active = page.get_attribute("#query", "aria-activedescendant")
    assert active == f"hit-{place}" and page.get_attribute(f"#{active}", "aria-selected") == "true"
    assert page.locator("[aria-selected=true]").count() == 1
    page.keyboard.press("Enter")
    page.wait_for_selector(".kept button")
    passages = page.locator(".passage .body").all_inner_texts()
    assert [re.search(r"number (\d+)\.", text)[1] for text in passages] == ["4", "5", "6", "7", "8", "9", "10"]  # type: ignore[index]
    assert "number 7." in page.inner_text(".passage.chosen .body")
    assert "passage 7 of 12" in page.inner_text(".read-head") and "tapirs.md" in page.inner_text(".path")
    assert {"leaves", "river"} <= set(page.locator(".passage.chosen mark").all_inner_texts())
    assert page.locator(".passage:not(.chosen) mark").count() == 0
    [kept] = device.feedback()
    assert (kept.query == "leaves near river number 7" and kept.passage_id.endswith("tapirs.md#6")) or kept.passage_id
    assert "Kept on this device" in page.inner_text(".kept")
    page.click("text=Show more above")
    page.wait_for_function("() => document.querySelectorAll('.passage').length === 12")
    assert len(device.feedback()) == 1
    page.keyboard.press("Escape")
    page.wait_for_selector("#reader", state="hidden")
    assert page.evaluate("document.activeElement.id") == "query" and page.locator(".hit").count()
    page.keyboard.press("Escape")
    page.wait_for_selector("#empty h2")
    assert page.input_value("#query") == ""


def test_what_was_opened_can_be_taken_back(opened: Opener, device: Device) -> None:
    """Guards against training data that its owner cannot see or remove: undo, one, all."""
    page = opened()
    for query in ("tapirs eat leaves", "array of numbers", "zip file members"):
        search(page, query)
        page.locator(".hit").first.click()
        page.wait_for_selector(f".kept b:has-text('{query}')")
    assert len(device.feedback()) == 3
    page.click(".kept button")
    page.wait_for_selector("text=Forgotten")
    assert [pair.query for pair in device.feedback()] == ["tapirs eat leaves", "array of numbers"]
    page.click("[data-panel=opened]")
    page.click("[aria-label='Erase the opening for tapirs eat leaves']")
    page.wait_for_function("() => document.querySelectorAll('.pair').length === 1")
    assert [pair.query for pair in device.feedback()] == ["array of numbers"]
    page.click("text=Erase all")
    assert device.feedback()  # the first click asks
    page.click("text=for good")
    page.wait_for_selector("text=Nothing yet")
    assert device.feedback() == []


def test_filters_narrow_and_say_where_they_cannot_be_read(opened: Opener) -> None:
    """Guards against a filter that is sent and ignored, and an error that leaves its reader to count letters."""
    page = opened()
    search(page, "numbers and files")

    def names() -> set[str]:
        """Of the documents that the results stand in."""
        paths: list[str] = page.locator(".hit-where").evaluate_all("all => all.map((e) => e.title)")
        return {path.rpartition("/")[2] for path in paths}

    assert len(names()) == 4
    for select, value, left in (
        ("#type", "code", "array.py"),
        ("#folder", None, "tapirs.md"),
        ("#mode", "bm25", "zip.txt"),
    ):
        choice = value or page.locator("#folder option").nth(1).get_attribute("value")
        with page.expect_response("**/api/search"):
            page.select_option(select, choice)
        page.wait_for_timeout(80)
        assert left in names() and len(names()) < 4, (select, names())
        with page.expect_response("**/api/search"):
            page.select_option(select, "hybrid" if select == "#mode" else "")
        page.wait_for_timeout(80)
    page.click("#more")
    page.fill("#where", "type=code or yaer=1")
    page.wait_for_selector("#where-error:not([hidden])")
    assert page.inner_text("#where-error") == " " * 13 + "↑ there is no field 'yaer'"
    page.fill("#where", "type=code")
    page.wait_for_selector("#where-error", state="hidden")
    page.wait_for_timeout(80)
    assert names() == {"array.py"}
    page.fill("#where", "type=code and type=text")
    page.wait_for_selector("text=Nothing found")
    page.click("text=Search everything")
    page.wait_for_selector(".hit")
    assert len(names()) == 4


def test_a_document_cannot_run_anything_in_the_page(opened: Opener) -> None:
    """Guards against stored cross-site scripting by text, title, heading or file name of a document."""
    page = opened()
    titles = search(page, "hostile passage says")
    assert any(ATTACK in title for title in titles)
    assert page.locator(".hit-text", has_text="<script>").count()
    page.locator(".hit", has_text="The hostile passage").first.click()
    page.wait_for_selector(".kept button")
    assert ATTACK in page.inner_text(".passage.chosen .body") and "<img src=x" in page.inner_text(".path")
    page.click("[data-panel=opened]")
    page.wait_for_selector(".pair")
    assert page.locator("#results img, #results script, #reader img, #reader script, .pair img").count() == 0
    assert page.evaluate("[window.hacked, document.scripts.length]") == [None, 1]
    refused = page.evaluate("() => { try { document.body.innerHTML = '<b>x</b>' } catch (e) { return e.name } }")
    assert refused == "TypeError"  # Trusted Types: the page could not do it if it wanted to


def test_leaving_is_durable_and_joining_again_shows_its_limit(opened: Opener, device: Device) -> None:
    """Guards against a switch that only moves: the consent on the disk decides whether the next order is followed."""
    from stillroom_client.participation import take_part

    Consent(federation="f", limit_epsilon=8.0).save(device.home)
    take_part(device.home, order())
    page = opened()
    page.click("[data-panel=privacy]")
    page.wait_for_selector("meter", timeout=90_000)
    assert "of 8 epsilon" in page.inner_text("#panel-body")
    page.click("[role=switch]")
    page.wait_for_selector("[role=switch][aria-checked=false]", timeout=5_000)  # it waits for no accounting
    assert not Consent.load(device.home).takes_part
    with pytest.raises(BudgetError, match="the owner has left"):
        take_part(device.home, order(round=2))
    page.click("[role=switch]")
    form = page.locator("form.join")
    assert "central" in form.inner_text() and page.input_value("#limit") == "8"
    page.click("text=Take part again >> nth=-1")
    assert not Consent.load(device.home).takes_part  # the box was not ticked
    page.fill("#limit", "7.5")
    page.check("#agree")
    page.click("form.join button")
    page.wait_for_selector("[role=switch][aria-checked=true]")
    assert Consent.load(device.home) == Consent(federation="f", limit_epsilon=7.5)
    take_part(device.home, order(round=2))


def test_what_an_adapter_changes_stands_side_by_side(
    opened: Opener, device: Device, tiny_release: Release, signing_key: SigningKey, tmp_path: Path
) -> None:
    """Guards against a comparison of the adapter with itself."""
    page = opened()
    page.click("[data-panel=learned]")
    page.wait_for_selector("text=No adapter yet")
    page.keyboard.press("Escape")
    before = [hit.passage_id for hit in device.search("leaves near river", 10, mode="dense")]
    device.adopt(adapter_folder(tmp_path / "adapter", tiny_release, signing_key, scale=2.0))
    after = [hit.passage_id for hit in device.search("leaves near river", 10, mode="dense")]
    assert before != after  # the adapter is large enough for this test to see something
    assert [hit.passage_id for hit in device.search("leaves near river", 10, mode="dense", adapted=False)] == before
    page.select_option("#mode", "dense")
    search(page, "leaves near river")
    page.click("[data-panel=learned]")
    page.wait_for_selector(".sides")
    sides = page.locator(".sides > div")
    assert sides.count() == 2 and sides.nth(0).locator("li").count() == 10
    moved = sum(a != b for a, b in zip(before, after, strict=True))
    assert f"{moved} result" in page.inner_text("#panel-body")
    assert sides.nth(1).locator(".up, .down").count() == moved


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_and_named(opened: Opener, device: Device, scheme: str) -> None:
    """Guards against grey on grey in the scheme that its author does not use, and controls without a name."""
    Consent(takes_part=False).save(device.home)
    page = opened(color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", background)[0]) < 128) == (scheme == "dark")

    def checked(what: str) -> None:
        assert (what, low_contrast(page)) == (what, [])
        assert (what, nameless(page)) == (what, [])
        assert (what, repeated_ids(page)) == (what, [])

    checked("empty")
    search(page, "hostile passage tapirs")
    page.click("#more")
    page.fill("#where", "(")
    page.wait_for_selector("#where-error:not([hidden])")
    page.locator(".hit").nth(1).click()
    page.wait_for_selector(".kept button")
    checked("passage")
    for name in ("opened", "learned", "privacy", "keys"):
        page.click(f"[data-panel={name}]")
        page.wait_for_selector("#panel-body section")
        if name == "privacy":
            page.click("[role=switch]")
            page.wait_for_selector("form.join:not([hidden])")
        checked(name)
        page.keyboard.press("Escape")


def test_it_is_readable_on_a_phone(opened: Opener) -> None:
    """Guards against a page that has to be dragged sideways, and one that cannot be left by the phone's way back."""
    page = opened(360, 740, has_touch=True)
    assert not overflows(page)
    search(page, "hostile passage array numbers")
    assert not overflows(page)
    page.locator(".hit").first.tap()
    page.wait_for_selector(".kept button")
    assert not overflows(page) and not page.locator("#results").is_visible()
    page.go_back()
    page.wait_for_selector(".hit")
    assert not page.locator("#reader").is_visible()
    for name in ("opened", "learned", "privacy", "keys"):
        page.tap(f"[data-panel={name}]")
        page.wait_for_selector("#panel-body section")
        assert not overflows(page), name
        assert page.locator("#panel").bounding_box()["width"] == 360, name  # type: ignore[index]
        page.tap("#close")


def test_keys_lead_everywhere(opened: Opener) -> None:
    """Guards against a page that needs a mouse, and a focus that cannot be seen."""
    page = opened()
    page.keyboard.press("Tab")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query" and page.input_value("#query") == ""
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open]")
    assert page.inner_text("#panel-title") == "Keys and help"
    page.keyboard.press("Escape")
    page.wait_for_selector("#panel", state="hidden")
    page.keyboard.type("why?")
    assert page.input_value("#query") == "why?" and not page.locator("#panel").is_visible()
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(FOCUS))
    assert {"mode", "type", "folder", "more"} <= {name for name, _ in seen}
    assert all(style != "none" for name, style in seen if name not in ("", "reader") and "\n" not in name)


def test_the_token_leaves_the_address_and_a_page_without_it_says_so(opened: Opener, server: WebServer) -> None:
    """Guards against a token in the history of the browser, and a blank page for who comes without it."""
    page = opened()
    assert page.url == f"http://127.0.0.1:{server.port}/"
    search(page, "tapirs")
    assert "tapirs" not in page.url
    assert page.evaluate("[document.cookie, localStorage.length, Object.keys(sessionStorage).join()]") == [
        "",
        0,
        "token",
    ]
    other = opened(url=f"http://127.0.0.1:{server.port}/")
    assert "needs its key" in other.inner_text("#empty")
    other.fill("#key", server.url)
    other.click("text=Open >> nth=-1")
    other.wait_for_selector("text=What are you looking for?")


def test_the_file_in_the_home_leads_to_the_page(opened: Opener, server: WebServer) -> None:
    """Guards against `--open` and `--quiet` that end at a refusal: the browser comes from a file, not from the page."""
    page = opened(url=server.address_file.as_uri())
    assert page.url == f"http://127.0.0.1:{server.port}/"
    page.wait_for_selector("text=What are you looking for?")


def test_a_foreign_page_gets_nothing(browser: Browser, server: WebServer, device: Device, tmp_path: Path) -> None:
    """Guards against what tests of headers cannot show: a real browser, a page elsewhere that even knows the token."""
    page = browser.new_context().new_page()
    page.route(
        "http://evil.example/**", lambda route: route.fulfill(body="<title>evil</title>", content_type="text/html")
    )
    page.goto("http://evil.example/")
    base = f"http://127.0.0.1:{server.port}"
    tried = page.evaluate(FOREIGN, [base, server.token])
    assert tried[0] == "failed" and tried[3:] == ["failed", "closed"]
    assert set(tried[1:3]) <= {"failed", "opaque0"}
    page.set_content(
        f"<form id=f method=post enctype=text/plain action=\"{base}/api/leave\"><input name='{{\"a' value='\":1}}'></form>"
    )
    with page.expect_navigation():
        page.evaluate("document.getElementById('f').submit()")
    assert "another site" in page.inner_text("body")
    assert Consent.load(device.home).takes_part
    page.context.close()


def test_an_empty_device_says_what_to_type(browser: Browser, tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a first look that shows nothing and leads nowhere; and a server that ends unnoticed."""
    with Device.create(tmp_path / "my home", tiny_release, link=True) as device:
        context = browser.new_context()
        page = context.new_page()
        with served(device) as server:
            page.goto(server.url)
            page.wait_for_selector("text=No documents yet")
            assert f"stillroom index add PATH... --home '{tmp_path / 'my home'}'" in page.inner_text("#empty")
            page.click("[data-panel=privacy]")
            page.wait_for_selector("text=None yet")
            assert "has not been asked by any federation" in page.inner_text("#panel-body")
            assert not list((tmp_path / "my home").glob("ledger*"))  # looking makes no ledger
            page.keyboard.press("Escape")
            page.fill("#query", "something")
            page.wait_for_selector("text=There are no documents yet")
        page.fill("#query", "anything")
        page.wait_for_selector("text=The server does not answer")
        context.close()


def test_the_page_is_light() -> None:
    """Guards against a page that grows a framework, or asks somebody else for a font."""
    files = page_files()
    assert sum(len(answer.body) for answer in files.values()) < 60_000
    for path, answer in files.items():
        text = answer.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), path
