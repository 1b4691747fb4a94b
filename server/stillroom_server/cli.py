"""`stillroom release` and `stillroom plan`: what an operator asks before shipping a release, and before spending.

Only typer is imported here; what a command needs is imported when it runs (`stillroom_shared.cli`).
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillroom_server.distillery import cli as distillery

if TYPE_CHECKING:
    from stillroom_shared.release import Release


def register(app: typer.Typer) -> None:
    """Add the commands of the server room."""
    group = typer.Typer(name="release", help="Make, verify and show releases.", no_args_is_help=True)
    group.command()(create)
    group.command()(verify)
    group.command()(operators)
    app.add_typer(group)
    planning = typer.Typer(name="plan", help="Reckon before anything is run.", no_args_is_help=True)
    planning.command()(tuning)
    # Typer drops the name of a group's only command, unless the group has a callback.
    planning.callback()(lambda: None)
    app.add_typer(planning)
    distillery.register(app)


def create(
    model: Annotated[
        Path,
        typer.Argument(help="The query tower: model/ of `stillroom distill run`, or a Sentence Transformers folder."),
    ],
    out: Annotated[Path, typer.Argument(help="Folder of the release, which must not exist.")],
    key: Annotated[
        Path, typer.Option(help="File of the operator's key, made on first use; devices take releases of one key only.")
    ] = Path("operator.key"),
    documents: Annotated[
        str | None, typer.Option(help="Folder or name of the document tower.  [default: what the recipe says]")
    ] = None,
    reranker: Annotated[Path | None, typer.Option(help="Folder of a cross-encoder that the release brings.")] = None,
    settings: Annotated[
        Path | None, typer.Option(envvar="STILLROOM_SETTINGS", help="A TOML file; docs/settings.md lists its keys.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: adapter.rank, adapter.targets."),
    ] = None,
) -> None:
    """Make a signed release of a distilled query tower, with its document tower and the sources of its text."""
    from stillroom_shared.asked import only_our_own_progress, pairs

    only_our_own_progress()
    from stillroom_server.distillery.releasing import create_release
    from stillroom_shared.settings import load_settings
    from stillroom_shared.signing import SigningKey

    adapter, fresh = load_settings(settings, pairs(changes or [])).adapter, not key.exists()
    operator = SigningKey.load_or_generate(key)
    if fresh:
        typer.echo(f"{key} is new: keep it, and keep it secret; devices of this release take no other key's")
    release = create_release(model, out, key=operator, documents=documents, reranker=reranker, adapter=adapter)
    typer.echo("\n".join(_shown(release)))


def _shown(release: Release) -> list[str]:
    """What it is, and what it learned from."""
    manifest = release.manifest
    return [
        f"release {release.id[:16]} in {release.folder}, signed by {manifest.public_key[:16]}",
        f"{manifest.dimension} values; queries of {manifest.query_tokens} tokens, passages of {manifest.document_tokens}"
        + ("; with a reranker" if release.has_reranker else ""),
        *_learned_from(release),
        f"stillroom index create --home DIR --release {release.folder}   makes a device that searches with it",
    ]


def _learned_from(release: Release) -> list[str]:
    sources = release.sources
    if sources is None:
        return ["what public text it learned from is not recorded"]
    return [
        "learned from:",
        *(f"  {one['name']}: {one['facts'].get('licence', 'no licence stated')}" for one in sources),
    ]


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of the release.")],
    key: Annotated[str | None, typer.Option(help="Public key that must have signed it, in hexadecimal.")] = None,
) -> None:
    """Check every hash and the signature, and print what the release says about itself."""
    from stillroom_shared.release import open_release

    release = open_release(folder, trusted_key=key)
    typer.echo(release.manifest.model_dump_json(indent=2, exclude={"files"}))
    typer.echo("\n".join(_learned_from(release)))
    typer.echo("every file and the signature hold")


class Target(StrEnum):
    """Where a tower may go on from a release."""

    onnxruntime = "onnxruntime"
    tensorrt = "tensorrt"
    coreml = "coreml"
    executorch = "executorch"


def operators(
    folder: Annotated[Path, typer.Argument(help="Folder of a release or a model, or an ONNX file.")],
    target: Annotated[Target, typer.Option(help="Where it shall run.")] = Target.onnxruntime,
) -> None:
    """Check that a target has every operator of the exported towers; exit status 1 when one is missing."""
    from stillroom_server.distillery.compress.targets import SOURCES, check_operators, graphs

    found = [check_operators(path, target.value) for path in graphs(folder, target.value)]
    typer.echo("\n".join(one.text() for one in found))
    typer.echo(f"compared with {SOURCES[target.value]}")
    if any(one.missing for one in found):
        raise typer.Exit(1)


def tuning(
    devices: Annotated[int, typer.Option(help="Enrolled devices.")],
    rounds: Annotated[int, typer.Option(help="Rounds of one trial.")] = 15,
    sampling_rate: Annotated[float, typer.Option(help="Chance of a device to be in a round's cohort.")] = 0.2,
    noise_multiplier: Annotated[float, typer.Option(help="Noise standard deviation / sensitivity of a round.")] = 2.0,
    evaluation_noise: Annotated[float, typer.Option(help="The same of the evaluation that scores a trial.")] = 2.0,
    delta: Annotated[float | None, typer.Option(help="Of the guarantee.  [default: 1 / (10 x devices)]")] = None,
    trials: Annotated[str, typer.Option(help="Mean numbers of trials, comma-separated.")] = "2,5,10,20",
    retries: Annotated[int, typer.Option(help="Interruptions within a trial that are paid for beforehand.")] = 1,
    target_epsilon: Annotated[
        float | None, typer.Option(help="Also print the least noise at which each whole search meets it.")
    ] = None,
) -> None:
    """Print what a search over settings costs, by each way of counting, before anything is run."""
    import logging

    from stillroom_server.search_costs import plan_tuning

    logging.disable(logging.WARNING)  # orders at which a Renyi series does not converge are left out, and that is all
    typer.echo(
        plan_tuning(
            devices=devices, rounds=rounds, sampling_rate=sampling_rate, noise_multiplier=noise_multiplier,
            evaluation_noise=evaluation_noise, delta=delta, trials=trials, retries=retries,
            target_epsilon=target_epsilon,
        )
    )  # fmt: skip
