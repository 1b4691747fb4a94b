"""A ledger that goes back in time, of a device or of the coordinator, is noticed by the round itself.

The apps are the deployed ones; only the training is replaced by a fixed update for each device. Runs of one seed differ in
nothing but what devices contribute, so an update that counts zero gives, to the last bit, the run where it is zero.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from typer.testing import CliRunner

from stillroom_client.app import HOME_KEY as DEVICE_HOME
from stillroom_client.app import client_app
from stillroom_client.home import Identity
from stillroom_client.participation import KEY_FILE as DEVICE_KEY
from stillroom_client.participation import LEDGER_FILE, Consent, open_ledger, take_part
from stillroom_server.app import HOME_KEY, server_app
from stillroom_server.coordinate import KEY_FILE, Coordinator, RoundReport
from stillroom_server.plan import Plan
from stillroom_server.receipts import ReceiptBook
from stillroom_shared.accounting import epsilon
from stillroom_shared.adapter import Adapter
from stillroom_shared.cli import build_app
from stillroom_shared.errors import ProtocolError
from stillroom_shared.events import SampledGaussian
from stillroom_shared.heads import head_of
from stillroom_shared.ledger import Ledger
from stillroom_shared.mechanism import RESOLUTION
from stillroom_shared.protocol import RoundOrder, order_message
from stillroom_shared.receipts import Attempt, issue
from stillroom_shared.release import Release
from stillroom_shared.signing import SigningKey
from stillroom_simulations.engine import InProcessGrid, run_server_app

NAMES = ("d0", "d1", "d2")
TAKEN = "d1"
"""The device whose ledger goes back in these tests."""
Tamper = Callable[[RecordDict, int], RecordDict]


class Enough(Exception):
    """Stops a run after some rounds."""


class Fixed:
    """One raw update for each device; `TAKEN` contributes in the rounds that `counts` names."""

    def __init__(self, counts: Callable[[int], bool] = lambda number: True, size: float = 0.03) -> None:
        self._counts = counts
        self._size = size

    def check(self, home: Path, order: RoundOrder) -> None:
        """Every order can be followed."""

    def update(self, home: Path, order: RoundOrder, adapter: Adapter) -> np.ndarray:
        """The same in every coordinate."""
        size = {"d0": 0.01, TAKEN: self._size * self._counts(order.round), "d2": 0.02}[home.name]
        return np.full(adapter.spec.size, size, np.float32)


class Federation:
    """Three devices and their coordinator, which can be stopped, damaged and resumed."""

    def __init__(self, folder: Path, release: Release, operator: SigningKey) -> None:
        self.home = folder / "coordinator"
        self.devices = {name: folder / name for name in NAMES}
        for name, home in self.devices.items():
            home.mkdir(parents=True)
            identity = Identity(name=name, trusted_key=operator.public, document_tower_hash="0" * 64)
            (home / "device.json").write_text(identity.model_dump_json())
            Consent(federation="f").save(home)
        Plan(
            federation="f", release_folder=release.folder, enrolled=NAMES, mechanism="central", rounds=12,
            sampling_rate=1.0, clip_norm=1.0, noise_multiplier=3.0, budget_epsilon=1e4, delta=1e-3, local_steps=1,
            local_learning_rate=1.0, temperature=0.05, candidates=4, server_learning_rate=1.0, momentum=0.0,
            averaging=0.0, rehearsal=True, seed="receipts",
        ).save(self.home)  # fmt: skip
        operator.save(self.home / KEY_FILE)

    def run(self, *, until: int, source: Fixed | None = None, tamper: Tamper | None = None) -> np.ndarray:
        """Run until so many rounds are released; the iterate then."""

        def on_round(report: RoundReport) -> None:
            if report.round == until:
                raise Enough

        app = client_app(source or Fixed())
        grid = InProcessGrid(
            client_app=app if tamper is None else tampered(app, tamper),
            nodes={number: {DEVICE_HOME: str(home)} for number, home in enumerate(self.devices.values(), start=2)},
            run_config={HOME_KEY: str(self.home)},
        )
        with pytest.raises(Enough):
            run_server_app(server_app(on_round), grid)
        assert grid.failures == 0
        with Coordinator(self.home) as coordinator:
            return coordinator.state.iterate

    @property
    def ledger(self) -> Path:
        """Of the device that is taken."""
        return self.devices[TAKEN] / LEDGER_FILE

    @property
    def refused(self) -> dict[str, str]:
        return ReceiptBook(self.home, federation="f").refused()

    def joined(self, name: str = TAKEN) -> list[int]:
        with Ledger.open(self.devices[name] / LEDGER_FILE) as ledger:
            return sorted(purpose["round"] for purpose in ledger.purposes())


def tampered(app: ClientApp, tamper: Tamper) -> ClientApp:
    """The same app, whose answer of `TAKEN` to a round is changed on the way."""
    wrapped = ClientApp()

    @wrapped.query("enrol")
    def enrol(message: Message, context: Context) -> Message:
        return app(message, context)

    @wrapped.train()
    def train(message: Message, context: Context) -> Message:
        answer = app(message, context)
        if not str(context.node_config[DEVICE_HOME]).endswith(TAKEN):
            return answer
        return Message(tamper(answer.content, int(message.metadata.group_id)), reply_to=message)

    return wrapped


@pytest.fixture
def make(tmp_path: Path, tiny_release: Release, signing_key: SigningKey) -> Callable[[str], Federation]:
    return lambda name: Federation(tmp_path / name, tiny_release, signing_key)


def without(make: Callable[[str], Federation], rounds: Sequence[int], *, until: int) -> np.ndarray:
    """The run in which the device contributes nothing in these rounds."""
    return make(f"without-{rounds}-{until}").run(until=until, source=Fixed(lambda number: number not in rounds))


def command(*arguments: str | Path) -> Result:
    done = CliRunner(env={"COLUMNS": "300"}).invoke(build_app(), [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done


def test_a_restored_backup_counts_zero_until_it_is_replayed(make: Callable[[str], Federation], tmp_path: Path) -> None:
    """Whoever restores a backup spends again what it forgot; the others must not stand still for it."""
    here, backup = make("here"), tmp_path / "backup"
    here.run(until=2)
    shutil.copy(here.ledger, backup)
    here.run(until=4)
    assert here.refused == {}
    shutil.copy(backup, here.ledger)
    np.testing.assert_array_equal(here.run(until=6), without(make, [5, 6], until=6))
    assert list(here.refused) == [TAKEN]
    assert "went back in time: it lacks round 3 attempt 1, round 4 attempt 1; hand it" in here.refused[TAKEN]
    assert (
        "refused: device 'd1', whose updates count as zero: the ledger" in command("audit", "ledger", here.home).stdout
    )

    command("audit", "receipt", here.home, "--device", TAKEN, "--out", tmp_path / "receipt.json")
    command("budget", "--home", here.devices[TAKEN], "--recover", tmp_path / "receipt.json")
    np.testing.assert_array_equal(here.run(until=7), without(make, [5, 6], until=7))
    assert here.refused == {}
    assert here.joined() == [1, 2, 3, 4, 5, 6, 7], "the larger spend"
    assert "refused" not in command("audit", "ledger", here.home).stdout


class _Crash(BaseException):
    """The coordinator ends here."""


class _Crashing(Fixed):
    def update(self, home: Path, order: RoundOrder, adapter: Adapter) -> np.ndarray:
        if home.name == "d2":
            raise _Crash
        return super().update(home, order, adapter)


def test_a_backup_is_noticed_although_the_coordinator_crashed_in_the_round_that_it_lacks(
    make: Callable[[str], Federation], tmp_path: Path
) -> None:
    """The device answered and may have been seen; a receipt that is lost with the round would let it spend that again."""
    here = make("here")
    here.run(until=1)
    shutil.copy(here.ledger, tmp_path / "backup")
    with pytest.raises(_Crash):
        here.run(until=2, source=_Crashing())
    assert here.joined() == [1, 2]
    shutil.copy(tmp_path / "backup", here.ledger)
    here.run(until=2)
    assert "it lacks round 2 attempt 1" in here.refused[TAKEN]


def test_what_is_refused_moves_nothing_and_what_counts_moves_by_one_update(
    make: Callable[[str], Federation], tmp_path: Path
) -> None:
    """Neighbouring data: a refusal that depended on it, or that left out somebody else, would move the sum by more."""
    ends = {}
    for name, size in (("huge", 1e6), ("zero", 0.0)):
        here = make(name)
        source = Fixed(size=size)
        here.run(until=1, source=source)
        shutil.copy(here.ledger, tmp_path / name / "backup")
        before = here.run(until=2, source=source)
        shutil.copy(tmp_path / name / "backup", here.ledger)
        ends[name] = before, here.run(until=5, source=source)
        assert list(here.refused) == [TAKEN]
    (huge, huge_end), (zero, zero_end) = ends["huge"], ends["zero"]
    norm = float(np.linalg.norm(huge - zero)) * len(NAMES)
    assert 1.99 < norm <= 2 * (1 + 1e-9), "two rounds, one clip norm each"
    np.testing.assert_allclose(huge_end - huge, zero_end - zero, atol=2**-40)
    assert float(np.linalg.norm(huge_end - huge)) * len(NAMES) > 1 / RESOLUTION


def stop_naming(home: Path) -> None:
    Consent().save(home)


def delete_ledger(home: Path) -> None:
    (home / LEDGER_FILE).unlink()


def begin_anew(home: Path) -> None:
    (home / LEDGER_FILE).unlink()
    (home / DEVICE_KEY).unlink()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (stop_naming, "showed receipts before and shows none now"),
        (delete_ledger, "showed receipts before and shows none now"),
        (begin_anew, "its earlier ones are by"),
    ],
)
def test_a_device_cannot_hide_a_loss(
    make: Callable[[str], Federation], change: Callable[[Path], None], reason: str
) -> None:
    """Deleting the ledger, with its key or without, or showing it no more, would be the way around every check."""
    here = make("here")
    here.run(until=2)
    change(here.devices[TAKEN])
    np.testing.assert_array_equal(here.run(until=3), without(make, [3], until=3))
    assert reason in here.refused[TAKEN]
    assert list(here.refused) == [TAKEN]


def test_whoever_names_no_federation_shows_nothing_and_counts(make: Callable[[str], Federation]) -> None:
    """A receipt for whoever the node is connected to could be about a federation that is not his."""
    here = make("here")
    for home in here.devices.values():
        Consent().save(home)
    np.testing.assert_array_equal(here.run(until=2), without(make, [], until=2))
    assert here.refused == {}
    assert not ReceiptBook(here.home, federation="f").export(TAKEN, SigningKey.generate()).charges


def shown(content: RecordDict, receipt: object) -> RecordDict:
    record = receipt if isinstance(receipt, ArrayRecord) else ConfigRecord({"receipt": receipt})  # type: ignore[dict-item]
    return RecordDict({"update": content["update"], "receipt": record})


STRANGER = SigningKey.generate()
STEP = SampledGaussian(noise_multiplier=0.5, sampling_rate=1.0, sigma=2**27, dimension=9)


def forged(device: str, federation: str, number: int) -> str:
    made = issue("device", {Attempt(number, 1): STEP}, federation=federation, device=device, key=STRANGER)
    return made.model_dump_json()


def old_receipts() -> Tamper:
    """Shows in each round what was shown in the first."""
    kept: dict[str, str] = {}

    def replay(content: RecordDict, number: int) -> RecordDict:
        receipt = content.config_records["receipt"]["receipt"]
        return shown(content, kept.setdefault("first", str(receipt)))

    return replay


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (lambda content, number: shown(content, "{"), "cannot be read"),
        (lambda content, number: shown(content, "[" * 100_000), "cannot be read"),
        (lambda content, number: shown(content, f"{content['receipt']['receipt']}{' ' * (1 << 17)}"), None),
        (lambda content, number: shown(content, 7), None),
        (lambda content, number: shown(content, b"{}"), None),
        (lambda content, number: shown(content, ArrayRecord()), None),
        (lambda content, number: RecordDict({**shown(content, "{}"), "more": ConfigRecord()}), "cannot be read"),
        (lambda content, number: RecordDict({**content, "more": ConfigRecord()}), "never"),
        (lambda content, number: shown(content, forged("d2", "f", number)), "has device 'd2'"),
        (lambda content, number: shown(content, forged(TAKEN, "g", number)), "has federation 'g'"),
        (lambda content, number: shown(content, forged(TAKEN, "f", number)), "its earlier ones are by|does not list"),
        (old_receipts(), "does not list round 2 attempt 1"),
    ],
)  # fmt: skip
def test_a_receipt_that_is_not_this_rounds_own_counts_the_update_as_zero(
    make: Callable[[str], Federation], tamper: Tamper, reason: str | None
) -> None:
    """A stranger's bytes that end the round make the release depend on a stranger; those that pass hide a roll-back."""
    here = make("here")
    here.run(until=1, tamper=tamper if reason and "round 2" in reason else None)
    np.testing.assert_array_equal(here.run(until=2, tamper=tamper), without(make, [2], until=2))
    if reason not in (None, "never"):
        assert any(part in here.refused[TAKEN] for part in str(reason).split("|")), here.refused
    np.testing.assert_array_equal(here.run(until=3), without(make, [2], until=3))
    assert here.refused == {}, "an honest receipt is admitted again"


