"""`stillroom demo` and `stillroom report`: a whole federation in one process, and the page about it.

Only typer is imported here; what a command needs is imported when it runs (`stillroom_shared.cli`).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from stillroom_shared.errors import SettingsError


def register(app: typer.Typer) -> None:
    """Add the commands of the simulations room."""
    app.command()(demo)
    app.command()(report)
    group = typer.Typer(name="audit", help="Check what was spent and what leaked.", no_args_is_help=True)
    group.command()(ledger)
    group.command()(canaries)
    group.command()(receipt)
    app.add_typer(group)
    measured = typer.Typer(name="bench", help="Measure the figures of record.", no_args_is_help=True)
    measured.command("demo")(bench_demo)
    measured.command("privacy")(bench_privacy)
    app.add_typer(measured)


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results; the same one again resumes.")] = Path("runs/demo"),
    scale: Annotated[str | None, typer.Option(help="How much text: small or full.  [default: small]")] = None,
    data: Annotated[str | None, typer.Option(help="A BEIR-layout folder in place of the docstrings here.")] = None,
    seed: Annotated[str | None, typer.Option(help="Seed of the simulated population and its rounds.")] = None,
    settings: Annotated[
        Path | None, typer.Option(envvar="STILLROOM_SETTINGS", help="A TOML file; docs/settings.md lists its keys.")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
) -> None:
    """Distil a release, improve it on simulated devices under differential privacy, and report on every step."""
    _only_our_own_progress()
    from rich.console import Console

    from stillroom_shared.settings import load_settings
    from stillroom_simulations.demo import run_demo

    named = {"corpus.scale": scale, "corpus.data": data, "seed": seed}
    overrides = {key: value for key, value in named.items() if value is not None} | _pairs(changes or [])
    run_demo(load_settings(settings, overrides), out=out, console=Console(highlight=False))


def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `stillroom demo --out` wrote.")]) -> None:
    """Write report.html again from results.json."""
    from stillroom_simulations.report import rewrite_report

    typer.echo(rewrite_report(folder))


def ledger(
    path: Annotated[Path, typer.Argument(help="A coordinator's home, or its ledger with the plan beside it.")],
    key: Annotated[str | None, typer.Option(help="Public key that must have signed every row, in hexadecimal.")] = None,
    head: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="Hash of the last row that a counterpart has seen of this ledger."),
    ] = None,
) -> None:
    """Verify every row of a ledger and print its privacy statement; exit status 1 on any break, naming the row."""
    from stillroom_simulations.audit import audit_ledger

    found = audit_ledger(path, public_key=key, head=head)
    trust = "signed by the key you named" if key else "consistent with itself; name --key to prove whose they are"
    whole = "the head you named is among them" if head else "name --head to prove that none is cut off at the end"
    typer.echo(f"{found.rows} rows verified, {trust}; {whole}\nhead {found.head}")
    typer.echo(f"{found.adapters} published adapters state what its events cost")
    for device, reason in found.refused.items():
        typer.echo(f"refused: device {device!r}, whose updates count as zero: {reason}")
    typer.echo(f"\n{found.statement.paragraph()}")


def receipt(
    home: Annotated[Path, typer.Argument(help="A coordinator's home.")],
    device: Annotated[str, typer.Option(help="Name under which the device is enrolled.")],
    out: Annotated[Path, typer.Option(help="The file to write; hand it to the device's owner only.")],
) -> None:
    """Write what the coordinator saw a device answer, signed: the device replays it with `stillroom budget --recover`."""
    from stillroom_shared.files import replace_file
    from stillroom_simulations.audit import export_receipt

    made = export_receipt(home, device)
    replace_file(out, made.model_dump_json(indent=1).encode())
    typer.echo(f"{out}: {len(made.charges)} attempts of device {device!r}, for `stillroom budget --recover` there")


def canaries(
    mechanism: Annotated[str, typer.Option(help="Which to audit: central, correlated, local or none.")] = "central",
    epsilon: Annotated[float, typer.Option(help="What it is calibrated to, against readers of releases.")] = 1.0,
    delta: Annotated[float, typer.Option(help="Of the guarantee; below 1 / canaries.")] = 1e-5,
    canaries: Annotated[int, typer.Option(help="Canary devices, or queries; more give a tighter bound.")] = 1_000,
    rounds: Annotated[int, typer.Option(help="Rounds to run.")] = 10,
    sampling_rate: Annotated[float, typer.Option(help="Probability with which a canary joins a round or step.")] = 0.1,
    seed: Annotated[int | None, typer.Option(help="Fixes all randomness.  [default: none is fixed]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Attack simulated rounds: a lower bound beside what is accounted for; exit status 1 when they contradict."""
    import json

    from rich.console import Console

    from stillroom_shared.progress import Progress
    from stillroom_simulations.canary_audit import STAGES, CanaryAuditSettings, audit_canaries

    settings = CanaryAuditSettings.checked(
        mechanism=mechanism, epsilon=epsilon, delta=delta, canaries=canaries, rounds=rounds,
        sampling_rate=sampling_rate, seed=seed,
    )  # fmt: skip
    progress = Progress(STAGES, console=Console(stderr=True, highlight=False))
    done = audit_canaries(settings, progress=progress)
    typer.echo(json.dumps(done.to_json(), indent=2) if as_json else done.text())
    if done.broken:
        raise typer.Exit(1)


