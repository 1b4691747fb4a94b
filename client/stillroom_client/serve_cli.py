"""`stillroom serve`: answer other programs of this machine, or its owner's browser, until a signal says to stop.
`stillroom mcp`: answer an assistant.

What `serve` runs is a list of services, each started, then all stopped in the opposite order. Only typer is imported here.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from stillroom_client.options import Home

if TYPE_CHECKING:
    from stillroom_client.device import Device

GRACE = 5.0  # seconds for what has begun
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Service(Protocol):
    """Something that runs beside others in one event loop."""

    async def start(self) -> None:
        """Begin to answer; what it raises ends the command."""

    async def stop(self, grace: float) -> None:
        """Answer what has begun within `grace` seconds, then give everything back."""


def serve(
    home: Home,
    web: Annotated[
        bool, typer.Option("--web", help="Serve the web page, on 127.0.0.1, for you only; with --grpc, both.")
    ] = False,
    grpc: Annotated[bool, typer.Option("--grpc", help="Serve programs; what is done without --web.")] = False,
    tcp: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="gRPC on loopback, with TLS and a token, not on the home's socket."),
    ] = "",
    workers: Annotated[int, typer.Option(min=1, max=64, help="gRPC searches that run at the same time.")] = 2,
    cache: Annotated[
        bool, typer.Option(help="Answer a query that was asked before from memory, until documents change.")
    ] = True,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the web page; 0 takes a free one.")] = 0,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in your browser.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print no address of the page: web.html in the home leads there.")
    ] = False,
) -> None:
    """Serve a device to other programs of yours over gRPC, or to you as a web page; until Ctrl-C. Nothing leaves it."""
    from stillroom_client.cache import CacheLimits
    from stillroom_client.device import Device

    with Device.open(home, cache=CacheLimits() if cache else CacheLimits(entries=0)) as device:
        served: list[_Grpc | _Page] = []
        if grpc or tcp or not web:
            served.append(_Grpc(device, tcp, workers))
        if web:
            served.append(_Page(device, port, open_page=open_page, quiet=quiet))

        def ready() -> None:
            for one in served:
                for line in one.said():
                    typer.echo(line)

        asyncio.run(run_until_signal(served, ready))


class _Grpc:
    """Programs, as a service of `run_until_signal`."""

    def __init__(self, device: Device, tcp: str, workers: int) -> None:
        from stillroom_client.serving.server import GrpcServer
        from stillroom_client.serving.work import Limits

        self._device, self._tcp = device, tcp
        self._server = GrpcServer(device, tcp=tcp, limits=Limits(workers=workers))
        self.start, self.stop = self._server.start, self._server.stop

    def said(self) -> list[str]:
        """What the owner is told once it answers."""
        lines = [f"{self._device.identity.name} is served on {self._server.address}; Ctrl-C ends it"]
        return lines + ([f"token and certificate: {self._device.home / 'serving'}"] if self._tcp else [])


class _Page:
    """The web page, as a service of `run_until_signal`."""

    def __init__(self, device: Device, port: int, *, open_page: bool, quiet: bool) -> None:
        from stillroom_client.web import WebServer

        self._device, self._quiet, self._open = device, quiet, open_page
        self._server = WebServer(device, port=port)

    async def start(self) -> None:
        self._server.start()
        if self._open:
            import webbrowser

            webbrowser.open(self._server.address_file.absolute().as_uri())

    async def stop(self, grace: float) -> None:
        await asyncio.to_thread(self._server.close)

    def said(self) -> list[str]:
        """What the owner is told once it answers."""
        if self._quiet:
            return [f"serving {self._device.identity.name}; open {self._server.address_file}"]
        return [
            f"{self._device.identity.name}: {self._server.url}",
            "The address is the key: who has it sees your documents. Ctrl-C ends it.",
        ]


def mcp(home: Home) -> None:
    """Let an assistant search a device: a server of the Model Context Protocol on standard input and output."""
    from stillroom_client.device import Device
    from stillroom_client.mcp_server import run

    with Device.open(home) as device:
        run(device)


async def run_until_signal(services: Sequence[Service], ready: Callable[[], None]) -> None:
    """Start all, call `ready`, wait for SIGINT or SIGTERM, stop all; a second signal does not wait for them."""
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    started: list[Service] = []
    try:
        for service in services:
            await service.start()
            started.append(service)
        for number in _SIGNALS:
            loop.add_signal_handler(number, stopping.set)
        ready()
        await stopping.wait()
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
        for service in reversed(started):
            await service.stop(GRACE)
