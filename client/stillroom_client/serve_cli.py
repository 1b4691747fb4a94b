"""`stillroom serve`: the interfaces of a device that other programs and its owner's browser speak to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillroom_client.options import Home


def serve(
    home: Home,
    web: Annotated[bool, typer.Option("--web", help="Serve the web page, on 127.0.0.1, for you only.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 0,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in your browser.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print no address: web.html in the home leads there, for you only.")
    ] = False,
) -> None:
    """Serve the web page of a device, until Ctrl-C. Nothing leaves it."""
    if not web:
        raise typer.BadParameter("say what to serve: --web")
    serve_web(home, port=port, open_page=open_page, quiet=quiet)


def serve_web(home: Path, *, port: int, open_page: bool, quiet: bool) -> None:
    """`stillroom serve --web`."""
    import signal
    import webbrowser

    from stillroom_client.device import Device
    from stillroom_client.web import WebServer

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        with Device.open(home) as device, WebServer(device, port=port) as server:
            server.start()
            if quiet:
                typer.echo(f"serving {device.identity.name}; open {server.address_file}")
            else:
                typer.echo(f"{device.identity.name}: {server.url}")
                typer.echo("The address is the key: who has it sees your documents. Ctrl-C ends it.")
            if open_page:
                webbrowser.open(server.address_file.absolute().as_uri())
            server.wait()
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
