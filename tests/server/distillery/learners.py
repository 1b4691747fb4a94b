"""Small students and lessons that several tests of training share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import nn

from stillroom_server.distillery.lessons import Lessons, LessonsWriter
from stillroom_server.distillery.students.towers import bert_of

Model = TypeVar("Model", SentenceTransformer, MultiVectorEncoder, CrossEncoder)

WORDS = [
    "open",
    "close",
    "read",
    "zip",
    "tar",
    "file",
    "list",
    "sort",
    "search",
    "index",
    "passage",
    "tapir",
    "eats",
    "leaves",
    "river",
    "bank",
]
ROOT = Path(__file__).resolve().parents[3]
DIM = 32
CANDIDATES = 3


def read(folder: Path) -> nn.Module:
    found: nn.Module = Transformer(
        str(folder), processor_kwargs={"model_max_length": 24}, model_kwargs={"local_files_only": True}
    )
    return found


def tower(folder: Path) -> SentenceTransformer:
    """A student with unit vectors, eager attention and no dropout."""
    model = SentenceTransformer(modules=[read(folder), Pooling(DIM, "mean"), Normalize()], device="cpu")
    bert_of(model).set_attn_implementation("eager")
    return quiet(model)


def late(folder: Path) -> MultiVectorEncoder:
    """A student with a unit vector for each token."""
    modules: list[nn.Module] = [read(folder), MultiVectorMask(), Normalize("token_embeddings", "token_embeddings")]
    return quiet(MultiVectorEncoder(modules=modules, device="cpu"))


def reranker(folder: Path) -> CrossEncoder:
    """A student with one score for a pair."""
    torch.manual_seed(2)
    made: CrossEncoder = quiet(CrossEncoder(str(folder), num_labels=1, device="cpu", local_files_only=True))
    return made


def quiet(model: Model) -> Model:
    """Without dropout, so that what is computed twice is the same."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def lessons(folder: Path, *, queries: int = 40, lists: int = 20, seed: int = 0) -> Lessons:
    """Queries of one to nine words, and lists of three candidates of which the first is relevant."""
    generator = np.random.default_rng(seed)

    def text(least: int, most: int) -> str:
        return " ".join(generator.choice(WORDS, generator.integers(least, most)))

    with LessonsWriter(folder, candidates=CANDIDATES) as writer:
        source = writer.source("words")
        passages = [writer.text(f"{text(4, 16)} {n}", "passage", source) for n in range(30)]
        asked = [writer.text(f"{text(1, 10)} {n}", "query", source) for n in range(queries)]
        for n in range(lists):
            rows = [passages[(n + step) % len(passages)] for step in (0, 7, 11)]
            writer.list(asked[n], rows, [1, 0, 0], source)
    return Lessons.open(folder)


def unit(rows: int, dim: int = DIM, seed: int = 1) -> NDArray[np.float32]:
    """Random unit vectors."""
    values = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    made: NDArray[np.float32] = values / np.linalg.norm(values, axis=1, keepdims=True)
    return made


def in_two_processes(program: str, folder: Path, *arguments: Path) -> None:
    """Run a program, whose traceback tells where it hangs or fails, in two processes that train together."""
    path = folder / "program.py"
    path.write_text("import faulthandler\nfaulthandler.dump_traceback_later(250, exit=True)\n" + program)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, [*launch, path, *arguments])], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
