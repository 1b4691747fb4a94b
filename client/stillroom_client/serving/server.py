"""The gRPC server of a home: the `Retrieval` service with health and reflection, on a Unix socket or on loopback.

One server a home. It verifies the release and loads the indexes before it says that it serves. `stop` answers what has begun,
refuses what comes, and takes the socket away.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from stillroom_client.device import Device
from stillroom_client.serving import retrieval_pb2 as pb
from stillroom_client.serving import retrieval_pb2_grpc as stubs
from stillroom_client.serving.access import key_and_certificate, token_of
from stillroom_client.serving.codes import ERROR_KEY, AccessError, ServiceError
from stillroom_client.serving.places import (
    Address,
    claim,
    forget_address,
    free_socket,
    loopback,
    socket_path,
    unix_target,
    write_address,
)
from stillroom_client.serving.service import Context, Retrieval, drained
from stillroom_client.serving.work import Limits, Work

NAME: str = pb.DESCRIPTOR.services_by_name["Retrieval"].full_name


class GrpcServer:
    """Serves a device's home from `start` to `stop`; the caller opens and closes the device.

    Args:
        tcp: HOST:PORT on loopback, with TLS and the home's token; "" for the Unix socket in the home.
    """

    def __init__(self, device: Device, *, tcp: str = "", limits: Limits | None = None) -> None:
        self._device = device
        self._endpoint = loopback(tcp) if tcp else None
        self._work = Work(limits or Limits())
        self._held = ExitStack()
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self.address: Address | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            ServiceError: the home is served already, or the port is taken.
            ReleaseError: the release does not hold.
        """
        home = self._device.home
        self._held.enter_context(claim(home))
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._warm)
            token = token_of(home, make=True) if self._endpoint else None
            limits = self._work.limits
            server = grpc.aio.server(
                interceptors=[_TokenOnly(token)] if token else [],
                options=[
                    ("grpc.so_reuseport", 0),  # or a second process could share the port, and with it the calls
                    ("grpc.max_receive_message_length", limits.message_bytes),
                    ("grpc.max_send_message_length", limits.message_bytes),
                ],
            )
            stubs.add_RetrievalServicer_to_server(Retrieval(self._device, self._work), server)  # type: ignore[no-untyped-call]
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            await self._health.set(NAME, health_pb2.HealthCheckResponse.SERVING)
            reflection.enable_server_reflection((NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
            self.address = self._listen(server)
            await server.start()
            self._server = server
            write_address(home, self.address)
            self._held.callback(forget_address, home)
        except BaseException:
            self._work.close()
            self._held.close()
            raise

    async def stop(self, grace: float = 5.0) -> None:
        """Refuse new calls, answer those that have begun within `grace` seconds, give the home back."""
        if self._server is None:
            return
        server, self._server = self._server, None
        await self._health.enter_graceful_shutdown()
        await server.stop(grace)
        await drained(self._work, 1.0)
        await asyncio.get_running_loop().run_in_executor(None, self._work.close)
        self._held.close()

    def _warm(self) -> None:
        """What the first search would wait for: the release verified, the towers and the indexes loaded."""
        self._device.encoder.encode_queries(["first"])
        self._device.refresh_index()

    def _listen(self, server: grpc.aio.Server) -> Address:
        home = self._device.home
        if self._endpoint is None:
            path = socket_path(home)
            free_socket(path)
            try:
                server.add_insecure_port(unix_target(path))
            except RuntimeError as error:
                raise ServiceError(f"{path} cannot be listened on: {error}") from error
            path.chmod(0o600)
            self._held.callback(path.unlink, missing_ok=True)
            return Address(unix_target(path), secure=False)
        host, port = self._endpoint
        host = f"[{host}]" if ":" in host else host
        credentials = grpc.ssl_server_credentials([key_and_certificate(home)])
        try:
            port = server.add_secure_port(f"{host}:{port}", credentials)
        except RuntimeError as error:
            raise ServiceError(
                f"--tcp {host}:{port} cannot be listened on, another process may: take another port"
            ) from error
        return Address(f"{host}:{port}", secure=True)


class _TokenOnly(grpc.aio.ServerInterceptor):
    """Lets calls with the bearer token through, of every service."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        given = [value for key, value in details.invocation_metadata if key == "authorization"]
        offered = given[0] if len(given) == 1 else b""
        if hmac.compare_digest(offered.encode() if isinstance(offered, str) else offered, self._expected):
            return await continuation(details)
        # As a stream on both sides, so that the answer waits for no message, whatever the method.
        return grpc.stream_stream_rpc_method_handler(_unauthenticated)


async def _unauthenticated(requests: Any, context: Context) -> None:
    message = "no call without the home's token: send it as `authorization: Bearer TOKEN`, from HOME/serving/token"
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, message, ((ERROR_KEY, AccessError.__name__),))
