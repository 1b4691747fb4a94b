"""Who gets in: the owner, by the modes of a socket and its folder, or by a token over TLS; nobody else."""

from __future__ import annotations

import datetime as dt
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.client.devices import ANIMALS, ROOT, passages
from typer.testing import CliRunner

from stillroom_client.search import Device
from stillroom_shared.cli import build_app
from stillroom_shared.errors import SettingsError
from stillroom_shared.release import Release

grpc = pytest.importorskip("grpc")
pytest.importorskip("grpc_reflection")

from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: E402
from tests.client.served import code, serving  # noqa: E402

from stillroom_client.serving import access, codes, places  # noqa: E402
from stillroom_client.serving import retrieval_pb2 as pb  # noqa: E402
from stillroom_client.serving.client import connect  # noqa: E402
from stillroom_client.serving.codes import AccessError, ServiceError  # noqa: E402
from stillroom_client.serving.retrieval_pb2_grpc import RetrievalStub  # noqa: E402
from stillroom_client.serving.work import Limits  # noqa: E402


@pytest.fixture
def device(tmp_path: Path, tiny_release: Release) -> Iterator[Device]:
    with Device.create(tmp_path / "home", tiny_release, link=True) as made:
        made.add(passages(ANIMALS))
        yield made


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_only_the_owner_can_reach_the_socket(device: Device) -> None:
    """Guards against a socket that the umask, or a folder of before, opens to everybody: gRPC asks nobody who calls."""
    folder = device.home / "serving"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    before = os.umask(0)
    try:
        with serving(device):
            assert mode(folder) == 0o700 and mode(folder / "retrieval.sock") == 0o600
            assert stat.S_ISSOCK((folder / "retrieval.sock").lstat().st_mode)
            assert all(mode(path) == 0o600 for path in folder.iterdir())
    finally:
        os.umask(before)
    assert {path.name for path in folder.iterdir()} == {"lock"}


def test_a_home_is_served_once(device: Device) -> None:
    """Guards against a second server that takes the socket from the first, which then answers nobody."""
    with serving(device), connect(device.home) as client:
        with pytest.raises(ServiceError, match=f"is served already by process {os.getpid()}"), serving(device):
            pass
        with pytest.raises(ServiceError, match="is served already"), serving(device, tcp="127.0.0.1:0"):
            pass
        assert client.healthy() and connect(device.home).healthy()
    with serving(device), connect(device.home) as client:
        assert client.healthy()


def test_a_socket_of_a_crash_is_replaced_and_one_that_answers_is_not(device: Device) -> None:
    """Guards against a home that a crash makes unservable, and against a foreign socket or file that is deleted."""
    path = places.socket_path(device.home)
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving(device), connect(device.home) as client:
        assert client.healthy()
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(path))
        alive.listen()
        with pytest.raises(ServiceError, match="another process answers on"), serving(device):
            pass
    path.unlink()
    path.write_text("precious")
    with pytest.raises(ServiceError, match="is no socket: move it away"), serving(device):
        pass
    assert path.read_text() == "precious"


@pytest.mark.parametrize("name", ["a home", "100%41?#", "Größe", "new\nline"])
def test_any_name_of_a_home_can_be_served(tmp_path: Path, tiny_release: Release, name: str) -> None:
    """Guards against a path that is read as a URI, and then names another socket or none."""
    with Device.create(tmp_path / name, tiny_release, link=True) as device, serving(device):
        assert (device.home / "serving" / "retrieval.sock").exists()
        with connect(device.home) as client:
            assert client.healthy()


