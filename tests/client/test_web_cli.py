"""`stillroom serve --web`, as a process: what it prints, to whom, and what it leaves behind."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stillroom_client.device import Device
from stillroom_shared.release import Release

COMMAND = [sys.executable, "-c", "from stillroom_shared.cli import main; main()", "serve"]


@pytest.fixture
def home(tmp_path: Path, tiny_release: Release) -> Path:
    Device.create(tmp_path / "home", tiny_release, link=True).close()
    return tmp_path / "home"


@contextmanager
def serving(home: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and its first line."""
    command = [*COMMAND, "--web", "--home", str(home), *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline()
        finally:
            process.kill()


def answers(address: str) -> int:
    found = re.search(r"127\.0\.0\.1:(\d+)/#([0-9a-f]{64})", address)
    assert found, address
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=20)
    headers = {"Authorization": f"Bearer {found[2]}", "Content-Type": "application/json"}
    connection.request("POST", "/api/status", "{}", headers)
    return connection.getresponse().status


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_the_printed_address_works_until_the_server_ends(home: Path, ending: signal.Signals) -> None:
    """Guards against an address that leads nowhere, and a key that outlives its server in the home."""
    with serving(home) as (process, line):
        assert answers(line) == 200 and (home / "web.html").exists()
        process.send_signal(ending)
        assert process.wait(20) == 0
    assert not (home / "web.html").exists()


def test_a_service_prints_no_key(home: Path) -> None:
    """Guards against a key in the journal of the system, which others may read."""
    with serving(home, "--quiet") as (process, line):
        assert f"open {home / 'web.html'}" in line
        assert answers((home / "web.html").read_text()) == 200
        process.terminate()
        assert process.stdout is not None and not re.search("[0-9a-f]{64}", line + process.stdout.read())


def test_the_browser_is_not_given_the_key_itself(home: Path, tmp_path: Path) -> None:
    """Guards against a key in the list of processes, which every user of the machine can read."""
    browser, called = tmp_path / "browser", tmp_path / "called"
    browser.write_text(f'#!/bin/sh\necho "$@" > {called}.partial && mv {called}.partial {called}\n')
    browser.chmod(0o755)
    with serving(home, "--open", BROWSER=f"{browser} %s"):
        end = time.monotonic() + 20
        while not called.exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert called.read_text().strip() == (home / "web.html").absolute().as_uri()


def test_what_cannot_be_served_is_one_line(home: Path, tmp_path: Path) -> None:
    """Guards against a traceback for a folder that is no home."""
    done = subprocess.run([*COMMAND, "--web", "--home", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode and "is not the home of a device" in done.stderr and "Traceback" not in done.stderr
