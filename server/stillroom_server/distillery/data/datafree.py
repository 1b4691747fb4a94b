"""Texts out of a model alone: its vocabulary, its token embeddings, its masked-token head. No corpus is read.

| method | a text is |
|---|---|
| unigram | tokens drawn by Zipf's law over the vocabulary's order |
| topics | the same, tilted by a topic: p(token) ~ rank^-s exp(f <e, z>), z drawn once a text |
| gibbs | a topic text of which each token is drawn again by a masked-token model, several times over (`gibbs`) |

unigram reaches every token at about its frequency, but has no topic: vectors crowd around one mean. topics spreads over the
teacher's space with words that belong together, and is never grammatical. gibbs is locally fluent, needs such a head, costs a
pass of the model a token, and drifts to frequent words. None knows what people ask: measure before trusting.

topics samples the embedding space: z comes from a Gaussian with the shrunk covariance (Ledoit & Wolf 2004) of the token
embeddings, their mean removed, and words are chosen that lie where z does: the random-walk model of Arora et al. 2016
(arXiv 1502.03520) with the walk standing still. It is the tokens' space, not that of finished vectors: to sample the latter
takes an inverter that was trained on text, and vectors without a text give a student nothing to read.

Word-piece vocabularies are roughly written from frequent to rare; single characters, special and unused entries are left out.
Lengths are log-normal. Text number i of a role follows from (seed, role, i) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

from stillroom_server.distillery.data.settings import DataFreeSettings
from stillroom_server.distillery.teachers.base import Role
from stillroom_server.teacher import OFFLINE, offline_folder
from stillroom_shared.errors import SettingsError

_SUBWORD = "##"
_LONGEST = {"query": 64, "passage": 512}
_LEAST_WORDS = 16
_TOGETHER = 64
"""Texts whose topics are multiplied together."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokens that texts are made of.

    Attributes:
        ids: token ids from frequent to rare, (tokens,).
        embeddings: of these, mean removed, scaled to a root mean square length of 1, (tokens, width).
        opens: whether a token may begin a text: it is no continuation, (tokens,).
    """

    tokenizer: PreTrainedTokenizerBase
    ids: NDArray[np.int64]
    embeddings: NDArray[np.float32]
    opens: NDArray[np.bool_]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, embeddings: NDArray[np.float32]) -> Vocabulary:
        """All tokens but special, unused and one-character ones; `embeddings` by token id, (vocabulary, width)."""
        special = set(tokenizer.all_special_ids)
        names = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), len(embeddings)))))
        kept = [number for number, name in enumerate(names) if number not in special and _is_word(name)]
        if len(kept) < _LEAST_WORDS:
            raise SettingsError(
                f"data.datafree.model has {len(kept)} whole tokens: {_LEAST_WORDS} are needed, take another"
            )
        ids = np.array(kept, np.int64)
        centred = embeddings[ids] - embeddings[ids].mean(0)
        scale = np.sqrt((centred**2).sum(1).mean())
        opens = np.array([not names[number].startswith(_SUBWORD) for number in kept])
        return cls(tokenizer, ids, (centred / scale).astype(np.float32), opens)

    @classmethod
    def load(cls, name: str) -> Vocabulary:
        """Of a model by folder or name. Raises `SettingsError` when it cannot be had."""
        tokenizer, model = _loaded(name, AutoModel)
        return cls.of(tokenizer, model.get_input_embeddings().weight.detach().float().numpy())

    def prior(self, exponent: float) -> NDArray[np.float64]:
        """Logarithm of Zipf's probabilities by rank, not normalized, (tokens,)."""
        return -exponent * np.log(np.arange(1, len(self.ids) + 1))


