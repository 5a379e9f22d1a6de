"""Feature patches to one feature image: the mean over overlapping patches, weighted by electrons and a window."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from airpi_py4d.acquisition import Acquisition
from airpi_py4d.stitching import interpolation_matrix

#: Electrons a pattern at which the level is 1, as a power of ten.
_FULL_LEVEL = 7.0
#: Channels that stand beside the features: level and coverage.
EXTRA_CHANNELS = 2
#: Of the window's half width: pixels that lie on its edge but for rounding are beyond it.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class PatchWindows:
    """Window and interpolation along rows and columns, as matrices from patches to the image.

    Attributes
    ----------
    reach : (int, int)
        Image pixels that the window reaches beyond its centre, along rows and columns.
    block : int
        Neighbouring positions of a scan row whose windows `columns` and `column_window` hold: so many that the window
        of a block's last position ends before the end of the next block.
    rows : ndarray of float32, shape (height, p)
        From a patch's rows to the image's, the window included; height is 2 reach + 1.
    row_window : ndarray of float32, shape (height,)
    columns : ndarray of float32, shape (block * p, span)
        From the columns of a block's patches to the image's.
    column_window : ndarray of float32, shape (block, span)
    """

    reach: tuple[int, int]
    block: int
    rows: NDArray[np.float32]
    row_window: NDArray[np.float32]
    columns: NDArray[np.float32]
    column_window: NDArray[np.float32]

    @classmethod
    def of(
        cls, acquisition: Acquisition, patch_pixels: int, patch_pixel_size: float, oversample: tuple[int, int]
    ) -> PatchWindows:
        """See `FeatureStitcher` for the parameters."""
        length = patch_pixels * patch_pixel_size
        reach, windows, matrices = [], [], []
        for step, count in zip(acquisition.scan_step, oversample, strict=True):
            pixel = step / count
            n = math.ceil(length / 2 / pixel * (1 - _ROUNDING)) - 1
            window = np.cos(np.pi * np.arange(-n, n + 1) * pixel / length) ** 2
            reach.append(n)
            windows.append(window.astype(np.float32))
            matrices.append(window[:, None] * interpolation_matrix(patch_pixels, patch_pixel_size, 2 * n + 1, pixel))
        right, size = oversample[1], 2 * reach[1] + 1
        block = -(-size // right)
        span = (block - 1) * right + size
        columns, column_window = np.zeros((block, patch_pixels, span), np.float32), np.zeros((block, span), np.float32)
        for n in range(block):
            here = slice(n * right, n * right + size)
            columns[n, :, here] = matrices[1].T
            column_window[n, here] = windows[1]
        return cls(
            (reach[0], reach[1]),
            block,
            matrices[0].astype(np.float32),
            windows[0],
            columns.reshape(block * patch_pixels, span),
            column_window,
        )

    @property
    def size(self) -> tuple[int, int]:
        """Image rows and columns of a position's window."""
        return 2 * self.reach[0] + 1, 2 * self.reach[1] + 1


