"""Raw patterns to the model's grid: one constant linear map, built once from the acquisition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import KDTree

from airpi_py4d.acquisition import Acquisition

#: Detector pixels larger than this many pixels of the model's grid are interpolated linearly, smaller ones averaged.
_LARGE_PIXEL = 1.25
_POINTS_PER_GRID_PIXEL = 12
#: Keeps points on the edge of two grid pixels in one of them, whatever the rounding [grid pixels].
_ROUNDING = 1e-5
#: Good pixels at most that a bad one is filled from.
_NEIGHBOURS = 8
#: Largest step of the descan correction [px of the model's grid].
_DESCAN_STEP = 0.25
_KEPT_MAPS = 512
#: Detector pixels are summed in squares of 2, 4 ... first, while these are below this part of `smallest_pixel`.
_SUMMED_PART = 0.95
#: The sparse product is fastest for a few small patterns at once, that stay in the cache, or a single large one.
_SMALL_PATTERN = 2**14  # [px]
_PATTERNS_AT_ONCE = 8
_SMALLEST_DISK = 4.0  # [px^2]


def _subdivision(ratio: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Offsets from the middle of a detector pixel [px] and weights (sum 1) that stand for it.

    `ratio` is its size in grid pixels.
    """
    count = max(2, int(np.ceil(ratio * _POINTS_PER_GRID_PIXEL - _ROUNDING)))
    if ratio <= _LARGE_PIXEL:
        return (np.arange(count) + 0.5) / count - 0.5, np.full(count, 1 / count)
    offsets = (np.arange(2 * count) + 0.5) / count - 1
    weights = 1 - np.abs(offsets)
    return offsets, weights / weights.sum()


