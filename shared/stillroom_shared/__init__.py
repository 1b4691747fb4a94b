"""What both sides of Stillroom must agree on: corpora, releases, mechanisms, the ledger. Imports no other room.

Public names are loaded when first asked for: the command line imports this package to print its help.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom_shared.accounting import epsilon as epsilon
    from stillroom_shared.adapter import Adapter as Adapter
    from stillroom_shared.adapter import AdapterSpec as AdapterSpec
    from stillroom_shared.beir import load_beir as load_beir
    from stillroom_shared.corpus import Corpus as Corpus
    from stillroom_shared.corpus import Passage as Passage
    from stillroom_shared.corpus import Query as Query
    from stillroom_shared.correlated import Correlated as Correlated
    from stillroom_shared.correlated import calibrate_correlated as calibrate_correlated
    from stillroom_shared.errors import StillroomError as StillroomError
    from stillroom_shared.ledger import Budget as Budget
    from stillroom_shared.ledger import Ledger as Ledger
    from stillroom_shared.local_mechanism import Local as Local
    from stillroom_shared.local_mechanism import calibrate_local as calibrate_local
    from stillroom_shared.mechanism import Central as Central
    from stillroom_shared.mechanism import NoPrivacy as NoPrivacy
    from stillroom_shared.mechanism import calibrate as calibrate
    from stillroom_shared.release import Release as Release
    from stillroom_shared.release import SealedAdapter as SealedAdapter
    from stillroom_shared.release import open_adapter as open_adapter
    from stillroom_shared.release import open_release as open_release
    from stillroom_shared.settings import Settings as Settings
    from stillroom_shared.settings import load_settings as load_settings
    from stillroom_shared.signing import SigningKey as SigningKey
    from stillroom_shared.statement import PrivacyStatement as PrivacyStatement

_HOME = {
    "Adapter": "adapter",
    "AdapterSpec": "adapter",
    "Budget": "ledger",
    "Central": "mechanism",
    "Corpus": "corpus",
    "Correlated": "correlated",
    "Ledger": "ledger",
    "Local": "local_mechanism",
    "NoPrivacy": "mechanism",
    "Passage": "corpus",
    "PrivacyStatement": "statement",
    "Query": "corpus",
    "Release": "release",
    "SealedAdapter": "release",
    "Settings": "settings",
    "SigningKey": "signing",
    "StillroomError": "errors",
    "calibrate": "mechanism",
    "calibrate_correlated": "correlated",
    "calibrate_local": "local_mechanism",
    "epsilon": "accounting",
    "load_beir": "beir",
    "load_settings": "settings",
    "open_adapter": "release",
    "open_release": "release",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