class _Leaky(Fixed):
    def update(self, home: Path, order: RoundOrder, adapter: Adapter) -> np.ndarray:
        raise RuntimeError("the query was: am I ill")


class _Elsewhere(Fixed):
    def check(self, home: Path, order: RoundOrder) -> None:
        raise ProtocolError("round is for another release")


def test_a_reply_is_the_same_whether_the_device_trained_declined_or_failed(
    make: Callable[[str], Federation], tmp_path: Path, tiny_adapter: Adapter
) -> None:
    """A receipt that is missing, or shorter, would tell what a vector of zeros is there to hide."""
    here = make("here")
    here.run(until=2)
    home, plan = here.devices[TAKEN], Plan.load(here.home)
    with Ledger.open(here.home / "ledger.sqlite3") as ledger:
        hashes = [row.hash for row in ledger.rows()]
    order = plan.order(round_number=3, attempt=1, release="r", dimension=tiny_adapter.spec.size)
    forward, back = head_of([*hashes, "a" * 64]), head_of(hashes[:1])
    spent = epsilon([order.build_mechanism().participation_event()] * 2, 1e-5)
    cases: Mapping[str, tuple[Fixed, Consent, object]] = {
        "trained": (Fixed(), Consent(federation="f"), forward),
        "failed": (_Leaky(), Consent(federation="f"), forward),
        "another release": (_Elsewhere(), Consent(federation="f"), forward),
        "over the limit": (Fixed(), Consent(federation="f", limit_epsilon=spent + 1e-6), forward),
        "over the cap": (Fixed(), Consent(federation="f", participations=2), forward),
        "not agreed to": (Fixed(), Consent(federation="f", mechanisms=()), forward),
        "coordinator went back": (Fixed(), Consent(federation="f"), back),
    }
    replies = {}
    for case, (source, consent, head) in cases.items():
        copy = tmp_path / "copies" / case / TAKEN
        shutil.copytree(home, copy)
        consent.save(copy)
        content = order_message(order.model_copy(update={"ledger": head}), tiny_adapter)
        grid = InProcessGrid(client_app=client_app(source), nodes={2: {DEVICE_HOME: str(copy)}})
        (reply,) = grid.send_and_receive([grid.create_message(content, "train", 2, "3")])
        vector = reply.content.array_records["update"]["values"].numpy()
        assert vector.shape == (tiny_adapter.spec.size,)
        assert bool(vector.any()) == (case == "trained"), case
        replies[case] = {name: reply.content[name] for name in reply.content if name != "update"}
        assert set(reply.content) == {"update", "receipt"}, case
    assert len({json.dumps(dict(reply["receipt"])) for reply in replies.values()}) == 1, "byte for byte"
    assert "[3,1]" in str(replies["failed"]["receipt"])


