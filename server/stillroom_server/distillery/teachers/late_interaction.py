"""Late interaction as a teacher: one vector a token, its score MaxSim (Khattab & Zaharia 2020, arXiv 2004.12832).

    score(q, p) = sum over tokens i of q of  max over tokens j of p of  q_i . p_j

Any `MultiVectorEncoder` of Sentence Transformers, with what it says about prefixes, query expansion, punctuation and "mean"
MaxSim. `token_model` opens an ordinary Sentence Transformers model as one: its token vectors, normalised.

A passage that stands in many lists is embedded once as long as its token vectors fit into `token_cache_mib` (least recently
used leave first). Memory beside that: token vectors of `_PASSAGES_AT_ONCE` passages. Equal up to rounding whatever else is in
the call: 1e-6 of a score in float32 (all-MiniLM-L6-v2, 40 pairs of SciFact).

| case | what happens |
|---|---|
| the same text several times in a call | computed once |
| a query without passages | an empty array |
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch import Tensor

from stillroom_server.distillery.teachers.base import FloatArray, Role
from stillroom_server.distillery.teachers.bi_encoder import autocast, identity_of, prompt_of, reading
from stillroom_server.distillery.teachers.settings import TeacherSettings
from stillroom_shared.errors import SettingsError

_PASSAGES_AT_ONCE = 512


def token_model(model: SentenceTransformer) -> MultiVectorEncoder:
    """An ordinary model's normalised token vectors; pooling and what follows it are left out.

    Sentence Transformers' own conversion adds a random projection, which is for training: it would make a teacher of noise.

    Raises:
        SettingsError: the model has no token vectors (it does not begin with a transformer).
    """
    if not isinstance(model[0], Transformer):
        raise SettingsError(
            f"a model that begins with {type(model[0]).__name__} has no token vectors: give one with a transformer"
        )
    modules = [model[0], MultiVectorMask(), Normalize(module_input_name="token_embeddings")]
    prompts = {name: prompt for name, prompt in model.prompts.items() if prompt}
    return MultiVectorEncoder(modules=modules, device=str(model.device), prompts=prompts or None)


class LateInteraction:
    """A `Teacher`.

    Attributes:
        model: the model itself.
        settings: text limits, prompts, batch size, precision and the size of the cache are read.
    """

    def __init__(self, model: MultiVectorEncoder, settings: TeacherSettings) -> None:
        self.model = model
        self.settings = settings
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._kept_bytes = 0

    @cached_property
    def identity(self) -> str:
        """See `Teacher`."""
        return identity_of(f"late-interaction {self.model.similarity_fn_name}", self.model, self.settings)

    def tokens(self, texts: Sequence[str], role: Role) -> list[Tensor]:
        """Token vectors of each text, (its tokens, dimension)."""
        encode = self.model.encode_query if role == "query" else self.model.encode_document
        with autocast(self.model, self.settings):
            found = encode(
                list(texts),
                prompt=prompt_of(self.settings, role),
                batch_size=self.settings.batch_size,
                show_progress_bar=False,
                **reading(self.settings, role),
            )
        return [one.clone() for one in found]  # a slice would keep its whole padded batch alive

    def score(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[FloatArray]:
        """MaxSim; see `Teacher`."""
        scores: list[FloatArray] = []
        for start, stop in _chunks(passages):
            scores += self._chunk(queries[start:stop], passages[start:stop])
        return scores

    def _chunk(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[FloatArray]:
        asked = list(dict.fromkeys(queries))
        left = dict(zip(asked, self.tokens(asked, "query"), strict=True)) if asked else {}
        right = self._passages(list(dict.fromkeys(text for own in passages for text in own)))
        pairs = [(left[query], right[text]) for query, own in zip(queries, passages, strict=True) for text in own]
        if not pairs:
            return [np.zeros(0, np.float32) for _ in passages]
        flat = self.model.similarity_pairwise([a for a, _ in pairs], [b for _, b in pairs]).float().cpu().numpy()
        ends = np.cumsum([len(own) for own in passages])[:-1]
        return [np.asarray(own, np.float32) for own in np.split(flat, ends)]

    def _passages(self, texts: Sequence[str]) -> dict[str, Tensor]:
        found = {text: self._kept[text] for text in texts if text in self._kept}
        for text in found:
            self._kept.move_to_end(text)
        if missing := [text for text in texts if text not in found]:
            for text, vectors in zip(missing, self.tokens(missing, "passage"), strict=True):
                found[text] = self._kept[text] = vectors
                self._kept_bytes += vectors.nbytes
        while self._kept_bytes > self.settings.token_cache_mib << 20:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return found


def _chunks(passages: Sequence[Sequence[str]]) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive lists with at most `_PASSAGES_AT_ONCE` passages together, one list at least."""
    start, held = 0, 0
    for number, own in enumerate(passages):
        if number > start and held + len(own) > _PASSAGES_AT_ONCE:
            yield start, number
            start, held = number, 0
        held += len(own)
    if start < len(passages):
        yield start, len(passages)
