"""Settings of a run: frozen values, checked at birth, from one TOML file and `key=value` on the command line.

To add a setting, add a field: its type, its bounds, its default and its description are all that loading, refusing and
docs/settings.md (`make docs`) need. Defaults are those of the small scale; `SCALES` holds what another scale changes.
Privacy parameters stand in `rounds`; what changes only how fast a result comes stands in `speed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from stillroom_shared.adapter import Target
from stillroom_shared.mechanism import MechanismName
from stillroom_shared.settings_file import Group, load, reference

HomePath = Annotated[Path, AfterValidator(Path.expanduser)]
"""A path; `~` is the home directory, a relative one starts at the working directory."""


class CorpusSettings(Group):
    """What is searched, and which part of it is public."""

    scale: Literal["small", "full"] = Field("small", description="how much text, and the values that suit it")
    data: HomePath | None = Field(None, description="a BEIR-layout folder in place of the docstrings of this machine")
    public_owners: tuple[str, ...] = Field((), description="owners whose text is public; needed with `data` only")
    start_from: HomePath | None = Field(
        None, description="folder of an earlier run whose release is improved on `data`; nothing is distilled"
    )

    @model_validator(mode="after")
    def _starts_with_data(self) -> Self:
        if self.start_from is not None and self.data is None:
            raise ValueError(f"start_from {self.start_from}: give `data` too, on which its release is to be improved")
        return self


class DistilSettings(Group):
    """How the query tower is made from the teacher, on public text only."""

    teacher: str = Field("offline", min_length=1, description="`offline` (packaged MiniLM), a name or a folder")
    layers: tuple[int, ...] = Field((0, 2, 5), min_length=1, description="teacher layers that the student starts from")
    epochs: float = Field(3.0, gt=0, le=100, description="passes over the public pairs")
    learning_rate: float = Field(5e-4, gt=0, lt=1, description="peak learning rate")
    sentences: int = Field(4_000, ge=0, description="sentences cropped from public passages, as further texts to align")
    batch_size: int = Field(64, ge=1, le=8192, description="texts in a step")
    ranking_weight: float = Field(0.3, ge=0, description="weight of the ranking loss beside the alignment loss")
    temperature: float = Field(0.05, gt=0, description="divides cosines before the softmax of the ranking loss")
    seed: int = Field(0, ge=0, description="seed of batch order and of the choice of sentences")


class PopulationSettings(Group):
    """The simulated devices: what each owns."""

    queries_per_device: int = Field(10, ge=1, description="training queries of a device, all of one owner")
    distractors_median: int = Field(100, ge=0, description="median of passages beside the relevant ones")
    distractors_max: int = Field(2_000, ge=0, description="most passages beside the relevant ones")
    silos: bool = Field(False, description="every owner is one device, with all its passages")


class AdapterSettings(Group):
    """The part of the query tower that learns in rounds."""

    rank: int = Field(4, ge=1, le=64, description="inner dimension of the low-rank update")
    targets: tuple[Target, ...] = Field(("query", "value"), min_length=1, description="adapted projections")
    seed: int = Field(0, ge=0, description="seed of the public random half `A`")


class RoundsSettings(Group):
    """Federated rounds. Everything here is a public constant of the federation."""

    mechanism: MechanismName = Field(
        "central",
        description="`none` is the non-private baseline; under `correlated` and `local` devices take turns",
    )
    rounds: int = Field(15, ge=0, description="planned rounds")
    sampling_rate: float = Field(0.2, gt=0, le=1, description="chance of a device to be in a round's cohort")
    separation: int = Field(
        5,
        ge=1,
        description="under `correlated` and `local`: a device's turn comes every so many rounds; 1: every round",
    )
    bands: int | None = Field(
        None,
        ge=1,
        description="under `correlated`: rounds whose noise is correlated; none: the best number; 1: fresh noise",
    )
    records: int = Field(
        10, ge=1, le=1 << 20, description="under `local`: most queries that a device trains on, its latest"
    )
    record_rate: float = Field(0.5, gt=0, le=1, description="under `local`: chance of each query to be in a step")
    clip_norm: float | None = Field(
        0.3, gt=0, description="largest L2 norm of an update; under `local` of the gradient of a query"
    )
    clip_quantile: float | None = Field(
        None, gt=0, lt=1, description="share of updates to leave unclipped: the clip norm follows it; none: it stays"
    )
    noise_multiplier: float | None = Field(
        2.0, gt=0, description="noise standard deviation / sensitivity, of a round; under `local` of a step on a device"
    )
    target_epsilon: float | None = Field(
        None, gt=0, description="take the least noise that meets it, user level; under `local` query level"
    )
    delta: float | None = Field(
        None, gt=0, lt=1, description="none: 1 / (10 x enrolled devices), under `local` 1 / (10 x devices x records)"
    )
    budget_epsilon: float = Field(
        4.0, gt=0, description="against readers of releases; a round that would pass it is refused"
    )
    server_optimizer: Literal["momentum", "adam"] = Field("momentum", description="how the server steps")
    server_learning_rate: float = Field(0.5, gt=0, description="step of the server along the noisy mean update")
    momentum: float = Field(0.9, ge=0, lt=1, description="server momentum")
    averaging: float = Field(
        0.5, ge=0, le=1, description="share of rounds, the last ones, whose mean is released; 0: none"
    )
    candidates: int = Field(32, ge=2, description="passages of its own index that a device ranks for each query")
    temperature: float = Field(0.05, gt=0, description="divides inner products before the softmax")
    local_steps: int = Field(1, ge=1, description="gradient steps of a device in a round; under `local` noisy ones")
    local_learning_rate: float = Field(1.0, gt=0, description="step size on the device")

    @model_validator(mode="after")
    def _noise_is_set_once(self) -> Self:
        if self.mechanism == "none" and self.clip_quantile is not None:
            raise ValueError(f"clip_quantile {self.clip_quantile}: mechanism none clips nothing, set it to none")
        bounded, noisy = self.clip_norm is not None, (self.noise_multiplier, self.target_epsilon) != (None, None)
        both = None not in (self.noise_multiplier, self.target_epsilon)
        values = ", ".join(f"{name} {getattr(self, name) or 'none'}" for name in _NOISE)
        if self.mechanism == "none" and (bounded or noisy):
            raise ValueError(f"{values}: mechanism none neither clips nor adds noise, set all three to none")
        if self.mechanism == "correlated" and self.clip_quantile is not None:
            raise ValueError(f"clip_quantile {self.clip_quantile}: rows add up rounds of one clip norm, set it to none")
        if self.mechanism == "local" and self.clip_quantile is not None:
            raise ValueError(f"clip_quantile {self.clip_quantile}: devices clip queries, not updates, set it to none")
        if self.mechanism != "none" and not bounded:
            raise ValueError(f"{values}: without a clip norm nothing bounds what a user can do, give one, e.g. 0.3")
        if self.mechanism != "none" and (both or not noisy):
            raise ValueError(f"{values}: give one of the last two, and set the other to none")
        return self


class EvaluationSettings(Group):
    """Private evaluation, which decides what is published. Public constants of the federation, as `rounds` is."""

    held_back: float = Field(
        0.0, ge=0, lt=1, description="share of each device's queries to judge adapters by; 0: none, publish unjudged"
    )
    bound: float = Field(0.1, gt=0, le=1, description="largest difference of one device's nDCG that counts")
    noise_multiplier: float = Field(2.0, gt=0, description="noise standard deviation / sensitivity")
    sampling_rate: float = Field(1.0, gt=0, le=1, description="chance of a device to be asked")


_NOISE = ("clip_norm", "noise_multiplier", "target_epsilon")


def _without_privacy() -> RoundsSettings:
    return RoundsSettings(mechanism="none", clip_norm=None, noise_multiplier=None, server_learning_rate=1.0)


class SpeedSettings(Group):
    """Knobs that change how long a run takes, never what it computes."""

    threads: int = Field(2, ge=1, description="threads of numeric libraries")
    workers: int = Field(2, ge=1, description="processes that read source files")
    block: int = Field(64, ge=1, description="simulated devices trained in one batch")
    cache: HomePath = Field(Path("~/.cache/stillroom"), description="folder of what can be computed again")


class Settings(Group):
    """Everything a run depends on, beside the code and the data.

    >>> settings = load_settings(None, {"rounds.noise_multiplier": "3", "distil.layers": "0,5"})
    >>> settings.rounds.noise_multiplier, settings.distil.layers
    (3.0, (0, 5))
    >>> load_settings(None, {"rounds.clip": "3"})
    Traceback (most recent call last):
        ...
    stillroom_shared.errors.SettingsError: setting rounds.clip is unknown: did you mean rounds.clip_norm?
    """

    corpus: CorpusSettings = CorpusSettings()
    distil: DistilSettings = DistilSettings()
    population: PopulationSettings = PopulationSettings()
    adapter: AdapterSettings = AdapterSettings()
    rounds: RoundsSettings = RoundsSettings()
    nonprivate: RoundsSettings = Field(default_factory=_without_privacy)
    evaluation: EvaluationSettings = EvaluationSettings()
    speed: SpeedSettings = SpeedSettings()
    seed: int = Field(0, ge=0, description="seed of the simulated population, its cohorts and its rehearsal noise")


SCALES: Mapping[str, Mapping[str, object]] = {
    "small": {},
    "full": {
        "distil.epochs": 2.0,
        "distil.learning_rate": 1e-3,
        "distil.sentences": 60_000,
        "population.distractors_median": 200,
        "rounds.rounds": 20,
        "rounds.noise_multiplier": 1.25,
        "rounds.server_learning_rate": 3.0,
        "evaluation.noise_multiplier": 4.0,
        "nonprivate.rounds": 30,
        "nonprivate.server_optimizer": "adam",
        "nonprivate.server_learning_rate": 0.01,
    },
}
"""What each scale changes about the defaults, by dotted key."""


def load_settings(path: Path | None, overrides: Mapping[str, str]) -> Settings:
    """Read the file, if any, lay the overrides over it, and check the whole.

    Later wins: defaults, the values of the scale, the file, the overrides.

    Args:
        path: a TOML file whose tables are the groups of `Settings`.
        overrides: text by dotted key, e.g. `{"rounds.rounds": "20"}`; lists are comma-separated, `none` unsets.

    Raises `SettingsError` with name, value and remedy of every key that is unknown or out of range.
    """
    return load(Settings(), path, overrides, preset=lambda given: SCALES.get(str(given.get("corpus.scale")), {}))


if __name__ == "__main__":
    print(reference({scale: load_settings(None, {"corpus.scale": scale}) for scale in SCALES}))
