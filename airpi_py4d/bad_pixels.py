"""Hot and dead pixels and gaps between detector modules, found in the mean pattern."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

#: A hot pixel has more than this times the third largest of its neighbours.
_HOT = 1.5
#: Standard deviations that a hot pixel is off, and electrons that a dead one or a gap lacks.
_SIGNIFICANCE, _DEAD_ELECTRONS = 5.0, 12.0
_WIDEST_GAP = 8  # [px]


def find_bad_pixels(mean: NDArray[Any], fano: float = 1.0, patterns: int = 1) -> NDArray[np.bool_]:
    """Hot and dead pixels, and gaps between detector modules, from the mean pattern.

    A hot pixel has 1.5 times as much as the third largest of its 8 neighbours, and 5 standard deviations more: the edge
    of the bright-field disk and diffracted disks always have three bright neighbours. A dead pixel has nothing where
    the median of the 5x5 pixels around it promises 12 electrons or more. A gap is 1 to 8 rows or columns without any
    electron between ones that have some.

    Parameters
    ----------
    mean : ndarray, shape (detector rows, detector columns)
        Mean pattern [detector units], background subtracted.
    fano : float
        Variance over mean of a pixel's counts, for counted electrons the `gain` [detector units].
    patterns : int
        How many patterns the mean was taken over.

    Returns
    -------
    ndarray of bool, shape (detector rows, detector columns)

    Examples
    --------
    >>> mean = np.full((12, 12), 3.0)
    >>> mean[2, 5], mean[8, 3] = 90.0, 0.0
    >>> np.argwhere(find_bad_pixels(mean, patterns=1000)).tolist()
    [[2, 5], [8, 3]]
    """
    electrons = np.asarray(mean, np.float64) * (patterns / fano)
    bad = np.zeros(electrons.shape, bool)
    for _ in range(4):
        around = np.where(bad, np.nan, electrons)
        found = bad | _hot(electrons, around)
        counted = np.where(found, 0, electrons)
        found |= _gaps(counted, 0) | _gaps(counted, 1) | _dead(electrons, around)
        if (found == bad).all():
            break
        bad = found
    return bad


def _neighbours(image: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Pixels around every pixel, sorted along the last axis, NaN (bad ones) last; mirrored at the edges."""
    side = 2 * reach + 1
    padded = np.pad(image, reach, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side)).reshape(*image.shape, side**2)
    return np.sort(np.delete(windows, side**2 // 2, axis=-1), axis=-1)


def _counted(values: NDArray[np.float64], place: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.take_along_axis(values, np.maximum(place, 0)[..., None], -1)[..., 0]


def _hot(electrons: NDArray[np.float64], around: NDArray[np.float64]) -> NDArray[np.bool_]:
    values = _neighbours(around, 1)
    count = np.isfinite(values).sum(-1)
    # beside a gap fewer of an edge's bright neighbours are left: of 5, the largest stands for the third
    third = np.maximum(_counted(values, count - np.clip(count - 4, 1, 3)), 0)
    limit = _HOT * third + _SIGNIFICANCE * np.sqrt(third + 1) + _SIGNIFICANCE
    return (count >= 3) & (electrons > limit)


def _dead(electrons: NDArray[np.float64], around: NDArray[np.float64]) -> NDArray[np.bool_]:
    values = _neighbours(around, 2)
    count = np.isfinite(values).sum(-1)
    return (count >= 3) & (electrons <= 0) & (_counted(values, (count - 1) // 2) >= _DEAD_ELECTRONS)


def _gaps(electrons: NDArray[np.float64], axis: int) -> NDArray[np.bool_]:
    """Lines without electrons, between lines that have some."""
    lines = electrons.clip(0).sum(axis=1 - axis)
    runs, count = ndimage.label(lines == 0)
    gaps = np.zeros(lines.shape, bool)
    for run in range(1, count + 1):
        places = np.flatnonzero(runs == run)
        before, after = places[0] - 1, places[-1] + 1
        inside = before >= 0 and after < len(lines)
        if inside and len(places) <= _WIDEST_GAP and min(lines[before], lines[after]) >= _DEAD_ELECTRONS:
            gaps[places] = True
    return np.broadcast_to(np.expand_dims(gaps, 1 - axis), electrons.shape)
