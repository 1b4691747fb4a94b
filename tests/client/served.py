"""A device that is served, for the length of a test: the server in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from stillroom_client.device import Device
from stillroom_client.serving.server import GrpcServer
from stillroom_client.serving.work import Limits


@contextmanager
def serving(device: Device, *, tcp: str = "", limits: Limits | None = None, grace: float = 2.0) -> Iterator[GrpcServer]:
    """Serve it; what `start` raises is raised here."""
    server = GrpcServer(device, tcp=tcp, limits=limits)
    started, problem = threading.Event(), list[BaseException]()
    loop = asyncio.new_event_loop()
    stopping = asyncio.Event()

    async def run() -> None:
        try:
            await server.start()
        except BaseException as error:
            problem.append(error)
            return
        finally:
            started.set()
        await stopping.wait()
        await server.stop(grace)

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    started.wait()
    try:
        if problem:
            raise problem[0]
        yield server
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(stopping.set)
        thread.join(20)
        loop.close()
        assert not thread.is_alive()


def code(error: Any) -> grpc.StatusCode:
    """The status code of a call that failed."""
    found: grpc.StatusCode = error.value.code()
    return found
