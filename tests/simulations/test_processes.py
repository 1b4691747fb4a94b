"""Processes that end together, with ordinary commands in place of Flower's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillroom_simulations.processes import DeploymentError, Processes

# Ignores the polite signal, has a child that does too, and prints both process ids.
_STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child:
    print(os.getpid(), child, flush=True)
time.sleep(600)
"""
_OWNER = f"""
import os, signal, sys
from pathlib import Path
from stillroom_simulations.processes import Processes
processes = Processes(Path(sys.argv[1]))
processes.serve("stubborn", [sys.executable, "-c", {_STUBBORN!r}], environment={{}})
processes.wait_until("its ids", lambda: processes.log("stubborn").endswith("\\n"), timeout=20.0)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    running = Processes(tmp_path / "logs", stop_seconds=0.5)
    yield running
    running.stop()


def _gone(pids: list[int]) -> bool:
    """Whether all have ended within ten seconds; a zombie that nobody has reaped yet has ended."""
    deadline = time.monotonic() + 10.0
    while alive := [pid for pid in pids if _state(pid) not in ("", "Z")]:
        if time.monotonic() > deadline:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


def _state(pid: int) -> str:
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return found.stdout.strip()[:1]


def test_stop_ends_processes_that_will_not_and_their_children(tmp_path: Path) -> None:
    """A SuperExec that hangs would keep ports, memory and two cores until the machine is restarted."""
    processes = Processes(tmp_path, stop_seconds=0.2)
    try:
        processes.serve("stubborn", [sys.executable, "-c", _STUBBORN], environment={})
        processes.wait_until("its ids", lambda: processes.log("stubborn").endswith("\n"), timeout=20.0)
    finally:
        processes.stop()
    pids = list(map(int, processes.log("stubborn").split()))
    assert len(pids) == 2 and _gone(pids)


def test_nothing_outlives_an_owner_that_is_killed(tmp_path: Path) -> None:
    """A test run that is killed for taking too long would leave a deployment behind on every machine of a farm."""
    owner = subprocess.run([sys.executable, "-c", _OWNER, str(tmp_path)], timeout=60, check=False)
    assert owner.returncode == -signal.SIGKILL
    pids = list(map(int, (tmp_path / "stubborn.log").read_text().split()))
    assert len(pids) == 2 and _gone(pids)


def test_a_service_that_ends_early_is_reported_with_its_log(processes: Processes) -> None:
    """Waiting out the whole timeout for a SuperLink that died at once, and then not knowing why."""
    processes.serve("link", [sys.executable, "-c", "print('port is taken'); raise SystemExit(3)"], environment={})
    with pytest.raises(DeploymentError, match=r"(?s)link ended with status 3 .*--- link.log\nport is taken"):
        processes.wait_until("the SuperLink", lambda: False, timeout=60.0)


def test_a_wait_is_bounded(processes: Processes) -> None:
    """A run that never completes must not hang the tests."""
    processes.serve("link", [sys.executable, "-c", "import time; time.sleep(600)"], environment={})
    with pytest.raises(DeploymentError, match=r"waited 0\.3 s for the round"):
        processes.wait_until("the round", lambda: False, timeout=0.3)


def test_a_command_returns_what_it_printed_or_raises(processes: Processes) -> None:
    """A submission that failed must not pass for a run without output."""
    show = "import os; print(os.environ['GREETING'])"
    assert (
        processes.run("hello", [sys.executable, "-c", show], environment={"GREETING": "hello"}, timeout=20.0)
        == "hello\n"
    )
    with pytest.raises(DeploymentError, match=r"(?s)sorry ended with status 1.*--- sorry.log\nno SuperLink there"):
        processes.run("sorry", [sys.executable, "-c", "exit('no SuperLink there')"], environment={}, timeout=20.0)
    with pytest.raises(DeploymentError, match="pip install"):
        processes.serve("missing", ["flower-that-does-not-exist"], environment={})
