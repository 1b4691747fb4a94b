"""A made-up run of the demo, in the layout of results.json: figures that hang together, none of them measured."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from stillroom_shared.statement import COORDINATOR, OBSERVERS, READERS, PrivacyStatement


def sample_results() -> dict[str, Any]:
    """A fresh, mutable copy each time."""
    return {
        "schema": 1,
        "corpus": {
            "name": "docstrings-full",
            "hash": "9f2c41d7a0b35e6688c1f04d2ab97e53c0d1846fe2397b5a1c84d06f7e5b3a92",
            "passages": 12_444,
            "queries": {"train": 8_050, "dev": 1_260, "test": 3_134},
            "public_owners": ["python", "torch", "transformers", "huggingface_hub"],
            "private_owners": ["flwr", "fsspec", "networkx", "numpy", "scipy", "sklearn", "sqlalchemy", "sympy"],
        },
        "seed": 7,
        "scale": "full",
        "versions": {"stillroom": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "numpy": "2.4.6", "flwr": "1.41.0"},
        "machine": "2 cores, Linux x86_64, no GPU",
        "teacher": stage(0.494, 0.705),
        "student": stage(0.4755, 0.681),
        "federated": stage(0.4912, 0.699),
        "federated_nonprivate": stage(0.4935, 0.703),
        "device": stage(0.4887, 0.697),
        "ratios": {
            "student_to_teacher": {"value": 0.9626, "interval": [0.9571, 0.968], "goal": ">= 0.96", "holds": False},
            "federated_to_teacher": {"value": 0.9943, "interval": [0.988, 1.0004], "goal": ">= 0.98", "holds": True},
            "device_loss": {"value": 0.0025, "interval": [0.0009, 0.0041], "goal": "<= 0.005", "holds": True},
        },
        "privacy": privacy(),
        "rounds": [
            {
                "round": number,
                "epsilon": 3.71 * math.sqrt(number / 15),
                "ndcg_at_10": 0.4655 + 0.0157 * (1 - math.exp(-number / 4)) + 0.0009 * math.sin(2.3 * number),
                "cohort": 172,
                "update_norm": 0.91 + 0.02 * math.cos(number) if number else None,
            }
            for number in (0, 1, 2, 4, 5, 6, 8, 9, 10, 11, 12, 14, 15)
        ],
        "rounds_nonprivate": [
            {"round": number, "ndcg_at_10": 0.4655 + 0.018 * (1 - math.exp(-number / 3))} for number in range(16)
        ],
        "rounds_on": {"split": "dev", "teacher_ndcg_at_10": 0.4846},
        "query_tower": {"parameters": 17_331_072, "bytes": 20_114_432},
        "document_tower": {"parameters": 22_713_216, "bytes": 23_026_176},
        "adapter": {"values": 9_216, "bytes": 37_624},
        "devices": {
            "count": 859,
            "passages_min": 31,
            "passages_median": 148,
            "passages_max": 2_000,
            "index_bytes_per_passage": 392.0,
        },
        "search": {"p50_ms": 1.31, "p99_ms": 2.94, "queries": 2_000},
        "seconds": {
            "corpus": 21.4,
            "distil": 148.0,
            "release": 14.2,
            "devices": 33.1,
            "rounds": 71.5,
            "evaluate": 48.9,
        },
        "peak_memory_bytes": 3_060_000_000,
        "examples": examples(),
    }


def stage(whole: float, own: float) -> dict[str, Any]:
    """One stage's quality, with intervals of the width that 3,964 test queries give."""
    return metrics(whole, 0.0118) | {"own_index": metrics(own, 0.0107)}


def metrics(ndcg: float, half_width: float) -> dict[str, Any]:
    values = {"ndcg_at_10": ndcg, "recall_at_10": ndcg + 0.15 * (1 - ndcg) + 0.06, "mrr_at_10": ndcg - 0.055}
    spread = dict(zip(values, np.array([1.0, 1.16, 1.08]) * half_width, strict=True))
    intervals = {name: [value - float(spread[name]), value + float(spread[name])] for name, value in values.items()}
    return values | {"intervals": intervals}


def privacy() -> dict[str, Any]:
    """The statement is the real one, so that the report is checked on the words it will carry."""
    by_accountant = {"PLD": 3.71, "RDP": 4.02}
    against = {READERS: 3.71, OBSERVERS: 13.6, COORDINATOR: None}
    facts = {
        "delta": 1.16e-4, "unit": "user", "mechanism": "central", "noise_multiplier": 1.5, "sampling_rate": 0.2,
        "rounds": 15, "devices": 859, "clip_norm": 0.3,
    }  # fmt: skip
    words = PrivacyStatement.model_validate(
        facts | {"epsilon": by_accountant, "against": against, "rehearsal": True}
    ).paragraph()
    return facts | {
        "epsilon": 3.71, "epsilon_by_accountant": by_accountant, "accountant": "PLD", "adversary": READERS,
        "against": against, "coordinator": "none", "paragraph": words,
    }  # fmt: skip


def examples() -> list[dict[str, Any]]:
    zipped = passage(
        "zipfile.ZipFile.namelist#1f",
        "Return a list of archive members by name. The archive must be open with mode 'r' or 'a'; "
        "see `infolist` for what else is known about each of them.",
        True,
    )
    tar = passage(
        "tarfile.TarFile.list#0a", "Print a table of contents to sys.stdout. If verbose is False, only names.", False
    )
    norm = passage(
        "numpy.linalg.norm#7c",
        "This function is able to return one of eight different matrix norms, or one of an infinite number of vector "
        "norms (described below), depending on the value of the ``ord`` parameter.",
        True,
    )
    sparse = passage(
        "scipy.sparse.linalg.norm#e1", "This function is able to return one of seven different sparse norms.", False
    )
    flow = passage(
        "networkx.maximum_flow#55", "The maximum flow value and a dict of the flow along each edge of <G>.", True
    )
    cut = passage("networkx.minimum_cut#b2", "The value and the node partition of a minimum (s, t)-cut.", False)
    return [
        example("List the members of an archive", "fsspec", [zipped, tar], [tar, zipped], [zipped, tar]),
        example("Matrix or vector norm of an array", "numpy", [norm, sparse], [norm, sparse], [norm, sparse]),
        example("Find a maximum single-commodity flow & its value", "networkx", [flow, cut], [cut, flow], [cut, flow]),
    ]


def example(query: str, owner: str, *rankings: list[dict[str, Any]]) -> dict[str, Any]:
    answer = next(result["passage_id"] for result in rankings[0] if result["relevant"])
    towers = dict(zip(("teacher", "student", "federated"), rankings, strict=True))
    return {"query": query, "owner": owner, "answer_id": answer, "results": towers}


def passage(key: str, text: str, relevant: bool) -> dict[str, Any]:
    return {"passage_id": key, "text": text, "relevant": relevant}
