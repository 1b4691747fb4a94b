"""`stillroom coordinate evaluate` over simulated devices: the real apps on the in-process grid, one encoder for all.

A folder of homes stands where a deployment has nodes. What each device scores is its own store and index, by the code that a
deployed device runs; only the encoder's weights are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from flwr.app import Context, Message

from stillroom_client.app import HOME_KEY as DEVICE_HOME
from stillroom_client.app import client_app
from stillroom_client.device import Device
from stillroom_client.encoder import Encoder
from stillroom_client.home import IDENTITY_NAME, RELEASE_NAME
from stillroom_client.scoring import held_back_difference
from stillroom_server.app import HOME_KEY as COORDINATOR_HOME
from stillroom_server.coordinate import Coordinator
from stillroom_server.evaluation import evaluation_app, next_evaluation
from stillroom_server.verdict import Evaluation, Policy
from stillroom_shared.adapter import Adapter
from stillroom_shared.errors import ProtocolError, SettingsError
from stillroom_shared.protocol import EVALUATE, EvaluationOrder
from stillroom_shared.release import Release
from stillroom_simulations.engine import InProcessGrid, numbered, run_server_app

ProgressBar = Callable[[int, int], None]


class SharedScores:
    """Scores of many simulated devices through one encoder; calls `progress` after each device.

    `said` counts devices that had something to say, `silent` those that declined or failed. A coordinator learns neither;
    whoever runs a simulation may.
    """

    def __init__(self, release: Release, expected: int, progress: ProgressBar, *, threads: int = 1) -> None:
        self._release = release
        self._encoder = Encoder(release, precision="int8", threads=threads)
        self._expected = expected
        self._progress = progress
        self.asked = self.said = 0
        self._reached = 0

    def prepare(self, block: Sequence[tuple[Message, Context]]) -> None:
        """Count the devices that an evaluation reaches; for the grid to call."""
        self._reached += sum(message.metadata.message_type == EVALUATE for message, _ in block)

    @property
    def silent(self) -> int:
        """Devices that an evaluation reached and that did not score: they declined or failed, and sent zeros."""
        return self._reached - self.asked

    def check(self, home: Path, order: EvaluationOrder) -> None:
        """Refuse an evaluation for another release than the simulated devices hold."""
        if order.release != self._release.id:
            raise ProtocolError(f"the order is for release {order.release[:12]}, devices hold {self._release.id[:12]}")

    def difference(self, home: Path, order: EvaluationOrder, baseline: Adapter, candidate: Adapter) -> float | None:
        """Score one device's own held-back queries."""
        linked = (home / RELEASE_NAME).resolve() == self._release.folder
        with Device.open(home, release=self._release if linked else None) as device:
            found = held_back_difference(
                device, self._encoder, baseline, candidate, share=order.held_back, cutoff=order.cutoff
            )
        self.asked, self.said = self.asked + 1, self.said + (found is not None)
        self._progress(self.asked, self._expected)
        return found


def evaluate_simulated(
    home: Path, devices: Path, policy: Policy, *, progress: ProgressBar = lambda done, total: None
) -> tuple[Evaluation, SharedScores]:
    """Evaluate a coordinator's candidate on the device homes in a folder, and publish it or roll back.

    Raises:
        SettingsError: there is nothing to evaluate, or the folder holds no home of a device that is enrolled; nothing is
            spent then.
    """
    if not home.is_dir():
        raise SettingsError(f"{home} is no coordinator's home: name the folder that holds its plan and ledger")
    with Coordinator(home) as coordinator:
        next_evaluation(coordinator)
        enrolled = set(coordinator.plan.enrolled)
    homes = sorted(path.parent for path in devices.glob(f"*/{IDENTITY_NAME}"))
    homes = [path for path in homes if Device.name_of(path) in enrolled]
    if not homes:
        raise SettingsError(f"{devices} holds no home of an enrolled device: name the folder of their homes")
    return evaluate_homes(home, homes, policy, progress=progress)


def evaluate_homes(
    home: Path, homes: Sequence[Path], policy: Policy, *, progress: ProgressBar = lambda done, total: None
) -> tuple[Evaluation, SharedScores]:
    """The same on these homes of devices."""
    with Coordinator(home) as coordinator:
        release, plan = coordinator.release, coordinator.plan
    scores = SharedScores(release, round(plan.evaluation_rate * len(plan.enrolled)), progress)
    grid = InProcessGrid(
        client_app=client_app(scores=scores),
        nodes=numbered({DEVICE_HOME: str(path)} for path in homes),
        run_config={COORDINATOR_HOME: str(home)},
        prepare=scores.prepare,
    )
    results: list[Evaluation] = []
    run_server_app(evaluation_app(policy, results.append), grid)
    return results[0], scores
