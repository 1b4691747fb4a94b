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

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import BertModel

from stillroom_client.device import Device
from stillroom_client.held_back import set_held_back_key
from stillroom_server.coordinate import RoundReport
from stillroom_server.distil import distil, public_lessons
from stillroom_server.distillery.releasing import write_sources
from stillroom_server.publish import publish_first
from stillroom_server.teacher import tower_of
from stillroom_shared.progress import Progress, Stage
from stillroom_shared.settings import RoundsSettings, Settings
from stillroom_shared.workspace import key_of
from stillroom_simulations.federation import BatchedUpdates, make_plan, run_federation
from stillroom_simulations.memory import keep_freed_memory
from stillroom_simulations.owners import CONSENT, agree
from stillroom_simulations.population import opened_results
from stillroom_simulations.report import write_report
from stillroom_simulations.results import Results
from stillroom_simulations.run_context import RunContext
from stillroom_simulations.summary import summarize

if TYPE_CHECKING:
    from rich.console import Console

# Seconds of each stage on two cores with an empty cache: only the estimate of what is left is made of them.
_FORECAST = {
    "small": {
        "corpus": 6.0,
        "teacher": 80.0,
        "distil": 60.0,
        "release": 10.0,
        "devices": 35.0,
        "private": 20.0,
        "nonprivate": 10.0,
        "evaluate": 15.0,
        "report": 2.0,
    },
    "full": {
        "corpus": 25.0,
        "teacher": 550.0,
        "distil": 450.0,
        "release": 15.0,
        "devices": 420.0,
        "private": 110.0,
        "nonprivate": 140.0,
        "evaluate": 140.0,
        "report": 2.0,
    },
}


def run_demo(settings: Settings, *, out: Path, console: Console) -> None:
    """Run every stage that is not done; leaves `results.json` and `report.html` in `out`."""
    keep_freed_memory()
    torch.set_num_threads(settings.speed.threads)
    progress = Progress(_FORECAST[settings.corpus.scale], console=console)
    run = DemoRun(settings, out)
    for name, work in run.stages():
        with progress.stage(name) as stage:
            if work(stage):
                stage.note("from an earlier run", cached=True)
    console.print(run.closing(), markup=False, soft_wrap=True)


