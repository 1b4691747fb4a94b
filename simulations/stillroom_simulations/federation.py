"""A federation of simulated devices: the real apps on the in-process grid, with clients trained in batches.

`BatchedUpdates` stands where a deployed device opens its own home: the grid announces a block of messages, one forward and
backward pass on the shared frozen tower computes the whole block's updates, and each client app then finds its own. Under
`local` that pass gives the gradient of every record; coins, clipping, noise and steps are the functions that a deployed device
calls. What each device learns from is mined once from that device's own store, by the code that a deployed device runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from flwr.app import Context, Message
from numpy.typing import NDArray

from stillroom_client.app import HOME_KEY as DEVICE_HOME
from stillroom_client.app import client_app, local_work
from stillroom_client.device import Device
from stillroom_client.encoder import Encoder
from stillroom_client.records import MAXIMUM_RECORDS, mine_records
from stillroom_client.training import Record, Trainer
from stillroom_server.app import HOME_KEY as COORDINATOR_HOME
from stillroom_server.app import server_app
from stillroom_server.coordinate import KEY_FILE, RoundReport
from stillroom_server.plan import Plan
from stillroom_shared.adapter import Adapter
from stillroom_shared.correlated import calibrate_correlated
from stillroom_shared.errors import SettingsError, StillroomError
from stillroom_shared.local_mechanism import calibrate_local, descend
from stillroom_shared.local_rounds import LocalRounds
from stillroom_shared.mechanism import calibrate
from stillroom_shared.protocol import TRAIN, RoundOrder, Schedule, read_order
from stillroom_shared.randomness import Randomness
from stillroom_shared.release import Release
from stillroom_shared.settings import EvaluationSettings, RoundsSettings
from stillroom_shared.signing import SigningKey
from stillroom_shared.toeplitz import best_coefficients
from stillroom_simulations.engine import InProcessGrid, numbered, run_server_app

_UNJUDGED = EvaluationSettings()
RecordsByHome = Mapping[str, Sequence[Record]]


class SilentDevicesError(StillroomError):
    """Simulated devices declined or failed, and sent zero: figures are not what they seem."""


class BatchedUpdates:
    """Updates for a block of devices from one batched pass; each is handed out once.

    `records`: of each home; under `local` mined with `one_per_query`. `seed` fixes the coins and the noise that devices
    draw under `local`; without one they come from the operating system.
    """

    def __init__(self, trainer: Trainer, records: RecordsByHome, *, seed: str | None = None) -> None:
        self._trainer = trainer
        self._records = records
        self._seed = seed
        self._ready: dict[tuple[str, int, int], NDArray[np.float32]] = {}

    def prepare(self, block: Sequence[tuple[Message, Context]]) -> None:
        """Compute the updates of a block of training messages; a block of other messages is left alone."""
        training = [(message, context) for message, context in block if message.metadata.message_type == TRAIN]
        if not training:
            return
        order, adapter = read_order(training[0][0].content)
        homes = [str(context.node_config[DEVICE_HOME]) for _, context in training]
        records = [self._records[home] for home in homes]
        mechanism = order.build_mechanism()
        if isinstance(mechanism, LocalRounds):
            changes = descend(
                mechanism.training,
                adapter.values,
                records,
                lambda values, chosen: batched_gradients(self._trainer, values, chosen, order.temperature),
                learning_rate=order.learning_rate,
                randomness=[self._randomness(Path(home).name, order) for home in homes],
            )
        else:
            changes = self._trainer.updates(adapter, records, local_work(order))
        self._ready |= {(home, order.round, order.attempt): change for home, change in zip(homes, changes, strict=True)}

    @property
    def unclaimed(self) -> list[str]:
        """Homes whose device never asked for its update: it declined or failed, and sent zero instead."""
        return sorted({home for home, _, _ in self._ready})

    def check(self, home: Path, order: RoundOrder) -> None:
        """Nothing to refuse: all simulated devices hold the release that the trainer was made from."""

    def update(self, home: Path, order: RoundOrder, adapter: Adapter) -> NDArray[np.float32]:
        """The prepared update of one device."""
        try:
            return self._ready.pop((str(home), order.round, order.attempt))
        except KeyError:
            raise StillroomError(f"no update was prepared for {home}: pass `prepare` to the grid") from None

    def _randomness(self, device: str, order: RoundOrder) -> Randomness:
        if self._seed is None:
            return Randomness()
        return Randomness(seed=f"{self._seed}/{order.federation}/{device}/{order.round}/{order.attempt}")


def batched_gradients(
    trainer: Trainer, values: NDArray[np.float32], chosen: Sequence[Sequence[Record]], temperature: float
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Gradients for `descend`, all devices in one pass: (device, gradient) of each chosen record."""
    owned = [(device, record) for device, own in enumerate(chosen) for record in own]
    devices = [device for device, _ in owned]
    found = trainer.record_gradients(values[devices], [record for _, record in owned], temperature)
    yield from zip(devices, found, strict=True)


def mine_population(
    homes: Sequence[Path],
    release: Release,
    *,
    candidates: int,
    threads: int,
    one_per_query: bool = False,
    most: int = MAXIMUM_RECORDS,
    held_back: float = 0.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Record]]:
    """The training records of every device, each mined from its own store as `mine_records` says; the encoder is shared."""
    encoder = Encoder(release, precision="int8", threads=threads)
    records = {}
    for done, home in enumerate(homes, start=1):
        with Device.open(home) as device:
            records[str(home)] = mine_records(
                device,
                encoder,
                candidates=candidates,
                one_per_query=one_per_query,
                most=most,
                held_back_share=held_back,
            )
        progress(done, len(homes))
    return records


