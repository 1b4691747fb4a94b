"""What is learned from, as settings: sources, queries made for their passages, the filter, negatives, and text from nothing.

| setting | when it is not given |
|---|---|
| a limit (`queries`, `passages`, `texts`) | everything is taken |
| `synthetic.makers` | no queries are made |
| `roundtrip.top` | every made query is kept |
| `negatives.count` of 0 | lists hold the relevant passage alone |
| `datafree.queries` and `datafree.passages` of 0 | no text is drawn from a vocabulary |
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from stillroom_server.docstrings import FULL
from stillroom_shared.settings_file import Group

HomePath = Annotated[Path, AfterValidator(Path.expanduser)]
SourceKind = Literal["beir", "huggingface", "docstrings", "documentation", "wordnet", "questions"]
Use = Literal["pairs", "passages", "queries"]
Maker = Literal["seq2seq", "llm", "crop", "sentence", "title", "summary"]

PROMPT = (
    "Write one question that a person might type into a search box and that the following text answers. "
    "Answer with the question alone.\n\n{passage}"
)


class SourceSettings(Group):
    """One source of public text."""

    kind: SourceKind = Field("docstrings", description="where the text lies")
    name: str = Field("", description="how the manifest calls it; empty: after its folder, data set or kind")
    data: str = Field(
        "", description="a BEIR folder; name or folder of a Hugging Face data set; WordNet's, empty: /usr/share/wordnet"
    )
    use: Use = Field("pairs", description="`pairs` takes passages, queries and judgements; the others one side alone")
    queries: int | None = Field(None, ge=1, description="most queries, chosen by a hash of their text")
    passages: int | None = Field(None, ge=0, description="most passages beside those that a chosen query needs")
    characters: int = Field(8_000, ge=100, description="a passage is cut here: no teacher reads further")
    licence: str = Field("", description="for the manifest, where the source does not say it itself")
    splits: tuple[Literal["train", "dev"], ...] = Field(
        ("train",), min_length=1, description="whose queries may be learned from, in BEIR folders and docstrings"
    )
    packages: tuple[str, ...] = Field(
        FULL.public, min_length=1, description="import names whose docstrings or documentation are read"
    )
    subset: str | None = Field(None, description="configuration of a Hugging Face data set")
    split: str = Field("train", min_length=1, description="split of a Hugging Face data set")
    revision: str | None = Field(None, description="commit of a Hugging Face data set; none: the newest, recorded")
    query_column: str = Field("query", description="column of queries")
    passage_column: str = Field("passage", description="column of a passage, or of a list of relevant ones")
    title_column: str = Field("", description="column of the passage's title; empty: there is none")
    other_column: str = Field("", description="column of further passages, not relevant to the query; empty: none")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind in ("beir", "huggingface") and not self.data:
            raise ValueError(f"kind {self.kind} needs `data`: give a folder" + " or a name" * (self.kind[0] == "h"))
        if self.kind == "documentation" and self.use != "passages":
            raise ValueError(f"use {self.use}: documentation has no queries of its own, set use to passages")
        if self.kind == "wordnet" and self.use != "queries":
            raise ValueError(
                f"use {self.use}: definitions are as short as queries and judge nothing, set use to queries"
            )
        if self.kind == "questions" and (self.use != "queries" or self.queries is None):
            raise ValueError("questions are made, without passages: set use to queries, and queries to how many")
        # The library joins splits by `+`, takes parts of them in brackets, and knows `all`.
        named = {part.partition("[")[0].strip() for part in self.split.split("+")}
        if self.kind == "huggingface" and self.use != "passages" and named & {"test", "all"}:
            raise ValueError(
                f"split {self.split}: test queries are never learned from, name other splits or set use to passages"
            )
        return self

    @property
    def title(self) -> str:
        """What the manifest calls it."""
        return self.name or (f"{Path(self.data).name or self.data}" if self.data else self.kind)


class ExcludeSettings(Group):
    """What must not be learned from: the queries that students are measured on."""

    folders: tuple[HomePath, ...] = Field((), description="BEIR folders whose queries must not occur in any text")
    splits: tuple[Literal["train", "dev", "test"], ...] = Field(
        ("dev", "test"), min_length=1, description="splits of these folders that are measured on"
    )
    passages: bool = Field(False, description="their passages must not occur either")


class SyntheticSettings(Group):
    """Queries for passages that have none."""

    makers: tuple[Maker, ...] = Field((), description="who makes them, one after the other")
    per_passage: int = Field(2, ge=1, le=64, description="most queries that a maker makes for a passage")
    passages: int | None = Field(None, ge=1, description="most passages to make queries for, chosen by a hash")
    model: str = Field("", description="name or folder of the model that `seq2seq` or `llm` generates with")
    prompt: str = Field(PROMPT, min_length=1, description="what `llm` is asked; {passage} stands for the text")
    passage_tokens: int = Field(384, ge=8, le=8_192, description="tokens of a passage that a generator reads")
    new_tokens: int = Field(48, ge=4, le=512, description="most tokens of a generated query")
    temperature: float = Field(1.0, gt=0, le=5, description="of generation")
    top_k: int = Field(25, ge=0, description="likeliest tokens that are drawn from; 0: all")
    top_p: float = Field(0.95, gt=0, le=1, description="share of probability that is drawn from")
    batch_size: int = Field(16, ge=1, le=1_024, description="texts in one step of generation")
    shortest: int = Field(3, ge=1, description="words of the shortest query that is kept")
    longest: int = Field(32, ge=1, description="words of the longest one")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if {"seq2seq", "llm"} & {*self.makers} and not self.model:
            raise ValueError("makers seq2seq and llm need `model`: give a name or a folder")
        if {"seq2seq", "llm"} <= {*self.makers}:
            raise ValueError("makers seq2seq and llm: choose one of them, there is one `model`")
        if "{passage}" not in self.prompt:
            raise ValueError(f"prompt {self.prompt!r} lacks {{passage}}: write where the text goes")
        if self.shortest > self.longest:
            raise ValueError(f"shortest {self.shortest} is above longest {self.longest}: exchange them")
        return self


class RoundTripSettings(Group):
    """Whether a made query leads back to its passage."""

    top: int | None = Field(None, ge=1, description="rank by which the teacher must find it; none: all are kept")
    candidates: int = Field(100, ge=1, description="passages found by words that a teacher without vectors scores")


class NegativeSettings(Group):
    """Passages that are easily mistaken for the relevant one."""

    count: int = Field(7, ge=0, le=1_000, description="negatives in each list; 0: lists of the relevant passage alone")
    first: int = Field(0, ge=0, description="hardest candidates that are skipped, after positives and margin")
    last: int = Field(100, ge=1, description="candidates that are drawn from or taken in order, the skipped included")
    absolute_margin: float | None = Field(None, ge=0, description="a negative scores at least so much below a positive")
    relative_margin: float | None = Field(
        0.05, ge=0, le=1, description="the same as a share of the positive's score (TopK-PercPos of NV-Retriever)"
    )
    sampling: Literal["top", "random"] = Field("top", description="the hardest candidates, or some of them by chance")
    lists_per_query: int | None = Field(None, ge=1, description="most positives of a query that get a list; none: all")
    candidates: int = Field(200, ge=1, description="passages found by words that a teacher without vectors scores")
    words: bool = Field(False, description="a teacher with vectors finds half of the candidates, words the others")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.count > self.last - self.first:
            raise ValueError(
                f"count {self.count} negatives do not fit between candidates {self.first} and {self.last}: raise `last`"
            )
        return self


class DataFreeSettings(Group):
    """Text drawn from a teacher's own vocabulary: distillation without any data."""

    queries: int = Field(0, ge=0, description="short texts to draw")
    passages: int = Field(0, ge=0, description="long texts to draw")
    method: Literal["unigram", "topics", "gibbs"] = Field("topics", description="how words are chosen")
    model: str = Field("offline", min_length=1, description="whose vocabulary (and head, for gibbs): name or folder")
    query_words: float = Field(8, ge=2, le=64, description="median tokens of a short text")
    passage_words: float = Field(96, ge=2, le=512, description="median tokens of a long text")
    spread: float = Field(0.5, ge=0, le=2, description="standard deviation of the logarithm of the length")
    exponent: float = Field(1.0, ge=0, le=3, description="of Zipf's law over the vocabulary's order")
    focus: float = Field(2.0, ge=0, le=20, description="how much a text's topic decides over frequency (topics)")
    sweeps: int = Field(3, ge=1, le=100, description="times that every word is drawn again (gibbs)")
    temperature: float = Field(1.0, gt=0, le=5, description="of these draws (gibbs)")
    batch_size: int = Field(64, ge=1, le=4_096, description="texts in one step (gibbs)")


class DataSettings(Group):
    """What students learn from."""

    sources: tuple[SourceSettings, ...] = Field((SourceSettings(),), description="public text")
    exclude: ExcludeSettings = ExcludeSettings()
    synthetic: SyntheticSettings = SyntheticSettings()
    roundtrip: RoundTripSettings = RoundTripSettings()
    negatives: NegativeSettings = NegativeSettings()
    datafree: DataFreeSettings = DataFreeSettings()
    seed: int = Field(0, ge=0, description="of every choice by chance or by hash")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.sources and not self.datafree.queries + self.datafree.passages:
            raise ValueError("no sources and no text from a vocabulary: give one of them")
        titles = [source.title for source in self.sources]
        if twice := sorted({title for title in titles if titles.count(title) > 1}):
            raise ValueError(f"sources {', '.join(twice)} occur twice: give each a `name` of its own")
        return self
