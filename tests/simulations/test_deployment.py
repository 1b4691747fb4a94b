"""The same app objects on Flower's own deployment engine and on the in-process grid.

One SuperLink and two SuperNodes serve both tests. They take about ten seconds to start on two idle cores, and each
exchange six or more: SuperNode and ServerApp poll every three seconds, and each message starts a ClientApp process, which
imports what the app needs. Timeouts are wide, for machines that do other work meanwhile.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from stillroom_shared.adapter import Adapter
from stillroom_shared.corpus import Passage
from stillroom_shared.ledger import Ledger
from stillroom_shared.randomness import Randomness
from stillroom_simulations.deployment import Deployment, loopback_deployment
from stillroom_simulations.engine import Faults, InProcessGrid, run_server_app

if TYPE_CHECKING:
    from stillroom_server.plan import Plan
    from stillroom_shared.release import Release

_CONTRACT = Path(__file__).parent / "grid_contract"
_APP = Path(__file__).parents[2] / "docker" / "app"
_NAMES = ("ant", "zebra")
_WORDS = ["open", "close", "read", "write", "zip", "tar", "file", "list", "search", "index", "tapir", "river", "matrix"]


@dataclass(frozen=True)
class _Running:
    """A deployment whose nodes live in `homes`; `devices` are copies of these from before it started."""

    deployment: Deployment
    homes: tuple[Path, ...]
    devices: tuple[Path, ...]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_release: Release) -> Iterator[_Running]:
    folder = tmp_path_factory.mktemp("deployment")
    untouched = tuple(_make_device(folder / "before" / name, tiny_release, seed) for seed, name in enumerate(_NAMES))
    homes = tuple(_copy(home, folder / "devices") for home in untouched)
    nodes = [{"device-home": str(home)} for home in homes]
    with loopback_deployment(nodes=nodes, folder=folder / "processes") as deployment:
        yield _Running(deployment, homes, untouched)


def test_the_in_process_grid_behaves_like_flowers(running: _Running, tmp_path: Path) -> None:
    """Every other test of a round runs on our grid; where it is kinder than Flower's, a round breaks when deployed."""
    report = tmp_path / "report.json"
    running.deployment.run(_CONTRACT, {"report": str(report)}, timeout=300.0)
    theirs: dict[str, Any] = json.loads(report.read_text())

    apps = _contract_apps()
    homes = [seen["home"] for seen in theirs["seen"]]
    nodes = {7_000: {"device-home": homes[1]}, 8_000: {"device-home": homes[0]}}
    grid = InProcessGrid(client_app=apps.client_app, nodes=nodes, run_config={"report": str(report)})
    run_server_app(apps.server_app, grid)
    ours: dict[str, Any] = json.loads(report.read_text())

    # The one thing we do otherwise, on purpose. When Flower stops to quote exceptions, say so in engine.py.
    failed = theirs["rounds"][0][0], ours["rounds"][0][0]
    assert [reply.pop("quotes the exception") for reply in failed] == [True, False]

    assert ours == theirs
    contents = [[reply["content"] for reply in round_] for round_ in theirs["rounds"]]
    assert contents == [[False, True], [True, True]], "the contract did not exercise a failing client"


def test_two_rounds_give_the_same_adapter_on_both_engines(
    running: _Running, tiny_release: Release, tmp_path: Path
) -> None:
    """What is measured in simulation would not be what is deployed.

    Node ids, the order of nodes and replies, processes and thread counts differ between the engines; the cohort of the
    first round is one device, so that an update of the wrong device would show.
    """
    plan = _plan(tiny_release)
    assert _cohorts(plan) == [("ant",), ("ant", "zebra")], "choose a seed whose first cohort is one, the second both"

    deployed = _coordinator(tmp_path / "deployed", plan)
    running.deployment.run(_APP, {"coordinator-home": str(deployed)}, timeout=600.0)
    simulated = _simulate(_coordinator(tmp_path / "simulated", plan), tmp_path / "devices", running.devices, Faults())
    offline = Faults(drop=lambda round_, node_id: True)
    noise_alone = _simulate(_coordinator(tmp_path / "noise", plan), tmp_path / "offline", running.devices, offline)

    ours, theirs, noise = (_published(home) for home in (simulated, deployed, noise_alone))
    assert np.abs(theirs.values - noise.values).max() > 1e-3, "the devices' updates are too small to be compared"
    np.testing.assert_allclose(theirs.values, ours.values, atol=1e-6)
    assert len(_spends(deployed)) == 2 and _spends(deployed) == _spends(simulated)
    assert _shown(deployed) == _shown(simulated) == [[(1, 1), (2, 1)], [(2, 1)]]
    participations = [len(_spends(home)) for home in running.homes]
    assert participations == [2, 1] == [len(_spends(tmp_path / "devices" / name)) for name in _NAMES]


