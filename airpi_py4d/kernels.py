"""Rows of patterns to what the model sees at once: single patterns, or 3x3 kernels, edges replicated, holes filled."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Patterns of one scan row, shape (columns, grid, grid) [electrons], and which of them were measured, (columns,).
Row = tuple[NDArray[np.float32], NDArray[np.bool_]]

_LARGEST_SPACING = 16


def kernel_spacing(scan_step: tuple[float, float]) -> tuple[int, int]:
    """Rows and columns from a position to its neighbours in a kernel: those that make it most nearly square.

    Examples
    --------
    >>> kernel_spacing((0.2, 0.2)), kernel_spacing((0.1, 0.29)), kernel_spacing((0.3, 0.15))
    ((1, 1), (3, 1), (1, 2))
    """
    row, column = scan_step
    return (
        min(max(1, round(column / row)), _LARGEST_SPACING),
        min(max(1, round(row / column)), _LARGEST_SPACING),
    )


def summed_rows(rows: Iterable[Row], neighbours: int, stride: int) -> Iterator[Row]:
    """Sums over `neighbours` x `neighbours` positions, one for every `stride` positions along rows and columns.

    The data repetition of Friedrich et al. (2023), figure 5. The first sum is centred at the first position; at the
    scan's edges and where patterns are missing, the sum is that of the others, scaled to the full number.

    Parameters
    ----------
    rows : iterable of Row
    neighbours : int
        Odd.
    stride : int

    Examples
    --------
    >>> rows = [(np.ones((5, 1, 1), np.float32), np.ones(5, bool)) for _ in range(4)]
    >>> sums = list(summed_rows(rows, neighbours=3, stride=2))
    >>> len(sums), sums[0][0].ravel().tolist()
    (2, [9.0, 9.0, 9.0])
    """
    half = neighbours // 2
    held: deque[Row] = deque(maxlen=neighbours)
    centre = number = 0
    for number, row in enumerate(rows):
        held.append(row)
        if number == centre + half:
            yield sum_of_rows(list(held), neighbours, stride)
            centre += stride
    oldest = number + 1 - len(held)
    for last in range(centre, number + 1, stride):
        yield sum_of_rows(list(held)[max(last - half - oldest, 0) :], neighbours, stride)


def sum_of_rows(rows: Sequence[Row], neighbours: int, stride: int) -> Row:
    """One row of the sums of `summed_rows`, of the scan rows that go into it.

    Parameters
    ----------
    rows : sequence of Row
        As many as `neighbours`, or fewer at the scan's edges.
    neighbours, stride : int

    Returns
    -------
    Row
        Sums, shape (ceil(columns / stride), grid, grid) [electrons]; False where no pattern of a sum was measured.
    """
    if neighbours == stride == 1:
        return rows[0]
    patterns = np.sum([np.where(valid[:, None, None], patterns, 0) for patterns, valid in rows], axis=0)
    number = np.sum([valid for _, valid in rows], axis=0)
    centres = np.arange(0, len(patterns), stride)
    total, count = np.zeros_like(patterns[centres]), np.zeros(len(centres), int)
    for offset in range(-(neighbours // 2), neighbours // 2 + 1):
        inside = (centres + offset >= 0) & (centres + offset < len(patterns))
        total[inside] += patterns[centres[inside] + offset]
        count[inside] += number[centres[inside] + offset]
    return total * (neighbours**2 / np.maximum(count, 1)).astype(np.float32)[:, None, None], count > 0


class Piece(NamedTuple):
    """Neighbouring positions of a scan row in a batch of patterns.

    Attributes
    ----------
    row, first : int
        Scan row, and column of the first position.
    here : slice
        Of the batch.
    measured : ndarray of bool, shape (n,)
        False where the pattern is missing.
    """

    row: int
    first: int
    here: slice
    measured: NDArray[np.bool_]


def pattern_batches(
    rows: Iterable[Row], batch: int, first_row: int = 0
) -> Iterator[tuple[NDArray[np.float32], list[Piece]]]:
    """Every position's pattern, up to `batch` at a time: parts of a row or several short rows.

    Rows that fill half a batch aren't copied to join others. The first row is number `first_row`.

    Yields
    ------
    patterns : ndarray of float32, shape (n, grid, grid)
    pieces : list of Piece

    Examples
    --------
    >>> rows = [(np.ones((3, 1, 1), np.float32), np.ones(3, bool)) for _ in range(3)]
    >>> [[(piece.row, piece.here) for piece in pieces] for _, pieces in pattern_batches(rows, 7)]
    [[(0, slice(0, 3, None)), (1, slice(3, 6, None))], [(2, slice(0, 3, None))]]
    """
    held: list[NDArray[np.float32]] = []
    pieces: list[Piece] = []
    size = 0
    for number, (patterns, measured) in enumerate(rows, first_row):
        columns = len(patterns)
        length = -(-columns // -(-columns // batch))
        for first in range(0, columns, length):
            part = patterns[first : first + length]
            if size + len(part) > batch or 2 * size >= batch:
                yield held[0] if len(held) == 1 else np.concatenate(held), pieces
                held, pieces, size = [], [], 0
            here = slice(size, size + len(part))
            pieces.append(Piece(number, first, here, measured[first : first + length]))
            held.append(part)
            size = here.stop
    if held:
        yield held[0] if len(held) == 1 else np.concatenate(held), pieces


def kernel_batches(
    rows: Iterable[Row], spacing: tuple[int, int], batch: int
) -> Iterator[tuple[int, int, NDArray[np.float32], NDArray[np.bool_]]]:
    """The 3x3 kernel of every position, up to `batch` neighbours of one row at a time.

    Beyond the scan's edges the outermost patterns are repeated. A missing pattern is the mean of those of its kernel
    that were measured.

    Yields
    ------
    row, first : int
        Scan row, and column of the first position.
    kernels : ndarray of float32, shape (n, 3, 3, grid, grid)
    measured : ndarray of bool, shape (n,)
        False where the central pattern is missing.
    """
    above, beside = spacing
    held: deque[Row] = deque(maxlen=2 * above + 1)

    def batches_of(number: int, three: list[Row]) -> Iterator[tuple[int, int, NDArray[np.float32], NDArray[np.bool_]]]:
        columns = len(three[1][0])
        for first in range(0, columns, batch):
            here = np.arange(first, min(first + batch, columns))
            taken = np.clip(here[:, None] + [-beside, 0, beside], 0, columns - 1)
            kernels = np.stack([patterns[taken] for patterns, _ in three], axis=1)
            measured = np.stack([valid[taken] for _, valid in three], axis=1)
            for n in np.flatnonzero(~measured.all(axis=(1, 2)) & measured.any(axis=(1, 2))):
                kernels[n][~measured[n]] = kernels[n][measured[n]].mean(axis=0)
            yield number, first, kernels, measured[:, 1, 1]

    number = -1
    last = 0
    for number, row in enumerate(rows):
        held.append(row)
        last = number
        centre = number - above
        if centre >= 0:
            yield from batches_of(centre, [held[max(0, len(held) - 1 - 2 * above)], held[-1 - above], held[-1]])
    oldest = last + 1 - len(held)
    for centre in range(max(last - above + 1, 0), last + 1):
        places = [max(centre - above, 0), centre, last]
        yield from batches_of(centre, [held[place - oldest] for place in places])
