"""Small sealed folders to tamper with: the file table and the manifest matter here, not what the files hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillroom_shared import sealed
from stillroom_shared.adapter import AdapterSpec
from stillroom_shared.errors import ReleaseError
from stillroom_shared.release import DOCUMENT_FOLDER, ONNX_FILES, TOKENIZER_NAME, open_release, seal_release
from stillroom_shared.sealed import MANIFEST_NAME, canonical_json
from stillroom_shared.signing import SigningKey

SPEC = AdapterSpec(rank=2, layers=(0,), targets=("query",), dim=8, seed=3)
FIELDS: dict[str, Any] = {
    "dimension": 8,
    "query_tokens": 32,
    "document_tokens": 256,
    "parent": None,
    "adapter_round": 0,
    "adapter_spec": SPEC,
    "privacy_statement": {"epsilon": 1.57, "rounds": 15, "unit": "user", "readers": ["releases", None, True]},
}
NAMES = [prefix + name for prefix in ("", f"{DOCUMENT_FOLDER}/") for name in (*ONNX_FILES.values(), TOKENIZER_NAME)]


def make(folder: Path, key: SigningKey, **fields: Any) -> Path:
    """A sealed folder with the files a release must have, each with content of its own except the tokenizers."""
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("tokenizer" if name.endswith(TOKENIZER_NAME) else name)
    seal_release(folder, {**FIELDS, **fields}, key)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], None], key: SigningKey | None = None) -> None:
    """Alter the manifest; with a key, sign it again, as an operator whose tool is broken or hostile would."""
    path = folder / MANIFEST_NAME
    fields = json.loads(path.read_text())
    change(fields)
    if key is not None:
        fields["public_key"] = key.public
        body = {name: value for name, value in fields.items() if name != "signature"}
        fields["signature"] = key.sign(canonical_json(body))
    path.write_bytes(sealed._rendered(fields))


def refused(folder: Path, words: str, *, key: str | None) -> None:
    with pytest.raises(ReleaseError, match=words) as caught:
        open_release(folder, trusted_key=key)
    assert str(folder) in str(caught.value), "the message must name the folder or the file"
