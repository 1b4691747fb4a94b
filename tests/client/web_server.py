"""What tests of the web page need: a device with a few documents, one of them hostile, its server, and raw requests."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stillroom_client.adding import Adding
from stillroom_client.device import Device
from stillroom_client.reading import Parser
from stillroom_client.web import WebServer
from stillroom_shared.release import Release

ATTACK = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
"""HTML that a document brings along, in its text, its title and its name."""
TAPIRS = "\n\n".join(f"Tapirs eat leaves near river number {n}." for n in range(1, 13))
TEXTS = {
    "notes/tapirs.md": f"# Tapirs\n\n{TAPIRS}\n",
    "notes/zip.txt": "A zip file holds members. Open it and list its files.",
    "work/<img src=x onerror=hacked=1>.md": f"# {ATTACK}\n\nThe hostile passage says {ATTACK} and ends.\n",
    "work/array.py": "def array_of(numbers):\n    '''Make an array of numbers.'''\n    return list(numbers)\n",
}


def device_with_documents(folder: Path, release: Release) -> Device:
    """An open device called "home" with the documents of `TEXTS`."""
    texts = folder / "texts"
    for name, text in TEXTS.items():
        (texts / name).parent.mkdir(parents=True, exist_ok=True)
        (texts / name).write_text(text, encoding="utf-8")
    device = Device.create(folder / "home", release, link=True)
    with Parser() as parser:
        Adding(device.catalog, [texts], embed=device.embed, owner="me", parser=parser, limit=10**6).run()
    return device


@contextmanager
def served(device: Device) -> Iterator[WebServer]:
    """The running server of a device; the device stays open."""
    with WebServer(device) as server:
        server.start()
        yield server


def request(
    server: WebServer,
    path: str,
    body: Any = None,
    *,
    method: str = "POST",
    token: str | None = "right",
    headers: dict[str, str | None] | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body. As a program sends it, but for `headers`; None takes one away."""
    content = body if isinstance(body, bytes) else b"" if method == "GET" else json.dumps(body or {}).encode()
    sent: dict[str, str | None] = {"Host": f"127.0.0.1:{server.port}"}
    if method == "POST":
        sent |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
    if token is not None:
        sent["Authorization"] = f"Bearer {server.token if token == 'right' else token}"
    sent |= headers or {}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in sent.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(content or None)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def ask(server: WebServer, path: str, body: Any = None) -> Any:
    """What the interface answers to its owner; an assertion fails unless that is 200."""
    status, _, content = request(server, f"/api/{path}", body)
    assert status == 200, (path, status, content)
    return json.loads(content)


def raw(server: WebServer, content: bytes) -> bytes:
    """What comes back for these bytes, up to the end of the connection or 64 KB."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(content)
        return connection.recv(65_536)
