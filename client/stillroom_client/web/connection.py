"""A connection to the page, closed at once when it is another user's, and soon when it says nothing.

Without the token nobody is answered (`guard.py`), but who holds all connections open keeps the owner out. Linux says whose the
other end of a connection on loopback is (`uid` in `/proc/net/tcp`, proc_pid_net(5)); where nothing says so, it is let in.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 10.0
"""In which the first request of a connection has to begin."""
_TABLE = Path("/proc/net/tcp")
_ROOT = 0  # forwards of root (WSL, containers), and sockets whose process has ended


class Connection(H11Protocol):
    """As uvicorn has it, besides."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Look who it is."""
        super().connection_made(transport)
        if _user(transport.get_extra_info("peername"), transport.get_extra_info("sockname")) in (
            None,
            _ROOT,
            os.geteuid(),
        ):
            self.loop.call_later(SECONDS, self._give_up)
        else:
            transport.abort()

    def _give_up(self) -> None:
        if self.cycle is None:  # no request has come whole so far
            self.transport.abort()


def _user(other: Any, own: Any) -> int | None:
    """The user of the socket `other` that is connected to `own`, both (IPv4 address, port); None where that is not known."""
    try:
        wanted = [_written(*other[:2]), _written(*own[:2])]
        for line in _TABLE.read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1:3] == wanted:
                return int(fields[7])
    except (OSError, ValueError, TypeError, IndexError):
        return None
    return None


def _written(address: str, port: int) -> str:
    """As the table has it.

    >>> _written("127.0.0.1", 8000) in ("0100007F:1F40", "7F000001:1F40")
    True
    """
    return f"{int.from_bytes(socket.inet_aton(address), sys.byteorder):08X}:{port:04X}"
