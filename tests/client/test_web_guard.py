"""Who gets in: each way that another user, another site or a hostile document might take, and that the owner's way works."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.client.web_server import ask, device_with_documents, raw, request, served

from stillroom_client.device import Device
from stillroom_client.web import WebServer, connection
from stillroom_client.web.guard import LARGEST_BODY
from stillroom_shared.errors import SettingsError
from stillroom_shared.release import Release

PATHS = (
    "status",
    "search",
    "passage",
    "opened",
    "feedback",
    "feedback/erase",
    "learned",
    "privacy",
    "budget",
    "leave",
    "join",
)
FROM_PAGE = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, tiny_release: Release) -> Iterator[Device]:
    with device_with_documents(tmp_path_factory.mktemp("guard"), tiny_release) as device:
        yield device


@pytest.fixture(scope="module")
def server(device: Device) -> Iterator[WebServer]:
    with served(device) as server:
        yield server


def consented(device: Device) -> bool:
    return not (device.home / "consent.json").exists()


def test_the_owner_gets_in(server: WebServer) -> None:
    """Guards against tests of refusals that pass because nothing is ever answered."""
    origin = {"Origin": f"http://127.0.0.1:{server.port}"}
    for headers in ({}, FROM_PAGE | origin):
        status, _, body = request(server, "/api/search", {"query": "tapir leaves"}, headers=dict(headers))
        assert status == 200 and json.loads(body)["results"]
    for name in ("localhost", "[::1]"):
        assert request(server, "/api/status", headers={"Host": f"{name}:{server.port}"})[0] == 200
    assert request(server, "/", method="GET", token=None)[0] == 200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("token", [None, "", "0" * 64, "right-but-longer", "é"])
def test_without_the_token_nothing_is_answered(server: WebServer, path: str, token: str | None) -> None:
    """Guards against one path that forgot to ask: another user of the machine reaches the port."""
    wrong = server.token + "0" if token == "right-but-longer" else token
    status, _, body = request(server, f"/api/{path}", token=wrong)
    assert status == 401 and set(json.loads(body)) == {"error"}
    assert server.token.encode() not in body


def test_the_token_is_taken_from_the_header_only(server: WebServer) -> None:
    """Guards against a token that works in an address (and so in logs and histories), in a cookie or in a body."""
    secret = server.token
    for path, headers in (
        (f"/api/status?token={secret}", {}),
        ("/api/status", {"Cookie": f"token={secret}"}),
        ("/api/status", {"Authorization": f"Basic {secret}"}),
        ("/api/status", {"Authorization": secret}),
    ):
        assert request(server, path, {"token": secret}, token=None, headers=dict(headers))[0] in (400, 401)


def test_each_start_has_another_token_and_nobody_else_reads_it(device: Device, tmp_path: Path) -> None:
    """Guards against a token that is guessed from the last one, or read from a file by another user."""
    with served(device) as first, served(device) as second:
        assert first.token != second.token and len(first.token) == 64
        assert request(second, "/api/status", token=first.token)[0] == 401
        assert second.token in second.address_file.read_text()
        assert stat.S_IMODE(second.address_file.stat().st_mode) == 0o600
    assert not device.home.joinpath("web.html").exists()


def test_only_this_machine_reaches_the_port(server: WebServer) -> None:
    """Guards against a server that listens on every network of the machine."""
    assert server._socket.getsockname()[0] == "127.0.0.1"
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", server.port), timeout=2):
        pass


STRANGER = """
import os, socket, sys
"".encode("idna")  # loaded while the library can be read
if os.geteuid() == 0:
    os.setuid(65534)
held = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(80)]
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/net/tcp").exists(), reason="only root becomes another user")
def test_another_user_cannot_keep_the_owner_out(server: WebServer) -> None:
    """Guards against a stranger on this machine who holds all connections open and says nothing."""
    command = [sys.executable, "-c", STRANGER, str(server.port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as stranger:
        assert stranger.stdout is not None and stranger.stdout.readline() == "held\n"
        assert request(server, "/api/status")[0] == 200
        stranger.communicate("")


def test_who_says_nothing_is_not_waited_for(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against connections that are held for ever, by whomever."""
    monkeypatch.setattr(connection, "SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", server.port)) as silent:
        silent.sendall(b"GET / HTTP/1.1\r\nHost:")
        silent.settimeout(5)
        with suppress(ConnectionResetError):
            assert silent.recv(1) == b""
    assert request(server, "/api/status")[0] == 200


def test_a_port_that_is_taken_is_refused_in_words(device: Device, server: WebServer) -> None:
    """Guards against a traceback, and against two servers that share a port and take each other's requests."""
    with pytest.raises(SettingsError, match=f"port {server.port} cannot be used"):
        WebServer(device, port=server.port)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{}",
        "127.0.0.1",
        "127.0.0.1:1",
        "127.0.0.1.evil.example:{}",
        "0.0.0.0:{}",
        "",
        None,
    ],
)
def test_another_host_name_is_refused(server: WebServer, host: str | None) -> None:
    """Guards against DNS rebinding: a foreign name that leads here makes a foreign page one of ours to the browser."""
    headers = {"Host": None if host is None else host.format(server.port)}
    assert request(server, "/api/status", headers=dict(headers))[0] in (400, 421)
    assert request(server, "/", method="GET", headers=dict(headers))[0] in (400, 421)


def test_two_host_names_are_refused(server: WebServer) -> None:
    """Guards against a check of one `Host` while something else believes the other."""
    own = f"127.0.0.1:{server.port}"
    answer = raw(server, f"GET / HTTP/1.1\r\nHost: {own}\r\nHost: evil.example\r\n\r\n".encode())
    assert answer.split()[1] in (b"400", b"421")


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1", "http://localhost:{}", "https://127.0.0.1:{}"]
)
def test_another_origin_is_refused(server: WebServer, origin: str) -> None:
    """Guards against a page elsewhere, or on another port of this machine, that learned the token."""
    origin = origin.format(server.port)
    assert request(server, "/api/status", headers={"Origin": origin})[0] == 403
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    status, headers, _ = request(server, "/api/status", method="OPTIONS", headers=dict(asked))
    assert status in (403, 405) and not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none"])
