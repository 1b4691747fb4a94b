"""A simulated population: who owns which queries and passages (DESIGN section 8).

A device is about ten training queries of one owner with their passages, the held-out queries that fall to it with theirs,
and distractor passages of the same owner. Queries of one topic stay together, whatever their split: one person asks them.
Which passages a device owns, and the order of everything, comes from one seed.
Devices may own copies of the same passage, as people do; no device reads another's store.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stillroom_shared.corpus import Corpus, Passage, Query
from stillroom_shared.settings import PopulationSettings


@dataclass(frozen=True, kw_only=True)
class SimulatedDevice:
    """One device's own data. `held_out` are the dev and test queries whose passages it owns; it never trains on them."""

    name: str
    owner: str
    training: tuple[Query, ...]
    held_out: tuple[Query, ...]
    passages: tuple[Passage, ...]


def make_population(corpus: Corpus, settings: PopulationSettings, *, seed: int) -> tuple[SimulatedDevice, ...]:
    """Divide the private corpus among devices; every query and every judged passage belongs to at least one.

    The number of passages is log-normal around the median, so that a few devices own many. An owner with fewer training
    queries than one device needs becomes one device. With `silos`, every owner is one device that owns all its passages.
    """
    generator = np.random.default_rng(np.random.SeedSequence([seed, 0x9E3779B9]))
    devices: list[SimulatedDevice] = []
    for owner in corpus.owners:
        own = corpus.restrict(lambda name, owner=owner: name == owner)  # type: ignore[misc]
        devices += _devices_of(own, owner, settings, generator)
    return tuple(devices)


def opened_results(device: SimulatedDevice, qrels: Mapping[str, Mapping[str, int]]) -> list[tuple[str, str]]:
    """(query text, passage id) of what the owner of a device opened: for each training query a relevant passage that it has.

    Where one question has answers of several owners, the others' are not on the device.
    """
    held = {passage.id for passage in device.passages}
    found = (
        (query.text, [i for i, grade in qrels[query.id].items() if grade > 0 and i in held])
        for query in device.training
    )
    return [(text, relevant[0]) for text, relevant in found if relevant]


def _devices_of(
    corpus: Corpus, owner: str, settings: PopulationSettings, generator: np.random.Generator
) -> list[SimulatedDevice]:
    training = _shuffled(corpus.queries_in("train"), generator)
    held_out = _shuffled((*corpus.queries_in("dev"), *corpus.queries_in("test")), generator)
    count = 1 if settings.silos else max(1, math.floor(len(training) / settings.queries_per_device))
    topics = sorted({query.topic for query in (*training, *held_out) if query.topic})
    place_of = {topics[drawn]: place % count for place, drawn in enumerate(generator.permutation(len(topics)))}
    by_id = {passage.id: passage for passage in corpus.passages}
    devices = []
    for number in range(count):
        own, later = _dealt_to(number, count, training, place_of), _dealt_to(number, count, held_out, place_of)
        kept = {pid for query in (*own, *later) for pid in corpus.qrels[query.id]}
        others = sorted(by_id.keys() - kept)
        wanted = len(others) if settings.silos else settings.distractors_median * math.exp(generator.normal(0.0, 1.0))
        most = len(others) if settings.silos else settings.distractors_max
        drawn = generator.choice(len(others), size=min(len(others), most, round(wanted)), replace=False)
        kept |= {others[i] for i in drawn}
        devices.append(
            SimulatedDevice(
                name=f"{owner}-{number:03d}",
                owner=owner,
                training=own,
                held_out=later,
                passages=tuple(by_id[pid] for pid in sorted(kept)),
            )
        )
    return devices


def _dealt_to(number: int, count: int, queries: Sequence[Query], place_of: Mapping[str, int]) -> tuple[Query, ...]:
    """What one of `count` devices gets of the queries: those of its topics, and its turn of those without one."""
    places = (place_of.get(query.topic, position % count) for position, query in enumerate(queries))
    return tuple(query for query, place in zip(queries, places, strict=True) if place == number)


def _shuffled(queries: tuple[Query, ...], generator: np.random.Generator) -> list[Query]:
    ordered = sorted(queries, key=lambda query: query.id)
    return [ordered[i] for i in generator.permutation(len(ordered))]