class FeatureStitcher:
    r"""Averages feature patches, scan row by scan row.

    With N_j the electrons of pattern j, f_j its features, interpolated from the patch's pixels to the image's, and the
    window of the patch's side L,

    .. math:: u(x, y) = \cos^2(\pi x / L) \cos^2(\pi y / L), \quad |x|, |y| < L / 2,

    the feature image holds the features, their level and the coverage:

    .. math::
        F_c(r) = \frac{\sum_j N_j\, u(r - r_j)\, f_{j,c}(r - r_j)}{\sum_j N_j\, u(r - r_j)}, \quad
        \mathrm{level}(r) = \frac{1}{7} \log_{10} \max\left(\frac{\sum_j N_j u}{\sum_j u}, 1\right) \le 1, \quad
        \mathrm{coverage}(r) = \frac{4 s_x s_y}{L^2} \sum_j u(r - r_j),

    s the scan steps; the integral of u is L^2 / 4, so the coverage is 1 in the middle of a complete scan, 1/2 at its
    edge. Features are 0 where no electron was measured.

    Window and interpolation are products of a function of x and one of y. So the patches of neighbouring positions of
    a scan row are added along the row first, by one matrix that holds the columns of all of them where they belong;
    their sum is interpolated across the row.

    Parameters
    ----------
    scan_shape : (int, int)
    acquisition : Acquisition
    patch_pixels : int
        Side of the model's patches [px].
    patch_pixel_size : float
        [A]
    oversample : (int, int)
        Image pixels a scan step, along rows and columns: the pixel size is scan_step / oversample, so that probe
        positions fall on pixels.
    features : int
        Of each patch's pixel.
    held_rows : int, optional
        Image rows for which memory is kept, where rows come in order and `release` says which aren't needed any more;
        by default those of the whole image.
    """

    def __init__(
        self,
        scan_shape: tuple[int, int],
        acquisition: Acquisition,
        patch_pixels: int,
        patch_pixel_size: float,
        oversample: tuple[int, int],
        features: int,
        held_rows: int | None = None,
    ) -> None:
        self.windows = windows = PatchWindows.of(acquisition, patch_pixels, patch_pixel_size, oversample)
        self.oversample = oversample
        row, column = (step / count for step, count in zip(acquisition.scan_step, oversample, strict=True))
        self.pixel_size = row, column
        rows, columns = ((n - 1) * count + 1 for n, count in zip(scan_shape, oversample, strict=True))
        self.image_shape = rows, columns
        self._density = 4 * math.prod(acquisition.scan_step) / (patch_pixels * patch_pixel_size) ** 2
        self._features, self._patch_pixels, self._reach = features, patch_pixels, windows.reach
        padded = rows + 2 * windows.reach[0]
        # beside the rows that are held, a patch reaches beyond both ends, and above the image nothing is released
        held = padded if held_rows is None else min(held_rows + 3 * windows.reach[0], padded)
        # padded image rows from `_top` on; the last two channels are the sums of N u and of u
        self._sum = np.zeros((features + EXTRA_CHANNELS, held, columns + 2 * windows.reach[1]), np.float32)
        self._top = self._needed = 0
        self._changed = range(0)

    def add_row(
        self,
        row: int,
        first: int,
        patches: NDArray[np.float32],
        measured: NDArray[np.bool_],
        electrons: NDArray[np.float32],
    ) -> None:
        """Add the patches of neighbouring positions of one scan row.

        Parameters
        ----------
        row, first : int
            Scan row, and scan column of the first patch.
        patches : ndarray of float32, shape (n, features, patch_pixels, patch_pixels)
            Centred at n // 2.
        measured : ndarray of bool, shape (n,)
            Patches that are False are left out.
        electrons : ndarray of float32, shape (n,)
            N_j, at least 0.
        """
        counted = np.where(measured, electrons, np.float32(0))
        if not counted.all():  # what the model makes of an empty pattern may be anything
            patches = np.where((counted > 0)[:, None, None, None], patches, np.float32(0))
        pair = np.stack([counted, measured.astype(np.float32)])
        (down, right), side, features, windows = self.oversample, self._patch_pixels, self._features, self.windows
        height, size = windows.size
        width = (len(patches) - 1) * right + size
        strip, weights = np.zeros((features * side, width), np.float32), np.zeros((2, width), np.float32)
        for start in range(0, len(patches), windows.block):
            some = patches[start : start + windows.block]
            span = (len(some) - 1) * right + size
            here = slice(start * right, start * right + span)
            weighted = np.multiply(
                some.transpose(1, 2, 0, 3), counted[start : start + len(some), None], order="C"
            ).reshape(features * side, -1)
            strip[:, here] += weighted @ windows.columns[: weighted.shape[1], :span]
            weights[:, here] += pair[:, start : start + len(some)] @ windows.column_window[: len(some), :span]
        top = self._place(row * down, row * down + height)
        place = self._sum[:, top : top + height, first * right : first * right + width]
        place[:features] += np.matmul(windows.rows, strip.reshape(features, side, width))
        place[features:] += windows.row_window[:, None] * weights[:, None, :]

    def _place(self, start: int, stop: int) -> int:
        """Place in memory of the padded image rows from start to stop, which change."""
        if stop > self._top + self._sum.shape[1]:
            for channel in self._sum:  # one by one, as they overlap and are copied on the way
                kept = channel[self._needed - self._top :]
                channel[: len(kept)] = kept
                channel[len(kept) :] = 0
            self._top = self._needed
        # as image rows
        first, last = max(start - self._reach[0], 0), min(stop - self._reach[0], self.image_shape[0])
        changed = self._changed or range(first, last)
        self._changed = range(min(changed.start, first), max(changed.stop, last))
        return start - self._top

    def release(self, row: int) -> None:
        """Let go of the image rows above `row`."""
        self._needed = max(row + self._reach[0], self._top)

    def complete(self, rows: int) -> int:
        """Image rows, from the first one on, that nothing is added to after so many scan rows."""
        last = self.image_shape[0]
        return (
            last if (rows - 1) * self.oversample[0] + 1 >= last else max(rows * self.oversample[0] - self._reach[0], 0)
        )

    def changes(self) -> range:
        """The image rows that were added to since the last call."""
        changed, self._changed = self._changed, range(0)
        return changed

    def merge(self, part: FeatureStitcher, row: int) -> None:
        """Add what was summed apart of some scan rows, the first of which is `row`."""
        self.add_sums(part._sum, row)

    def add_sums(self, sums: NDArray[np.float32], row: int) -> None:
        """Add the sums of some scan rows, the first of which is `row`.

        Parameters
        ----------
        sums : ndarray of float32, shape (features + 2, image rows, image columns)
            Over N u f, N u and u, where the first row's and column's windows begin.
        row : int
        """
        start = row * self.oversample[0]
        top = self._place(start, start + sums.shape[1])
        self._sum[:, top : top + sums.shape[1]] += sums

    def _sums(self, rows: range, columns: range) -> NDArray[np.float32]:
        """Sums at some pixels of the image."""
        top, left = rows.start + self._reach[0] - self._top, columns.start + self._reach[1]
        return self._sum[:, top : top + len(rows), left : left + len(columns)]

    def feature_image(self, rows: range, columns: range) -> NDArray[np.float32]:
        """Features, level and coverage of some image rows and columns, shape (features + 2, rows, columns)."""
        features, sums = self._features, self._sums(rows, columns)
        electrons, covered = sums[features:]
        image = np.zeros(sums.shape, np.float32)
        np.divide(sums[:features], electrons, out=image[:features], where=electrons > 0)
        mean = np.divide(electrons, covered, out=image[features], where=covered > 0)
        np.log10(np.maximum(mean, 1, out=mean), out=mean)
        np.minimum(mean / np.float32(_FULL_LEVEL), 1, out=mean)
        np.multiply(covered, np.float32(self._density), out=image[features + 1])
        return image

    def measured(self, rows: range, columns: range) -> NDArray[np.bool_]:
        """Whether electrons were measured around some pixels of the image, shape (rows, columns)."""
        measured: NDArray[np.bool_] = self._sums(rows, columns)[self._features] > 0
        return measured
