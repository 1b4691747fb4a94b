"""What a name on the command line means.

| written | is |
|---|---|
| `offline`, a folder, a name on the Hugging Face Hub | any Sentence Transformers model (`sentence_models.py`) |
| `MODEL@int8`, `MODEL@float32`, of a folder with ONNX files | that file, run by ONNX Runtime (`onnx_models.py`) |
| a folder with a release | both towers in int8 as a device runs them; `RELEASE@float32` in float32 |
| a folder with a device | its index in all its modes; `HOME@hybrid`, `HOME@dense`, `HOME@bm25`, `HOME@rerank` in one |
| `bm25` | BM25 as devices have it |
| `QUERY::DOCUMENT` | the query tower of one, the document tower of the other: bi-encoders and releases |
| `...@128` | vectors cut to their first 128 values (on each side of a pair) |

Suffixes may follow each other, on either side of a pair: `MODEL@int8@128::offline@128`. A folder called bm25 is `./bm25`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

from sentence_transformers import CrossEncoder, MultiVectorEncoder

from stillroom_client.device import Device
from stillroom_client.encoder import Encoder
from stillroom_client.home import IDENTITY_NAME
from stillroom_shared.errors import SettingsError
from stillroom_shared.release import Precision, Release, open_release
from stillroom_shared.scales import FIRST_SHARE
from stillroom_shared.sealed import MANIFEST_NAME
from stillroom_simulations.evaluating.homes import MODES, Asked, Home
from stillroom_simulations.evaluating.late import LateInteraction
from stillroom_simulations.evaluating.onnx_models import open_onnx
from stillroom_simulations.evaluating.rerankers import Reranking
from stillroom_simulations.evaluating.sentence_models import Loaded, load_model, sentence_scorer, sentence_tower
from stillroom_simulations.evaluating.systems import System
from stillroom_simulations.evaluating.towers import BiEncoder, Role, Tower, release_tower
from stillroom_simulations.evaluating.words import Words

PAIR = "::"
_RESERVED = ("bm25", "offline")
"""Names with a meaning of their own: no folder is shown under one of them."""
_PRECISIONS: tuple[Precision, ...] = ("int8", "float32")


@dataclass(frozen=True)
class Spec:
    """One name, read.

    >>> Spec.read("runs/demo/release@float32@128")
    Spec(text='runs/demo/release@float32@128', place='runs/demo/release', precision='float32', mode=None, dimension=128)
    >>> Spec.read("someone/model@home").place
    'someone/model@home'
    """

    text: str
    place: str
    precision: Precision | None = None
    mode: Asked | None = None
    dimension: int | None = None

    @classmethod
    def read(cls, text: str) -> Spec:
        """Split the suffixes off; what is no suffix belongs to the name."""
        place, precision, mode, dimension = text, None, None, None
        while True:
            rest, at, last = place.rpartition("@")
            if not at or not rest:
                break
            if last in _PRECISIONS and precision is None:
                precision = last
            elif last in MODES and mode is None:
                mode = last
            elif last.isascii() and last.isdecimal() and dimension is None:
                dimension = int(last)
            else:
                break
            place = rest
        if not place:
            raise SettingsError(f"{text!r} names no model: write a folder, a name, offline or bm25")
        return cls(text, place, precision, mode, dimension)

    @property
    def kind(self) -> str:
        """ "bm25", "release", "home" or "model"."""
        if self.place == "bm25":
            return "bm25"
        folder = Path(self.place)
        if (folder / MANIFEST_NAME).is_file():
            return "release"
        return "home" if (folder / IDENTITY_NAME).is_file() else "model"

    def refuse_foreign_suffixes(self) -> None:
        """`SettingsError` when a suffix says nothing of this kind."""
        taken = {
            "bm25": (),
            "release": ("precision", "dimension"),
            "home": ("mode",),
            "model": ("precision", "dimension"),
        }[self.kind]
        for name in ("precision", "mode", "dimension"):
            if (value := getattr(self, name)) is not None and name not in taken:
                raise SettingsError(f"{self.text}: @{value} says nothing of a {self.kind}: leave it out")


class Opener:
    """Opens what specs name, each model once; leaving it closes devices."""

    def __init__(
        self,
        *,
        device: str = "cpu",
        threads: int = 1,
        first_stage: str = "bm25",
        top: int = 100,
        share: float = FIRST_SHARE,
        ignore_identical_ids: bool = False,
    ) -> None:
        self._threads, self._first, self._top, self._share = threads, first_stage, top, share
        self._ignore = ignore_identical_ids
        self._open = ExitStack()
        self._model = cache(lambda name: load_model(name, device=device))
        self._onnx = cache(lambda name, precision: open_onnx(name, self._model(name), precision))
        self._release = cache(lambda folder: open_release(Path(folder), trusted_key=None))
        self._encoder = cache(
            lambda folder, precision: Encoder(self._release(folder), precision=precision, threads=threads)
        )

    def __enter__(self) -> Opener:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def systems(self, models: Sequence[str | System]) -> list[System]:
        """The systems of all names, a device in each of its modes; `SettingsError` when two have one name."""
        places = [Spec.read(part).place for text in models if isinstance(text, str) for part in _sides(text)]
        labels = short_names(list(dict.fromkeys(places)))
        made: list[System] = []
        for model in models:
            made += self._systems(model, labels) if isinstance(model, str) else [model]
        names = [system.name for system in made]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise SettingsError(f"{twice[0]} is named twice: name each model once")
        return made

    def _systems(self, text: str, labels: dict[str, str]) -> list[System]:
        spec, *document = (Spec.read(part) for part in _sides(text))
        if document:
            return [self._pair(spec, document[0], labels)]
        spec.refuse_foreign_suffixes()
        name = labels[spec.place] + text.removeprefix(spec.place)
        if spec.kind == "bm25":
            return [Words()]
        if spec.kind == "home":
            # One thread: its queries come one at a time, and with more its reranker would be timed on all of them.
            device = self._open.enter_context(Device.open(Path(spec.place), threads=1))
            modes = (
                [spec.mode]
                if spec.mode
                else [mode for mode in MODES if mode != "rerank" or device.release.has_reranker]
            )
            label = labels[spec.place]
            return [cast(System, Home(f"{label}@{mode}", device, mode)) for mode in modes]
        if spec.kind == "model":
            loaded = self._model(spec.place)
            if isinstance(loaded.model, CrossEncoder | MultiVectorEncoder):
                return [self._other(name, spec, loaded)]
        query_tower, query_how = self._tower(spec, "query")
        return [
            BiEncoder(name, f"{query_how}, exact search", query_tower, self._tower(spec, "passage")[0], self._one(spec))
        ]

    def _pair(self, query: Spec, document: Spec, labels: dict[str, str]) -> System:
        for spec in (query, document):
            spec.refuse_foreign_suffixes()
        names = [labels[spec.place] + spec.text.removeprefix(spec.place) for spec in (query, document)]
        (asked, how), (held, other) = self._tower(query, "query"), self._tower(document, "passage")
        return BiEncoder(PAIR.join(names), f"queries {how}, passages {other}, exact search", asked, held, False)

    def _tower(self, spec: Spec, role: Role) -> tuple[Tower, str]:
        if spec.kind == "release":
            release: Release = self._release(spec.place)
            precision = spec.precision or "int8"
            tower = release_tower(release, self._encoder(spec.place, precision), precision, role)
            how = f"ONNX {precision}"
        elif spec.kind == "model":
            loaded: Loaded = self._model(spec.place)
            if isinstance(loaded.model, CrossEncoder | MultiVectorEncoder):
                raise SettingsError(f"{spec.text} is a {type(loaded.model).__name__}: a pair is of two bi-encoders")
            if spec.precision is not None:
                tower = self._onnx(spec.place, spec.precision).tower(role, threads=self._threads)
            else:
                tower = sentence_tower(loaded, role)
            how = _how(spec)
        else:
            raise SettingsError(f"{spec.text} is a {spec.kind} and has no tower: a pair is of models and releases")
        return tower.shortened(spec.dimension), how + (f", {spec.dimension} dimensions" if spec.dimension else "")

    def _one(self, spec: Spec) -> bool:
        return spec.kind == "model"

    def _other(self, name: str, spec: Spec, loaded: Loaded) -> System:
        if spec.dimension is not None:
            raise SettingsError(f"{spec.text}: a {type(loaded.model).__name__} has no single vector to cut")
        if isinstance(loaded.model, MultiVectorEncoder):
            if spec.precision is not None:
                loaded = self._onnx(spec.place, spec.precision).late()
            how = f"{_how(spec)}, MaxSim over every passage"
            return LateInteraction(name, how, cast(MultiVectorEncoder, loaded.model), loaded.identity, loaded.weights)
        first, *pair = (Spec.read(part) for part in _sides(self._first))
        if not pair and first.kind == "model" and isinstance(self._model(first.place).model, CrossEncoder):
            raise SettingsError(f"--first-stage {self._first} is a cross-encoder: it needs a first stage itself")
        found = self._systems(self._first, short_names([side.place for side in (first, *pair)]))
        if len(found) > 1:
            raise SettingsError(
                f"--first-stage {self._first} is a device with several modes: write @hybrid, say, behind it"
            )
        how = f"{_how(spec)}, reads the best {self._top} of {found[0].name}"
        how += f", whose scores have a share of {self._share:g}" if self._share else ""
        if spec.precision is None:
            logits, identity, weights, threads = sentence_scorer(loaded), loaded.identity, loaded.weights, 1
        else:
            file = self._onnx(spec.place, spec.precision)
            logits, identity, weights, threads = file.scorer().logits, file.identity, len(file.content), self._threads
        return Reranking(
            name, how, logits, identity, weights, found[0], self._top, self._share, threads=threads,
            ignore_identical_ids=self._ignore,
        )  # fmt: skip


def _how(spec: Spec) -> str:
    return "torch float32" if spec.precision is None else f"ONNX {spec.precision}"


def short_names(places: Sequence[str]) -> dict[str, str]:
    """The shortest endings of paths that tell them apart, also from reserved names; names that are no folders stay whole.

    >>> short_names(["runs/a/release", "runs/b/release", "offline"])
    {'runs/a/release': 'a/release', 'runs/b/release': 'b/release', 'offline': 'offline'}
    >>> short_names(["./bm25", "./runs/x/offline"])
    {'./bm25': './bm25', './runs/x/offline': 'x/offline'}
    """
    parts = {place: Path(place).parts if _is_path(place) else (place,) for place in places}
    shown = {}
    for place, own in parts.items():
        others = [other for name, other in (parts | {name: (name,) for name in _RESERVED}).items() if name != place]
        length = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        label = "/".join(own[-length:])
        shown[place] = place if label in _RESERVED else label
    return shown


def _sides(text: str) -> list[str]:
    """Both names of a pair, or the one name."""
    return text.split(PAIR, 1)


def _is_path(place: str) -> bool:
    return place.startswith((".", "/", "~")) or Path(place).exists() or place.count("/") > 1
