"""The device's encoder: independence of company and threads, and swapping adapters."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stillroom_client.encoder import Encoder
from stillroom_shared.adapter import Adapter
from stillroom_shared.errors import ReleaseError
from stillroom_shared.release import ONNX_FILES, Precision, Release, SealedAdapter, open_release
from stillroom_shared.signing import SigningKey

Vectors = NDArray[np.float32]
TEXTS = (
    "open the zip file and list its members",
    "tapir",
    "what do tapirs eat at the river bank, and how is an array sorted when given a number",
    "",
    "sort",
)


@pytest.fixture(scope="module", params=["int8", "float32"])
def encoder(request: pytest.FixtureRequest, tiny_release: Release) -> Encoder:
    return Encoder(tiny_release, precision=request.param)


def test_needs_neither_torch_nor_transformers() -> None:
    """One careless import costs a device seconds at every start, and gigabytes of installation."""
    code = "import stillroom_client.encoder, sys; print({'torch', 'transformers', 'flwr'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_vectors_are_unit_and_in_order(encoder: Encoder) -> None:
    """Sorting by length without undoing it would hand every text another one's vector."""
    for encode in (encoder.encode_queries, encoder.encode_documents):
        vectors = encode(TEXTS)
        assert vectors.shape == (len(TEXTS), 32) and vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        np.testing.assert_array_equal(vectors[::-1], encode(TEXTS[::-1]))
        assert len(np.unique(vectors.round(4), axis=0)) == len(TEXTS)
        assert encode([]).shape == (0, 32)
    assert not np.allclose(encoder.encode_queries(TEXTS), encoder.encode_documents(TEXTS), atol=0.1)


def test_vector_depends_on_its_text_alone(encoder: Encoder) -> None:
    """With a quantization scale shared by a batch, the same passage has another vector in another batch."""
    together = encoder.encode_documents(TEXTS)
    for text, vector in zip(TEXTS, together, strict=True):
        np.testing.assert_array_equal(encoder.encode_documents([text])[0], vector)


def test_threads_change_nothing_but_time(tiny_release: Release) -> None:
    """A race between texts, or rows written out of order, would only show with more than one thread."""
    one, many = Encoder(tiny_release), Encoder(tiny_release, threads=3)
    texts = [f"{text} {number}" for number in range(20) for text in TEXTS]
    np.testing.assert_array_equal(one.encode_documents(texts), many.encode_documents(texts))


def test_long_texts_are_truncated(encoder: Encoder) -> None:
    """A text longer than the tower's positions must not fail, nor be cut at another place than the release states."""
    words = ["zip", "tar", "file", "list", "read", "write", "open", "close", "array", "matrix"] * 10
    for encode, tokens in ((encoder.encode_queries, 16), (encoder.encode_documents, 48)):
        kept = encode([" ".join(words[: tokens - 2])])  # two tokens are [CLS] and [SEP]
        np.testing.assert_array_equal(encode([" ".join(words)]), kept)
        assert not np.array_equal(encode([" ".join(words[: tokens - 3])]), kept)


