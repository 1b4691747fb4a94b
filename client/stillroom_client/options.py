"""What many commands of the client room have in common: options, and how they print JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Home = Annotated[Path, typer.Option(help="Home of the device.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(value: Any) -> None:
    """For `--json`."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=1))
