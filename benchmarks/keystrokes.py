"""From a keystroke to its results on the screen, in a headless Chromium: `python -m benchmarks.keystrokes HOME`.

Types queries letter by letter into the page of a real home, at the pace of a quick typist, and measures inside the page: from
the `keydown` event to the frame after the one in which the results of exactly that letter's search were put into the document.
Letters that come within 40 ms wait for each other; at this pace none does. One whose search was superseded has no figure.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from tests.client.browser import chromium

from stillroom_client.device import Device
from stillroom_client.web import WebServer

QUERIES = (
    "open a zip file and list its members",
    "shortest path in a weighted graph",
    "render a template with a macro",
    "how is the privacy budget limited",
)
KEYSTROKES = 100
PACE = 150  # milliseconds between two letters: 80 words a minute

WATCH = """() => {
  window.times = [];
  const channel = new MessageChannel();
  let pressed = 0;
  let painted = () => {};
  channel.port1.onmessage = () => painted();
  document.getElementById("query").addEventListener("keydown", (event) => {
    if (event.key.length === 1) pressed = event.timeStamp;
  });
  new MutationObserver(() => {
    const began = pressed;
    pressed = 0;
    if (began) requestAnimationFrame(() => {
      painted = () => window.times.push(performance.now() - began);
      channel.port2.postMessage(0);
    });
  }).observe(document.getElementById("results"), { childList: true });
}"""


def main(home: Path) -> None:
    """Print the figures as one line of JSON."""
    with Device.open(home) as device, WebServer(device) as server, chromium() as browser:
        server.start()
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(server.url)
        page.wait_for_selector("#empty h2")
        page.evaluate(WATCH)
        typed = 0
        while typed < KEYSTROKES:
            page.fill("#query", "")
            page.wait_for_timeout(300)
            for letter in QUERIES[typed % len(QUERIES)][: KEYSTROKES - typed]:
                page.keyboard.press("Space" if letter == " " else letter)
                page.wait_for_timeout(PACE)
                typed += 1
        times = sorted(page.evaluate("window.times"))
        figures = {
            "passages": device.store.count(),
            "keystrokes": typed,
            "rendered": len(times),
            "p50_ms": round(statistics.median(times), 1),
            "p90_ms": round(times[int(len(times) * 0.9)], 1),
            "p99_ms": round(times[int(len(times) * 0.99)], 1),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
