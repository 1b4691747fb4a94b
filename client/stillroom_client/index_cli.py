"""`stillroom index tune`, `compact`, `upgrade` and `doctor`: how vectors are indexed, with which release, and how well."""

from __future__ import annotations

import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stillroom_client.options import AsJson, Home, print_json


class KindName(StrEnum):
    """Kinds of vector index, as the command line names them."""

    AUTO = "auto"
    FLAT = "flat"
    HNSW = "hnsw"
    IVF = "ivf"
    PQ = "pq"
    SQ4 = "sq4"


def tune(
    home: Home,
    kind: Annotated[
        KindName | None,
        typer.Option(
            help="Flat reads every vector; hnsw, ivf and pq approximate; sq4 is half of flat; auto goes by size."
        ),
    ] = None,
    ef_search: Annotated[
        int | None, typer.Option(min=0, help="Near vectors that an hnsw search keeps; 0: by itself.")
    ] = None,
    nprobe: Annotated[
        int | None, typer.Option(min=0, help="Lists that an ivf or pq search reads; 0: by itself.")
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(min=0, help="Passages that pq and sq4 score again; 0: by itself.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose how vectors are indexed and how thoroughly they are searched; without options, show it.

    What is not named stays. Another kind is built at once; `stillroom index doctor` measures what it finds.
    """
    from stillroom_client.device import Device

    named = {"ef_search": ef_search, "nprobe": nprobe, "candidates": candidates}
    asked = {name: value or None for name, value in named.items() if value is not None}
    if kind is not None:
        asked["kind"] = kind.value  # type: ignore[assignment]
    with Device.open(home) as device:
        if asked:
            device.index_settings = type(device.index_settings).model_validate(
                device.index_settings.model_dump() | asked
            )
        settings, in_use = device.index_settings, device.index_in_use()
    shown = {"asked": settings.model_dump(), "in_use": in_use}
    if as_json:
        print_json(shown)
        return
    typer.echo("asked   " + ", ".join(f"{name} {value}" for name, value in shown["asked"].items() if value is not None))
    typer.echo("in use  " + ", ".join(f"{name} {value}" for name, value in in_use.items()))


def upgrade(
    release: Annotated[Path, typer.Argument(help="Folder of the release to search with from now on.")], home: Home
) -> None:
    """Search with another release; documents are embedded anew if need be, while the old one serves. Ctrl-C loses nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from stillroom_client.device import Device

    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Device.open(home, threads=os.cpu_count() or 1) as device,
        Progress(*columns, console=Console(stderr=True), transient=True) as bar,
    ):
        task = bar.add_task("embedding", total=None)
        done = device.upgrade(release, report=lambda some, of: bar.update(task, completed=some, total=of))
    again = f"{done.embedded:,} passages embedded anew" if done.passages else "its document tower is the same"
    typer.echo(f"searching with release {done.release[:16]}; {again}")


def compact(home: Home) -> None:
    """Build both indexes from nothing, without what was removed, and give space back to the disk."""
    from stillroom_client.device import Device

    with Device.open(home) as device:
        before, started = _size(device.store.path.parent), time.monotonic()
        device.compact()
        after = _size(device.store.path.parent)
        typer.echo(
            f"{device.store.count():,} passages, {before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB now, "
            f"in {time.monotonic() - started:.1f} s"
        )


def _size(folder: Path) -> int:
    names = ("store.sqlite3", "store.sqlite3-wal", "index.faiss", "index.tantivy")
    found = [path for name in names for path in ((folder / name), *(folder / name).rglob("*")) if path.is_file()]
    return sum(path.stat().st_size for path in found)


def doctor(
    home: Home,
    goal: Annotated[float, typer.Option(min=0, max=1, help="Recall@10 to hold, against exact search.")] = 0.97,
    as_json: AsJson = False,
) -> None:
    """Check an index: recall against exact search on your own queries, speed, size, integrity; say what to change."""
    from stillroom_client.device import Device
    from stillroom_client.doctor import examine
    from stillroom_client.show_doctor import report_lines, to_json

    with Device.open(home) as device:
        found = examine(device, goal=goal)
    if as_json:
        print_json(to_json(found))
    else:
        for line in report_lines(found):
            typer.echo(line)
    if not found.well:
        raise typer.Exit(1)
