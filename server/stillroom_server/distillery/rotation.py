"""A teacher's space, turned so that the first values of its vectors hold as much of them as any so many can.

    M = sum over texts of v v^T = U diag(lambda) U^T, lambda falling        rotated v = U^T v

U is orthogonal: inner products of whole vectors stay as they are, and so does every ranking. Of all linear maps to d values,
the first d of U^T v keep the most squared length of these texts (Eckart and Young 1936): lambda_1 + ... + lambda_d of the
trace. A sentence encoder's values are in no such order, its first d are worth what any d are. M is not centred: scores are
inner products, in which the mean counts. Principal directions of sentence vectors as initial weights of a smaller `Dense` are
an old recipe of Sentence Transformers' `model_distillation`; here no dimension is left out, and cutting is up to the reader.

Squared length is not ranking. Where lengths d that vectors will be cut to are known, U is turned on from there (`ranked`), over
batches of texts q and of others C, by gradient descent on

    sum over d of KL( softmax(C q / T) || softmax(C_d q_d / T) )        x_d: the first d of U^T x, as a unit vector

in which U is the orthogonal factor of a QR decomposition: its first d columns span what the first d of any matrix do, so all
lengths are learned together and U stays orthogonal. Within what two neighbouring lengths have between them, directions are then
principal ones again.

The document tower is the teacher with U^T as a last linear layer; a student cut from it begins with that layer too, and
learns it further: on export it is folded into the states of tokens (`students/export.py`).

| case | what happens |
|---|---|
| no texts | `DataError` |
| texts that no loss reads, so that nobody embedded them (NaN) | left out, before any are drawn to be ranked; they stay NaN |
| fewer texts to rank than `least_ranked` | principal directions stay, and the stage says so |
| fewer texts than values, equal eigenvalues | U is orthogonal; within such directions any basis is as good |
| vectors of float16 | moments in float64, products in float32, stored as they were |
| the teacher does not normalise | the document tower does: so were the vectors |
| the teacher ends with a linear map | U^T is multiplied into it, so that one map is folded on export |
| the teacher's prompts or limits come from the recipe | they are written into the document tower |
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from torch import Tensor, nn
from torch.nn.functional import kl_div, normalize

from stillroom_server.distillery.arrays import changed_array
from stillroom_server.distillery.students.towers import linear_of, principal_directions
from stillroom_server.distillery.teachers.settings import TeacherSettings
from stillroom_shared.errors import DataError

_BLOCK = 8_192
"""Vectors that are held at once."""
_RANKED, _LEAST_RANKED = 49_152, 1
"""Texts that `Rotation.ranked` looks at, and the fewest for each value of a vector.

Fewer are learned by heart: on 800 held-out texts of docstrings, 384 values cut to 64, KL rose by 1% after 96 texts, and fell by
7% after 384, by 16% after 768 and by 18% after 1,152.
"""
_STEPS, _QUERIES, _PASSAGES, _RATE, _TEMPERATURE = 300, 512, 4_096, 2e-3, 0.05
"""Of its descent, chosen on train queries (docs/figures.md)."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal map of a space.

    >>> flat = np.array([[0.6, 0.8, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]], np.float32)
    >>> rotation = Rotation.of(flat)
    >>> round(rotation.share(1), 3), round(rotation.share(2), 3)
    (0.653, 0.987)

    Attributes:
        directions: the principal ones as columns, (dim, dim) float64.
        lengths: squared length of all texts along each, (dim,) float64; of principal directions falling.
    """

    directions: NDArray[np.float64]
    lengths: NDArray[np.float64]

    @classmethod
    def of(cls, vectors: NDArray[Any], progress: Progress = lambda done, total: None) -> Self:
        """The rotation of vectors, (n, dim), read a block at a time. Raises `DataError` when there are none."""
        moments = np.zeros((vectors.shape[1], vectors.shape[1]))
        for start in range(0, len(vectors), _BLOCK):
            block = np.asarray(vectors[start : start + _BLOCK], np.float64)
            embedded = block[~np.isnan(block).any(1)]
            moments += embedded.T @ embedded
            progress(start + len(block), len(vectors))
        if not moments.any():
            raise DataError("there are no vectors to find directions of: the lessons have no texts, add data.sources")
        values, directions = principal_directions(torch.from_numpy(moments))
        return cls(directions.contiguous().numpy(), values.numpy().clip(min=0))

    def ranked(
        self,
        vectors: NDArray[Any],
        dims: Sequence[int],
        *,
        seed: int = 0,
        progress: Progress = lambda done, total: None,
    ) -> Rotation:
        """Turned on, so that vectors cut to these lengths rank as whole ones do.

        Itself when nothing is shorter, or when there are fewer texts than `least_ranked`.

        Args:
            vectors: those that it was made of, (n, dim).
            dims: lengths, ascending or not.
            seed: of which texts are ranked, and in which batches.
        """
        size = len(self.lengths)
        cuts = sorted({count for count in dims if count < size})
        if not cuts:
            return self
        random = np.random.default_rng(seed)
        order = random.permutation(len(vectors))
        drawn = order[_embedded(vectors)[order]][:_RANKED]
        if len(drawn) < least_ranked(size):
            return self
        texts = np.asarray(vectors[np.sort(drawn)], np.float32)  # in order: one sweep over the mapped file
        texts = random.permutation(texts)
        directions = _ranking_directions(self.directions, torch.from_numpy(texts), cuts, random, progress)
        moments = (self.directions * self.lengths) @ self.directions.T
        return Rotation._of_blocks(directions, moments, cuts)

    @classmethod
    def _of_blocks(cls, directions: NDArray[np.float64], moments: NDArray[np.float64], cuts: Sequence[int]) -> Rotation:
        """The same spans of first values, with principal directions within each block."""
        blocks, lengths = [], []
        for block in np.split(directions, cuts, axis=1):
            held, inner = principal_directions(torch.from_numpy(block.T @ moments @ block))
            blocks.append(block @ inner.numpy())
            lengths.append(held.numpy().clip(min=0))
        return cls(np.ascontiguousarray(np.hstack(blocks)), np.hstack(lengths))

    @classmethod
    def open(cls, path: Path) -> Self:
        """What `save` wrote."""
        with np.load(path) as file:
            return cls(file["directions"], file["lengths"])

    def save(self, path: Path) -> None:
        """Write it as `.npz`."""
        np.savez(path, directions=self.directions, lengths=self.lengths)

    def __call__(self, vectors: NDArray[Any]) -> NDArray[np.float32]:
        """Vectors, (n, dim), in the rotated space."""
        return np.asarray(np.asarray(vectors, np.float32) @ self.directions.astype(np.float32), np.float32)

    def share(self, count: int) -> float:
        """Of the squared length of all texts, what the first so many values hold; 0 to 1."""
        return float(self.lengths[:count].sum() / self.lengths.sum())

    def shares(self, counts: Iterable[int]) -> dict[str, float]:
        """`share` by count, of those below the dimension, ascending."""
        return {str(count): self.share(count) for count in sorted(set(counts)) if count < len(self.lengths)}


def least_ranked(values: int) -> int:
    """The fewest texts that tell how vectors of so many values rank."""
    return max(3, _LEAST_RANKED * values)  # a query, and two that it can be nearer to or farther from


def _embedded(vectors: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows are vectors, (n,), read a block at a time."""
    blocks = (vectors[start : start + _BLOCK] for start in range(0, len(vectors), _BLOCK))
    return np.concatenate([~np.isnan(block).any(1) for block in blocks])


