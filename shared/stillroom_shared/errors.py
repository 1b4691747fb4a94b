"""One small tree of errors, so that a caller can catch everything Stillroom raises on purpose.

Every message names the thing, its value and the remedy. Anything that is not a `StillroomError` is a defect in Stillroom.
"""


class StillroomError(Exception):
    """Base of every error that Stillroom raises on purpose."""


class SettingsError(StillroomError):
    """A setting is unknown, missing or out of range."""


class DataError(StillroomError):
    """Input data cannot be read: the message names file, line and field."""


class NotFoundError(DataError):
    """What was named is not there."""


class StoreError(DataError):
    """The store of a device cannot be used now: blocked by another process, on a full disk, or damaged."""


class EncryptionError(StillroomError):
    """A home is encrypted, and its key is not at hand or does not fit; or what it sealed was altered."""


class ReleaseError(StillroomError):
    """A release or an adapter is incomplete, altered or signed by a key that is not trusted."""


class LedgerError(StillroomError):
    """A ledger cannot be read, does not verify, or was asked to do what would break it."""


class LedgerLostError(LedgerError):
    """A ledger is gone, emptied or damaged: trying again will not help, the counterpart's receipts will."""


class BudgetError(StillroomError):
    """A planned spend would pass the privacy budget, or a budget cannot be met at all."""


class PrivacyError(StillroomError):
    """Something that a privacy guarantee rests on does not hold, so nothing was computed from private data."""


class ProtocolError(StillroomError):
    """A message does not have the closed schema that the protocol allows."""


class MissingExtraError(StillroomError):
    """A command needs an optional dependency that is not installed."""

    def __init__(self, command: str, extra: str, module: str) -> None:
        super().__init__(
            f"`{command}` needs the module {module!r}, which is not installed: pip install 'stillroom[{extra}]'"
        )
