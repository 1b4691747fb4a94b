"""The server of the page: on 127.0.0.1 only, in a thread of its own, with a new token at each start."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
from contextlib import suppress
from importlib import resources
from pathlib import Path

import uvicorn

from stillroom_client.device import Device
from stillroom_client.web.api import Api
from stillroom_client.web.connection import Connection
from stillroom_client.web.desk import Desk
from stillroom_client.web.guard import Answer, Guard, guarded
from stillroom_shared.closing import Closing
from stillroom_shared.errors import SettingsError, StillroomError
from stillroom_shared.files import replace_file

ADDRESS_FILE = "web.html"
"""In the home, for its owner only, while the server runs: a page that leads to the address. A browser that is given the address
itself would show the token to every user of the machine, in the list of processes."""
_FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js", "/icon.svg": "icon.svg"}
_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_CONNECTIONS = 64
_log = logging.getLogger(__name__)


class WebServer(Closing):
    """Serves the page of an open device, which the caller closes after this. `port` 0 takes a free one.

    Raises:
        SettingsError: the port is taken.
    """

    def __init__(self, device: Device, *, port: int = 0) -> None:
        self._device = device
        self._desk = Desk()
        self._api = Api(device, self._desk)
        self._static = page_files()
        self._socket = _bound(port)
        self.port: int = self._socket.getsockname()[1]
        self.token = secrets.token_hex(32)
        self._guard = Guard(self.token, self.port)
        self._server = uvicorn.Server(
            uvicorn.Config(
                guarded(self._handle, self._guard),
                loop="asyncio",
                http=Connection,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=_CONNECTIONS,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=2,
            )
        )
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="stillroom-web", daemon=True
        )

    @property
    def url(self) -> str:
        """The address with the token, for the owner only. What follows `#` is never sent."""
        return f"http://127.0.0.1:{self.port}/#{self.token}"

    @property
    def address_file(self) -> Path:
        """See `ADDRESS_FILE`."""
        return self._device.home / ADDRESS_FILE

    def start(self) -> None:
        """Begin to serve; what the first search needs is loaded meanwhile."""
        replace_file(self.address_file, _leading_to(self.url))
        self._thread.start()
        self._desk.background(self._warm)

    def wait(self) -> None:
        """Until the server ends; Ctrl-C interrupts it."""
        while self._thread.is_alive():
            self._thread.join(0.5)

    def close(self) -> None:
        """Stop serving; what is being answered has two seconds to finish."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(5)
        self._desk.close()
        self._socket.close()
        with suppress(OSError):  # that of a server which was started later stays
            if self.token.encode() in self.address_file.read_bytes():
                self.address_file.unlink()

    async def _handle(self, method: str, path: str, body: bytes) -> Answer:
        if method == "POST":
            return await self._api.answer(path, body)
        return self._static.get(path) or Answer.error(404, f"there is no {path[:80]}")

    def _warm(self) -> None:
        try:
            if self._device.store.count():
                self._device.search("a")
        except StillroomError as error:  # the first search says it on the page
            _log.warning("%s", error)


def page_files() -> dict[str, Answer]:
    """The page's own files by path, in memory: no path that is asked for ever reaches the file system."""
    folder = resources.files("stillroom_client.web") / "static"
    return {
        path: Answer(200, (folder / name).read_bytes(), f"{_KINDS[name.rpartition('.')[2]]}; charset=utf-8")
        for path, name in _FILES.items()
    }


def _bound(port: int) -> socket.socket:
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(("127.0.0.1", port))
        found.listen(_CONNECTIONS)  # so that whoever comes between this and the first turn of the loop waits
    except (OSError, OverflowError) as error:
        found.close()
        raise SettingsError(f"port {port} cannot be used ({error}): name another one with --port, or none") from error
    return found


def _leading_to(url: str) -> bytes:
    return (
        '<!doctype html><meta charset="utf-8"><meta name="referrer" content="no-referrer"><title>Stillroom</title>'
        f'<meta http-equiv="refresh" content="0; url={url}"><p><a href="{url}">Your Stillroom page</a></p>\n'
    ).encode()