def _only_our_own_progress() -> None:
    """Keep the bars and the chatter of libraries off the terminal; has to come before they are imported."""
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }.items():
        os.environ.setdefault(name, value)
    # onnxruntime.quantization sets the root logger to INFO when it is imported; the first to set it wins.
    logging.basicConfig(level=logging.WARNING)


def bench_demo(
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated.")] = "0,1,2",
    folder: Annotated[Path, typer.Option(help="Where the runs go; the same folder again resumes.")] = Path(
        "runs/bench"
    ),
    out: Annotated[Path, typer.Option(help="The benchmark file to write.")] = Path("benchmarks/results/demo.json"),
    scale: Annotated[str, typer.Option(help="How much text: small or full.")] = "full",
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
) -> None:
    """Run the demo for several seeds, fine-tune centrally beside it, and write the figures with their intervals."""
    _only_our_own_progress()
    from rich.console import Console

    from stillroom_shared.settings import load_settings
    from stillroom_simulations.bench import bench_demo as measure

    settings = load_settings(None, {"corpus.scale": scale} | _pairs(changes or []))
    measure(settings, seeds=_numbers(seeds), folder=folder, out=out, console=Console(highlight=False))


def bench_privacy(
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated.")] = "0,1,2",
    data: Annotated[
        list[Path] | None, typer.Option(help="A BEIR-layout folder to measure on too; may be repeated.")
    ] = None,
    families: Annotated[
        str, typer.Option(help="Which to measure, comma-separated.")
    ] = "central,correlated,turns,local",
    folder: Annotated[Path, typer.Option(help="Where the runs go; that of `bench demo` spares distilling.")] = Path(
        "runs/bench"
    ),
    out: Annotated[Path, typer.Option(help="The benchmark file to write.")] = Path("benchmarks/results/privacy.json"),
    chart: Annotated[Path, typer.Option(help="The picture to draw.")] = Path("docs/images/privacy.svg"),
    scale: Annotated[str, typer.Option(help="How much text: small or full.")] = "full",
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
) -> None:
    """Measure what each mechanism costs in quality at each epsilon, and draw it; the same folder again resumes."""
    _only_our_own_progress()
    from rich.console import Console

    from stillroom_shared.settings import load_settings
    from stillroom_simulations.utility import bench_privacy as measure

    settings = load_settings(None, {"corpus.scale": scale} | _pairs(changes or []))
    measure(
        settings, seeds=_numbers(seeds), data=data or [], families=families.split(","), folder=folder, out=out, chart=chart,
        console=Console(highlight=False),
    )  # fmt: skip


def _numbers(seeds: str) -> list[int]:
    try:
        return [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise SettingsError(f"--seeds {seeds!r} is no list of whole numbers: write it as 0,1,2") from None


def _pairs(changes: list[str]) -> dict[str, str]:
    """The `--set` options as a mapping.

    >>> _pairs(["rounds.rounds=3", "rounds.delta=none"])
    {'rounds.rounds': '3', 'rounds.delta': 'none'}
    """
    for change in changes:
        if "=" not in change:
            raise SettingsError(f"--set {change!r} sets nothing: write it as KEY=VALUE, e.g. --set rounds.rounds=20")
    return {key.strip(): value.strip() for key, _, value in (change.partition("=") for change in changes)}