def _ranking_directions(
    start: NDArray[np.float64], texts: Tensor, cuts: Sequence[int], random: np.random.Generator, progress: Progress
) -> NDArray[np.float64]:
    """Columns whose first so many rank these texts as all do, (dim, dim); see the top of this module."""
    asked, others = texts[: len(texts) // 3], texts[len(texts) // 3 :]
    weights = torch.from_numpy(start).float().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for step in range(_STEPS):
        queries, passages = (
            one[torch.from_numpy(random.integers(0, len(one), min(most, len(one))))]
            for one, most in ((asked, _QUERIES), (others, _PASSAGES))
        )
        wanted = torch.log_softmax(queries @ passages.T / _TEMPERATURE, 1)
        basis = torch.linalg.qr(weights)[0]
        turned, beside = queries @ basis, passages @ basis
        loss = torch.zeros(())
        for cut in cuts:
            scores = normalize(turned[:, :cut], dim=1) @ normalize(beside[:, :cut], dim=1).T
            found = torch.log_softmax(scores / _TEMPERATURE, 1)
            loss = loss + kl_div(found, wanted, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress(step + 1, _STEPS)
    return np.asarray(torch.linalg.qr(weights.detach().double())[0].numpy())


def rotate_array(
    rotation: Rotation, vectors: NDArray[Any], out: Path, progress: Progress = lambda done, total: None
) -> NDArray[Any]:
    """All vectors in the rotated space, memory-mapped from the `.npy` file `out`, of the type that they had."""
    return changed_array(out, vectors, lambda block, _: rotation(block), block=_BLOCK, progress=progress)


def rotated_model(model: SentenceTransformer, rotation: Rotation) -> SentenceTransformer:
    """A copy of a bi-encoder whose unit vectors lie in the rotated space; a student is cut from it as from its teacher."""
    turned = copy.deepcopy(model)
    if not isinstance(turned[-1], Normalize):
        turned.append(Normalize())
    last = turned[-2]
    weight = torch.from_numpy(rotation.directions.T.copy())
    if isinstance(last, Dense) and linear_of(last):
        last.linear = _followed(last.linear, weight)
    else:
        size = len(weight)
        turned.insert(
            len(turned) - 1,
            Dense(size, size, bias=False, activation_function=nn.Identity(), init_weight=weight.float()),
        )
    return turned.to(model.device).eval()


def rotated_tokens(model: MultiVectorEncoder, rotation: Rotation) -> MultiVectorEncoder:
    """A late-interaction model whose token vectors are rotated where they are as long; shorter or longer ones are projected.

    A token's vector lies to the rotated vector of a text as it lay to that vector before. MaxSim stays as it was.
    """
    size = len(rotation.directions)
    if model.get_embedding_dimension() != size:
        return model
    turned = copy.deepcopy(model)
    weight = torch.from_numpy(rotation.directions.T.copy()).float()
    linear = nn.Identity()
    turned.append(
        Dense(
            size, size, bias=False, activation_function=linear, init_weight=weight, module_input_name="token_embeddings"
        )
    )
    return turned.to(model.device).eval()


def document_tower(model: SentenceTransformer, settings: TeacherSettings, rotation: Rotation) -> SentenceTransformer:
    """The same, which reads passages as the recipe's teacher does without being told to."""
    tower = rotated_model(model, rotation)
    if settings.passage_tokens is not None:
        tower.max_seq_length = settings.passage_tokens
    for name, prompt in (("query", settings.query_prompt), ("document", settings.passage_prompt)):
        if prompt is not None:
            tower.prompts[name] = prompt
    return tower


@torch.no_grad()
def _followed(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    """One linear map in the place of `linear` and then `weight`."""
    product = nn.Linear(linear.in_features, len(weight), bias=linear.bias is not None)
    product.weight.copy_(weight @ linear.weight.double().cpu())
    if linear.bias is not None:
        product.bias.copy_(weight @ linear.bias.double().cpu())
    return product