def order(number: int, head: object, **changes: object) -> RoundOrder:
    fields: dict[str, object] = {
        "federation": "f", "release": "r", "round": number, "attempt": 1, "mechanism": "central", "clip_norm": 1.0,
        "noise_multiplier": 2.0, "sampling_rate": 0.1, "devices": 50, "dimension": 256, "steps": 1, "learning_rate": 1.0,
        "temperature": 0.05, "candidates": 4, "ledger": head,
    }  # fmt: skip
    return RoundOrder.model_validate(fields | changes)


HASHES = [f"{number:016x}" * 4 for number in range(1, 2000)]


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (None, "is not shown any more, 5 rows were seen"),
        (head_of(HASHES[:4]), "has 4 rows where 5 were seen"),
        (head_of([*HASHES[:4], "e" * 64]), "is another one than was seen: row 4 has changed"),
        (head_of([*HASHES[:4], *HASHES[10:20]]), "is another one than was seen: row 4 has changed"),
        (head_of([*HASHES[:4], *HASHES[10:1033]]), "is another one than was seen: row 4 has changed"),
    ],
)
def test_an_order_of_a_ledger_that_went_back_is_refused(tmp_path: Path, head: object, reason: str) -> None:
    """Also once the other history is longer than what was seen: numbers alone would be caught up with."""
    take_part(tmp_path, order(1, head_of(HASHES[:5])))
    with pytest.raises(ProtocolError, match=f"ledger of federation 'f' went back in time: it {reason}.*audit ledger"):
        take_part(tmp_path, order(2, head))
    take_part(tmp_path, order(2, None, federation="another"))  # of which none was ever shown
    take_part(tmp_path, order(2, head_of(HASHES[:6])))
    take_part(tmp_path, order(3, head_of(HASHES[:1029])))
    take_part(tmp_path, order(4, head_of(HASHES)))


