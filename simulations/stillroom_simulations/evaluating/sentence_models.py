"""Any model of Sentence Transformers as a system: what it is, is read from its files, not guessed from its name.

| its files say | it is |
|---|---|
| `model_type` in config_sentence_transformers.json | that |
| modules.json without it | a bi-encoder, as all were before there were types; static embeddings are bi-encoders too |
| an architecture `...ForSequenceClassification` in config.json | a cross-encoder |
| an architecture `HF_ColBERT` | a multi-vector model |
| any other config.json | a bi-encoder with mean pooling, which Sentence Transformers adds |

Prompts of a model for queries and passages are used. Code that comes with a model is never run. Weights are read in float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.util import load_file_path
from torch import nn

import stillroom_server.distillery.students.shaped  # noqa: F401  # `AutoModel` learns what pruned towers are
from stillroom_server.distillery.students.towers import linear_of
from stillroom_server.teacher import folder_of
from stillroom_shared.errors import SettingsError
from stillroom_simulations.evaluating.towers import Role, Tower

Kind = Literal["SentenceTransformer", "CrossEncoder", "MultiVectorEncoder"]
_LIMITS = ("max_seq_length", "query_length", "document_length")
_CLASSES: dict[str, type[BaseModel]] = {
    "SentenceTransformer": SentenceTransformer,
    "CrossEncoder": CrossEncoder,
    "MultiVectorEncoder": MultiVectorEncoder,
}


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model with a hash of all that its answers depend on, and the bytes of its weights."""

    model: BaseModel
    identity: str
    weights: int


def load_model(name: str, *, device: str = "cpu") -> Loaded:
    """A folder, a name, or "offline"; `SettingsError` says why it cannot be evaluated."""
    place = folder_of(name)
    kind = _CLASSES[_kind(name, place)]
    try:
        model = kind(place, device=device, model_kwargs={"dtype": "float32"}, trust_remote_code=False)
    except Exception as error:  # whatever its libraries raise on files that are not theirs
        raise SettingsError(_refusal(name, error)) from error
    return describe(model, name)


def describe(model: BaseModel, name: str = "the model") -> Loaded:
    """The same of a model that is loaded."""
    if isinstance(model, CrossEncoder) and model.num_labels != 1:
        raise SettingsError(
            f"{name} is a cross-encoder with {model.num_labels} outputs: ranking takes one score a pair"
        )
    model.eval()
    weights = sum(value.nelement() * value.element_size() for value in model.state_dict().values())
    return Loaded(model, _identity(model), weights)


def sentence_tower(loaded: Loaded, role: Role) -> Tower:
    """One role of a bi-encoder."""
    model = cast(SentenceTransformer, loaded.model)
    compared = model.similarity_fn_name
    if compared == "manhattan":
        raise SettingsError(
            "a model that compares by Manhattan distance has no exact search here: cosine, dot, Euclidean do"
        )
    body, last = _before_a_map(model)
    encode: Callable[..., Any] = body.encode_query if role == "query" else body.encode_document

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        return np.asarray(encode(list(texts), show_progress_bar=False, convert_to_numpy=True), np.float32)

    full = model.get_embedding_dimension()
    assert full is not None
    identity = loaded.identity if last is None else _identity(body)
    return Tower(role, f"{role} {identity}", loaded.weights, embed, compared, full, last=last)


def _before_a_map(model: SentenceTransformer) -> tuple[SentenceTransformer, NDArray[np.float32] | None]:
    """The model without a last linear map before its unit vectors, and the map; as it is, and None, where it has none.

    Unit vectors of W v and of W v / |v| are the same. A teacher's space is turned by such a map (`rotate` of a recipe): its
    passages are embedded once, however often it is turned.
    """
    modules = list(model)
    last, whole = modules[-2] if len(modules) > 2 else None, model.truncate_dim is None
    unit = isinstance(modules[-1], Normalize) and model.similarity_fn_name == "cosine"
    linear = linear_of(last) if unit and whole else None
    if linear is None or linear.bias is not None or cast(Dense, last).module_input_name != "sentence_embedding":
        return model, None
    body = SentenceTransformer(
        modules=[*modules[:-2], modules[-1]],
        device=str(model.device),
        prompts=model.prompts,
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
    )
    return body, linear.weight.detach().cpu().numpy()