@dataclass(frozen=True, eq=False)
class Topics:
    """A Gaussian over directions of the embedding space.

    Attributes:
        root: z = root @ normal numbers, scaled so that <e, z> has variance 1 over tokens and topics, (width, width).
    """

    root: NDArray[np.float64]

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Topics:
        """Fit to the token embeddings."""
        covariance, _ = ledoit_wolf(vocabulary.embeddings, assume_centered=True)
        root = np.linalg.cholesky(covariance)
        # E[<e, z>^2] over tokens and topics is the trace of the squared covariance.
        return cls(root / np.sqrt((covariance**2).sum()))

    def tilts(self, vocabulary: Vocabulary, normals: NDArray[np.float64]) -> NDArray[np.float32]:
        """<e, z> of every token, of variance about 1, (topics, tokens), for standard normal numbers (topics, width)."""
        topics = (normals @ self.root.T).astype(np.float32)
        return np.asarray(topics @ vocabulary.embeddings.T, np.float32)


def texts(
    settings: DataFreeSettings,
    role: Role,
    *,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[str]:
    """As many texts of a role as the settings say. Raises `SettingsError` when the model cannot be had or lacks a head."""
    total = settings.queries if role == "query" else settings.passages
    if not total:
        return
    vocabulary = Vocabulary.load(settings.model)
    drawn = token_lists(vocabulary, settings, role, total, seed=seed)
    if settings.method == "gibbs":
        from stillroom_server.distillery.data.gibbs import resampled

        tokenizer, model = _loaded(settings.model, AutoModelForMaskedLM)
        drawn = resampled(model, tokenizer, vocabulary, drawn, settings, seed=seed + (role == "passage"))
    for done, ids in enumerate(drawn, start=1):
        yield str(vocabulary.tokenizer.decode(ids.tolist(), skip_special_tokens=True))
        progress(done, total)


def token_lists(
    vocabulary: Vocabulary, settings: DataFreeSettings, role: Role, total: int, *, seed: int
) -> Iterator[NDArray[np.int64]]:
    """Token ids of `total` texts, one after the other."""
    prior = vocabulary.prior(settings.exponent).astype(np.float32)
    topics = None if settings.method == "unigram" else Topics.of(vocabulary)
    median = settings.query_words if role == "query" else settings.passage_words
    for start in range(0, total, _TOGETHER):
        # Always as many, the last time too: a product of another shape rounds otherwise.
        randoms = [np.random.default_rng([seed, int(role == "passage"), start + i]) for i in range(_TOGETHER)]
        weights = np.broadcast_to(prior, (_TOGETHER, len(prior)))
        if topics is not None:
            normals = np.stack([random.standard_normal(len(topics.root)) for random in randoms])
            weights = prior + np.float32(settings.focus) * topics.tilts(vocabulary, normals)
        for random, line in list(zip(randoms, weights, strict=True))[: total - start]:
            length = int(np.clip(round(random.lognormal(np.log(median), settings.spread)), 2, _LONGEST[role]))
            chosen = _drawn(line, length, random)
            if not vocabulary.opens[chosen[0]]:
                chosen[:1] = _drawn(np.where(vocabulary.opens, line, -np.inf), 1, random)
            yield vocabulary.ids[chosen]


def _drawn(weights: NDArray[np.float32], count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Positions with the probabilities of softmax(weights)."""
    cumulated = np.cumsum(np.exp(weights - weights.max()), dtype=np.float64)
    places = np.searchsorted(cumulated, random.random(count) * cumulated[-1], side="right")
    return np.asarray(np.minimum(places, len(weights) - 1), np.int64)


def _is_word(token: str) -> bool:
    """Letters, at least two of them, behind the marks of continuation and of word starts."""
    bare = token.removeprefix(_SUBWORD).lstrip("\u2581\u0120")  # of word-piece, sentence-piece, byte-level vocabularies
    return len(bare) > 1 and bare.isalpha()


def _loaded(name: str, kind: Any) -> tuple[PreTrainedTokenizerBase, Any]:
    place = str(offline_folder("data.datafree.model")) if name == OFFLINE else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        model, report = kind.from_pretrained(place, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(
            f"data.datafree.model {name!r} cannot be loaded as {kind.__name__} ({error}): give a folder, or a name with "
            "network access"
        ) from error
    if kind is AutoModelForMaskedLM and report["missing_keys"]:
        raise SettingsError(
            f"data.datafree.model {name!r} has no masked-token head ({sorted(report['missing_keys'])[0]} is missing): gibbs "
            "needs one, as bert-base-uncased has; choose method topics or unigram"
        )
    return tokenizer, model.eval()