def test_devices_refuse_a_coordinator_that_restored_an_old_copy_and_go_on_with_the_newest(
    make: Callable[[str], Federation], tmp_path: Path
) -> None:
    """An old ledger with the checkpoint of its time is sound in itself: only who saw more can tell."""
    here, noise = make("here"), make("noise")
    here.run(until=2)
    shutil.copytree(here.home, tmp_path / "old")
    here.run(until=4)
    shutil.copytree(here.home, tmp_path / "newest")
    seen = json.loads(command("budget", "--home", here.devices[TAKEN], "--json").stdout)["coordinators"]
    assert [(each["federation"], each["rows"], each["refused"]) for each in seen] == [("f", 5, None)]
    assert "the head you named is among" in command("audit", "ledger", here.home, "--head", seen[0]["head"]).stdout

    def replace(copy: str) -> None:
        shutil.rmtree(here.home)
        shutil.copytree(tmp_path / copy, here.home)

    replace("old")
    for home in noise.devices.values():
        Consent(federation="f", participations=2).save(home)
    np.testing.assert_array_equal(here.run(until=7), noise.run(until=7), "the sums hold noise alone from round 3 on")
    done = CliRunner().invoke(build_app(), ["audit", "ledger", str(here.home), "--head", seen[0]["head"]])
    assert done.exit_code == 1 and "lacks the row of hash" in done.output
    for name in NAMES:
        found = json.loads(command("budget", "--home", here.devices[name], "--json").stdout)
        (why,) = [each["refused"] for each in found["coordinators"]]
        assert "ledger of federation 'f' went back in time: it is another one than was seen: row 4 has changed" in why
        assert "The last order of f was not followed" in command("budget", "--home", here.devices[name]).stdout
        assert here.joined(name) == [1, 2, 3, 4]

    replace("newest")
    np.testing.assert_array_equal(here.run(until=6), without(make, [], until=6))
    assert here.joined() == [1, 2, 3, 4, 5, 6], "also rounds that the wrong copy asked for"