class TestAdapters:
    """Adopting an adapter changes queries only, at once, and never half."""

    def torch_vectors(self, release: Release, adapter: Adapter) -> Vectors:
        """The slow twin: the query tower in torch with the adapter attached."""
        import torch
        from tokenizers import Tokenizer
        from transformers import BertModel

        from stillroom_shared.lowrank import attach, set_adapter

        tower = BertModel.from_pretrained(release.folder)
        set_adapter(attach(tower, adapter.spec), adapter)
        tokenizer = Tokenizer.from_file(str(release.tokenizer_file))
        tokenizer.enable_truncation(release.query_tokens)
        rows = []
        for text in TEXTS:
            with torch.no_grad():
                mean = tower(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].mean(0)
            rows.append((mean / mean.norm()).numpy())
        return np.stack(rows)

    @pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("int8", 0.05)])
    def test_adopted_adapter_equals_torch(
        self, tiny_release: Release, tiny_adapter: Adapter, precision: Precision, tolerance: float
    ) -> None:
        """An adapter that is fed under a name the graph does not use would be ignored without an error."""
        encoder = Encoder(tiny_release, precision=precision)
        plain, documents = encoder.encode_queries(TEXTS), encoder.encode_documents(TEXTS)
        expected = self.torch_vectors(tiny_release, tiny_adapter)
        assert abs(plain - expected).max() > 0.2, "the adapter must matter"
        encoder.adopt(tiny_adapter)
        np.testing.assert_allclose(encoder.encode_queries(TEXTS), expected, atol=tolerance)
        np.testing.assert_array_equal(encoder.encode_documents(TEXTS), documents)
        started = Encoder(tiny_release, precision=precision, adapter=tiny_adapter)
        np.testing.assert_array_equal(started.encode_queries(TEXTS), encoder.encode_queries(TEXTS))
        encoder.adopt(None)
        np.testing.assert_array_equal(encoder.encode_queries(TEXTS), plain)
        encoder.adopt(Adapter.zero(tiny_release.adapter_spec))
        np.testing.assert_array_equal(encoder.encode_queries(TEXTS), plain)

    def test_none_returns_to_the_adapter_of_the_release(self, adapted_release: tuple[Release, Adapter]) -> None:
        """`None` taken for zero would drop what the release was published with."""
        release, adapter = adapted_release
        encoder = Encoder(release, precision="float32")
        own = encoder.encode_queries(TEXTS)
        encoder.adopt(Adapter.zero(adapter.spec))
        assert abs(encoder.encode_queries(TEXTS) - own).max() > 0.1
        encoder.adopt(adapter)
        np.testing.assert_array_equal(encoder.encode_queries(TEXTS), own)

    def test_unfit_adapters_are_refused_and_the_old_one_stays(
        self, tiny_release: Release, tiny_adapter: Adapter, adapted_release: tuple[Release, Adapter]
    ) -> None:
        """Another seed has the same shapes: nothing but the spec tells that its `B` belongs to another `A`."""
        encoder = Encoder(tiny_release, adapter=tiny_adapter)
        before = encoder.encode_queries(TEXTS)
        other_seed = Adapter(replace(tiny_adapter.spec, seed=99), tiny_adapter.values)
        for_other = SealedAdapter(tiny_adapter, adapted_release[0].id, 1, None)
        for unfit, words in ((other_seed, "seed=99"), (adapted_release[1], "rank=3"), (for_other, "is for release")):
            with pytest.raises(ReleaseError, match=words) as caught:
                encoder.adopt(unfit)
            assert tiny_release.id in str(caught.value)
        np.testing.assert_array_equal(encoder.encode_queries(TEXTS), before)
        encoder.adopt(None)
        encoder.adopt(SealedAdapter(tiny_adapter, tiny_release.id, 1, None))
        np.testing.assert_array_equal(encoder.encode_queries(TEXTS), before)

    def test_later_changes_of_the_callers_array_do_not_reach_the_encoder(
        self, tiny_release: Release, tiny_adapter: Adapter
    ) -> None:
        """A round that goes on training in place would change searches in the middle of a step."""
        own = Adapter(tiny_adapter.spec, tiny_adapter.values.copy())
        encoder = Encoder(tiny_release, adapter=own)
        before = encoder.encode_queries(TEXTS)
        own.values[:] = 0
        np.testing.assert_array_equal(encoder.encode_queries(TEXTS), before)

    def test_swapping_is_atomic(self, tiny_release: Release, tiny_adapter: Adapter) -> None:
        """A query that saw half of the matrices of each adapter would return a vector of neither."""
        encoder = Encoder(tiny_release, precision="float32")
        adapters = (tiny_adapter, Adapter.zero(tiny_adapter.spec))
        allowed = []
        for adapter in adapters:
            encoder.adopt(adapter)
            allowed.append(encoder.encode_queries(TEXTS[:1])[0])
        stop = threading.Event()

        def swap() -> None:
            while not stop.is_set():
                for adapter in adapters:
                    encoder.adopt(adapter)

        swapper = threading.Thread(target=swap)
        swapper.start()
        try:
            found = [encoder.encode_queries(TEXTS[:1])[0] for _ in range(300)]
        finally:
            stop.set()
            swapper.join()
        seen = [next(i for i, vector in enumerate(allowed) if np.array_equal(vector, one)) for one in found]
        assert set(seen) == {0, 1}, "both adapters must have been met, or nothing was tested"


@pytest.mark.parametrize("name", [*ONNX_FILES.values(), "tokenizer.json"])
def test_files_are_verified_as_they_are_loaded(
    tiny_release: Release, signing_key: SigningKey, tmp_path: Path, name: str
) -> None:
    """Whoever can write to the folder could exchange a tower between the check and its use."""
    shutil.copytree(tiny_release.folder, tmp_path / "copy")
    release = open_release(tmp_path / "copy", trusted_key=signing_key.public)
    content = bytearray((release.folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (release.folder / name).write_bytes(content)
    with pytest.raises(ReleaseError, match="since the folder was opened"):
        Encoder(release, precision="int8" if "int8" in name else "float32")
