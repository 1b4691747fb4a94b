"""The Chromium of the system, without a window, for tests of pages; they are skipped where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; skips the test, with the reason, where it or playwright is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'stillroom[dev]'")
    path = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: install one of {', '.join(_NAMES)}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


# Every text that can be seen, with the colours that it has and stands on: the background of the nearest ancestor that has one.
CONTRASTS = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = colour.slice(0, 3).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest(".hidden, .skip, :disabled")) continue;
    let under = element;
    while (under && (rgb(getComputedStyle(under).backgroundColor)[3] ?? 1) === 0) under = under.parentElement;
    const back = under ? rgb(getComputedStyle(under).backgroundColor) : [255, 255, 255];
    const [a, b] = [light(rgb(getComputedStyle(element).color)), light(back)].sort((x, y) => y - x);
    found.push([walker.currentNode.data.trim().slice(0, 40), (a + 0.05) / (b + 0.05)]);
  }
  return found;
}"""

# What can be operated and has no name for who cannot see it.
NAMELESS = """() => [...document.querySelectorAll("button, input, select, a, [role=listbox], dialog[open], meter")]
  .filter((e) => e.checkVisibility() && !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim() ||
    (e.getAttribute("aria-labelledby") && document.getElementById(e.getAttribute("aria-labelledby"))?.textContent.trim())))
  .map((e) => e.outerHTML.slice(0, 120))"""

# A page of another site that was told the token: what becomes of its requests, its image and its frame.
FOREIGN = """async ([base, token]) => {
  const seen = [];
  const headers = { "content-type": "application/json", authorization: `Bearer ${token}` };
  const json = { method: "POST", body: "{}", headers };
  for (const options of [json, { ...json, mode: "no-cors" }, { method: "POST", body: "{}", mode: "no-cors" }])
    try { const a = await fetch(`${base}/api/leave`, options); seen.push(a.type + a.status); } catch { seen.push("failed"); }
  seen.push(await new Promise((done) => {
    const image = new Image();
    image.onload = () => done("loaded");
    image.onerror = () => done("failed");
    image.src = `${base}/icon.svg`;
  }));
  const frame = document.createElement("iframe");
  frame.src = base + "/";
  document.body.append(frame);
  await new Promise((done) => { frame.onload = done; });
  try { seen.push(frame.contentDocument ? "read" : "closed"); } catch { seen.push("closed"); }
  return seen;
}"""
# A form that sends JSON as plain text, which needs no leave of ours.
FORM = """<form id=f method=post enctype=text/plain action="{}/api/leave"><input name='{{"a' value='":1}}'></form>"""
FOCUS = """() => {
  const e = document.activeElement;
  return [e.id || e.textContent, getComputedStyle(e).outlineStyle];
}"""


def low_contrast(page: Page, least: float = 4.5) -> list[tuple[str, float]]:
    """Texts with less contrast than WCAG AA wants of small ones; an assertion fails if none was looked at."""
    found = page.evaluate(CONTRASTS)
    assert len(found) > 5, "nothing was looked at"
    return [(text, round(ratio, 2)) for text, ratio in found if ratio < least]


def nameless(page: Page) -> list[str]:
    """Controls without a name."""
    found: list[str] = page.evaluate(NAMELESS)
    return found


def repeated_ids(page: Page) -> list[str]:
    """Ids that occur twice, which break labels and descriptions."""
    found: list[str] = page.evaluate(
        "() => [...document.querySelectorAll('[id]')].map((e) => e.id).filter((id, n, all) => all.indexOf(id) !== n)"
    )
    return found


def overflows(page: Page) -> bool:
    """Whether the page can be scrolled sideways."""
    return bool(page.evaluate("() => document.documentElement.scrollWidth > innerWidth"))
