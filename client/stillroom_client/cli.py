"""`stillroom search`, `stillroom index` and `stillroom feedback`: what the owner of a device does with it.

Only typer is imported here; what a command needs is imported when it runs (`stillroom_shared.cli`).
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stillroom_client import encryption_cli
from stillroom_client.feedback_cli import erase, list_feedback, opened
from stillroom_client.index_cli import compact, doctor, tune, upgrade
from stillroom_client.options import AsJson, Home, print_json
from stillroom_client.serve_cli import mcp, serve


class SearchMode(StrEnum):
    """`stillroom_client.ranking.Mode`, for the command line, which must not wait for NumPy to print its help."""

    DENSE = "dense"
    BM25 = "bm25"
    HYBRID = "hybrid"


def register(app: typer.Typer) -> None:
    """Add the commands of the client room."""
    app.command()(search)
    index = typer.Typer(name="index", help="Make an index, add documents, see what it holds.", no_args_is_help=True)
    for command in (create, add, remove, status, tune, compact, upgrade, doctor):
        index.command()(command)
    encryption_cli.register(index)
    app.add_typer(index)
    feedback = typer.Typer(
        name="feedback",
        help="Which results you opened: kept on this device, and what it learns from.",
        no_args_is_help=True,
    )
    feedback.command()(opened)
    feedback.command("list")(list_feedback)
    feedback.command()(erase)
    app.add_typer(feedback)
    app.command()(budget)
    app.command()(serve)
    app.command()(mcp)
    encryption_cli.open_homes(app)


def search(
    query: Annotated[str, typer.Argument(help="What you look for, in your own words.")],
    home: Home,
    k: Annotated[int, typer.Option("-k", min=1, help="Results to show.")] = 10,
    mode: Annotated[
        SearchMode, typer.Option(help="What ranks: the meaning (dense), the words (bm25), or both.")
    ] = SearchMode.HYBRID,
    where: Annotated[
        str | None,
        typer.Option(metavar="FILTER", help="Only passages that fulfil it, such as \"owner in (zoo, 'city museum')\"."),
    ] = None,
    rerank: Annotated[
        bool, typer.Option("--rerank", help="Let the release's reranker read the best 20 again and order them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Search the documents of a device. Nothing leaves it."""
    from stillroom_client.device import Device
    from stillroom_client.rerank import USUAL
    from stillroom_shared.errors import DataError

    with Device.open(home, threads=(os.cpu_count() or 1) if rerank else 1) as device:
        if not device.store.count():
            raise DataError(
                f"the index is empty: add documents with `stillroom index add PATH... {_home_option(home)}`"
            )
        hits = device.search(query, k, mode=mode.value, where=where, rerank=USUAL if rerank else 0)
    from stillroom_client.show import highlights, hits_table, snippet

    if as_json:
        shown = [(hit, snippet(hit.text, query)) for hit in hits]
        print_json([dataclasses.asdict(h) | {"snippet": s, "highlights": highlights(s, query)} for h, s in shown])
        return
    if not hits:
        typer.echo(
            "no passage has a word of the query" + (" and fulfils the filter" if where else "")
            if mode is SearchMode.BM25
            else "no passage fulfils the filter"
        )
        return
    from rich.console import Console

    Console().print(hits_table(hits, query))


def create(
    home: Home,
    release: Annotated[Path, typer.Option(help="Folder of the release to search with.")],
    trust: Annotated[
        str | None, typer.Option(metavar="KEY", help="Public key that must have signed it, in hexadecimal.")
    ] = None,
    dimension: Annotated[
        int | None,
        typer.Option(
            min=1, help="Components of a vector that are stored and compared.  [default: all of the release's]"
        ),
    ] = None,
    encrypt: Annotated[
        bool, typer.Option("--encrypt", help="Encrypt all it will hold, by a passphrase or the system keyring.")
    ] = False,
    keyring: encryption_cli.Keyring = False,
    new_file: encryption_cli.NewFile = None,
) -> None:
    """Make an empty index that searches with a release."""
    from stillroom_client.device import Device
    from stillroom_client.matryoshka import remark

    if (keyring or new_file) and not encrypt:
        raise typer.BadParameter("a way to unlock is for an encrypted home: add --encrypt")
    protection = encryption_cli.new_protection(home, keyring=keyring, file=new_file) if encrypt else None
    with Device.create(home, release, trusted_key=trust, dimension=dimension, protection=protection) as device:
        typer.echo(f"{device.identity.name} is ready; it trusts key {device.identity.trusted_key}")
        opened = device.release
        if said := remark(device.store.dimension, opened.dimension, opened.matryoshka_dimensions):
            typer.echo(said, err=True)
    if trust is None:
        typer.echo("The release brought that key: compare it with the one its operator published.")
    typer.echo(f"Next: stillroom index add PATH... {_home_option(home)}")