def test_a_path_too_long_for_a_socket_goes_elsewhere_or_is_refused(
    tmp_path: Path, tiny_release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against "AF_UNIX path too long" with no way on, and against a folder that another user prepared."""
    home = tmp_path / ("long" * 25)
    runtime = Path(f"/tmp/stillroom-test-{os.getpid()}")
    runtime.mkdir(mode=0o700)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    try:
        with Device.create(home, tiny_release, link=True) as device:
            with pytest.raises(
                SettingsError, match=r"has \d{3} bytes, a Unix socket may have 107: set XDG_RUNTIME_DIR"
            ):
                places.socket_path(home)
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
            with serving(device), connect(home) as client:
                assert client.healthy()
                [folder] = runtime.iterdir()
                assert mode(folder) == 0o700 and mode(folder / "retrieval.sock") == 0o600
            folder.chmod(0o755)
            with pytest.raises(AccessError, match="not a folder that only you can enter"), serving(device):
                pass
    finally:
        subprocess.run(["rm", "-rf", str(runtime)], check=True)


def every_kind_of_call(channel: Any, headers: list[tuple[str, str]]) -> list[Callable[[], object]]:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    stub: Any = RetrievalStub(channel)  # type: ignore[no-untyped-call]
    health: Any = health_pb2_grpc.HealthStub(channel)
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    services = reflection_pb2.ServerReflectionRequest(list_services="")
    given: dict[str, Any] = {"metadata": headers, "timeout": 5}
    return [
        lambda: stub.Search(pb.SearchRequest(query="x"), **given),
        lambda: list(stub.SearchStream(pb.SearchRequest(query="x"), **given)),
        lambda: stub.Add(iter([pb.AddRequest()]), **given),
        lambda: health.Check(health_pb2.HealthCheckRequest(), **given),
        lambda: list(health.Watch(health_pb2.HealthCheckRequest(), **given)),
        lambda: list(reflection.ServerReflectionInfo(iter([services]), **given)),
    ]


def test_without_the_token_nothing_answers(device: Device) -> None:
    """Guards against health, reflection or a stream that is answered to any user of the machine."""
    with serving(device, tcp="127.0.0.1:0") as server, connect(device.home) as client:
        assert len(client.search("tapir")) == 10 and client.healthy()
        assert server.address is not None and server.address.secure
        token, certificate = access.token_of(device.home), access.certificate_of(device.home)
        assert len(token) >= 40
        trusted = grpc.ssl_channel_credentials(certificate)
        wrong = ["Bearer wrong", token, f"Bearer {token[:-1]}", f"bearer {token}x"]
        for headers in ([], *([("authorization", one)] for one in wrong), [("authorization", f"Bearer {token}")] * 2):
            with grpc.secure_channel(server.address.target, trusted) as channel:
                for call in every_kind_of_call(channel, headers):
                    with pytest.raises(grpc.RpcError) as refused:
                        call()
                    assert code(refused) is grpc.StatusCode.UNAUTHENTICATED
        with connect(server.address.target, token="wrong", certificate=certificate) as stranger:
            with pytest.raises(AccessError, match="no call without the home's token"):
                stranger.search("x")
            assert not stranger.healthy()
        with grpc.insecure_channel(server.address.target) as plain, pytest.raises(grpc.RpcError):
            RetrievalStub(plain).Status(pb.StatusRequest(), timeout=2)  # type: ignore[no-untyped-call]


def test_token_and_certificate_are_made_once_and_for_the_owner_only(device: Device, tmp_path: Path) -> None:
    """Guards against a token that changes under its users, and against one that was readable and is used on."""
    with serving(device, tcp="localhost:0"):
        first = access.token_of(device.home), access.certificate_of(device.home)
        names = ("token", "key.pem", "certificate.pem")
        assert all(mode(device.home / "serving" / name) == 0o600 for name in names)
    with serving(device, tcp="[::1]:0"), connect(device.home) as client:
        assert (access.token_of(device.home), access.certificate_of(device.home)) == first and client.healthy()
    (device.home / "serving" / "token").chmod(0o640)
    with pytest.raises(AccessError, match="can be read by others: `chmod 600` it"), serving(device, tcp="127.0.0.1:0"):
        pass
    with pytest.raises(AccessError, match="`stillroom serve --tcp` makes it"):
        access.token_of(tmp_path)


def test_a_certificate_that_ends_or_is_torn_is_made_again(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a server that nobody can connect to any more, ten years on or after a crash between two files."""
    monkeypatch.setattr(access, "_VALID", dt.timedelta(days=29))
    short = access.key_and_certificate(device.home)
    monkeypatch.undo()
    fresh = access.key_and_certificate(device.home)
    assert fresh != short and access.key_and_certificate(device.home) == fresh
    (device.home / "serving" / "key.pem").write_bytes(short[0])
    assert access.key_and_certificate(device.home)[1] != fresh[1]


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0:1", "192.168.1.4:1", "[::]:1", "example.org:1", "127.0.0.1", "127.0.0.1:x", ":1", "127.0.0.1:65536"],
)
def test_nothing_but_loopback_is_listened_on(address: str) -> None:
    """Guards against an index that a whole network can search."""
    with pytest.raises(SettingsError, match=r"--tcp .*(other machines|no HOST:PORT)"):
        places.loopback(address)


