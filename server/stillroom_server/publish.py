"""Build a release: a Sentence Transformers folder with both towers in torch and ONNX, sealed.

A release is written into a temporary sibling, made durable and renamed, so that a torn one never appears. The torch
weights of the query tower hold `W + B A`, for whoever loads the folder as a plain model; the ONNX files hold `W` and,
as defaults that a device can override, `B`. Both give the same vectors.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import BertModel, PreTrainedTokenizerFast

from stillroom_server.export import export, quantize
from stillroom_shared.adapter import Adapter, AdapterSpec
from stillroom_shared.errors import ReleaseError
from stillroom_shared.lowrank import attach, merge, set_adapter
from stillroom_shared.release import DOCUMENT_FOLDER, ONNX_FILES, TOKENIZER_NAME, Release, open_release, seal_release
from stillroom_shared.sealed import new_folder
from stillroom_shared.settings import AdapterSettings
from stillroom_shared.signing import SigningKey


def publish_release(
    folder: Path,
    *,
    query_tower: BertModel,
    document_tower: BertModel | Release,
    tokenizer: PreTrainedTokenizerFast,
    spec: AdapterSpec,
    adapter: Adapter | None,
    key: SigningKey,
    parent: str | None,
    adapter_round: int,
    privacy_statement: Mapping[str, Any] | None,
    query_tokens: int = 32,
    document_tokens: int = 256,
    matryoshka_dimensions: Sequence[int] = (),
    extras: Callable[[Path], object] | None = None,
) -> Release:
    """Write, seal and verify a release.

    Args:
        query_tower: the tower without adapter; it is not changed.
        document_tower: a tower, or the release whose document tower is taken over as it is, so that indexes stay valid.
        tokenizer: serves both towers.
        spec: the adapters that devices may apply to this release.
        adapter: applied by default; None for the zero adapter, which changes nothing.
        parent: id of the release this one was trained from.
        adapter_round: federated rounds that led to `adapter`.
        privacy_statement: the statement's fields, JSON values only.
        matryoshka_dimensions: shorter lengths that both towers were trained for, ascending.
        extras: writes what else the release brings into its folder before it is sealed, such as a reranker
            (`stillroom_server.rerankers.export_reranker`).

    Raises:
        ReleaseError: the folder exists, the towers do not fit each other, or a field is out of range.
    """
    adapter = Adapter.zero(spec) if adapter is None else adapter
    _check(query_tower, document_tower, spec, adapter, query_tokens, document_tokens)
    with new_folder(folder) as partial:
        # A query is encoded while somebody waits, a passage once: passages get the slower, closer quantization.
        _write_tower(partial, query_tower, tokenizer, query_tokens, adapter, blockwise=False)
        if isinstance(document_tower, Release):
            shutil.copytree(document_tower.folder / DOCUMENT_FOLDER, partial / DOCUMENT_FOLDER)
        else:
            _write_tower(partial / DOCUMENT_FOLDER, document_tower, tokenizer, document_tokens, None, blockwise=True)
        if extras is not None:
            extras(partial)
        fields = {
            "dimension": query_tower.config.hidden_size,
            "matryoshka_dimensions": tuple(matryoshka_dimensions),
            "query_tokens": query_tokens,
            "document_tokens": document_tokens,
            "parent": parent,
            "adapter_round": adapter_round,
            "adapter_spec": spec,
            "privacy_statement": None if privacy_statement is None else dict(privacy_statement),
        }
        seal_release(partial, fields, key)
    return open_release(folder, trusted_key=key.public)


def publish_first(
    folder: Path,
    *,
    query_tower: BertModel,
    document_tower: BertModel,
    tokenizer: PreTrainedTokenizerFast,
    adapter: AdapterSettings,
    key: SigningKey,
    query_tokens: int = 32,
    document_tokens: int = 256,
    extras: Callable[[Path], object] | None = None,
) -> Release:
    """A release of distilled towers, before any round: no parent, no adapter, every layer of the query tower adaptable."""
    spec = AdapterSpec(
        rank=adapter.rank,
        layers=tuple(range(query_tower.config.num_hidden_layers)),
        targets=adapter.targets,
        dim=query_tower.config.hidden_size,
        seed=adapter.seed,
    )
    return publish_release(
        folder, query_tower=query_tower, document_tower=document_tower, tokenizer=tokenizer, spec=spec, adapter=None, key=key,
        parent=None, adapter_round=0, privacy_statement=None, query_tokens=query_tokens, document_tokens=document_tokens,
        extras=extras,
    )  # fmt: skip


def _check(
    query_tower: BertModel,
    document_tower: BertModel | Release,
    spec: AdapterSpec,
    adapter: Adapter,
    query_tokens: int,
    document_tokens: int,
) -> None:
    if adapter.spec != spec:
        raise ReleaseError(f"the default adapter has spec {adapter.spec}, the release {spec}: they must be the same")
    if type(query_tower) is not BertModel:
        raise ReleaseError(
            f"the query tower is a {type(query_tower).__name__}: devices load a plain BertModel to train its adapter; remove "
            "layers or feed-forward neurons, as many from each layer, and leave heads and width as they are"
        )
    dimension = query_tower.config.hidden_size
    if isinstance(document_tower, Release):
        other, tokens = document_tower.dimension, document_tower.document_tokens
        if tokens != document_tokens:
            raise ReleaseError(f"document_tokens is {document_tokens}, the document tower taken over reads {tokens}")
    else:
        other = document_tower.config.hidden_size
        _check_tower("document_tokens", document_tokens, document_tower)
    if dimension != other:
        raise ReleaseError(f"the query tower has {dimension} dimensions, the document tower {other}: they must agree")
    _check_tower("query_tokens", query_tokens, query_tower)


def _check_tower(name: str, tokens: int, tower: BertModel) -> None:
    if tower.dtype != torch.float32:
        raise ReleaseError(f"the tower that reads {name} holds {tower.dtype}: convert it to torch.float32")
    limit = tower.config.max_position_embeddings
    if not 2 < tokens <= limit:
        raise ReleaseError(f"{name} is {tokens}: choose 3 to {limit}, the positions that its tower knows")


def _write_tower(
    folder: Path,
    tower: BertModel,
    tokenizer: PreTrainedTokenizerFast,
    tokens: int,
    adapter: Adapter | None,
    *,
    blockwise: bool,
) -> None:
    for name in ONNX_FILES.values():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    _merged(tower, adapter).save_pretrained(folder)
    write_tokenizer(folder, tokenizer, tokens)
    _write_modules(folder, tower.config.hidden_size, tokens)
    export(tower, folder / ONNX_FILES["float32"], adapter)
    quantize(folder / ONNX_FILES["float32"], folder / ONNX_FILES["int8"], blockwise=blockwise)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes files that only their owner can read; a release is for everybody


def _merged(tower: BertModel, adapter: Adapter | None) -> BertModel:
    if adapter is None:
        return tower
    adapted = copy.deepcopy(tower)
    set_adapter(attach(adapted, adapter.spec), adapter)
    return merge(adapted)


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast, tokens: int) -> Tokenizer:
    """Save a tokenizer for Sentence Transformers, which reads `tokens` of a text, and for the device; the device's."""
    own = copy.deepcopy(tokenizer)
    own.model_max_length = tokens
    own.save_pretrained(folder)
    # A tokenizer in use remembers its last truncation and padding; the device sets its own.
    plain = Tokenizer.from_str(own.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    plain.save(str(folder / TOKENIZER_NAME))
    return plain


def _write_modules(folder: Path, dimension: int, tokens: int) -> None:
    """What makes the folder a Sentence Transformers model, in the form that its versions since 2 read."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (path, kind) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": tokens, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": {"word_embedding_dimension": dimension, "pooling_mode_mean_tokens": True},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