def add(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Files or folders: text, Markdown, HTML, PDF, DOCX, e-mail (.eml), source code; BEIR .jsonl or .jsonl.gz."
        ),
    ],
    home: Home,
    owner: Annotated[str | None, typer.Option(help="Whose documents they are.  [default: the device's name]")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on: follow every change until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks at the files, with --watch.")] = 2.0,
    max_size: Annotated[float, typer.Option(min=0, help="Largest file to read, in MB; corpora have no limit.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Index documents: what changed is indexed again, what was deleted is removed, the rest costs nothing."""
    from stillroom_client.adding import Adding
    from stillroom_client.device import Device
    from stillroom_client.following import follow
    from stillroom_client.reading import Parser
    from stillroom_client.show_adding import AddingView

    with Device.open(home, threads=os.cpu_count() or 1) as device, Parser() as parser:
        view = AddingView(as_json=as_json)
        adding = Adding(
            device.catalog,
            paths,
            embed=device.embed,
            owner=owner or device.identity.name,
            parser=parser,
            limit=int(max_size * 1_000_000),
            report=view.report,
            checkpoint=device.checkpoint,
        )
        with view:
            done = adding.run()
            device.refresh_index()
        view.show(done, adding.news(done), device.store.count())
        if watch:
            view.say("following the files; Ctrl-C ends it")
            follow(adding, device, view, every=every)
    if done.failed and not watch:
        raise typer.Exit(1)


def remove(
    paths: Annotated[list[Path], typer.Argument(help="Documents, or folders of them, that no longer need to exist.")],
    home: Home,
) -> None:
    """Take documents out of the index. The files are not touched."""
    from stillroom_client.device import Device
    from stillroom_client.reading import path_id
    from stillroom_client.walking import is_below
    from stillroom_shared.errors import DataError

    with Device.open(home) as device:
        known, chosen = device.catalog.documents(), set()
        for given in paths:
            named = {path_id(given.absolute()), path_id(given.resolve())}
            found = {path for path in known for name in named if path == name or is_below(path, name)}
            if not found:
                raise DataError(f"{given} is not in this index: name a document or a folder that was added")
            chosen |= found
        passages = device.catalog.remove(sorted(chosen))
        device.refresh_index()
        typer.echo(f"{len(chosen):,} documents removed, {passages:,} passages: {device.store.count():,} left")


def status(home: Home, as_json: AsJson = False) -> None:
    """Show what a device holds, and verify its release."""
    from stillroom_client.device import Device

    with Device.open(home) as device:
        held = dataclasses.asdict(device.status())
        release, adapter = device.release, device.adapter
        held["release"] = release.id
        held["trusted_key"] = device.identity.trusted_key
        held["encryption"] = encryption_cli.ways_in(home)
        held["adapter_round"] = adapter.round if adapter else release.manifest.adapter_round
    if as_json:
        print_json(held)
        return
    from stillroom_client.show import plain

    owners = ", ".join(f"{plain(owner)} ({count:,})" for owner, count in list(held["owners"].items())[:8])
    more = f" and {len(held['owners']) - 8} more" if len(held["owners"]) > 8 else ""
    for label, value in {
        "device": held["name"],
        "passages": f"{held['passages']:,} of {held['dimension']} dimensions, generation {held['generation']}",
        "documents": ", ".join(f"{count:,} {kind}" for kind, count in held["documents"].items()) or "none",
        "owners": owners + more or "none",
        "index": _state(held["index"]),
        "words": _state(held["text_index"]),
        "release": f"{release.id[:16]}, every file and the signature hold",
        "signed by": held["trusted_key"],
        "adapter": f"of round {held['adapter_round']}" if held["adapter_round"] else "none yet",
        "feedback": f"{held['feedback']:,} opened results",
        "encryption": f"by {held['encryption']}" if held["encryption"] != "none" else "none",
    }.items():
        typer.echo(f"{label:10} {value}")


def budget(
    home: Home,
    limit: Annotated[
        str | None,
        typer.Option(metavar="EPSILON", help="Change what all rounds together may cost; `none` takes the limit away."),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(help="Delta of the limit and of what is shown.  [default: what stands, at first 1e-5]"),
    ] = None,
    recover: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Replay the coordinator's receipt after a loss or a restored backup."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what this device has spent, on what, and what is left; change the limit; recover the ledger."""
    from stillroom_client.budget import budget_report
    from stillroom_client.participation import Consent, set_limit
    from stillroom_client.recovery import recover as replay
    from stillroom_shared.errors import DataError

    if limit is not None or delta is not None:
        set_limit(home, limit if limit is not None else str(Consent.load(home).limit_epsilon or "none"), delta)
    if recover is not None:
        try:
            content = recover.read_bytes()
        except OSError as error:
            raise DataError(f"{recover} cannot be read ({error}): ask the operator for your receipt") from error
        done = replay(home, content)
        typer.echo(
            f"{done.witnessed} attempts of federation {done.federation!r} are on the receipt: {done.added} were missing and "
            "are charged now",
            err=True,
        )
        if done.salvaged is not None:
            typer.echo(
                f"the ledger was lost and begins again, with {done.salvaged} spends of the old one; replay the receipt of "
                "every federation that this device ever joined",
                err=True,
            )
    report = budget_report(home)
    if as_json:
        print_json(report.to_json())
        return
    from rich.console import Console

    from stillroom_client.show import budget_tables

    for table in budget_tables(report):
        Console().print(table)


def _state(state: str) -> str:
    return state if state == "current" else f"{state}; the next search builds it"


def _home_option(home: Path) -> str:
    return f"--home {shlex.quote(str(home))}"
