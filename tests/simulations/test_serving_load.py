"""The load generator: what it counts, and that it counts what went wrong."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom_client.device import Device
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import DataError
from stillroom_shared.release import Release

pytest.importorskip("grpc_reflection")

from stillroom_simulations import serving_load as load


def test_a_served_home_is_loaded_and_measured(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against figures of a server that was never asked, and against a server that outlives its measurement."""
    with Device.create(tmp_path / "home", tiny_release, link=True) as device:
        vectors = np.eye(20, 32, dtype=np.float32)
        device.add([Passage(f"p{n}", "zoo", f"tapir number {n}") for n in range(20)], vectors)
    found = load.serving_load(tmp_path / "home", ["a tapir", "leaves"], 1.0, 8, seed=1, closed_seconds=0.5)
    assert not found.closed.errors and not found.open.errors and found.clients == 8
    assert found.open.asked_per_second == found.closed.answered_per_second / 2
    assert found.open.searches == pytest.approx(found.open.asked_per_second, rel=0.5)
    assert 0 < found.open.p50_ms <= found.open.p90_ms <= found.open.p99_ms <= found.open.worst_ms
    assert found.memory_peak >= max(found.memory_before, found.memory_after) > 20 and found.tail >= 1
    assert 0 < found.closed.server_cores <= found.cores + 0.1
    assert not (tmp_path / "home" / "serving" / "address").exists()
    with pytest.raises(DataError, match="no queries"):
        load.serving_load(tmp_path / "home", [])


def test_a_stall_is_in_every_latency_that_it_delays() -> None:
    """Guards against coordinated omission: counted from when they are sent, searches that a stall held up look instant."""
    stalls = iter([0.5])

    async def search(*_: Any, **__: Any) -> None:
        time.sleep(next(stalls, 0.0))  # the whole loop stands still

    found = asyncio.run(load._open([search], ["q"], 1.0, 100.0, random.Random(0), pid=1))
    assert found.searches > 70 and found.worst_ms > 450  # those due in the first half second wait for its end
    assert found.p90_ms > 250 and found.late_p99_ms > 250


def test_failed_searches_are_counted_by_code() -> None:
    """Guards against an error rate of zero because errors were not looked at."""
    import grpc

    async def search(*_: Any, **__: Any) -> None:
        await asyncio.sleep(0.001)
        raise grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), grpc.aio.Metadata())

    found = asyncio.run(load._closed([search] * 3, ["q"], 0.1, random.Random(0), pid=1))
    assert found.errors == {"RESOURCE_EXHAUSTED": found.searches} and found.answered_per_second == 0
