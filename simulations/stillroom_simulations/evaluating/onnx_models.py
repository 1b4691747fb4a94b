"""The ONNX files of a Sentence Transformers folder, as a device runs them: `MODEL@float32` and `MODEL@int8`.

The weights are the file's; tokenizer, limits, prompts, pooling and similarity are the model's. A text at a time, without
padding, on one thread of ONNX Runtime, by the code of the client room.

| the model | its vectors come from |
|---|---|
| mean pooling without prompts, the map of its `Dense` in the file (`distillery.students.export`) | the client's `OnnxTower` |
| a static table, likewise | the same, without [CLS] and [SEP] |
| any other pooling, prompts, a `Dense` that the file lacks | the model's own modules, around the file |
| late interaction | the model's own modules, around the file |
| a cross-encoder | the client's `PairScorer`; pairs are cut at the tokens of its reranker.json, else at the model's own limit |
| no such file, or one that gives something else | `SettingsError` |
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from sentence_transformers.util import load_file_path
from torch import Tensor, nn

from stillroom_client.encoder import STATES, OnnxTower
from stillroom_client.rerank import LOGITS, PairScorer
from stillroom_client.sessions import Session
from stillroom_server.bert_graph import PROJECTION
from stillroom_server.teacher import folder_of
from stillroom_shared.errors import SettingsError
from stillroom_shared.release import ONNX_FILES, RERANKER_SETTINGS, Precision, RerankerSettings
from stillroom_simulations.evaluating.sentence_models import Loaded, sentence_tower
from stillroom_simulations.evaluating.towers import Role, Tower, unit

Vectors = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class OnnxModel:
    """A loaded model with one of its files. `identity` is a hash of both.

    Attributes:
        name: what the model was called, for errors.
        content: of the file.
        mapped: whether the model's `Dense` is in the file.
    """

    name: str
    loaded: Loaded
    content: bytes
    identity: str
    mapped: bool

    def tower(self, role: Role, *, threads: int) -> Tower:
        """One role of a bi-encoder: a text a thread."""
        own = sentence_tower(self.loaded, role)
        embed = self._plain or _by_its_modules(self, role)

        def all_of(texts: Sequence[str]) -> Vectors:
            return np.stack(_each(embed, texts, threads))

        return replace(own, identity=f"{role} {self.identity}", weights=len(self.content), embed=all_of, last=None)

    @cached_property
    def _plain(self) -> Callable[[str], Vectors] | None:
        """One session for both roles."""
        return _as_a_device(self)

    def late(self) -> Loaded:
        """A late-interaction model whose states are the file's."""
        expansion = getattr(self.loaded.model[0], "query_expansion", None)
        if expansion and not expansion["attend"]:
            raise SettingsError(
                f"{self.name} expands queries by tokens that no other looks at, which a device's texts without a mask "
                "cannot have: only its torch weights can be evaluated"
            )
        return Loaded(_around(self), self.identity, len(self.content))

    def scorer(self) -> PairScorer:
        """A cross-encoder."""
        model = cast(CrossEncoder, self.loaded.model)
        if any(model.prompts.values()):
            raise SettingsError(f"{self.name} puts prompts before its pairs: only its torch weights can be evaluated")
        scorer = PairScorer(_tokenizer(model), self.content, _pair_tokens(self.name, model))
        _gives(self.name, scorer.session, LOGITS)
        return scorer


def open_onnx(name: str, loaded: Loaded, precision: Precision) -> OnnxModel:
    """The file of a model that is loaded; `SettingsError` says how to make one where there is none."""
    path = load_file_path(folder_of(name), ONNX_FILES[precision])
    if path is None:
        raise SettingsError(
            f"{name} has no {ONNX_FILES[precision]}: write one with `stillroom distill export {name} FOLDER` and name that "
            f"folder, or leave @{precision} out"
        )
    content = Path(path).read_bytes()
    weights = {tensor.name for tensor in onnx.load_from_string(content).graph.initializer}
    mapped = any(weight.startswith(f"{PROJECTION}.") for weight in weights)
    identity = f"onnx {hashlib.sha256(content).hexdigest()} {_cut(name)} {loaded.identity}"
    return OnnxModel(name, loaded, content, identity, mapped)


