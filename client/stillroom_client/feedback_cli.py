"""`stillroom feedback`: which results the owner of a device opened; kept there, listed and erased at will."""

from __future__ import annotations

from typing import Annotated

import typer

from stillroom_client.options import AsJson, Home, print_json


def opened(
    query: Annotated[str, typer.Argument(help="What you searched for.")],
    passage_id: Annotated[str, typer.Argument(help="The passage you opened, as `search` shows it.")],
    home: Home,
) -> None:
    """Keep that you opened a result; the device learns from it in rounds it takes part in."""
    from stillroom_client.device import Device

    with Device.open(home) as device:
        device.record([(query, passage_id)])
        typer.echo(f"kept on this device: {len(device.feedback()):,} opened results")


def list_feedback(home: Home, as_json: AsJson = False) -> None:
    """Show which results you opened, latest last."""
    from stillroom_client.device import Device

    with Device.open(home) as device:
        pairs = device.feedback()
    if as_json:
        print_json([pair._asdict() for pair in pairs])
        return
    from stillroom_client.show import plain

    for pair in pairs:
        typer.echo(f"{plain(pair.query)}  ->  {plain(pair.passage_id)}")
    if not pairs:
        typer.echo("nothing was opened yet")


def erase(home: Home) -> None:
    """Forget which results you opened, on the disk too."""
    from stillroom_client.device import Device

    with Device.open(home) as device:
        typer.echo(f"{device.erase_feedback():,} opened results erased")
