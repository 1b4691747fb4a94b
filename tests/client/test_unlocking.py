"""Who gets into an encrypted home: by a passphrase, from a file or a terminal, by the system keyring; and who does not."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keyring
import numpy as np
import pytest
from click.testing import Result
from keyring.backend import KeyringBackend
from keyring.backends import fail, null
from tests.client.lived_in import QUERY, anywhere, contents, lived_in, order
from typer.testing import CliRunner

from stillroom_client import unlocking
from stillroom_client.app import HOME_KEY, client_app
from stillroom_client.device import Device
from stillroom_client.encrypting import Protection
from stillroom_client.key_file import KEY_NAME, KeyFile
from stillroom_shared.adapter import Adapter
from stillroom_shared.cli import build_app
from stillroom_shared.errors import EncryptionError
from stillroom_shared.protocol import RoundOrder, order_message, read_update
from stillroom_shared.release import Release
from stillroom_simulations.engine import InProcessGrid

pytest.importorskip("sqlcipher3")

PASSPHRASE = "correct horse battery staple"


@pytest.fixture(autouse=True)
def locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing unlocked by another test, and no passphrase in the environment."""
    unlocking.forget()
    monkeypatch.delenv(unlocking.FILE_VARIABLE, raising=False)


def test_a_wrong_passphrase_and_an_altered_key_file_are_refused_alike(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a home that opens half, an error that tells how near a guess was, and parameters nobody vouches for."""
    home = tmp_path / "home"
    lived_in(home, tiny_release, Protection(PASSPHRASE))
    unlocking.forget()
    before = contents(home)
    refusals = set()
    for wrong in ("", "correct horse battery stapl", PASSPHRASE.upper(), "x" * 5000, "\ud800"):
        with pytest.raises(EncryptionError) as refused:
            Device.open(home, key=wrong)
        refusals.add(str(refused.value))
    path = home / "sealed" / KEY_NAME
    sound = json.loads(path.read_text())
    for change in (
        {"wrapped": "00" * 48}, {"wrapped": ""}, {"nonce": ""}, {"nonce": "11" * 12}, {"salt": "22" * 16}, {"passes": 4},
        {"memory_kib": 70000}, {"lanes": 3}, {"id": "33" * 16},
    ):  # fmt: skip
        altered = {**sound, **{k: v for k, v in change.items() if k == "id"}}
        altered["ways"] = [{**sound["ways"][0], **{k: v for k, v in change.items() if k != "id"}}]
        path.write_text(json.dumps(altered))
        with pytest.raises(EncryptionError) as refused:
            Device.open(home, key=PASSPHRASE)
        refusals.add(str(refused.value))
    assert refusals == {f"this passphrase does not open {home}, or {path} was altered"}
    for broken in (
        "{}",
        "",
        '{"schema_version": 2}',
        json.dumps({**sound, "ways": [{**sound["ways"][0], "passes": 10**9}]}),
    ):
        path.write_text(broken)
        with pytest.raises(EncryptionError, match="restore it from a backup"):
            Device.open(home, key=PASSPHRASE)
    path.unlink()
    with pytest.raises(EncryptionError, match="is gone, and without it nothing"):
        Device.open(home, key=PASSPHRASE)
    path.write_text(json.dumps(sound))
    assert {**contents(home), path: b""} == {**before, path: b""}, "a refused opening wrote something"
    Device.open(home, key=PASSPHRASE).close()


def test_another_passphrase_rewrites_the_key_file_alone(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a change of passphrase that takes hours, or that leaves the old one working."""
    home = tmp_path / "home"
    lived_in(home, tiny_release, Protection(PASSPHRASE))
    before = contents(home)
    file, key = KeyFile.load(home / "sealed"), unlocking.data_key(home)
    file.with_passphrase(key, "an entirely new one").save(home / "sealed")
    assert {path for path, content in contents(home).items() if before[path] != content} == {home / "sealed" / KEY_NAME}
    unlocking.forget()
    with pytest.raises(EncryptionError, match="does not open"):
        Device.open(home, key=PASSPHRASE)
    Device.open(home, key="an entirely new one").close()
    with pytest.raises(EncryptionError, match="8 or more"):
        file.with_passphrase(key, "short")


def test_the_terminal_is_asked_and_a_wrong_answer_may_be_corrected(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a passphrase that is echoed, and a typing error that ends the command. A real terminal (pty)."""
    home = tmp_path / "home"
    lived_in(home, tiny_release, Protection(PASSPHRASE))
    for answers, status in (([b"no", PASSPHRASE.encode()], 0), ([b"no"] * 3, 1)):
        said, ended = at_terminal(["feedback", "list", "--home", str(home)], answers)
        assert ended == status, said
        assert said.count(f"Passphrase of {home}:") == len(answers)
        assert (QUERY in said) == (status == 0) and PASSPHRASE not in said
        assert "Traceback" not in said and "cipher" not in said


def at_terminal(arguments: list[str], answers: list[bytes]) -> tuple[str, int]:
    """What a command says on a terminal, and how it ends, given these lines when it asks."""
    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, [sys.executable, "-c", "from stillroom_shared.cli import main; main()", *arguments])
    said, left = b"", list(answers)
    with contextlib.suppress(OSError):  # the end of a terminal is an error
        while some := os.read(terminal, 4096):
            said += some
            if left and said.count(b"Passphrase of") + said.count(b"passphrase of") > len(answers) - len(left):
                os.write(terminal, left.pop(0) + b"\n")
    os.close(terminal)
    return said.decode(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_commands_encrypt_change_and_decrypt(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a command that works in one order only, or that leaves a way in that it says it took away."""
    home, old, new = (
        tmp_path / "home",
        secret_file(tmp_path / "old", PASSPHRASE),
        secret_file(tmp_path / "new", "x" * 20),
    )
    asked = run("index", "create", "--home", home, "--release", tiny_release.folder, "--encrypt")
    assert asked.exit_code == 1 and "no terminal" in asked.output and not home.exists()
    assert run("index", "create", "--home", home, "--release", tiny_release.folder, "--keyring").exit_code == 2
    made = run(
        "index", "create", "--home", home, "--release", tiny_release.folder, "--encrypt", "--new-passphrase-file", old
    )
    assert made.exit_code == 0, made.output
    (tmp_path / "note.md").write_text("# Brooch\n\nThe tapir list of the river bank.\n")
    unlocking.forget()
    locked = run("search", "tapir", "--home", home)
    assert locked.exit_code == 1 and locked.output.startswith(f"error: {home} is encrypted and stays locked")
    assert run("index", "add", tmp_path / "note.md", "--home", home, "--passphrase-file", old).exit_code == 0
    assert "encryption by passphrase" in run("index", "status", "--home", home).output
    unlocking.forget()
    assert (
        run("index", "passphrase", "--home", home, "--passphrase-file", old, "--new-passphrase-file", new).exit_code
        == 0
    )
    for file, status in ((old, 1), (new, 0)):
        unlocking.forget()
        done = run("search", "tapir", "--home", home, "--json", "--passphrase-file", file)
        assert done.exit_code == status, done.output
        assert ("river bank" in done.output) == (status == 0)
        assert ("does not open" in done.output) == (status == 1)
    twice = run("index", "encrypt", "--home", home)
    assert twice.exit_code == 1 and "encrypted already" in twice.output
    for _ in range(2):
        unlocking.forget()
        assert run("index", "decrypt", "--home", home, "--passphrase-file", new).exit_code == 0
        assert "encryption none" in run("index", "status", "--home", home).output
        assert run("index", "decrypt", "--home", home).exit_code == 1
        assert "river bank" in run("search", "tapir", "--home", home, "--json").output
        assert run("index", "encrypt", "--home", home, "--new-passphrase-file", new).exit_code == 0
        assert anywhere(home, {"text": b"river bank", "path": b"note.md"}) == {}
    assert run("index", "encrypt", "--home", tmp_path).exit_code == 1


def run(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(build_app(), [str(argument) for argument in arguments])


def secret_file(path: Path, words: str) -> Path:
    path.write_text(f"{words}\n")
    path.chmod(0o600)
    return path


def test_a_passphrase_file_that_others_read_is_refused(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a service whose passphrase lies open beside what it protects."""
    home, file = tmp_path / "home", secret_file(tmp_path / "passphrase", PASSPHRASE)
    lived_in(home, tiny_release, Protection(PASSPHRASE))
    unlocking.forget()
    os.environ[unlocking.FILE_VARIABLE] = str(file)  # the fixture takes it away
    Device.open(home).close()
    for mode in (0o640, 0o604, 0o666):
        unlocking.forget()
        file.chmod(mode)
        with pytest.raises(EncryptionError, match="chmod 600"):
            Device.open(home)
    file.chmod(0o600)
    for content, said in (("", "is empty"), ("\n" + PASSPHRASE, "is empty"), ("wrong words", "does not open")):
        file.write_text(content)
        with pytest.raises(EncryptionError, match=said):
            Device.open(home)
    file.unlink()
    with pytest.raises(EncryptionError, match="cannot be read"):
        Device.open(home)


class Memory(KeyringBackend):
    """A keyring of this process alone, registered as any other is."""

    priority = 1

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, username: str) -> str | None:
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.kept[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        del self.kept[service, username]


@pytest.fixture
def memory() -> Iterator[Memory]:
    before, backend = keyring.get_keyring(), Memory()
    keyring.set_keyring(backend)
    yield backend
    keyring.set_keyring(before)


def test_the_system_keyring_unlocks_without_asking(tmp_path: Path, tiny_release: Release, memory: Memory) -> None:
    """Guards against a key that is not in the keyring when it is needed, or that is the data key itself."""
    home = tmp_path / "home"
    planted = lived_in(home, tiny_release, Protection(keyring=True))
    [(service, name)] = memory.kept
    [kept] = memory.kept.values()
    assert service == "stillroom" and name == KeyFile.load(home / "sealed").id
    assert bytes.fromhex(kept) != unlocking.data_key(home)
    assert anywhere(home, planted | {"key": kept.encode(), "raw key": bytes.fromhex(kept)}) == {}
    unlocking.forget()
    Device.open(home).close()
    file = secret_file(tmp_path / "new", PASSPHRASE)
    assert run("index", "passphrase", "--home", home, "--no-keyring").exit_code == 1  # the only way in
    assert run("index", "passphrase", "--home", home, "--new-passphrase-file", file).exit_code == 0
    assert "by keyring or passphrase" in run("index", "status", "--home", home).output
    assert run("index", "passphrase", "--home", home, "--no-keyring").exit_code == 0
    unlocking.forget()
    assert memory.kept == {}
    with pytest.raises(EncryptionError, match="STILLROOM_PASSPHRASE_FILE"):
        Device.open(home)
    Device.open(home, key=PASSPHRASE).close()
    assert run("index", "passphrase", "--home", home, "--keyring").exit_code == 0
    unlocking.forget()
    Device.open(home).close()
    for wrong, said in (
        ({}, "has no key"),
        ({(service, name): "00" * 32}, "does not open"),
        ({(service, name): "?"}, "no key"),
    ):
        memory.kept = dict(wrong)
        unlocking.forget()
        with pytest.raises(EncryptionError, match=said):
            Device.open(home)
    Device.open(home, key=PASSPHRASE).close()


def backend_of(module: Any) -> KeyringBackend:
    backend: KeyringBackend = module.Keyring()
    return backend


def test_a_keyring_that_keeps_nothing_safe_is_refused(tmp_path: Path, tiny_release: Release, memory: Memory) -> None:
    """Guards against a home that nobody can open again, or whose key lies in the clear on the same disk."""

    class Plaintext(Memory):
        """Named as those of keyrings.alt are."""

    class Forgetful(Memory):
        def set_password(self, service: str, username: str, password: str) -> None:
            pass

    class Broken(Memory):
        def set_password(self, service: str, username: str, password: str) -> None:
            raise RuntimeError("no D-Bus")

    for backend, said in (
        (Plaintext(), "keeps nothing safe"), (Forgetful(), "did not keep"), (Broken(), "no D-Bus"),
        (backend_of(null), "keeps nothing safe"), (backend_of(fail), "take a passphrase"),
    ):  # fmt: skip
        keyring.set_keyring(backend)
        with pytest.raises(EncryptionError, match=said):
            Device.create(tmp_path / "home", tiny_release, link=True, protection=Protection(keyring=True))
        assert list(tmp_path.iterdir()) == []


def test_a_node_whose_home_is_locked_answers_zeros_and_its_log_says_why(
    tmp_path: Path, tiny_release: Release, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a round that waits for somebody to type, and a coordinator that learns what this device keeps."""
    home = tmp_path / "home"
    planted = lived_in(home, tiny_release, Protection(PASSPHRASE))
    adapter = Adapter(tiny_release.adapter_spec, np.zeros(tiny_release.adapter_spec.size, np.float32))
    size = tiny_release.adapter_spec.size
    grid = InProcessGrid(client_app=client_app(Ones()), nodes={2: {HOME_KEY: str(home)}})
    monkeypatch.setattr(unlocking, "_is_terminal", lambda: True)
    monkeypatch.setattr(unlocking, "getpass", lambda prompt: "nobody is asked")
    for words, joined in (("", False), (PASSPHRASE, True)):
        unlocking.forget()
        if words:
            monkeypatch.setenv(unlocking.FILE_VARIABLE, str(secret_file(tmp_path / "passphrase", words)))
        caplog.clear()
        message = grid.create_message(order_message(order(round=2, dimension=size), adapter), "train", 2, "1")
        (reply,) = grid.send_and_receive([message])
        update, receipt = read_update(reply.content, size), "receipt" in reply.content
        assert bool(np.any(update)) == joined == receipt
        assert ("stays locked" in caplog.text) != joined
    assert anywhere(home, planted) == {}


class Ones:
    """Updates of ones."""

    def check(self, home: Path, order: RoundOrder) -> None:
        pass

    def update(self, home: Path, order: RoundOrder, adapter: Adapter) -> np.ndarray:
        return np.ones(adapter.spec.size, np.float32)
