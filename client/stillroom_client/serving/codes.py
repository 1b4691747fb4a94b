"""Errors on their way over the wire: what Stillroom raises becomes a status code and its name, and the same error again.

| raised in the service | status code | raised in the client |
|---|---|---|
| `SettingsError`, `FilterError`, `DataError`: what was asked is wrong | INVALID_ARGUMENT | the same |
| `NotFoundError`: a passage that is not there | NOT_FOUND | the same |
| `StoreError`: the store is locked, damaged or has no space | UNAVAILABLE | the same |
| `ReleaseError` and every other `StillroomError` | FAILED_PRECONDITION | the same |
| `OverloadedError`, `DeadlineError`, `AccessError` | RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED, UNAUTHENTICATED | the same |
| anything else, a defect | INTERNAL, with the name of its class and nothing else | `ServiceError` |
| nobody answers | - | `ServiceError` |
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc

from stillroom_client.filters import FilterError
from stillroom_shared import errors
from stillroom_shared.errors import StillroomError

ERROR_KEY = "stillroom-error"
"""Trailing metadata that names the class."""

_MOST_BYTES = 4_000  # of a message: all metadata of a call must stay under 8 KB


class ServiceError(StillroomError):
    """The service does not answer, or not as it should."""


class OverloadedError(ServiceError):
    """The service has more to do than it takes on, or an answer is larger than a message may be."""


class DeadlineError(ServiceError):
    """The time that the caller gave, or that the service allows, is over."""


class AccessError(ServiceError):
    """The token is missing or wrong."""


# The first class that fits decides.
_CODES: tuple[tuple[type[StillroomError], grpc.StatusCode], ...] = (
    (errors.NotFoundError, grpc.StatusCode.NOT_FOUND),
    (errors.StoreError, grpc.StatusCode.UNAVAILABLE),
    (errors.SettingsError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.DataError, grpc.StatusCode.INVALID_ARGUMENT),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (AccessError, grpc.StatusCode.UNAUTHENTICATED),
    (StillroomError, grpc.StatusCode.FAILED_PRECONDITION),
)
_NAMED: tuple[type[StillroomError], ...] = (
    FilterError,
    OverloadedError,
    DeadlineError,
    AccessError,
    errors.NotFoundError,
    errors.StoreError,
    errors.SettingsError,
    errors.DataError,
    errors.ReleaseError,
    errors.LedgerError,
    errors.LedgerLostError,
    errors.BudgetError,
    errors.PrivacyError,
    errors.ProtocolError,
)
_CLASSES = {kind.__name__: kind for kind in _NAMED}
_UNNAMED: dict[grpc.StatusCode, type[StillroomError]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAUTHENTICATED: AccessError,
}


def code_of(error: Exception) -> tuple[grpc.StatusCode, str, str]:
    """Status code, message and the name for `ERROR_KEY` ("" for a defect, whose own message may quote documents).

    >>> code_of(errors.SettingsError("k = 0 is out of range"))
    (<StatusCode.INVALID_ARGUMENT: (3, 'invalid argument')>, 'k = 0 is out of range', 'SettingsError')
    >>> code_of(ValueError("something about a document"))[1]
    'a defect in Stillroom (ValueError): the terminal of `stillroom serve` says where'
    """
    for kind, code in _CODES:
        if isinstance(error, kind):
            named = next((c for c in type(error).__mro__ if c.__name__ in _CLASSES), type(error))
            return code, _cut(str(error)), named.__name__
    message = f"a defect in Stillroom ({type(error).__name__}): the terminal of `stillroom serve` says where"
    return grpc.StatusCode.INTERNAL, message, ""


def raised(error: Any, server: str) -> StillroomError:
    """The error of a failed call, a `grpc.RpcError` that has `code`, `details` and `trailing_metadata`."""
    code, details = error.code(), error.details() or ""
    metadata: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()
    name = next((str(value) for key, value in metadata if key == ERROR_KEY), "")
    if name in _CLASSES:
        return _CLASSES[name](details)
    if code is grpc.StatusCode.UNAVAILABLE:
        return ServiceError(f"{server} does not answer ({details}): is `stillroom serve` running there?")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and not name:
        details = f"{server} did not answer in time: give `connect` a larger timeout, or ask for less"
    kind = _UNNAMED.get(code, ServiceError)
    return kind(details if name or kind is not ServiceError else f"{server} failed ({code.name}): {details}")


def _cut(message: str) -> str:
    # gRPC writes each byte that is no printable ASCII as three.
    if len(message.encode()) * (1 if message.isascii() else 3) <= _MOST_BYTES:
        return message
    return message.encode()[: _MOST_BYTES // 3].decode(errors="ignore") + " [...]"