def _divided(
    turn: NDArray[np.float64],
    rows: NDArray[np.float64],
    columns: NDArray[np.float64],
    grid_pixels: int,
    row_points: tuple[NDArray[np.float64], NDArray[np.float64]],
    column_points: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> sparse.csr_matrix:
    """`resampling_matrix` of detector pixels that are divided into points.

    `turn` (2, 2) goes from the detector [px] to the grid [px]; `rows` and `columns` (n,) are the pixels' places from
    the optical axis [px], the points their offsets in a pixel [px] and weights, both (m,).
    """
    column_offsets, column_weights = column_points
    pixel = np.arange(rows.size * columns.size).reshape(rows.size, columns.size)
    matrix = sparse.csr_matrix((grid_pixels**2, pixel.size), dtype=np.float64)
    for row_offset, row_weight in zip(*row_points, strict=True):
        # one sub-row of every detector pixel: (rows, columns, sub-columns)
        v = (rows + row_offset)[:, None, None]
        u = columns[:, None] + column_offsets
        place = [np.floor(t[0] * v + t[1] * u + grid_pixels // 2 + 0.5 + _ROUNDING).astype(np.int64) for t in turn]
        inside = (place[0] >= 0) & (place[0] < grid_pixels) & (place[1] >= 0) & (place[1] < grid_pixels)
        weight = np.broadcast_to(row_weight * column_weights, inside.shape)[inside]
        source = np.broadcast_to(pixel[:, :, None], inside.shape)[inside]
        target = (place[0] * grid_pixels + place[1])[inside]
        matrix += sparse.coo_matrix((weight, (target, source)), shape=matrix.shape).tocsr()
    matrix.sum_duplicates()
    return matrix


def _tent(places: NDArray[np.float64], width: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    r"""Parts of tents around `places` that lie in each pixel of the grid along an axis, from the first that has any.

    The tent has the standard deviation of a box of `width`, so half its base is h = width / \sqrt{2}. Below x lies

    .. math:: \frac{R(x + h) - 2 R(x) + R(x - h)}{h^2}, \quad R(x) = \max(x, 0)^2 / 2

    of a tent around 0; all lengths in pixels of the grid.

    Returns
    -------
    pixels : ndarray of int, shape (*places, 2 h + 1, rounded up)
    parts : ndarray of float64, the same shape
    """
    half = width / np.sqrt(2)
    onwards = np.arange(int(np.ceil(2 * half)) + 2)
    first = np.floor(places - half + 0.5 + _ROUNDING).astype(np.int64)[..., None]
    edges = first + onwards - 0.5 - places[..., None]
    left, middle, right = (np.maximum(edges + x, 0) ** 2 for x in (half, 0, -half))
    return first + onwards[:-1], np.diff(left - 2 * middle + right) / (2 * half**2)


def _spread(
    turn: NDArray[np.float64],
    rows: NDArray[np.float64],
    columns: NDArray[np.float64],
    grid_pixels: int,
    width: float,
) -> sparse.csr_matrix:
    """`resampling_matrix` of detector pixels that are spread over tents as wide as `width` [grid pixels].

    The others as for `_divided`.
    """
    places = [t[0] * rows[:, None] + t[1] * columns + grid_pixels // 2 for t in turn]
    (row, row_part), (column, column_part) = (_tent(place, width) for place in places)
    row_inside, column_inside = ((target >= 0) & (target < grid_pixels) for target in (row, column))
    weight = row_part[..., :, None] * column_part[..., None, :]
    # smaller ones are rounding errors
    inside = row_inside[..., :, None] & column_inside[..., None, :] & (weight > np.finfo(np.float32).eps)
    target = (row[..., :, None] * grid_pixels + column[..., None, :])[inside]
    pixel = np.arange(rows.size * columns.size).reshape(rows.size, columns.size, 1, 1)
    source = np.broadcast_to(pixel, inside.shape)[inside]
    return sparse.coo_matrix((weight[inside], (target, source)), shape=(grid_pixels**2, pixel.size)).tocsr()


def _factor(ratio: float, smallest: float) -> int:
    """Detector pixels of `ratio` grid pixels that are summed first, along an axis."""
    return 2 ** int(np.log2(max(_SUMMED_PART * smallest / ratio, 1.0)))


def summed(patterns: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    """Sums over `rows` x `columns` neighbouring detector pixels; the last ones may be of fewer.

    Parameters
    ----------
    patterns : ndarray, shape (n, detector rows, detector columns)
    rows, columns : int

    Returns
    -------
    ndarray, shape (n, detector rows / rows, detector columns / columns), rounded up
        The patterns themselves where there is nothing to sum.

    Examples
    --------
    >>> summed(np.arange(12, dtype=np.uint8).reshape(1, 3, 4), 2, 2).tolist()
    [[[10, 18], [17, 21]]]
    """
    if rows == columns == 1:
        return patterns
    if patterns.dtype.kind != "u" or patterns.dtype.itemsize > 2:
        patterns = patterns.astype(np.float32, copy=False)
    elif patterns.max() > np.iinfo(patterns.dtype).max // (rows * columns):
        patterns = patterns.astype(np.uint32)
    beyond = [(0, 0), (0, -patterns.shape[1] % rows), (0, -patterns.shape[2] % columns)]
    if any(after for _, after in beyond):
        patterns = np.pad(patterns, beyond)
    total = patterns[:, ::rows]
    for row in range(1, rows):
        total = total + patterns[:, row::rows]
    across = total[:, :, ::columns]
    for column in range(1, columns):
        across = across + total[:, :, column::columns]
    return across


def detector_to_scan(acquisition: Acquisition) -> NDArray[np.float64]:
    r"""Matrix (2, 2) from a place on the detector [px] to k along scan rows and columns [1/A].

    .. math:: k = R\, S\, \mathrm{diag}(k_{pixel})\, E\, (d - center)

    with the rotation R and the transposition S of `Acquisition`, and E = u u^T + (a / b) v v^T, which makes a circle of
    an ellipse of semi-axes a along the unit vector u and b along v.

    Examples
    --------
    >>> detector_to_scan(Acquisition(300e3, 20.0, 0.2, (0.05, 0.04), rotation=90.0)).tolist()
    [[0.0, -0.04], [0.05, 0.0]]
    """
    angle = np.deg2rad(acquisition.rotation)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).round(15)
    if acquisition.transpose:
        matrix = matrix[:, ::-1]
    matrix = matrix * np.array(acquisition.k_pixel)
    if acquisition.ellipse is not None:
        a, b, theta = acquisition.ellipse
        u = np.array([np.cos(np.deg2rad(theta)), np.sin(np.deg2rad(theta))])
        matrix = matrix @ (np.outer(u, u) + a / b * (np.eye(2) - np.outer(u, u)))
    return matrix + 0.0


def repair_matrix(bad_pixels: NDArray[np.bool_]) -> sparse.csr_matrix:
    """Linear map that fills bad pixels from the good ones around, shape (pixels, pixels); it leaves good ones alone.

    A bad pixel gets the mean of the nearest good pixels, those at most 1.5 times as far as the very nearest, weighted
    by the inverse square of their distance.

    Examples
    --------
    >>> (repair_matrix(np.array([[False, True, False]])) @ [1.0, 99.0, 3.0]).tolist()
    [1.0, 2.0, 3.0]
    """
    flat = bad_pixels.ravel()
    good, bad = np.argwhere(~bad_pixels), np.argwhere(bad_pixels)
    count = min(_NEIGHBOURS, len(good))
    distance, neighbour = KDTree(good).query(bad, [n + 1 for n in range(count)])
    weight = np.where(distance <= 1.5 * distance[:, :1], distance**-2.0, 0)
    weight /= weight.sum(1, keepdims=True)
    pixels = np.arange(flat.size)
    rows = np.repeat(pixels[flat], count)
    columns = pixels[~flat][neighbour.ravel()]
    keep = np.flatnonzero(~flat)
    values = np.concatenate([weight.ravel(), np.ones(len(keep))])
    places = np.concatenate([rows, keep]), np.concatenate([columns, keep])
    return sparse.csr_matrix((values, places), shape=(flat.size, flat.size))


def resampling_matrix(
    detector_shape: tuple[int, int],
    acquisition: Acquisition,
    grid_pixels: int,
    grid_k_pixel: float,
    smallest_pixel: float = 0.0,
) -> sparse.csr_matrix:
    r"""Linear map from detector pixels to the model's grid that keeps the electron count.

    Detector pixel d (row, column) lies at the k of `detector_to_scan`, and at n // 2 + k / grid_k_pixel on the grid.
    Each detector pixel is divided into points; each point's electrons go to the grid pixel it lies in (area average).
    A detector pixel that is much larger than a grid pixel is spread over its neighbourhood with a tent (linear
    interpolation). One smaller than `smallest_pixel` along both axes is spread over a tent along each of the grid's
    axes that is as wide (standard deviation) as a box of `smallest_pixel`, half its base being
    smallest_pixel / \sqrt{2}.

    The last serves networks that take roots of the counts. A single electron, shared by grid pixels in parts p
    along rows and q along columns, is the sum of \sqrt{p q} to them, which is 1 in the middle of a grid pixel and 2 at
    its corner: a noise of 22 % (standard deviation over the mean, all places alike) for pixels half as large as the
    grid's, 2 % for tents as wide as 1.1, whatever the pixels' size.

    Parameters
    ----------
    detector_shape : (int, int)
        Rows and columns of the detector.
    acquisition : Acquisition
        With a centre.
    grid_pixels : int
        Side n of the model's grid [px].
    grid_k_pixel : float
        [1/A]
    smallest_pixel : float
        [grid pixels]

    Returns
    -------
    scipy.sparse.csr_matrix of float32, shape (grid_pixels**2, rows * columns)
        Every column sums to the part of the pixel's area that lies on the grid.

    Examples
    --------
    >>> acquisition = Acquisition(300e3, 20.0, 0.2, (0.05, 0.05), center=(4, 4))
    >>> matrix = resampling_matrix((8, 8), acquisition, 8, 0.05)
    >>> bool((matrix.toarray() == np.eye(64)).all())
    True
    """
    if acquisition.center is None:
        raise ValueError("center is None; give it, or measure it with airpi_py4d.calibrate.")
    turn = detector_to_scan(acquisition) / grid_k_pixel
    ratios = np.linalg.norm(turn, axis=0)  # of a detector pixel along rows, along columns
    rows, columns = (np.arange(n) - c for n, c in zip(detector_shape, acquisition.center, strict=True))
    if ratios.max() < smallest_pixel:
        return _spread(turn, rows, columns, grid_pixels, smallest_pixel).astype(np.float32)
    return _divided(turn, rows, columns, grid_pixels, *map(_subdivision, ratios)).astype(np.float32)


class Resampling:
    """Raw patterns to electrons on the model's grid, by constant linear maps.

    background off -> bad pixels filled -> descan shift -> small pixels summed -> `resampling_matrix` -> over the gain

    Pixels much smaller than `smallest_pixel` are summed in squares first, which changes little where electrons are
    spread that far anyway, and leaves fewer for the matrix.

    Parameters
    ----------
    detector_shape : (int, int)
    acquisition : Acquisition
        With a centre.
    grid_pixels : int
        Side of the model's grid [px].
    grid_k_pixel : float
        [1/A]
    smallest_pixel : float
        Detector pixels that are smaller are spread over tents as wide [px of the model's grid].

    Raises
    ------
    ValueError
        If bad pixels, background or descan don't fit the data.
    """

    def __init__(
        self,
        detector_shape: tuple[int, int],
        acquisition: Acquisition,
        grid_pixels: int,
        grid_k_pixel: float,
        smallest_pixel: float = 0.0,
    ) -> None:
        for name in ("bad_pixels", "background"):
            shape = np.shape(getattr(acquisition, name))
            if shape not in ((), detector_shape):
                raise ValueError(
                    f"{acquisition.argument_names.get(name, name)} has the shape {shape}, expected that of the "
                    f"detector, {detector_shape}."
                )
        self._shape, self._acquisition = detector_shape, acquisition
        self._grid = grid_pixels, grid_k_pixel, smallest_pixel
        background = 0.0 if acquisition.background is None else acquisition.background
        self._background = np.broadcast_to(np.asarray(background, np.float32), detector_shape).reshape(-1)
        scale = np.linalg.norm(detector_to_scan(acquisition), axis=0) / grid_k_pixel
        #: Descan is corrected to this many parts of a detector pixel.
        self._parts = np.ceil(scale / _DESCAN_STEP).astype(int)
        self._factors = _factor(scale[0], smallest_pixel), _factor(scale[1], smallest_pixel)
        rows, columns = (-(-n // factor) for n, factor in zip(detector_shape, self._factors, strict=True))
        self._summed_shape = rows, columns
        place = [np.arange(n) // factor for n, factor in zip(detector_shape, self._factors, strict=True)]
        target = (place[0][:, None] * columns + place[1]).ravel()
        ones = np.ones(target.size, np.float32), (target, np.arange(target.size))
        #: From detector pixels to their sums.
        self._sums = sparse.csr_matrix(ones, shape=(rows * columns, target.size))
        self._bad: NDArray[np.intp] | None = None
        if acquisition.bad_pixels is not None and acquisition.bad_pixels.any():
            self._bad = np.flatnonzero(acquisition.bad_pixels)
            repair = repair_matrix(acquisition.bad_pixels).astype(np.float32)
            self._sums = (self._sums @ repair).tocsr()
            filled = repair[self._bad]
            #: Good pixels that bad ones are filled from, and the map from them.
            self._around = np.unique(filled.indices)
            self._fill = filled[:, self._around]
        self._maps: dict[tuple[int, int], tuple[sparse.csr_matrix, NDArray[np.float32]]] = {}
        self._map((0, 0))

    def _map(self, shift: tuple[int, int]) -> tuple[sparse.csr_matrix, NDArray[np.float32]]:
        """Matrix of the sums, and the background on the grid, for a descan shift in parts of a detector pixel."""
        if shift not in self._maps:
            if len(self._maps) == _KEPT_MAPS:
                self._maps.pop(next(iter(self._maps)), None)
            assert self._acquisition.center is not None
            factors = np.array(self._factors)
            row, column = (np.array(self._acquisition.center) + np.array(shift) / self._parts + 0.5) / factors - 0.5
            sizes = [size * factor for size, factor in zip(self._acquisition.k_pixel, self._factors, strict=True)]
            shifted = replace(self._acquisition, center=(row, column), k_pixel=(sizes[0], sizes[1]))
            matrix = resampling_matrix(self._summed_shape, shifted, *self._grid)
            matrix = (matrix / np.float32(self._acquisition.gain)).astype(np.float32)
            self._maps[shift] = matrix, matrix @ (self._sums @ self._background)
        return self._maps[shift]

    def sums_and_matrix(self) -> tuple[tuple[int, int], sparse.csr_matrix, NDArray[np.float32]]:
        """For patterns that aren't shifted: which pixels are summed, and where the sums go; to resample elsewhere.

        Returns
        -------
        factors : (int, int)
            Of `summed`: 1 where bad pixels have to be filled first, which the matrix does then.
        matrix : scipy.sparse.csr_matrix of float32, shape (grid_pixels**2, pixels that are left)
        background : ndarray of float32, shape (grid_pixels**2,)
            To be subtracted.
        """
        matrix, background = self._map((0, 0))
        if self._bad is not None:
            return (1, 1), (matrix @ self._sums).tocsr(), background
        return self._factors, matrix, background

    def __call__(
        self,
        patterns: NDArray[Any],
        descan: NDArray[np.float64] | None = None,
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Electrons on the grid, shape (n, grid, grid).

        Parameters
        ----------
        patterns : ndarray, shape (n, detector rows, detector columns)
            As the detector reports them.
        descan : ndarray, shape (n, 2), optional
            Where the optical axis is in each, minus the centre [px].
        out : ndarray of float32, shape (n, grid, grid), optional
            Where to put the result.
        """
        side = self._grid[0]
        result = np.empty((len(patterns), side, side), np.float32) if out is None else out
        steps = np.zeros((len(patterns), 2), int)
        if descan is not None:
            steps = np.rint(descan * self._parts).astype(int)
        shifts, group = np.unique(steps, axis=0, return_inverse=True)
        pixels = self._summed_shape[0] * self._summed_shape[1]
        count = _PATTERNS_AT_ONCE if pixels <= _SMALL_PATTERN else 1
        for number, (row, column) in enumerate(shifts.tolist()):
            matrix, background = self._map((row, column))
            chosen = np.flatnonzero(group.ravel() == number)
            for first in range(0, len(chosen), count):
                part = chosen[first : first + count]
                flat = np.empty((pixels, len(part)), np.float32)
                for n, counts in enumerate(self._summed(patterns, part)):
                    flat[:, n] = counts.reshape(-1)
                for place, resampled in zip(part, (matrix @ flat).T, strict=True):
                    result[place] = (resampled - background).reshape(side, side)
        return result

    def _summed(self, patterns: NDArray[Any], part: NDArray[np.intp]) -> NDArray[Any]:
        """Some of the patterns, bad pixels filled and small ones summed: (len(part), rows, columns)."""
        neighbours = part[-1] - part[0] + 1 == len(part)
        few = patterns[part[0] : part[-1] + 1] if neighbours else patterns[part]
        if self._bad is not None:
            flat = few.reshape(len(few), -1).astype(np.float32)
            flat[:, self._bad] = (self._fill @ flat[:, self._around].T).T
            few = flat.reshape(few.shape)
        return summed(few, *self._factors)


def check_disk(detector_shape: tuple[int, int], acquisition: Acquisition) -> None:
    """Raise where the bright-field disk is too small, too large or beside the detector."""
    radius, area = acquisition.aperture_radius, bright_field_pixels(acquisition)
    disk = (
        f"{acquisition.argument_names.get('k_pixel', 'k_pixel')} is {acquisition.k_pixel} 1/A: the bright-field disk "
        f"of radius {radius:.4g} 1/A"
    )
    shown = f"detector of {detector_shape[0]} x {detector_shape[1]} px"
    if area < _SMALLEST_DISK:
        raise ValueError(f"{disk} covers {area:.2g} px; check the k-pixel, the semi-angle and the energy.")
    if area >= detector_shape[0] * detector_shape[1]:
        raise ValueError(f"{disk} is larger than the {shown}; check the k-pixel, the semi-angle and the energy.")
    center = acquisition.center
    if center is not None and not all(-0.5 <= c <= n - 0.5 for c, n in zip(center, detector_shape, strict=True)):
        raise ValueError(
            f"{acquisition.argument_names.get('center', 'center')} is {center}, beside the {shown}; expected the row "
            "and column of the optical axis in pixels."
        )


def bright_field_pixels(acquisition: Acquisition) -> float:
    """Area of the bright-field disk [detector px], pi k0^2 / (k_row k_column)."""
    row, column = acquisition.k_pixel
    return float(np.pi * acquisition.aperture_radius**2 / (row * column))
