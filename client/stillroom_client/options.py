"""Options that many commands of the client room have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Home = Annotated[Path, typer.Option(help="Home of the device.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