def test_what_a_browser_sends_for_another_page_is_refused(server: WebServer, site: str) -> None:
    """Guards against a browser's request that carries no `Origin`: an image, a script, a frame, a typed address."""
    for mode, dest in (("no-cors", "image"), ("no-cors", "script"), ("navigate", "iframe"), ("navigate", "document")):
        headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}
        assert request(server, "/api/status", headers=dict(headers))[0] == 403
        assert request(server, "/page.js", method="GET", headers=dict(headers))[0] == 403
    assert (
        request(
            server,
            "/",
            method="GET",
            headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
        )[0]
        == 403
    )


def test_a_link_from_elsewhere_leads_to_the_page_which_alone_shows_nothing(server: WebServer, device: Device) -> None:
    """Guards against an address that cannot be opened from a file or a chat, and a page that holds what is private."""
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    status, _, body = request(server, "/", method="GET", token=None, headers=dict(followed))
    assert status == 200
    for private in (server.token, str(device.home), device.identity.name + " ·", "tapir"):
        assert private.encode() not in body


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_what_a_form_can_send_changes_nothing(server: WebServer, device: Device, kind: str) -> None:
    """Guards against a form on another site that leaves the federation or erases what was opened."""
    assert request(server, "/api/leave", b"{}", token=None, headers={"Content-Type": kind})[0] == 401
    assert request(server, "/api/leave", b"{}", headers={"Content-Type": kind})[0] == 415
    assert consented(device)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", PATHS)
def test_only_post_reaches_the_device(server: WebServer, device: Device, path: str, method: str) -> None:
    """Guards against an image whose address changes something."""
    status, headers, _ = request(server, f"/api/{path}", method=method)
    assert status == 405 and headers["allow"] == "POST"
    assert consented(device)


def test_web_sockets_are_not_spoken(server: WebServer) -> None:
    """Guards against a second way in: web sockets are not held by the same-origin policy."""
    lines = [
        "GET /api/search HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Connection: Upgrade", "Upgrade: websocket",
        "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", f"Authorization: Bearer {server.token}",
    ]  # fmt: skip
    assert raw(server, "\r\n".join([*lines, "", ""]).encode()).split()[1] == b"405"


def test_every_answer_forbids_what_the_page_does_not_need(server: WebServer) -> None:
    """Guards against one answer, an error above all, that may be framed, stored, sniffed or read by another site."""
    answers = [
        request(server, "/", method="GET"),
        request(server, "/page.js", method="GET"),
        request(server, "/nowhere", method="GET"),
        request(server, "/api/status"),
        request(server, "/api/status", token=None),
        request(server, "/api/search", b"no json"),
        request(server, "/", method="GET", headers={"Host": "evil.example"}),
    ]
    for _, headers, _ in answers:
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'") and "unsafe" not in policy
        for part in (
            "frame-ancestors 'none'",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
        ):
            assert part in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store" and headers["x-frame-options"] == "DENY"
        assert "server" not in headers and "set-cookie" not in headers


@pytest.mark.parametrize(
    "path",
    ["/../api.py", "/static/../../device.json", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/page.js/../../api.py",
     "/..%5c..%5cdevice.json", "/page.js%00.html", "/index.html", "/web.html"],
)  # fmt: skip
def test_paths_lead_to_no_file(server: WebServer, path: str) -> None:
    """Guards against a server of files that can be led out of its folder."""
    status, _, body = request(server, path, method="GET")
    assert status == 404 and b"root:" not in body and b"import" not in body


def test_bodies_end_somewhere(server: WebServer) -> None:
    """Guards against a request that fills the memory, said or unsaid in its header, and one that never ends."""
    assert request(server, "/api/search", b"x" * (LARGEST_BODY + 1))[0] == 413
    assert request(server, "/api/search", b"{}", headers={"Content-Length": "9" * 30})[0] in (400, 413)
    chunks = (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 4 + b"1\r\nx\r\n"  # one byte too many, and no end
    head = f"POST /api/search HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {server.token}\r\nTransfer-Encoding: chunked\r\n\r\n"
    began = time.monotonic()
    assert raw(server, head.encode() + chunks).split()[1] == b"413"
    assert time.monotonic() - began < 5  # for its size, not because it never ends
    assert request(server, "/api/search", b"[" * 60_000)[0] == 400
    assert request(server, "/" + "a" * 100_000, method="GET")[0] in (400, 404, 431)
    assert ask(server, "status")["passages"]


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b'{"query": 1}', b'{"query": "a", "k": 0}', b'{"query": "a", "surplus": 1}', b"\xff",
     b'{"query": "a", "mode": "regex"}', b'{"query": "a", "narrow": {"since": "x"}}', b'{"query": "' + b"a" * 3_000 + b'"}'],
)  # fmt: skip
def test_what_is_no_search_is_refused_in_words(server: WebServer, body: bytes) -> None:
    """Guards against a defect that answers bad input with a traceback, or with something that was not asked."""
    status, _, content = request(server, "/api/search", body)
    assert status == 400 and list(json.loads(content)) == ["error"]
    assert b"Traceback" not in content