def _as_a_device(model: OnnxModel) -> Callable[[str], Vectors] | None:
    """The client's way from text to vector, or None where a device could not run the model."""
    own = cast(SentenceTransformer, model.loaded.model)
    first, *others = own
    static = isinstance(first, StaticEmbedding)
    if not static:
        pooling = others.pop(0) if others else None
        if not isinstance(pooling, Pooling) or pooling.pooling_mode != "mean":
            return None
    if any(own.prompts.values()) or not all(isinstance(one, Normalize) for one in _outside(model, others)):
        if static:
            raise SettingsError(
                f"{model.name} has prompts, or a Dense that its file lacks: write the file with `stillroom distill export`"
            )
        return None
    tower = OnnxTower(_tokenizer(own), model.content, None if static else own.max_seq_length, special=not static)
    _gives(model.name, tower.session, STATES)
    normalized = any(isinstance(one, Normalize) for one in others)
    nothing = np.zeros(own.get_embedding_dimension() or 0, np.float32)

    def vector(text: str) -> Vectors:
        if static and not tower.tokens(text):  # the mean of no rows
            return nothing
        mean: Vectors = tower.mean(text)
        return (unit(mean[None])[0] if normalized else mean)[: own.truncate_dim]

    return vector


def _by_its_modules(model: OnnxModel, role: Role) -> Callable[[str], Vectors]:
    whole = cast(SentenceTransformer, _around(model))
    encode: Callable[..., Any] = whole.encode_query if role == "query" else whole.encode_document

    def vector(text: str) -> Vectors:
        [found] = encode([text], show_progress_bar=False, convert_to_numpy=True)
        return np.asarray(found, np.float32)

    return vector


class _States(nn.Module):
    """Stands where the transformer of a model was: the states of a file, a text at a time, padded again."""

    def __init__(self, session: Session, config: Any) -> None:
        super().__init__()
        self._session, self.config = session, config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """`last_hidden_state`, (batch, tokens, dim); padding is zeros."""
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        rows: list[Tensor] = []
        for ids, mask, kinds in zip(input_ids, attention_mask.bool(), types, strict=True):
            found = torch.from_numpy(self._session.run(STATES, ids[mask].tolist(), kinds[mask].tolist()))
            rows.append(found.new_zeros(len(ids), found.shape[1]).masked_scatter_(mask[:, None], found))
        return {STATES: torch.stack(rows)}


def _around(model: OnnxModel) -> BaseModel:
    """A copy of the model with the file in place of its transformer, without the `Dense` that the file holds."""
    own = model.loaded.model
    session = Session(model.content)
    _gives(model.name, session, STATES)
    transformer = own.transformers_model
    if transformer is None:
        raise SettingsError(f"{model.name} begins with a {type(own[0]).__name__}: only its torch weights are evaluated")
    # What stands in the memo is taken for copied already: neither the weights nor the session are.
    whole = copy.deepcopy(own, {id(transformer): _States(session, transformer.config)})
    for place in reversed(range(len(whole))):
        if model.mapped and isinstance(whole[place], Dense):
            del whole[place]
    return whole.to("cpu")


def _outside(model: OnnxModel, modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that the file does not hold."""
    return [one for one in modules if not (model.mapped and isinstance(one, Dense))]


def _tokenizer(model: BaseModel) -> bytes:
    inner: Any = getattr(model.tokenizer, "backend_tokenizer", model.tokenizer)
    text: str = inner.to_str()
    return text.encode()


def _cut(name: str) -> int | None:
    """Tokens of a pair, as reranker.json has them; None without it."""
    path = load_file_path(folder_of(name), RERANKER_SETTINGS)
    if path is None:
        return None
    try:
        return RerankerSettings.model_validate_json(Path(path).read_bytes()).tokens
    except ValueError as error:
        raise SettingsError(f"{path} cannot be read ({error}): export the reranker again") from error


def _pair_tokens(name: str, model: CrossEncoder) -> int:
    tokens = _cut(name) or model.max_seq_length
    if tokens is None:
        raise SettingsError(f"{name} does not say how many tokens of a pair it reads: export it again")
    return tokens


def _gives(name: str, session: Session, output: str) -> None:
    if output not in session.outputs:
        raise SettingsError(
            f"the ONNX file of {name} gives {', '.join(session.outputs)}, not {output}: write it with "
            "`stillroom distill export`"
        )


def _each(embed: Callable[[str], Vectors], texts: Sequence[str], threads: int) -> list[Vectors]:
    if threads == 1 or len(texts) < 2:
        return [embed(text) for text in texts]
    with ThreadPoolExecutor(threads) as pool:  # tokenizer and session leave the interpreter lock
        return list(pool.map(embed, texts))