def test_a_published_adapter_tells_an_old_ledger_from_the_newest(
    make: Callable[[str], Federation], tmp_path: Path
) -> None:
    """Adapters are copied far and wide: they witness a ledger whose rows were cut off, without anybody's receipt."""
    here = make("here")
    here.run(until=1)
    shutil.copy(here.home / "ledger.sqlite3", tmp_path / "old")
    with Coordinator(here.home) as coordinator:
        coordinator.ledger.record({"stopped": "a note, which no statement counts"})
        coordinator.publish()
    assert "1 published adapters" in command("audit", "ledger", here.home).stdout
    shutil.copy(tmp_path / "old", here.home / "ledger.sqlite3")
    done = CliRunner().invoke(build_app(), ["audit", "ledger", str(here.home)])
    assert done.exit_code == 1 and "was published when the ledger had 3 rows" in done.output


def test_the_head_names_no_device_and_no_receipt(make: Callable[[str], Federation]) -> None:
    """Every device sees the head: a row about one device's ledger would be told to all, by a hash that can be guessed."""
    here = make("here")
    here.run(until=1)
    shutil.copy(here.ledger, here.ledger.with_name("backup"))
    here.run(until=2)
    shutil.copy(here.ledger.with_name("backup"), here.ledger)
    here.run(until=3)
    assert list(here.refused) == [TAKEN]
    with Ledger.open(here.home / "ledger.sqlite3") as ledger:
        rows = ledger.rows()
    assert [row.kind for row in rows] == ["genesis", "spend", "spend", "spend"]
    assert not any(name in row.body.replace(row.fields["nonce"], "") for row in rows[1:] for name in NAMES)
    with open_ledger(here.devices["d0"]) as own:
        kept = [row.fields["ledger"] for row in own.rows() if row.kind == "spend"]
    assert kept == [{"rows": row.seq + 1, "head": row.hash} for row in rows[1:]]
