"""`stillroom demo`: from a teacher to a private, searchable federation, stage by stage, in one folder.

Each stage reads what the one before it wrote, is skipped when its input has not changed, and goes on where it was
interrupted (see `workspace`). The folder afterwards:

| name | holds |
|---|---|
| `release/` | the distilled release, signed |
| `devices/NAME/` | a home for each simulated device; `stillroom search --home` answers from it |
| `federation/private`, `federation/nonprivate` | plan, ledger, checkpoint and sealed adapter of each federation |
| `results.json`, `report.html` | the figures, and a page about them |
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from transformers import BertModel

from stillroom_client.device import Device
from stillroom_client.encoder import Encoder
from stillroom_client.participation import Consent
from stillroom_client.training import Record, Trainer, native_bfloat16
from stillroom_server.coordinate import Coordinator, RoundReport
from stillroom_server.distil import distil, public_lessons
from stillroom_server.publish import publish_release
from stillroom_server.teacher import TeacherVectors, load_teacher, tower_of
from stillroom_shared.adapter import AdapterSpec
from stillroom_shared.corpus import Corpus
from stillroom_shared.progress import Progress, Stage
from stillroom_shared.release import Release, open_release
from stillroom_shared.settings import RoundsSettings, Settings
from stillroom_shared.signing import SigningKey
from stillroom_simulations.federation import BatchedUpdates, make_plan, mine_population, run_federation
from stillroom_simulations.memory import keep_freed_memory
from stillroom_simulations.population import SimulatedDevice, make_population
from stillroom_simulations.report import write_report
from stillroom_simulations.results import Results
from stillroom_simulations.sources import load_corpus
from stillroom_simulations.summary import summarize
from stillroom_simulations.workspace import Workspace, key_of

if TYPE_CHECKING:
    from rich.console import Console

FederationName = Literal["private", "nonprivate"]

# Seconds of each stage at the small scale on two cores: only the estimate of what is left is made of them.
_FORECAST = {
    "corpus": 6.0,
    "teacher": 80.0,
    "distil": 80.0,
    "release": 25.0,
    "devices": 45.0,
    "private": 35.0,
    "nonprivate": 30.0,
    "evaluate": 15.0,
    "report": 2.0,
}


_ENCODED_AT_ONCE = 128


def run_demo(settings: Settings, *, out: Path, console: Console) -> None:
    """Run every stage that is not done; leaves `results.json` and `report.html` in `out`."""
    keep_freed_memory()
    torch.set_num_threads(settings.speed.threads)
    progress = Progress(_FORECAST, console=console)
    run = DemoRun(settings, out)
    for name, work in run.stages():
        with progress.stage(name) as stage:
            skipped = work(stage)
            if skipped:
                stage.note("from an earlier run", cached=True)
            elif not stage.remark:
                stage.note(run.remark)
    console.print(run.closing(), markup=False, soft_wrap=True)


@dataclass(frozen=True, eq=False)
class DemoRun:
    """The stages of one run and what they share. Everything is read back from `out` or the cache when first needed."""

    settings: Settings
    out: Path

    @property
    def remark(self) -> str:
        """What to say of a stage that says nothing of itself."""
        return ""

    def stages(self) -> list[tuple[str, Callable[[Stage], bool]]]:
        """Every stage in order; each returns whether it was skipped."""
        return [
            ("corpus", self.read_corpus),
            ("teacher", self.ask_teacher),
            ("distil", self.distil),
            ("release", self.publish),
            ("devices", self.settle_devices),
            ("private", lambda stage: self.federate("private", self.settings.rounds, stage)),
            ("nonprivate", lambda stage: self.federate("nonprivate", self.settings.nonprivate, stage)),
            ("evaluate", self.evaluate),
            ("report", self.report),
        ]

    # ---- stages -----------------------------------------------------------------------------------------------------

    def read_corpus(self, stage: Stage) -> bool:
        """Load the corpus and divide it by owner."""
        settings = self.settings
        corpora = load_corpus(
            settings.corpus, cache=settings.speed.cache, workers=settings.speed.workers, progress=stage
        )
        self.__dict__["corpora"] = corpora
        public, private = corpora
        stage.note(
            f"{len(public.passages):,} public and {len(private.passages):,} private pairs, "
            f"corpus {self.corpus_hash[:12]}"
        )
        return self.space.stage("corpus", self.corpus_hash, [], lambda: None) and False

    def ask_teacher(self, stage: Stage) -> bool:
        """Compute every teacher vector once, into the cache."""

        def work() -> None:
            public_lessons(self.public, self.vectors, self.settings.distil, progress=stage)
            _ = self.passage_vectors

        return self.space.stage("teacher", self._key("teacher"), [], work)

    def distil(self, stage: Stage) -> bool:
        """Train the query tower on public text."""

        def work() -> None:
            lessons = public_lessons(self.public, self.vectors, self.settings.distil)
            student = distil(self.teacher, lessons, self.settings.distil, autocast=self.autocast, progress=stage)
            tower_of(student).save_pretrained(self.out / "student")

        return self.space.stage("distil", self._key("distil"), ["student"], work)

    def publish(self, stage: Stage) -> bool:
        """Export, quantize and sign the release."""

        def work() -> None:
            spec = AdapterSpec(
                rank=self.settings.adapter.rank,
                layers=tuple(range(len(self.settings.distil.layers))),
                targets=self.settings.adapter.targets,
                dim=tower_of(self.teacher).config.hidden_size,
                seed=self.settings.adapter.seed,
            )
            publish_release(
                self.out / "release",
                query_tower=BertModel.from_pretrained(self.out / "student", add_pooling_layer=False),
                document_tower=tower_of(self.teacher),
                tokenizer=self.teacher.tokenizer,
                spec=spec,
                adapter=None,
                key=self.operator,
                parent=None,
                adapter_round=0,
                privacy_statement=None,
                document_tokens=int(self.teacher.max_seq_length or 256),
            )

        return self.space.stage("release", self._key("release"), ["release"], work)

    def settle_devices(self, stage: Stage) -> bool:
        """Give each simulated device its home: passages, quantized index, and what its owner opened."""

        def work() -> None:
            vectors = self.device_vectors(stage)
            row_of = {passage.id: row for row, passage in enumerate(self.private.passages)}
            for done, own in enumerate(self.population, start=1):
                with self._device(self.homes[own.name]) as device:
                    device.add(own.passages, vectors[[row_of[passage.id] for passage in own.passages]])
                    device.record((q.text, next(iter(self.private.qrels[q.id]))) for q in own.training)
                    device.refresh_index()
                    Consent(mechanisms=("central", "none")).save(device.home)
                stage(done, len(self.population))
            with self._device(self.everything) as device:
                device.add(self.private.passages, vectors)
                device.refresh_index()

        return self.space.stage("devices", self._key("devices"), ["devices", "everything"], work)

    def federate(self, name: FederationName, rounds: RoundsSettings, stage: Stage) -> bool:
        """Run one federation's rounds; an interrupted one resumes from its checkpoint."""
        home = self.out / "federation" / name

        def on_round(report: RoundReport) -> None:
            with (home / "rounds.jsonl").open("a") as file:
                file.write(json.dumps({"round": report.round, "update_norm": report.update_norm}) + "\n")
            stage(report.round, report.rounds)

        def work() -> None:
            plan = make_plan(
                rounds,
                # Devices never answer an attempt twice: another plan over the same homes is another federation.
                name=f"demo-{name}-{self._key(name)[:8]}",
                release_folder=Path("../../release"),
                enrolled=[device.name for device in self.population],
                dimension=self.release.adapter_spec.size,
                seed=f"{self.settings.seed}",
            )
            run_federation(
                home,
                plan,
                [self.homes[device.name] for device in self.population],
                BatchedUpdates(self.trainer, self.records(rounds.candidates)),
                operator=self.operator,
                block=self.settings.speed.block,
                on_round=on_round,
            )
            if name == "private":
                with self.coordinator(name) as coordinator:
                    published = coordinator.published
                for device in self.population:
                    with Device.open(self.homes[device.name], release=self.release) as opened:
                        opened.adopt(published)

        return self.space.stage(name, self._key(name), [f"federation/{name}"], work)

    def evaluate(self, stage: Stage) -> bool:
        """Measure every stage on the test queries; write `results.json`."""
        return self.space.stage(
            "evaluate", self._key("evaluate"), ["results.json", "scores.npz"], lambda: summarize(self, stage)
        )

    def report(self, stage: Stage) -> bool:
        """Draw the page; cheap, so always."""
        write_report(Results.load(self.out / "results.json"), self.out)
        return False

    # ---- what stages share ------------------------------------------------------------------------------------------

    @cached_property
    def space(self) -> Workspace:
        """The run's folder."""
        self.out.mkdir(parents=True, exist_ok=True)
        return Workspace(self.out)

    @cached_property
    def corpora(self) -> tuple[Corpus, Corpus]:
        """The public and the private corpus."""
        return load_corpus(self.settings.corpus, cache=self.settings.speed.cache, workers=self.settings.speed.workers)

    @property
    def public(self) -> Corpus:
        """Text that the operator may read."""
        return self.corpora[0]

    @property
    def private(self) -> Corpus:
        """Text that only devices read; evaluation stands outside of the federation and reads all."""
        return self.corpora[1]

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
        """The operator's key, made on first use."""
        path = self.out / "operator.key"
        if not path.exists():
            SigningKey.generate().save(path)
        return SigningKey.load(path)

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

    def records(self, candidates: int) -> dict[str, list[Record]]:
        """Every device's training records, mined once for both federations."""
        known: dict[int, dict[str, list[Record]]] = self.__dict__.setdefault("_records", {})
        if candidates not in known:
            homes = list(self.homes.values())
            known[candidates] = mine_population(
                homes, self.release, candidates=candidates, threads=self.settings.speed.threads
            )
        return known[candidates]

    def coordinator(self, name: FederationName) -> Coordinator:
        """A finished federation, for reading."""
        return Coordinator(self.out / "federation" / name)

    def peak_memory(self) -> int:
        """Largest resident size of this process so far, in bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def closing(self) -> str:
        """The last words on the terminal."""
        best = max(self.population, key=lambda device: len(device.passages)).name
        return (
            f"\nreport   {self.out / 'report.html'}\nfigures  {self.out / 'results.json'}\n"
            f'try      stillroom search "open a zip file and list its members" --home {self.homes[best]}'
        )

    def _device(self, home: Path) -> Device:
        """The device of a home: one that an interrupted run began is gone on with, for adding is idempotent."""
        return (
            Device.open(home, release=self.release) if home.exists() else Device.create(home, self.release, link=True)
        )

    def _key(self, name: str) -> str:
        """Hash of everything a stage's result depends on; later stages include earlier ones."""
        settings = self.settings
        chain: Sequence[tuple[str, object]] = (
            ("teacher", (self.corpus_hash, settings.distil.teacher, settings.distil.sentences, settings.distil.seed)),
            ("distil", settings.distil.model_dump(mode="json")),
            ("release", settings.adapter.model_dump(mode="json")),
            ("devices", (settings.population.model_dump(mode="json"), settings.seed)),
            ("private", settings.rounds.model_dump(mode="json")),
            ("nonprivate", settings.nonprivate.model_dump(mode="json")),
            ("evaluate", None),
        )
        order = [stage for stage, _ in chain]
        upto = order.index(name) + 1
        included = [part for part in chain[:upto] if not (name == "nonprivate" and part[0] == "private")]
        return key_of(included)
