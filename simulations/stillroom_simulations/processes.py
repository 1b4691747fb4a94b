"""Processes that end together: services that must keep running, commands that run to their end, a log for each.

Guarantees: every wait is bounded; a service that ends early, a command that fails and a wait that takes too long raise
`DeploymentError` with the end of every log; after `stop`, and also when this Python process is killed, no process and
no child that stayed in its group is left. POSIX only.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from stillroom_shared.errors import StillroomError

_POLL_SECONDS = 0.2
_LOG_TAIL = 40

# Reads process groups until its input ends, which also happens when this process is killed, then ends what is left.
_KEEPER = """
import os, signal, sys
for group in [int(line) for line in sys.stdin]:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


class DeploymentError(StillroomError):
    """A process did not do what was asked of it in time; the message holds the end of every log."""


class Processes:
    """Named processes, each with a process group of its own, logging to `folder/NAME.log`."""

    def __init__(self, folder: Path, *, stop_seconds: float = 5.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._stop_seconds = stop_seconds
        self._services: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: list[subprocess.Popen[bytes]] = []
        self._keeper = subprocess.Popen(
            [sys.executable, "-c", _KEEPER], stdin=subprocess.PIPE, text=True, start_new_session=True
        )

    def serve(self, name: str, command: Sequence[str], *, environment: Mapping[str, str]) -> None:
        """Start a process that is expected to run until `stop`. `environment` is added to this process's own."""
        self._services[name] = self._start(name, command, environment)

    def run(self, name: str, command: Sequence[str], *, environment: Mapping[str, str], timeout: float) -> str:
        """Run a process to its end and return what it printed."""
        process = self._start(name, command, environment)
        self._commands.append(process)
        self.wait_until(f"{name} to end", lambda: process.poll() is not None, timeout=timeout)
        if process.returncode != 0:
            raise self.error(f"{name} ended with status {process.returncode}")
        return self.log(name)

    def wait_until(self, what: str, done: Callable[[], bool], *, timeout: float) -> None:
        """Poll until `done()`; raises when that takes more than `timeout` seconds or a service has ended."""
        deadline = time.monotonic() + timeout
        while not done():
            for name, process in self._services.items():
                if process.poll() is not None:
                    raise self.error(f"{name} ended with status {process.returncode} while waiting for {what}")
            if time.monotonic() > deadline:
                raise self.error(f"waited {timeout:g} s for {what}: read the logs, or give a longer timeout")
            time.sleep(_POLL_SECONDS)

    def log(self, name: str) -> str:
        """What a process has printed so far."""
        return self._log_file(name).read_text(errors="replace")

    def error(self, what: str) -> DeploymentError:
        """An error that carries the end of every log."""
        tails = [
            "\n".join([f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-_LOG_TAIL:]])
            for path in sorted(self._folder.glob("*.log"))
        ]
        return DeploymentError("\n".join([what, *tails]))

    def stop(self) -> None:
        """Ask every process group to end, then have the keeper end what did not."""
        processes = [*self._services.values(), *self._commands]
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + self._stop_seconds
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self._keeper.communicate()
        for process in processes:
            process.wait()

    def _start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        # Commands of this Python's packages come first; processes that start others by name find the same ones.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        program = shutil.which(command[0], path=path)
        if program is None:
            raise DeploymentError(f"command {command[0]!r} is not installed: pip install 'stillroom[federated]'")
        with self._log_file(name).open("wb") as log:
            process = subprocess.Popen(
                [program, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment, "PATH": path},
                start_new_session=True,
            )
        assert self._keeper.stdin is not None
        print(process.pid, file=self._keeper.stdin, flush=True)
        return process

    def _log_file(self, name: str) -> Path:
        return self._folder / f"{name}.log"
