"""Kinds of vector index, which of them fits how many passages, and how each is made with FAISS.

8 bits a component unless said otherwise (Douze et al. 2024, arXiv 2401.08281). Graphs and lists are made by distance: of unit
vectors that is the order of inner products, but a graph whose edges are chosen by inner product is worse (below).

| kind | what it is | bytes a passage at 384 dimensions | a query reads |
|---|---|---|---|
| `flat` | every vector | 392 | all of them: exact up to the 8 bits |
| `hnsw` | a graph of neighbours (Malkov and Yashunin 2018, arXiv 1603.09320), 16 each | 536 | a few thousand |
| `ivf` | lists around centroids (Sivic and Zisserman 2003) | 405 | `nprobe` lists |
| `pq` | the same lists, product codes (Jegou et al. 2011), re-ranked | 84 | `nprobe` lists, `candidates` stored vectors |
| `sq4` | every vector, 4 bits a component, re-ranked | 200 | all of them, `candidates` stored vectors |

Re-ranked: the `candidates` best are scored again with their int8 vectors from the store.

Measured on one core: 97,517 passages of 55 words of four corpora by a document tower of 384 dimensions, 500 questions by a
distilled query tower ("queries") and by the document tower itself ("same"), 100 results, Recall@10 against exact float32.
Questions by another tower than the graph was made of are the hard case, and the usual one here.

| kind | built in | queries | same | a query |
|---|---|---|---|---|
| every vector, 8 bits | 0.1 s | 0.992 | | 2.6 ms |
| every vector, 4 bits, 40 candidates | 0.1 s | 0.999 | | 4.1 ms |
| graph, 16 neighbours, by distance, 200 when built, `ef_search` 100 | 35 s | 0.964 | 0.978 | 0.23 ms |
| the same, `ef_search` 150 | | 0.977 | 0.982 | 0.30 ms |
| the same, `ef_search` 200, the default | | 0.983 | 0.990 | 0.39 ms |
| 100 when built, `ef_search` 200 | 19 s | 0.957 | 0.979 | 0.36 ms |
| by inner product, `ef_search` 200 | 35 s | 0.965 | 0.981 | 0.45 ms |
| 624 lists, a quarter of them read | 6 s | 0.968 | 0.979 | 0.73 ms |
| a third of them read | | 0.979 | 0.985 | 0.98 ms |
| 312 lists, a third of them read | 3 s | 0.966 | 0.978 | 1.1 ms |
| product codes of 48 bytes, a quarter read, 200 candidates | 6 s | 0.963 | 0.980 | 1.2 ms |
"""

from __future__ import annotations

from typing import Literal, get_args

import faiss
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["flat", "hnsw", "ivf", "pq", "sq4"]
KINDS: tuple[Kind, ...] = get_args(Kind)
RERANKED: frozenset[Kind] = frozenset({"pq", "sq4"})

FLAT_LIMIT = 20_000
"""Passages up to which every vector is read, and the index is built whole at each change."""

LEARNT_LIMIT = 2_000
"""Passages up to which centroids and code books cannot be learnt: such an index is `flat` whatever is asked for."""

SAMPLE = 100_000
"""Vectors that centroids, code books and ranges are learnt from, at most."""

_NEIGHBOURS = 16  # 32 cost 128 more bytes a passage
_EF_CONSTRUCTION = 200
_PQ_BYTES = 48
_MARGIN = 0.05  # of the range that a component had in the sample, kept free on both sides for vectors that come later


class IndexSettings(BaseModel):
    """What the owner of a device asks of its vector index; a value that is None is chosen by size.

    Attributes:
        kind: "auto" for `flat` up to `FLAT_LIMIT` passages and `hnsw` from there on.
        ef_search: of `hnsw`, how many near vectors a search keeps track of.
        nprobe: of `ivf` and `pq`, how many lists a search reads.
        candidates: of `pq` and `sq4`, how many passages are scored again with their stored vectors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["auto", "flat", "hnsw", "ivf", "pq", "sq4"] = "auto"
    ef_search: int | None = Field(default=None, ge=1, le=100_000)
    nprobe: int | None = Field(default=None, ge=1, le=1_000_000)
    candidates: int | None = Field(default=None, ge=1, le=100_000)

    def kind_for(self, count: int) -> Kind:
        """The kind for so many passages."""
        if count <= LEARNT_LIMIT or (self.kind == "auto" and count <= FLAT_LIMIT):
            return "flat"
        return "hnsw" if self.kind == "auto" else self.kind

    def effort(self, kind: Kind, lists: int) -> Effort:
        """How thoroughly an index of this kind with so many lists is searched."""
        return Effort(
            ef_search=self.ef_search or 200,
            nprobe=min(self.nprobe or max(16, lists // 3), max(lists, 1)),
            candidates=(self.candidates or 200) if kind in RERANKED else 0,
        )


class Effort(BaseModel):
    """The settings of a search with nothing left open; `candidates` is 0 for kinds that are not re-ranked."""

    model_config = ConfigDict(frozen=True)

    ef_search: int
    nprobe: int
    candidates: int


def lists_for(count: int) -> int:
    """Lists of an inverted file: twice the square root, so that one list and all centroids cost a query about the same."""
    return max(1, int(2 * count**0.5))


def make(kind: Kind, count: int, sample: NDArray[np.float32]) -> faiss.Index:
    """An empty index for `count` vectors, trained on a sample of them (m, dim); untrained on none."""
    dimension, product, distance = sample.shape[1], faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2
    eight = faiss.ScalarQuantizer.QT_8bit
    index: faiss.Index
    if kind == "flat":
        index = faiss.IndexScalarQuantizer(dimension, eight, product)
    elif kind == "sq4":
        index = faiss.IndexScalarQuantizer(dimension, faiss.ScalarQuantizer.QT_4bit, product)
    elif kind == "hnsw":
        index = faiss.IndexHNSWSQ(dimension, eight, _NEIGHBOURS, distance)  # type: ignore[arg-type]  # FAISS' types err
        index.hnsw.efConstruction = _EF_CONSTRUCTION
    else:
        lists = min(lists_for(count), max(len(sample), 1))
        centroids = faiss.IndexFlatL2(dimension)
        if kind == "ivf":
            index = faiss.IndexIVFScalarQuantizer(centroids, dimension, lists, eight, distance)
        else:
            index = faiss.IndexIVFPQ(centroids, dimension, lists, _pq_bytes(dimension), 8, distance)
            index.pq.cp.min_points_per_centroid = 1
        index.cp.niter = 10
        index.cp.min_points_per_centroid = 1  # FAISS warns below 39: on stderr, of what nobody can change
        centroids.this.disown()  # type: ignore[attr-defined]
        index.own_fields = True
    _leave_room(index, count > len(sample) or count > FLAT_LIMIT)
    if len(sample):
        index.train(np.ascontiguousarray(sample))
    return index


def _leave_room(index: faiss.Index, grows: bool) -> None:
    """Widen the range of 8 bits when vectors will come that were not in the sample."""
    scalar = getattr(index, "sq", None) or getattr(getattr(index, "storage", None), "sq", None)
    if scalar is not None and grows:
        scalar.rangestat, scalar.rangestat_arg = faiss.ScalarQuantizer.RS_minmax, _MARGIN


def _pq_bytes(dimension: int) -> int:
    """Bytes of a code: 48, or the next number below that divides the dimension."""
    return next(size for size in range(min(_PQ_BYTES, dimension), 0, -1) if dimension % size == 0)
