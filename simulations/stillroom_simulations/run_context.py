"""What the stages of a run share: settings, folder, corpora, teacher, release, population, records.

Everything is read back from the run's folder or from the cache when it is first needed, so that a run which resumes at its
last stage loads only what that stage asks for.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from stillroom_client.encoder import Encoder
from stillroom_client.records import MAXIMUM_RECORDS
from stillroom_client.training import Record, Trainer
from stillroom_server.coordinate import Coordinator
from stillroom_server.distillery.data.sources import versions_of
from stillroom_server.teacher import TeacherVectors, load_teacher
from stillroom_shared.corpus import Corpus
from stillroom_shared.processor import native_bfloat16
from stillroom_shared.release import Release, open_release
from stillroom_shared.settings import RoundsSettings, Settings
from stillroom_shared.signing import SigningKey
from stillroom_shared.workspace import Workspace, key_of
from stillroom_simulations.federation import mine_population
from stillroom_simulations.population import SimulatedDevice, make_population
from stillroom_simulations.sources import load_corpus

_OPERATOR_KEY = "operator.key"
_ENCODED_AT_ONCE = 128


@dataclass(frozen=True, eq=False)
class RunContext:
    """One run in one folder."""

    settings: Settings
    out: Path

    @cached_property
    def space(self) -> Workspace:
        """The run's folder."""
        self.out.mkdir(parents=True, exist_ok=True)
        return Workspace(self.out)

    @cached_property
    def corpora(self) -> tuple[Corpus, Corpus]:
        """The public and the private corpus."""
        return self._load_corpus(lambda done, total: None)

    @property
    def public(self) -> Corpus:
        """Text that the operator may read."""
        return self.corpora[0]

    @property
    def private(self) -> Corpus:
        """Text that only devices read; evaluation stands outside of the federation and reads all."""
        return self.corpora[1]

    @property
    def public_sources(self) -> list[dict[str, Any]]:
        """What the release says it learned from: each public owner, a package with version and licence where it is one."""
        if self.settings.corpus.data is not None:
            return [{"name": owner, "facts": {"kind": "beir"}} for owner in self.public.owners]
        known = versions_of(self.public.owners)
        return [{"name": owner, "facts": {"kind": "docstrings", **facts}} for owner, facts in known.items()]

    @property
    def corpus_hash(self) -> str:
        """Hash of both sides; stands beside every figure."""
        return key_of(self.public.content_hash, self.private.content_hash)

    @property
    def autocast(self) -> bool:
        """Whether to compute in bfloat16."""
        return native_bfloat16()

    @cached_property
    def teacher(self) -> SentenceTransformer:
        """The teacher model."""
        return load_teacher(self.settings.distil.teacher)

    @cached_property
    def vectors(self) -> TeacherVectors:
        """The teacher's cached vectors."""
        return TeacherVectors(self.teacher, self.settings.speed.cache / "vectors", autocast=self.autocast)

    @cached_property
    def passage_vectors(self) -> NDArray[np.float32]:
        """The teacher's float vectors of the private passages: the yardstick; devices use `device_vectors`."""
        return self.vectors.encode([passage.full_text for passage in self.private.passages])

    @cached_property
    def operator(self) -> SigningKey:
        """The operator's key, made on first use; that of the earlier run where this one starts from a release."""
        if self.origin is not None:
            return SigningKey.load(self.origin.folder.parent / _OPERATOR_KEY)
        return SigningKey.load_or_generate(self.out / _OPERATOR_KEY)

    @cached_property
    def release(self) -> Release:
        """The distilled release, verified."""
        return open_release(self.out / "release", trusted_key=self.operator.public)

    @cached_property
    def population(self) -> tuple[SimulatedDevice, ...]:
        """Who owns what."""
        return make_population(self.private, self.settings.population, seed=self.settings.seed)

    @cached_property
    def homes(self) -> dict[str, Path]:
        """The home of each device."""
        return {device.name: self.out / "devices" / device.name for device in self.population}

    @property
    def everything(self) -> Path:
        """A home that holds every private passage: what the device path is measured on over the whole corpus."""
        return self.out / "everything"

    @cached_property
    def trainer(self) -> Trainer:
        """The frozen query tower that all simulated clients share."""
        return Trainer(self.release.folder, self.release.adapter_spec, autocast=self.autocast)

    def device_vectors(self, progress: Callable[[int, int], None] = lambda done, total: None) -> NDArray[np.float32]:
        """Vectors of the private passages by the release's int8 document tower, as a device computes them; cached."""
        texts = [passage.full_text for passage in self.private.passages]
        name = key_of(self.release.document_tower_hash, self.private.content_hash)
        path = self.settings.speed.cache / "vectors" / f"device-{name}.npy"
        if not path.exists():
            encoder = Encoder(self.release, precision="int8", threads=self.settings.speed.threads)
            encoded = np.zeros((len(texts), self.release.dimension), np.float32)
            for start in range(0, len(texts), _ENCODED_AT_ONCE):
                chunk = slice(start, start + _ENCODED_AT_ONCE)
                encoded[chunk] = encoder.encode_documents(texts[chunk])
                progress(min(chunk.stop, len(texts)), len(texts))
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.npy")
            np.save(partial, encoded)
            partial.replace(path)
        return np.asarray(np.load(path, allow_pickle=False))

    def records(self, rounds: RoundsSettings) -> dict[str, list[Record]]:
        """Every device's training records, mined once for all federations that train on the same ones."""
        local = rounds.mechanism == "local"
        how = (rounds.candidates, local, rounds.records if local else MAXIMUM_RECORDS)
        known: dict[tuple[int, bool, int], dict[str, list[Record]]] = self.__dict__.setdefault("_records", {})
        if how not in known:
            candidates, one_per_query, most = how
            known[how] = mine_population(
                list(self.homes.values()),
                self.release,
                candidates=candidates,
                threads=self.settings.speed.threads,
                one_per_query=one_per_query,
                most=most,
                held_back=self.settings.evaluation.held_back,
            )
        return known[how]

    def coordinator(self, name: str) -> Coordinator:
        """A finished federation, for reading."""
        return Coordinator(self.out / "federation" / name)

    def peak_memory(self) -> int:
        """Largest resident size of this process so far, in bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    @cached_property
    def origin(self) -> Release | None:
        """The release of an earlier run that this one starts from, if it does."""
        folder = self.settings.corpus.start_from
        return None if folder is None else open_release(folder / "release", trusted_key=None)

    def key(self, name: str) -> str:
        """Hash of everything a stage's result depends on; later stages include earlier ones."""
        if name in self.federations:
            return self.federation_key(name, self.federations[name])
        if name == "evaluate":
            rounds = [(each, self.federation_key(each, own)) for each, own in self.federations.items()]
            return key_of(self._chain("devices"), rounds)
        return key_of(self._chain(name))

    @property
    def federations(self) -> dict[str, RoundsSettings]:
        """The federations of every run, by name."""
        return {"private": self.settings.rounds, "nonprivate": self.settings.nonprivate}

    def federation_key(self, name: str, rounds: RoundsSettings) -> str:
        """The same for the rounds of one federation over the devices of this run."""
        judged = self.settings.evaluation
        added = [("judged", judged.model_dump(mode="json"))] if judged.held_back else []  # keys are as they always were
        return key_of([*self._chain("devices"), (name, rounds.model_dump(mode="json")), *added])

    def _chain(self, upto: str) -> list[tuple[str, object]]:
        """What each stage up to the named one adds to what its result depends on."""
        settings = self.settings
        distilled = settings.distil.model_dump(mode="json") if self.origin is None else self.origin.id
        chain: list[tuple[str, object]] = [
            ("teacher", (self.corpus_hash, settings.distil.teacher, settings.distil.sentences, settings.distil.seed)),
            ("distil", distilled),
            ("release", settings.adapter.model_dump(mode="json")),
            ("devices", (settings.population.model_dump(mode="json"), settings.seed)),
        ]
        return chain[: 1 + [stage for stage, _ in chain].index(upto)]

    def _load_corpus(self, progress: Callable[[int, int], None]) -> tuple[Corpus, Corpus]:
        speed = self.settings.speed
        return load_corpus(self.settings.corpus, cache=speed.cache, workers=speed.workers, progress=progress)