def _make_device(home: Path, release: Release, seed: int) -> Path:
    """A device with forty passages, whose owner has opened six of them."""
    from stillroom_client.device import Device
    from stillroom_client.participation import Consent

    generator = np.random.default_rng(seed)
    home.parent.mkdir(parents=True, exist_ok=True)
    texts = [" ".join(generator.choice(_WORDS, 6)) for _ in range(40)]
    passages = [Passage(f"{home.name}/{number}", home.name, text) for number, text in enumerate(texts)]
    vectors = generator.standard_normal((len(passages), release.dimension)).astype(np.float32)
    with Device.create(home, release) as device:
        Consent(federation="rehearsal").save(home)
        device.add(passages, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        device.record((" ".join(generator.choice(_WORDS, 4)), passage.id) for passage in passages[:6])
        device.refresh_index()
    return home


def _plan(release: Release) -> Plan:
    from stillroom_server.plan import Plan

    return Plan(
        federation="rehearsal", release_folder=release.folder, enrolled=_NAMES, mechanism="central", rounds=2,
        sampling_rate=0.75, clip_norm=0.5, noise_multiplier=0.5, budget_epsilon=1_000.0, delta=1e-3, local_steps=2,
        local_learning_rate=1.0, temperature=0.1, candidates=8, server_learning_rate=1.0, momentum=0.5, averaging=0.0,
        reply_timeout_seconds=180.0, rehearsal=True, seed="both engines 10",
    )  # fmt: skip


def _cohorts(plan: Plan) -> list[tuple[str, ...]]:
    from stillroom_server.cohort import poisson_cohort

    seeds = [f"{plan.seed}/cohort/{number}/1" for number in (1, 2)]
    return [poisson_cohort(plan.enrolled, plan.sampling_rate, Randomness(seed=seed)) for seed in seeds]


def _coordinator(home: Path, plan: Plan) -> Path:
    plan.save(home)
    return home


def _simulate(coordinator: Path, folder: Path, devices: tuple[Path, ...], faults: Faults) -> Path:
    """The deployed apps on the in-process grid, on copies of the devices, with node ids in the opposite order."""
    from stillroom_client.app import app as client_app
    from stillroom_server.app import app as server_app

    homes = [_copy(home, folder) for home in devices]
    nodes = {9_000 - number: {"device-home": str(home)} for number, home in enumerate(homes)}
    grid = InProcessGrid(
        client_app=client_app, nodes=nodes, run_config={"coordinator-home": str(coordinator)}, faults=faults
    )
    run_server_app(server_app, grid)
    assert grid.failures == 0
    return coordinator


def _copy(home: Path, folder: Path) -> Path:
    return Path(shutil.copytree(home, folder / home.name, symlinks=True))


def _published(coordinator: Path) -> Adapter:
    from stillroom_server.coordinate import Coordinator
    from stillroom_shared.release import ADAPTER_NAME

    with Coordinator(coordinator) as opened:
        return Adapter.load(opened.published / ADAPTER_NAME)


def _spends(home: Path) -> list[dict[str, Any]]:
    with Ledger.open(home / "ledger.sqlite3") as ledger:
        return [_without_chance(row.fields) for row in ledger.rows() if row.kind == "spend"]


def _without_chance(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in ("nonce", "ledger")}


def _shown(coordinator: Path) -> list[list[Any]]:
    """What the coordinator keeps of each device's ledger."""
    from stillroom_server.receipts import ReceiptBook
    from stillroom_shared.signing import SigningKey

    book = ReceiptBook(coordinator, federation="rehearsal")
    assert book.refused() == {}
    return [list(book.export(name, SigningKey.generate()).charges) for name in _NAMES]


def _contract_apps() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grid_contract", _CONTRACT / "grid_contract.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
