"""Whole federations in one process: populations, engines, the demo and its report.

Public names are loaded when first asked for: the command line imports this package to print its help.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom_simulations.engine import Faults as Faults
    from stillroom_simulations.engine import InProcessGrid as InProcessGrid
    from stillroom_simulations.engine import run_server_app as run_server_app
    from stillroom_simulations.federation import run_federation as run_federation
    from stillroom_simulations.measure import Trial as Trial
    from stillroom_simulations.one_run_audit import OneRunAudit as OneRunAudit
    from stillroom_simulations.one_run_audit import audit_one_run as audit_one_run
    from stillroom_simulations.population import SimulatedDevice as SimulatedDevice
    from stillroom_simulations.population import make_population as make_population

_HOME = {
    "Faults": "engine",
    "InProcessGrid": "engine",
    "OneRunAudit": "one_run_audit",
    "SimulatedDevice": "population",
    "Trial": "measure",
    "audit_one_run": "one_run_audit",
    "make_population": "population",
    "run_federation": "federation",
    "run_server_app": "engine",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
