"""Where a home is served: its folder for that, the right to serve it, its socket, and where clients find it.

| file in `HOME/serving/` (0700) | holds |
|---|---|
| `lock` | held by the server that runs |
| `address` | where it listens, while it runs |
| `retrieval.sock` | the Unix socket (0600) |
| `token`, `certificate.pem`, `key.pem` | for `--tcp` (`access.py`) |

A Unix socket is opened by those who may write to it and may enter its folder; both are the owner's alone, and root's. gRPC for
Python does not hand out the credentials of the peer (SO_PEERCRED), so these modes are the whole argument; a test holds them.
"""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import json
import os
import shlex
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from stillroom_client.serving.codes import AccessError, ServiceError
from stillroom_shared.errors import DataError, SettingsError
from stillroom_shared.files import replace_file

FOLDER = "serving"
SOCKET_BYTES = 107
"""Of the path of a Unix socket: `sun_path` in sockaddr_un has 108 with the final zero (unix(7))."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a service listens, as gRPC writes it ("unix:/home/me/index/serving/retrieval.sock", "127.0.0.1:50051")."""

    target: str
    secure: bool

    def __str__(self) -> str:
        return self.target


def serving_folder(home: Path) -> Path:
    """The folder of these files, made when it is not there, for its owner only."""
    folder = home.resolve() / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    return folder


@contextmanager
def claim(home: Path) -> Iterator[None]:
    """The right to serve a home, one holder at a time over all processes; a crash gives it back.

    Raises:
        ServiceError: another server has it.
    """
    handle = os.open(serving_folder(home) / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServiceError(
                f"{home} is served already by process {os.read(handle, 20).decode() or '?'}: connect to it, or end it first"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


def socket_path(home: Path) -> Path:
    """Where the socket of a home lies: in it, or in XDG_RUNTIME_DIR when that path is too long for a socket.

    Raises:
        SettingsError: both are.
    """
    own = home.resolve() / FOLDER / "retrieval.sock"
    if len(os.fsencode(own)) <= SOCKET_BYTES:
        return own
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isabs(runtime):
        other = Path(runtime) / f"stillroom-{hashlib.sha256(os.fsencode(own)).hexdigest()[:16]}" / "retrieval.sock"
        if len(os.fsencode(other)) <= SOCKET_BYTES:
            other.parent.mkdir(mode=0o700, exist_ok=True)
            _refuse_foreign_folder(other.parent)
            return other
    raise SettingsError(
        f"{own} has {len(os.fsencode(own))} bytes, a Unix socket may have {SOCKET_BYTES}: set XDG_RUNTIME_DIR to a "
        "short folder of yours, move the home, or serve with --tcp 127.0.0.1:0"
    )


def free_socket(path: Path) -> None:
    """Remove a socket that a crash left behind; ask while the home is claimed.

    Raises:
        ServiceError: somebody answers on it, or it is no socket.
    """
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise ServiceError(f"{path} is no socket: move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(5)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise ServiceError(f"{path} cannot be tried ({error}): end the process that holds it") from error
    raise ServiceError(f"another process answers on {path}: end it first")


def unix_target(path: Path) -> str:
    """The path as gRPC's URI."""
    return f"unix:{quote(str(path))}"


def loopback(address: str) -> tuple[str, int]:
    """Host and port of `--tcp`.

    >>> loopback("localhost:8443"), loopback("[::1]:0")
    (('127.0.0.1', 8443), ('::1', 0))
    >>> loopback("0.0.0.0:8443")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    stillroom_shared.errors.SettingsError: --tcp 0.0.0.0:8443 would be reached from other machines: ...

    Raises:
        SettingsError: it is none, or can be reached from other machines.
    """
    host, colon, port = address.rpartition(":")
    host = {"localhost": "127.0.0.1"}.get(host, host.removeprefix("[").removesuffix("]"))
    if not (colon and port.isascii() and port.isdigit() and int(port) < 65_536):
        raise SettingsError(
            f"--tcp {address} is no HOST:PORT: such as 127.0.0.1:8443, or 127.0.0.1:0 for any free port"
        )
    try:
        near = ipaddress.ip_address(host).is_loopback
    except ValueError:
        near = False
    if not near:
        raise SettingsError(f"--tcp {address} would be reached from other machines: take 127.0.0.1, [::1] or localhost")
    return host, int(port)


def write_address(home: Path, address: Address) -> None:
    """Say where this home is served."""
    content = json.dumps({"target": address.target, "secure": address.secure})
    replace_file(serving_folder(home) / "address", content.encode())


def forget_address(home: Path) -> None:
    """The home is not served any more."""
    with suppress(FileNotFoundError):
        (home.resolve() / FOLDER / "address").unlink()


def read_address(home: Path) -> Address:
    """Where a home is served; `ServiceError` when it is not."""
    path = home.resolve() / FOLDER / "address"
    try:
        found = json.loads(path.read_bytes())
        return Address(str(found["target"]), bool(found["secure"]))
    except FileNotFoundError:
        raise ServiceError(f"{home} is not served: `stillroom serve --home {shlex.quote(str(home))}` does it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}): start `stillroom serve` again") from error


def _refuse_foreign_folder(folder: Path) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise AccessError(f"{folder} is not a folder that only you can enter: remove it")
