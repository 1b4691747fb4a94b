"""Shorter vectors: the first components of a vector, brought back to norm 1 (Kusupati et al. 2022, arXiv 2205.13147).

A device may index at fewer dimensions than its release has: passages are cut when they are stored, queries when they are
searched, both in the same way, so stored bytes and the work of a search fall with the dimension. The choice is made once, when
the home is made; another one needs the passages embedded again.

A release states the dimensions it was trained for. Others work as well, at a loss. Measured with releases of 384 dimensions
that were trained for none, nDCG@10 on dev and train queries, with two standard errors of the difference to 384.

By vectors alone:

| dimensions | bytes of a vector | MedQuAD | docstrings | SciFact | SQuAD |
|---|---|---|---|---|---|
| 384 | 392 | 0.680 | 0.442 | 0.656 | 0.755 |
| 256 | 264 | -0.002 +- 0.008 | -0.012 +- 0.007 | -0.014 +- 0.009 | -0.018 +- 0.007 |
| 128 | 136 | -0.065 +- 0.012 | -0.062 +- 0.011 | -0.061 +- 0.015 | -0.065 +- 0.011 |
| 64 | 72 | -0.220 +- 0.018 | -0.152 +- 0.016 | -0.168 +- 0.021 | -0.170 +- 0.016 |

Hybrid, where the words make up for much of it:

| dimensions | MedQuAD | docstrings | SciFact | SQuAD |
|---|---|---|---|---|
| 384 | 0.717 | 0.534 | 0.716 | 0.869 |
| 256 | +0.003 +- 0.007 | -0.007 +- 0.006 | -0.002 +- 0.006 | -0.006 +- 0.005 |
| 128 | -0.021 +- 0.010 | -0.019 +- 0.009 | -0.020 +- 0.010 | -0.021 +- 0.007 |
| 64 | -0.053 +- 0.012 | -0.056 +- 0.011 | -0.047 +- 0.013 | -0.048 +- 0.010 |

Training stays right. A record on a short index holds short candidates, and its loss compares them with the query's vector cut
in the same way (`training.record_losses`): the loss that ranks what this device ranks, one term of a Matryoshka loss. It is a
function of the one record, its gradient has the adapter's shape and is clipped as ever, so no bound of a sensitivity changes;
nor does the form of an update say at which dimension a device searches. An adapter averaged over devices of several dimensions
minimises the sum of their losses.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.errors import DataError, SettingsError

LEAST = 8
"""Dimensions below which nothing is found any more."""


def prefix(vectors: NDArray[np.float32], dimension: int, *, full: int) -> NDArray[np.float32]:
    """Vectors of full length (n, full) as unit vectors (n, dimension); those of any other length as they are.

    Whoever uses them refuses what does not fit: cutting whatever is too long would hide vectors of another model.

    >>> prefix(np.array([[0.48, 0.64, 0.6]], np.float32), 2, full=3).round(2).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    if dimension == full or vectors.ndim != 2 or vectors.shape[1] != full:
        return vectors
    cut = vectors[:, :dimension]
    norms = np.linalg.norm(cut, axis=1, keepdims=True)
    if (lost := np.flatnonzero(~(norms[:, 0] > 0))).size:
        raise DataError(f"vector {lost[0]} has norm {norms[lost[0], 0]} in its first {dimension} components: take more")
    return np.asarray(cut / norms, np.float32)


def chosen_dimension(wanted: int | None, full: int) -> int:
    """The dimension of an index; `SettingsError` when a release with vectors of length `full` cannot give it."""
    if wanted is None:
        return full
    if not LEAST <= wanted <= full:
        raise SettingsError(f"dimension = {wanted} is out of range: this release gives {LEAST} to {full}")
    return wanted


def remark(dimension: int, full: int, trained: Collection[int]) -> str | None:
    """What to tell who chose a dimension that the release was not trained for; None for one that it was.

    >>> remark(128, 384, (64, 128)), remark(384, 384, ())
    (None, None)
    """
    if dimension == full or dimension in trained:
        return None
    better = f"it was for {', '.join(map(str, sorted(trained)))}" if trained else "it states no shorter ones"
    return (
        f"this release was not trained for {dimension} dimensions ({better}): expect to find less. Measured with releases of "
        "384, nDCG@10 of hybrid search fell by up to 0.007 at 256, 0.02 at 128 and 0.06 at 64; by vectors alone by 0.02, 0.07 "
        "and 0.22"
    )