def test_a_port_is_not_shared(device: Device, tmp_path: Path, tiny_release: Release) -> None:
    """Guards against SO_REUSEPORT, gRPC's default: a second process gets some of the calls, and their tokens."""
    with (
        serving(device, tcp="127.0.0.1:0") as server,
        Device.create(tmp_path / "two", tiny_release, link=True) as other,
    ):
        assert server.address is not None
        with pytest.raises(ServiceError, match="take another port"), serving(other, tcp=server.address.target):
            pass


@pytest.mark.parametrize("target", ["nowhere", "host:port", "http://localhost"])
def test_a_target_that_is_none_says_what_one_is(target: str) -> None:
    """Guards against a client that waits for a name to resolve."""
    with pytest.raises(SettingsError, match="neither a home, nor unix:PATH, nor HOST:PORT"):
        connect(target)
    with pytest.raises(SettingsError, match="needs a token and a certificate"):
        connect("127.0.0.1:1")


@pytest.mark.parametrize(("name", "extra"), [("SIGTERM", ()), ("SIGINT", ("--tcp", "127.0.0.1:0"))])
def test_the_command_serves_until_a_signal(device: Device, name: str, extra: tuple[str, ...]) -> None:
    """Guards against a service that leaves its socket, or a traceback, when its user ends it."""
    code = "from stillroom_shared.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--home", str(device.home), *extra]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("home is served on ") and line.endswith("; Ctrl-C ends it\n")
        with connect(device.home) as client:
            assert len(client.search("an animal")) == 10
            second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            assert second.returncode == 1 and f"is served already by process {process.pid}" in second.stderr
        process.send_signal(getattr(signal, name))
        assert process.wait(20) == 0 and process.stderr.read() == ""
    assert not (device.home / "serving" / "retrieval.sock").exists()
    assert not (device.home / "serving" / "address").exists()


def test_stubs_are_what_the_proto_says(tmp_path: Path) -> None:
    """Guards against messages that were changed in the .proto and not generated again."""
    pytest.importorskip("grpc_tools")
    name, room = "stillroom_client/serving/retrieval", ROOT / "client"
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{room}", *outputs, f"{name}.proto"]
    subprocess.run(command, check=True, cwd=room)
    for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"):
        made, committed = (folder / f"{name}{suffix}" for folder in (tmp_path, room))
        assert made.read_text() == committed.read_text(), f"{name}{suffix}: `make proto` writes it"


def test_the_client_of_the_manual_runs(
    tmp_path: Path, tiny_release: Release, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against an example that nobody ran since the names changed."""
    manual = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    [example] = re.findall(r"## The client\n\n```python\n(.*?)```", manual, re.DOTALL)
    assert len(example.strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zip.md").write_text("# Zip files\n\nHow to open a zip file.\n")
    with Device.create(Path("my-device"), tiny_release, link=True) as device:
        assert CliRunner().invoke(build_app(), ["index", "add", "zip.md", "--home", "my-device"]).exit_code == 0
        with serving(device):
            exec(example, {})
    assert re.fullmatch(r"1\.0 Zip files .*/zip\.md line 3\n", capsys.readouterr().out)


def test_the_manual_states_the_limits_and_codes_that_hold() -> None:
    """Guards against a manual that promises other numbers than the server keeps."""
    manual, limits = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8"), Limits()
    for stated in (
        f"{limits.message_bytes >> 20} MiB", f"{limits.k:,} of `Search`", f"{limits.streamed:,} of `SearchStream`",
        f"{limits.query_characters:,} characters", f"{limits.passage_characters:,} characters",
        f"{limits.added:,} passages, {limits.added_bytes >> 20} MiB", f"{limits.seconds:.0f} seconds, or",
        f"| {limits.pending}; more",
    ):  # fmt: skip
        assert stated in manual, stated
    for code_ in {found.name for _, found in codes._CODES} | {"INTERNAL"}:
        assert f"| {code_} |" in manual, code_
