"""The phase that patches are off by: measured where neighbouring patches overlap, and taken from the image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import fft

#: Distance over which patches keep to each other more than to the model's own mean phase [1 / k0].
KEPT_DISTANCE = 0.4


class PatchOffsets:
    r"""Offsets of the patches' phases, from the differences between neighbours.

    The mean phase of a patch is not in its intensities: the model guesses it, so that an image of patches as they come
    lacks its low spatial frequencies. What two neighbours i and j see differently of the same pixels,

    .. math:: d_{ij} = \arg \sum_r \sqrt{w_i(r)\, w_j(r)}\; \hat{o}_i(r)\, \hat{o}_j^*(r),

    with o / |o| and w of eq. 6 and 7, is the difference of their offsets. Offsets c are those that minimise

    .. math:: \sum_{ij} (c_j - c_i - d_{ij})^2 / s_{ij}^2 + \sum_i c_i^2 / l^2,

    s the scan step between i and j and l the kept distance, chosen on simulated crystals that nothing is reported of
    (docs/training.md). A screened Poisson equation, solved by cosine transforms: the image of offsets is free of flux
    through its edges.

    Parameters
    ----------
    scan_shape : (int, int)
    weights : ndarray, shape (h, w)
        Of a patch's pixels (eq. 7).
    oversample : (int, int)
        Image pixels a scan step, along rows and columns.
    relative_step : (float, float)
        Scan step along rows and columns [1 / k0].
    """

    def __init__(
        self,
        scan_shape: tuple[int, int],
        weights: NDArray[np.float64],
        oversample: tuple[int, int],
        relative_step: tuple[float, float],
    ) -> None:
        self._shape = scan_shape
        self._relative_step = relative_step
        self._down, self._right = oversample
        self._root = np.sqrt(weights).astype(np.float32)
        self._to_left = np.zeros(scan_shape, np.float32)  # d from the left neighbour; 0 in the first column
        self._to_above = np.zeros(scan_shape, np.float32)
        self._joined = np.zeros(scan_shape[0] + 1, bool)  # row n with row n - 1
        self._held: dict[int, NDArray[np.complex64]] = {}
        self._arrived: dict[int, int] = {}

    def add(self, row: int, first: int, phasors: NDArray[np.complex64]) -> None:
        """Add neighbouring patches of a scan row.

        Parameters
        ----------
        row, first : int
            Scan row, and scan column of the first patch.
        phasors : ndarray of complex64, shape (n, h, w)
            o / |o| at the image's pixels; 0 where nothing was measured.
        """
        if row not in self._held:
            self._held[row] = np.zeros((self._shape[1], *phasors.shape[1:]), np.complex64)
            self._arrived[row] = 0
        self._held[row][first : first + len(phasors)] = phasors
        self._arrived[row] += len(phasors)
        if self._arrived[row] == self._shape[1]:
            whole = self._held[row]
            right = self._right
            self._to_left[row, 1:] = self._difference(
                whole[:-1, :, right:], whole[1:, :, :-right], self._root[:, right:] * self._root[:, :-right]
            )
            self._join(row)

    @staticmethod
    def _difference(
        one: NDArray[np.complex64], other: NDArray[np.complex64], weights: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Phase of `one` less that of `other` [rad], (n,), over their common pixels; 0 if there are none."""
        return np.angle(np.einsum("nij,nij,ij->n", one, other.conj(), weights))

    def _join(self, row: int) -> None:
        """A whole scan row with those above and below, if they are there; rows that were joined to both are let go."""
        down = self._down
        for below in (row, row + 1):
            above = below - 1
            if all(self._arrived.get(n) == self._shape[1] for n in (above, below)) and not self._joined[below]:
                self._to_above[below] = self._difference(
                    self._held[above][:, down:],
                    self._held[below][:, :-down],
                    self._root[down:] * self._root[:-down],
                )
                self._joined[below] = True
        for n in (row - 1, row, row + 1):
            if n in self._held and self._joined[n] and self._joined[n + 1]:
                del self._held[n], self._arrived[n]

    def merge(self, part: PatchOffsets, row: int) -> None:
        """Add what was found apart of some scan rows, the first of which is `row`."""
        rows = slice(row, row + part._shape[0])
        self._to_left[rows] += part._to_left
        self._to_above[rows] += part._to_above
        self._joined[rows] |= part._joined[:-1]
        for number, held in part._held.items():
            self._held[row + number], self._arrived[row + number] = held, part._arrived[number]
            if part._arrived[number] == self._shape[1]:
                self._join(row + number)

    def solve(self) -> NDArray[np.float32]:
        """The offsets [rad], shape (rows, columns), to be added to the patches' phases."""
        differences = zip((self._to_above, self._to_left), self._relative_step, (0, 1), strict=True)
        source = np.zeros(self._shape, np.float32)
        stiffness = np.full(self._shape, KEPT_DISTANCE**-2, np.float32)
        for difference, step, axis in differences:
            flux = np.moveaxis(difference / step**2, axis, 0)
            gathered = np.moveaxis(source, axis, 0)
            gathered += flux
            gathered[:-1] -= flux[1:]
            frequency = np.pi * np.arange(self._shape[axis]) / self._shape[axis]
            of_axis = ((2 - 2 * np.cos(frequency)) / step**2).astype(np.float32)
            stiffness += of_axis[:, None] if axis == 0 else of_axis
        solved = fft.dctn(source, norm="ortho", overwrite_x=True)
        solved /= stiffness
        offsets: NDArray[np.float32] = fft.idctn(solved, norm="ortho", overwrite_x=True)
        return offsets