def make_plan(
    settings: RoundsSettings,
    *,
    name: str,
    release_folder: Path,
    enrolled: Sequence[str],
    dimension: int,
    seed: str,
    evaluation: EvaluationSettings = _UNJUDGED,
) -> Plan:
    """The plan of a simulated federation: a rehearsal with seeded noise, calibrated where the settings give a target."""
    local = settings.mechanism == "local"
    delta = settings.delta or 1 / (10 * len(enrolled) * (settings.records if local else 1))
    turns = settings.mechanism in ("correlated", "local")
    schedule = Schedule.every(settings.separation, rounds=settings.rounds) if turns else None
    noise = settings.noise_multiplier
    if settings.target_epsilon is not None and settings.clip_norm is not None:
        noise = _least_noise(settings, schedule, delta=delta, devices=len(enrolled), dimension=dimension)
    private = settings.mechanism != "none"
    return Plan(
        federation=name,
        release_folder=release_folder,
        enrolled=tuple(enrolled),
        mechanism=settings.mechanism,
        rounds=settings.rounds,
        schedule=schedule,
        coefficients=_coefficients(schedule, settings.bands) if schedule and not local else None,
        records=settings.records if local else None,
        record_rate=settings.record_rate if local else None,
        sampling_rate=settings.sampling_rate if schedule is None else 1 / schedule.separation,
        clip_norm=settings.clip_norm if private else None,
        clip_quantile=settings.clip_quantile,
        noise_multiplier=noise if private else None,
        budget_epsilon=settings.budget_epsilon if private else None,
        delta=delta,
        local_steps=settings.local_steps,
        local_learning_rate=settings.local_learning_rate,
        temperature=settings.temperature,
        candidates=settings.candidates,
        server_optimizer=settings.server_optimizer,
        server_learning_rate=settings.server_learning_rate,
        momentum=settings.momentum,
        averaging=settings.averaging,
        held_back=evaluation.held_back,
        evaluation_bound=evaluation.bound,
        evaluation_noise=evaluation.noise_multiplier,
        evaluation_rate=evaluation.sampling_rate,
        rehearsal=True,
        seed=seed,
    )


def _least_noise(
    settings: RoundsSettings, schedule: Schedule | None, *, delta: float, devices: int, dimension: int
) -> float:
    """The noise multiplier that meets the target epsilon of the settings."""
    assert settings.target_epsilon is not None
    assert settings.clip_norm is not None
    if schedule is None:
        return calibrate(
            target_epsilon=settings.target_epsilon,
            delta=delta,
            rounds=settings.rounds,
            clip_norm=settings.clip_norm,
            sampling_rate=settings.sampling_rate,
            devices=devices,
            dimension=dimension,
        ).noise_multiplier
    if settings.mechanism == "local":
        return calibrate_local(
            target_epsilon=settings.target_epsilon,
            delta=delta,
            rounds=schedule.participations,
            clip_norm=settings.clip_norm,
            sampling_rate=settings.record_rate,
            steps=settings.local_steps,
            records=settings.records,
            dimension=dimension,
        ).noise_multiplier
    return calibrate_correlated(
        target_epsilon=settings.target_epsilon,
        delta=delta,
        rounds=settings.rounds,
        participations=schedule.participations,
        separation=schedule.separation,
        clip_norm=settings.clip_norm,
        devices=devices,
        dimension=dimension,
    ).noise_multiplier


def _coefficients(schedule: Schedule, bands: int | None) -> tuple[int, ...]:
    """Of the noise: `bands` of them, by default as many as suit the turns, and never more than there are between two."""
    rounds, most = max(1, schedule.rounds), min(schedule.separation, max(1, schedule.rounds))
    if bands is not None and bands > most:
        raise SettingsError(
            f"bands {bands}: noise may be correlated over at most {most} rounds, those from one turn of a device to its next"
        )
    return best_coefficients(bands or most, rounds, schedule.participations, schedule.separation)


def run_federation(
    home: Path,
    plan: Plan,
    devices: Sequence[Path],
    updates: BatchedUpdates,
    *,
    operator: SigningKey,
    block: int,
    on_round: Callable[[RoundReport], None] = lambda report: None,
) -> None:
    """Run, or resume, all rounds of a plan in `home`; the coordinator's folder holds what it left."""
    plan.save(home)
    if not (home / KEY_FILE).exists():
        operator.save(home / KEY_FILE)
    grid = InProcessGrid(
        client_app=client_app(updates),
        nodes=numbered({DEVICE_HOME: str(device)} for device in devices),
        run_config={COORDINATOR_HOME: str(home)},
        prepare=updates.prepare,
        block=block,
    )
    run_server_app(server_app(on_round), grid)
    # A device that fails sends zero, in a simulation too: figures would only be a little worse, and nobody would know why.
    if grid.failures or updates.unclaimed:
        raise SilentDevicesError(
            f"{grid.failures} client apps failed and {len(updates.unclaimed)} devices sent zero in {home}, first "
            f"{updates.unclaimed[:1]}: see the log above; the figures would be wrong"
        )
