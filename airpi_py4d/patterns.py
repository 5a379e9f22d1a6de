"""Raw patterns to the model's grid: one constant linear map, built once from the acquisition."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from airpi_py4d.acquisition import Acquisition

#: Detector pixels larger than this many pixels of the model's grid are interpolated linearly, smaller ones averaged.
_LARGE_PIXEL = 1.25
_POINTS_PER_GRID_PIXEL = 12
_ROWS_FOR_CENTER = 16
_SMALLEST_DISK = 4.0  # [px^2]


def _subdivision(ratio: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Offsets in a detector pixel [px] and weights (sum 1) that stand for it; `ratio` is its size in grid pixels."""
    count = max(2, int(np.ceil(ratio * _POINTS_PER_GRID_PIXEL)))
    if ratio <= _LARGE_PIXEL:
        offsets = (np.arange(count) + 0.5) / count - 0.5
        return offsets, np.full(count, 1 / count)
    offsets = (np.arange(2 * count) + 0.5) / count - 1
    weights = 1 - np.abs(offsets)
    return offsets, weights / weights.sum()


def resampling_matrix(
    detector_shape: tuple[int, int], acquisition: Acquisition, grid_pixels: int, grid_k_pixel: float
) -> sparse.csr_matrix:
    r"""Linear map from detector pixels to the model's grid that keeps the electron count.

    Detector pixel d (row, column) lies at k = R S ((d - center) k_pixel), with S the transposition and R the
    rotation of `Acquisition`, and at n // 2 + k / grid_k_pixel on the grid. Each detector pixel is divided into
    points; each point's electrons go to the grid pixel it lies in (area average). A detector pixel that is much
    larger than a grid pixel is spread over its neighbourhood with a tent (linear interpolation).

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
        raise ValueError("center is None; give it or measure it with measure_center.")
    ratios = np.array(acquisition.k_pixel) / grid_k_pixel
    angle = np.deg2rad(acquisition.rotation)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).round(15)
    if acquisition.transpose:
        turn = turn[:, ::-1]
    turn = turn * ratios  # columns: what a detector pixel along rows, along columns is on the grid
    (row_offsets, row_weights), (column_offsets, column_weights) = map(_subdivision, ratios)
    rows = np.arange(detector_shape[0]) - acquisition.center[0]
    columns = np.arange(detector_shape[1]) - acquisition.center[1]
    pixel = np.arange(rows.size * columns.size).reshape(rows.size, columns.size)
    matrix = sparse.csr_matrix((grid_pixels**2, pixel.size), dtype=np.float64)
    for row_offset, row_weight in zip(row_offsets, row_weights, strict=True):
        # one sub-row of every detector pixel: (rows, columns, sub-columns)
        v = (rows + row_offset)[:, None, None]
        u = columns[:, None] + column_offsets
        place = [np.floor(t[0] * v + t[1] * u + grid_pixels // 2 + 0.5).astype(np.int64) for t in turn]
        inside = (place[0] >= 0) & (place[0] < grid_pixels) & (place[1] >= 0) & (place[1] < grid_pixels)
        weight = np.broadcast_to(row_weight * column_weights, inside.shape)[inside]
        source = np.broadcast_to(pixel[:, :, None], inside.shape)[inside]
        target = (place[0] * grid_pixels + place[1])[inside]
        matrix += sparse.coo_matrix((weight, (target, source)), shape=matrix.shape).tocsr()
    matrix.sum_duplicates()
    return matrix.astype(np.float32)


def resample(patterns: NDArray[Any], matrix: sparse.csr_matrix) -> NDArray[np.float32]:
    """Apply the map to patterns of shape (n, rows, columns); returns (n, grid, grid), electrons per grid pixel."""
    flat = np.ascontiguousarray(patterns.reshape(len(patterns), -1).T, dtype=np.float32)
    side = int(np.sqrt(matrix.shape[0]))
    return np.ascontiguousarray((matrix @ flat).T).reshape(len(patterns), side, side)


def check_finite(rows: NDArray[Any], first: int) -> None:
    """Raise for NaN or infinity in scan rows, of which the first is number `first`."""
    if rows.dtype.kind != "f":
        return
    finite = np.isfinite(rows).all(axis=(2, 3))
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise ValueError(
            f"data holds NaN or infinity in {np.count_nonzero(~finite)} pattern(s) of scan rows {first} to "
            f"{first + len(rows) - 1}, the first at scan position ({first + row}, {column}); replace them."
        )


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


def measure_center(data: Any, acquisition: Acquisition) -> tuple[float, float]:
    """Centre of the bright-field disk (row, column) [px] of the mean pattern.

    The disk is where the mean pattern exceeds half the median of its brightest pi k0^2 / k_pixel^2 pixels; its
    centre is the mean position of those pixels.

    Parameters
    ----------
    data : array_like, shape (scan rows, scan columns, detector rows, detector columns)
        Up to 16 evenly spaced scan rows are read.
    acquisition : Acquisition

    Raises
    ------
    ValueError
        If the disk doesn't fit the detector, or the patterns are empty or not finite.
    """
    shape = data.shape[2:]
    check_disk(shape, acquisition)
    chosen = np.unique(np.linspace(0, data.shape[0] - 1, _ROWS_FOR_CENTER).astype(int))
    mean = np.zeros(shape)
    for row in chosen:
        patterns = np.asarray(data[row : row + 1])
        check_finite(patterns, int(row))
        mean += patterns[0].mean(axis=0, dtype=np.float64) / len(chosen)
    brightest = np.sort(mean, axis=None)[-int(bright_field_pixels(acquisition)) :]
    disk = mean > np.median(brightest) / 2
    if not disk.any():
        raise ValueError("center can't be measured: the mean pattern is empty. Give center, or check the data.")
    rows, columns = np.nonzero(disk)
    return float(rows.mean()), float(columns.mean())
