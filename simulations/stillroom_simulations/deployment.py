"""A Flower deployment rehearsed on one machine: a SuperLink and its SuperNodes as processes on loopback.

For tests and rehearsals of what the product deploys (DESIGN section 5): the same processes, process isolation with a
SuperExec secret for each participant, SQLite state, the thin app bundle of `docker/app`, no telemetry, no update check,
no installation of dependencies at run time. Each participant has a Flower home of its own under the given folder;
nothing is written to the user's.

    with loopback_deployment(nodes=[{"device-home": "a"}, {"device-home": "b"}], folder=folder) as deployment:
        deployment.run(Path("docker/app"), {"coordinator-home": "c"}, timeout=120.0)

Guarantees: every wait is bounded; a process that ends early or a run that fails raises with the tails of all logs; no
process outlives the `with` block, nor this Python process however it ends.

Not for anything else: traffic is plain HTTP (`--insecure`), SuperNodes are not authenticated, and the SuperLink's one
port also serves the Control API, so any local user could submit a run. That is why the address is a constant.
"""

from __future__ import annotations

import json
import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import UserConfigValue

from stillroom_shared.errors import SettingsError
from stillroom_simulations.processes import Processes

Config = Mapping[str, UserConfigValue]

_HOST = "127.0.0.1"
_CONNECTION = "loopback"
_SECRET = "superexec.secret"
_LIST_SECONDS = 30.0

_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # seconds; ten processes polling every second would idle half of a test
    "NO_PROXY": _HOST,
    "no_proxy": _HOST,
    # Several participants share this machine's cores; one thread each also makes sums reproducible.
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class FinishedRun:
    """A run that completed: its id, what the ServerApp logged, and the seconds from submission to completion."""

    id: int
    log: str
    seconds: float


class Deployment:
    """A running SuperLink with its SuperNodes; made by `loopback_deployment`."""

    def __init__(self, processes: Processes, *, environment: Mapping[str, str]) -> None:
        self._processes = processes
        self._environment = environment

    def run(self, app: Path, run_config: Config, *, timeout: float) -> FinishedRun:
        """Submit an app bundle's folder as `flwr run` does, and wait until the run has completed.

        Raises:
            DeploymentError: the run failed, or took more than `timeout` seconds.
        """
        started = time.monotonic()
        stream = ("--stream", "--run-config", _pairs(run_config))
        submitted = self._flwr("run", str(app), _CONNECTION, *stream, timeout=timeout)
        seconds = time.monotonic() - started
        found = re.search(r"started run (\d+)", submitted)
        if found is None:
            raise self._processes.error("`flwr run` did not name the run it started")
        listed = self._flwr("list", _CONNECTION, "--run-id", found[1], "--format", "json", timeout=_LIST_SECONDS)
        status = json.loads(listed)["runs"][0]["status"]
        if status != "finished:completed":
            raise self._processes.error(f"run {found[1]} ended as {status!r}, not as 'finished:completed'")
        return FinishedRun(id=int(found[1]), log=submitted, seconds=seconds)

    def _flwr(self, *arguments: str, timeout: float) -> str:
        command = ["flwr", *arguments]
        return self._processes.run(f"flwr-{arguments[0]}", command, environment=self._environment, timeout=timeout)


@contextmanager
def loopback_deployment(
    *,
    nodes: Sequence[Config],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    timeout: float = 120.0,
) -> Iterator[Deployment]:
    """Start a SuperLink and one SuperNode for each `node_config` in `nodes`; yield when all of them are online.

    folder: for logs, secrets and state; must not hold another deployment's.
    environment: added to that of every process.
    timeout: seconds until the last SuperNode has to be online.
    """
    settings = {**_ENVIRONMENT, **(environment or {})}
    link_address, *node_addresses = [f"{_HOST}:{port}" for port in _free_ports(1 + len(nodes))]
    processes = Processes(folder)
    try:
        _start_link(processes, folder / "link", link_address, settings)
        for number, (address, config) in enumerate(zip(node_addresses, nodes, strict=True), start=1):
            _start_node(processes, folder / f"node-{number}", address, link_address, config, settings)
        names = [f"node-{number}" for number in range(1, 1 + len(nodes))]
        processes.wait_until(
            "every SuperNode to be online",
            # Printed once the link has activated the node, and so lists it to ServerApps.
            lambda: all("SuperNode ID: " in processes.log(name) for name in names),
            timeout=timeout,
        )
        yield Deployment(processes, environment=settings | _operator_home(folder / "operator", link_address))
    finally:
        processes.stop()


def _start_link(processes: Processes, home: Path, address: str, settings: Mapping[str, str]) -> None:
    """A SuperLink, and the SuperExec that starts ServerApps for it."""
    own = {**settings, "FLWR_HOME": str(home)}
    link = ["flower-superlink", "--insecure", *_isolation(home, address), "--database", str(home / "state.sqlite3")]
    processes.serve("link", [*link, "--disable-runtime-dependency-installation"], environment=own)
    processes.serve("link-exec", _superexec(home, address), environment=own)


def _start_node(
    processes: Processes, home: Path, address: str, link: str, config: Config, settings: Mapping[str, str]
) -> None:
    """A SuperNode, and the SuperExec that starts ClientApps for it; it installs no dependencies by default."""
    own = {**settings, "FLWR_HOME": str(home)}
    node = ["flower-supernode", "--insecure", *_isolation(home, address), "--superlink", link]
    processes.serve(home.name, [*node, "--node-config", _pairs(config)], environment=own)
    processes.serve(f"{home.name}-exec", _superexec(home, address), environment=own)


def _isolation(home: Path, address: str) -> list[str]:
    """Arguments for process isolation; makes the participant's home and secret."""
    home.mkdir()
    secret = home / _SECRET
    secret.touch(mode=0o600)
    secret.write_bytes(secrets.token_bytes(32))
    host, port = address.split(":")
    return ["--isolation", "process", "--superexec-auth-secret-file", str(secret), "--host", host, "--port", port]


def _superexec(home: Path, address: str) -> list[str]:
    secret = ["--superexec-auth-secret-file", str(home / _SECRET)]
    return ["flower-superexec", "--insecure", "--runtime-api-address", address, *secret]


def _operator_home(home: Path, address: str) -> dict[str, str]:
    """The environment in which `flwr` knows the loopback SuperLink."""
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink.{_CONNECTION}]\naddress = "{address}"\ninsecure = true\n')
    return {"FLWR_HOME": str(home)}


def _pairs(config: Config) -> str:
    """Flower's command-line form of a configuration: `key="text" other=1`."""
    if odd := [key for key, value in config.items() if '"' in str(value)]:
        raise SettingsError(
            f"values of {odd} hold a double quote, which Flower's command line cannot carry: rename them"
        )
    return " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, all different; held together while they are chosen."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((_HOST, 0))
        return [int(each.getsockname()[1]) for each in sockets]