@dataclass(frozen=True, eq=False)
class DemoRun(RunContext):
    """The stages of one run."""

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

    def read_corpus(self, stage: Stage) -> bool:
        """Load the corpus and divide it by owner."""

        def work() -> None:
            self.__dict__["corpora"] = self._load_corpus(stage)

        skipped = self.space.stage("corpus", key_of(self.settings.corpus.model_dump(mode="json")), [], work)
        public, private = self.corpora
        pairs = f"{len(public.passages):,} public and {len(private.passages):,} private pairs"
        stage.note(f"{pairs}, corpus {self.corpus_hash[:12]}", cached=skipped)
        return False

    def ask_teacher(self, stage: Stage) -> bool:
        """Compute every teacher vector once, into the cache."""

        def work() -> None:
            if self.origin is None:
                public_lessons(self.public, self.vectors, self.settings.distil, progress=stage)
            _ = self.passage_vectors

        return self.space.stage("teacher", self.key("teacher"), [], work)

    def distil(self, stage: Stage) -> bool:
        """Train the query tower on public text, unless the run starts from a release."""

        def work() -> None:
            if self.origin is not None:
                return
            lessons = public_lessons(self.public, self.vectors, self.settings.distil)
            student = distil(self.teacher, lessons, self.settings.distil, autocast=self.autocast, progress=stage)
            tower_of(student).save_pretrained(self.out / "student")

        return self.space.stage("distil", self.key("distil"), ["student"], work)

    def publish(self, stage: Stage) -> bool:
        """Export, quantize and sign the release; or take over that of an earlier run."""

        def work() -> None:
            if self.origin is not None:
                shutil.copytree(self.origin.folder, self.out / "release")
                return
            publish_first(
                self.out / "release",
                query_tower=BertModel.from_pretrained(self.out / "student", add_pooling_layer=False),
                document_tower=tower_of(self.teacher),
                tokenizer=self.teacher.tokenizer,
                adapter=self.settings.adapter,
                key=self.operator,
                document_tokens=int(self.teacher.max_seq_length or 256),
                extras=lambda folder: write_sources(folder, self.public_sources, lessons=self.public.content_hash),
            )

        return self.space.stage("release", self.key("release"), ["release"], work)

    def settle_devices(self, stage: Stage) -> bool:
        """Give each simulated device its home: passages, quantized index, and what its owner opened."""

        def work() -> None:
            vectors = self.device_vectors(stage)
            row_of = {passage.id: row for row, passage in enumerate(self.private.passages)}
            for done, own in enumerate(self.population, start=1):
                with self._device(self.homes[own.name]) as device:
                    device.add(own.passages, vectors[[row_of[passage.id] for passage in own.passages]])
                    device.record(opened_results(own, self.private.qrels))
                    device.refresh_index()
                    CONSENT.save(device.home)
                    set_held_back_key(device, hashlib.sha256(f"{self.settings.seed}/{own.name}".encode()).digest())
                stage(done, len(self.population))
            with self._device(self.everything) as device:
                device.add(self.private.passages, vectors)
                device.refresh_index()

        return self.space.stage("devices", self.key("devices"), ["devices", "everything"], work)

    def federate(self, name: str, rounds: RoundsSettings, stage: Stage) -> bool:
        """Run one federation's rounds; an interrupted one resumes from its checkpoint."""
        key, home = self.federation_key(name, rounds), self.out / "federation" / name

        def on_round(report: RoundReport) -> None:
            with (home / "rounds.jsonl").open("a") as file:
                file.write(json.dumps({"round": report.round, "update_norm": report.update_norm}) + "\n")
            stage(report.round, report.rounds)

        def work() -> None:
            plan = make_plan(
                rounds,
                # Devices never answer an attempt twice: another plan over the same homes is another federation.
                name=f"demo-{name}-{key[:8]}",
                release_folder=Path("../../release"),
                enrolled=[device.name for device in self.population],
                dimension=self.release.adapter_spec.size,
                seed=f"{self.settings.seed}",
                evaluation=self.settings.evaluation,
            )
            agree([self.homes[device.name] for device in self.population], plan, self.release.adapter_spec.size)
            run_federation(
                home,
                plan,
                [self.homes[device.name] for device in self.population],
                BatchedUpdates(self.trainer, self.records(rounds), seed=f"{self.settings.seed}"),
                operator=self.operator,
                block=self.settings.speed.block,
                on_round=on_round,
            )
            if name == "private" and not plan.held_back:
                with self.coordinator(name) as coordinator:
                    published = coordinator.published
                for device in self.population:
                    with Device.open(self.homes[device.name], release=self.release) as opened:
                        opened.adopt(published)

        return self.space.stage(name, key, [f"federation/{name}"], work)

    def evaluate(self, stage: Stage) -> bool:
        """Measure every stage on the test queries; write `results.json`."""
        return self.space.stage(
            "evaluate", self.key("evaluate"), ["results.json", "scores.npz"], lambda: summarize(self, stage)
        )

    def report(self, stage: Stage) -> bool:
        """Draw the page; cheap, so always."""
        write_report(Results.load(self.out / "results.json"), self.out)
        return False

    def closing(self) -> str:
        """The last words on the terminal."""
        best = max(self.population, key=lambda device: len(device.passages)).name
        private, devices = self.out / "federation" / "private", self.out / "devices"
        waiting = f"\nnext     stillroom coordinate evaluate {private} --devices {devices}"
        return (
            f"\nreport   {self.out / 'report.html'}\nfigures  {self.out / 'results.json'}\n"
            f'try      stillroom search "open a zip file and list its members" --home {self.homes[best]}'
            + (waiting if self.settings.evaluation.held_back else "")
        )

    def _device(self, home: Path) -> Device:
        """The device of a home: one that an interrupted run began is gone on with, for adding is idempotent."""
        return (
            Device.open(home, release=self.release) if home.exists() else Device.create(home, self.release, link=True)
        )