def sentence_scorer(loaded: Loaded) -> Callable[[str, Sequence[str]], NDArray[np.floating]]:
    """Logits of a cross-encoder for a query and each of n passages, (n,)."""
    model = cast(CrossEncoder, loaded.model)

    def logits(query: str, passages: Sequence[str]) -> NDArray[np.floating]:
        pairs = [(query, passage) for passage in passages]
        return np.asarray(model.predict(pairs, activation_fn=nn.Identity(), show_progress_bar=False), np.float32)

    return logits


def _kind(name: str, place: str) -> Kind:
    stated = _json(name, place, "config_sentence_transformers.json")
    config = _json(name, place, "config.json")
    modules = _json(name, place, "modules.json")
    if stated is None and config is None and modules is None:
        raise SettingsError(_unknown(name, place))
    architectures = [str(one) for one in (config or {}).get("architectures") or []]
    kind = (stated or {}).get("model_type")
    if kind == "ColBERT" or (kind is None and "HF_ColBERT" in architectures):
        kind = "MultiVectorEncoder"
    elif kind is None and modules is None and any(one.endswith("ForSequenceClassification") for one in architectures):
        kind = "CrossEncoder"
    elif kind is None:
        kind = "SentenceTransformer"
    if kind not in _CLASSES:
        raise SettingsError(f"{name} is a {kind}: {', '.join(_CLASSES)} models can be evaluated")
    return cast(Kind, kind)


def _json(name: str, place: str, file: str) -> dict[str, Any] | None:
    """A file of a model; None when it has none, or when there is no such model."""
    try:
        path = load_file_path(place, file)
        found = None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # a registry that refuses, a network that is down, or a file that is no JSON
        raise SettingsError(_refusal(name, error)) from error
    return found if found is None or isinstance(found, dict) else {}


def _unknown(name: str, place: str) -> str:
    if Path(place).exists():
        return (
            f"{name} holds no model (no modules.json and no config.json), no release and no device: name one of these"
        )
    return f"{name!r} is no folder, and no model of that name can be had: check the name, or the network"


def _refusal(name: str, error: Exception) -> str:
    said = " ".join(str(error).split())
    if "trust_remote_code" in said:
        return (
            f"{name} brings code of its own (trust_remote_code), which is never run here: name a model that the "
            "libraries know"
        )
    return f"{name} cannot be loaded ({type(error).__name__}: {said[:300]}): name a Sentence Transformers model"


def _identity(model: BaseModel) -> str:
    """Weights, configuration of every part, prompts, tokenizer and text limits.

    How a tokenizer was last told to cut and pad is not part of it: each call tells it anew.
    """
    parts = [type(model).__name__, repr(model), json.dumps(model.prompts, sort_keys=True)]
    parts.append(str(getattr(model, "default_prompt_name", None)))
    if cut := getattr(model, "truncate_dim", None):  # saved with the model, and no part of any module
        parts.append(f"cut to {cut}")
    for part in model.modules():
        stated: Any = getattr(part, "get_config_dict", dict)
        parts.append(json.dumps(stated(), sort_keys=True, default=str))
        config: Any = getattr(part, "config", None)
        if hasattr(config, "to_json_string"):
            parts.append(config.to_json_string())
        parts += [str(getattr(part, name, None)) for name in _LIMITS]
    tokenizer: Any = getattr(model, "tokenizer", None)
    inner: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(inner, "to_str"):
        parts.append(json.dumps(json.loads(inner.to_str()) | {"truncation": None, "padding": None}, sort_keys=True))
    else:
        parts.append(repr(inner))
    digest = hashlib.sha256(json.dumps(parts).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
