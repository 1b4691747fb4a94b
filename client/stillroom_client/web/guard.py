"""Who gets in: whoever holds the token, from the page itself or from a program, on this machine. Everybody else is refused
before a byte of the device is read.

The port of 127.0.0.1 can be reached by every user of this machine and by every page in the owner's browser. What keeps each
of them out:

| who tries | is stopped by |
|---|---|
| another user of this machine, a program | the token: 256 random bits, new at each start, compared in constant time |
| the same by holding every connection open | the user of the other end, where the system says it (`connection.py`) |
| a page of another site: form, image, script, fetch | the token; Origin and Sec-Fetch-Site besides |
| the same by DNS rebinding | `Host`, which has to be one of our own names with our port |
| a page that frames ours, to lure clicks | `frame-ancestors 'none'` |
| a document that holds HTML or script | text is inserted as text; no inline script, no HTML from strings (Trusted Types) |
| who reads the browser's history, or a log | the token stands in the fragment, never sent, soon removed; queries in bodies |

The token is a header, which no browser adds by itself; another site's page that adds it has to ask first (CORS) and is refused.
There is no cookie. A cookie would be sent by the browser on its own (and to every port of 127.0.0.1), so it would need a second
defence against forged requests; a header that our script sets from `sessionStorage` needs none. `sessionStorage` belongs to one
tab and ends with it; the token ends with the server. GET gives the page's own files, which hold nothing of the owner's, so
they need no token; whatever reads or changes the device is a POST of JSON.

Not covered: who takes a fixed port (`--port`) while the page is not served, and leaves a service worker in the owner's browser
(a free port, the default, is another one each time); programs that run as the owner, the administrator, and extensions that the
browser lets into every page.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LARGEST_BODY = 64 * 1024
"""Bytes of a request. The longest that the page sends is a query with a filter."""
_BODY_SECONDS = 10.0

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": _POLICY,
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True)
class Answer:
    """What goes back: a status and a body of one type."""

    status: int
    body: bytes
    kind: str = "application/json"
    allow: str | None = None

    @classmethod
    def of(cls, value: Any, status: int = 200) -> Answer:
        """As JSON. ASCII only, so that half a surrogate pair in a document cannot break it."""
        return cls(status, json.dumps(value, separators=(",", ":")).encode())

    @classmethod
    def error(cls, status: int, message: str, **more: Any) -> Answer:
        """The form that every error has."""
        return cls.of({"error": message} | more, status)


@dataclass(frozen=True)
class Guard:
    """What is asked of every request. `token` is the secret in hexadecimal; `port` that of the server."""

    token: str
    port: int

    @property
    def hosts(self) -> frozenset[str]:
        """The only names under which this server is spoken to."""
        return frozenset(f"{name}:{self.port}" for name in ("127.0.0.1", "localhost", "[::1]"))

    def refusal(self, method: str, path: str, headers: Mapping[str, str]) -> Answer | None:
        """Why a request is refused; None when it may pass. `headers` in lower case, repeated ones joined by a comma."""
        if (host := headers.get("host", "")) not in self.hosts:
            return Answer.error(421, f"this server is not {host[:80]!r}: open the address that it printed")
        if not self._from_here(method, path, headers, host):
            return Answer.error(403, "another site or page sent this request: only the page of this server may")
        if method == "GET" and not path.startswith("/api/"):
            return None
        if method != "POST" or not path.startswith("/api/"):
            allowed = "POST" if path.startswith("/api/") else "GET"
            refused = Answer.error(405, f"{method[:20]} is not answered here: {allowed} is")
            return Answer(refused.status, refused.body, allow=allowed)
        if not self._knows(headers.get("authorization", "")):
            return Answer.error(
                401, "the token is missing or wrong: open the address that `stillroom serve --web` printed"
            )
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return Answer.error(415, "the body has to be application/json")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 12 or int(length) > LARGEST_BODY:
            return _too_large()
        return None

    def _from_here(self, method: str, path: str, headers: Mapping[str, str], host: str) -> bool:
        """Browsers say where a request comes from, in headers that no page can set; programs say nothing."""
        if (origin := headers.get("origin")) is not None and origin != f"http://{host}":
            return False
        site = headers.get("sec-fetch-site", "none")
        followed_link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
        if (method, path) == ("GET", "/") and followed_link:
            return True  # from wherever the address was written down: the page alone shows nothing
        return site == "same-origin" or (site == "none" and "sec-fetch-mode" not in headers)

    def _knows(self, authorization: str) -> bool:
        return hmac.compare_digest(authorization.encode(errors="replace"), f"Bearer {self.token}".encode())


Handler = Callable[[str, str, bytes], Awaitable[Answer]]
"""From method, path and body to the answer."""


def guarded(handler: Handler, guard: Guard) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The ASGI application: every request passes the guard first, and every answer has `HEADERS`."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # neither web sockets nor anything else is spoken here
            raise RuntimeError(f"{scope['type']} is not answered")
        answer = guard.refusal(scope["method"], scope["path"], _headers(scope))
        if answer is None:
            body = await _body(receive)
            answer = _too_large() if body is None else await handler(scope["method"], scope["path"], body)
        await _send(answer, send)

    return app


def _headers(scope: Scope) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in scope["headers"]:
        name, text = key.decode("latin-1").lower(), value.decode("latin-1")
        found[name] = f"{found[name]},{text}" if name in found else text
    return found


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None when it is too long or does not come."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > LARGEST_BODY:
                    return None
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        return None


def _too_large() -> Answer:
    return Answer.error(
        413, f"a request has at most {LARGEST_BODY:,} bytes, and comes within {_BODY_SECONDS:.0f} seconds"
    )


async def _send(answer: Answer, send: Send) -> None:
    headers = {**HEADERS, "content-type": answer.kind, "content-length": str(len(answer.body))}
    if answer.allow:
        headers["allow"] = answer.allow
    if answer.status == 413:
        headers["connection"] = "close"  # what is still on its way is not read
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": raw})
    await send({"type": "http.response.body", "body": answer.body})
