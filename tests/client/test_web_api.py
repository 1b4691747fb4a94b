"""What the page asks and is told: the JSON interface of `docs/web.md`."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.client.web_server import ask, device_with_documents, request, served

from stillroom_client.device import Device
from stillroom_client.participation import Consent
from stillroom_client.store import Feedback
from stillroom_client.web import WebServer
from stillroom_client.web.answers import marked, readable
from stillroom_client.web.api import Api
from stillroom_client.web.desk import Desk, SupersededError
from stillroom_shared.release import Release

DOCS = Path(__file__).resolve().parents[2] / "docs" / "web.md"


@pytest.fixture
def device(tmp_path: Path, tiny_release: Release) -> Iterator[Device]:
    with device_with_documents(tmp_path, tiny_release) as device:
        yield device


@pytest.fixture
def server(device: Device) -> Iterator[WebServer]:
    with served(device) as server:
        yield server


def error(server: WebServer, path: str, body: object, status: int) -> dict[str, object]:
    found, _, content = request(server, f"/api/{path}", body)
    assert found == status, (found, content)
    return dict(json.loads(content))


def test_a_search_gives_what_the_device_finds(server: WebServer, device: Device) -> None:
    """Guards against a page that ranks, filters or cuts otherwise than the command line."""
    hits = device.search("open a zip file", 5, mode="bm25", where="type=text")
    found = ask(
        server, "search", {"query": "open a zip file", "k": 5, "mode": "bm25", "narrow": {"where": "type=text"}}
    )
    assert hits and [result["id"] for result in found["results"]] == [hit.passage_id for hit in hits]
    [result] = found["results"]
    assert result["name"] == "zip.txt" and result["position"] == "line 1"
    assert "".join(text for text, _ in result["snippet"]) == hits[0].text
    assert {text for text, mark in result["snippet"] if mark} == {"zip", "file", "Open", "files"}
    assert found["where"] == "(type=text)" and found["milliseconds"] >= 0


def test_choices_narrow_together_with_the_line(server: WebServer, device: Device) -> None:
    """Guards against an "or" in the line that escapes the other choices."""
    [(folder, label, count), _] = ask(server, "status")["choices"]["folders"]
    assert (label, count) == ("notes", 2) and folder.endswith("/texts/notes")
    narrow = {"where": "type=code or type=markdown", "folder": folder}
    found = ask(server, "search", {"query": "tapir zip array", "k": 100, "narrow": narrow})["results"]
    assert {result["name"] for result in found} == {"tapirs.md"}
    assert error(server, "search", {"query": "a", "narrow": {"where": "type=code) or (type=text"}}, 400)["place"] == 9


def test_nothing_is_recorded_until_a_result_is_opened(server: WebServer, device: Device) -> None:
    """Guards against training data from what was only typed, shown or read on."""
    [hit, *_] = ask(server, "search", {"query": "tapirs"})["results"]
    ask(server, "passage", {"id": hit["id"], "query": "tapirs", "reach": 50})
    ask(server, "learned", {"query": "tapirs"})
    assert device.feedback() == []
    assert ask(server, "opened", {"query": " tapirs ", "id": hit["id"]}) == {"opened": 1}
    assert device.feedback() == [Feedback("tapirs", hit["id"])]
    [pair] = ask(server, "feedback")["opened"]
    assert (pair["query"], pair["id"], pair["name"]) == ("tapirs", hit["id"], hit["name"])
    assert ask(server, "feedback/erase", {"opened": {"query": "other", "id": hit["id"]}})["erased"] == 0
    ask(server, "opened", {"query": "xylophonist", "id": hit["id"]})
    assert ask(server, "feedback/erase", {"opened": {"query": "xylophonist", "id": hit["id"]}}) == {
        "erased": 1,
        "opened": 1,
    }
    assert device.feedback() == [Feedback("tapirs", hit["id"])]
    assert not [path for path in device.home.rglob("*") if path.is_file() and b"xylophonist" in path.read_bytes()]


def test_a_passage_stands_between_its_neighbours(server: WebServer, device: Device) -> None:
    """Guards against neighbours of another document, and one too few at the ends."""
    path = next(path for path in device.catalog.documents() if path.endswith("tapirs.md"))
    ids = [found.passage.id for found in device.catalog.passages_of(path)]
    for place, expected in ((0, ids[:3]), (5, ids[3:8]), (11, ids[9:])):
        found = ask(server, "passage", {"id": ids[place], "reach": 2})
        assert [passage["id"] for passage in found["passages"]] == expected
        assert [p["id"] for p in found["passages"] if p["chosen"]] == [ids[place]]
        assert (found["more_before"], found["more_after"]) == (place > 2, place < 9)
        assert (found["place"], found["passages_in_document"]) == (place + 1, 12)
    assert "not in the index" in str(error(server, "passage", {"id": "gone"}, 404)["error"])
    assert "not in this index" in str(error(server, "opened", {"id": "gone", "query": "q"}, 404)["error"])


def test_joining_has_to_be_agreed_to(server: WebServer, device: Device) -> None:
    """Guards against a request that joins without the box, or with a limit that was not shown."""
    shown = ask(server, "leave")["consent"]
    assert not shown["takes_part"] and not Consent.load(device.home).takes_part
    for body in (
        {"agree": False, "seen": shown, "limit_epsilon": None},
        {"seen": shown, "limit_epsilon": 1},
        {"agree": True, "seen": shown},
    ):
        error(server, "join", body, 400)
    error(server, "join", {"agree": True, "seen": {"limit_epsilon": 99}, "limit_epsilon": 1}, 400)
    error(server, "join", {"agree": True, "seen": {"nonsense": 1}, "limit_epsilon": 1}, 400)
    error(server, "join", {"agree": True, "seen": shown, "limit_epsilon": -1}, 400)
    assert not Consent.load(device.home).takes_part
    assert ask(server, "join", {"agree": True, "seen": shown, "limit_epsilon": 2.5})["consent"]["limit_epsilon"] == 2.5
    assert Consent.load(device.home).takes_part


def test_of_one_tab_the_latest_search_only_is_made() -> None:
    """Guards against a device that answers every letter, one after the other, long after the word is there."""
    done: list[str] = []
    gate = threading.Event()

    async def scene() -> list[object]:
        desk = Desk()
        running = asyncio.create_task(desk.latest("a", 1, lambda: gate.wait(20)))
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(desk.latest("a", n, lambda n=n: done.append(f"a{n}"))) for n in (2, 3, 4)]  # type: ignore[misc]
        other = asyncio.create_task(desk.latest("b", 1, lambda: done.append("b1")))
        await asyncio.sleep(0.05)
        late = asyncio.create_task(desk.latest("a", 3, lambda: done.append("late")))
        await asyncio.sleep(0.05)
        gate.set()
        found = await asyncio.gather(running, *waiting, other, late, return_exceptions=True)
        desk.close()
        return list(found)

    found = asyncio.run(scene())
    assert [type(each) for each in found] == [
        bool,
        SupersededError,
        SupersededError,
        type(None),
        type(None),
        SupersededError,
    ]
    assert sorted(done) == ["a4", "b1"]


def test_a_superseded_search_says_so(server: WebServer) -> None:
    """Guards against a late request that takes the place of a newer one."""
    ask(server, "search", {"query": "tapirs", "tab": "t", "number": 9})
    assert "later search" in str(error(server, "search", {"query": "tap", "tab": "t", "number": 8}, 409)["error"])
    ask(server, "search", {"query": "tap", "tab": "u", "number": 8})
    ask(server, "search", {"query": "tap", "number": 8})
    ask(server, "search", {"query": "tap", "number": 7})


def test_many_requests_at_once_are_all_answered(server: WebServer) -> None:
    """Guards against threads that share what they must not: SQLite, an encoder, an index."""
    failures: list[object] = []

    def work(tab: int) -> None:
        for n in range(10):
            for path, body in (
                ("search", {"query": f"tapirs {n}", "tab": str(tab or ""), "number": n}),
                ("feedback", {}),
                ("privacy", {}),
            ):
                status, _, content = request(server, f"/api/{path}", body)
                if status != 200:
                    failures.append((path, status, content))

    # Two of them without a tab, as programs are.
    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 0, 1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_what_cannot_be_used_is_said(
    server: WebServer, device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against a traceback on the page, or its text on the wire or in a log, when something is broken."""
    (device.home / "device.key").write_text("x")
    found = ask(server, "budget")
    assert found["budget"] is None and found["problem"]
    monkeypatch.setattr(Device, "search", lambda self, text, *_, **__: int(text))
    answer = error(server, "search", {"query": "a secret"}, 500)
    assert "defect" in str(answer["error"]) and "secret" not in str(answer) and "ValueError" not in str(answer)
    assert "ValueError" in caplog.text and "secret" not in caplog.text


def test_text_keeps_its_letters_and_loses_its_tricks() -> None:
    """Guards against marks at the wrong letters (beyond 16 bits), and text that turns what stands beside it."""
    text = "\U0001f9ea zip \u202eexe.fdp\x1b[31m"
    assert marked(readable(text), "zip") == [("\U0001f9ea ", False), ("zip", True), (" exe.fdp[31m", False)]


def test_the_manual_lists_every_path(device: Device) -> None:
    """Guards against an interface that only its author knows."""
    desk = Desk()
    paths = set(Api(device, desk)._paths)
    desk.close()
    assert set(re.findall(r"^\| `(/api/[a-z/]+)`", DOCS.read_text(encoding="utf-8"), re.MULTILINE)) == paths
