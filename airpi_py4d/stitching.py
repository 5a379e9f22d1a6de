"""Patches of the object to one image: weights and complex sum (eq. 6 to 8 of Friedrich et al. 2023), and offsets."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from airpi_py4d import optics
from airpi_py4d.acquisition import Acquisition
from airpi_py4d.offsets import PatchOffsets

#: Of the largest probe intensity: what lies below has no weight (eq. 7).
WEIGHT_THRESHOLD = 0.1
#: Of the patch's side: the outermost pixels can't be interpolated.
_USED_PART = 0.75
#: Side of the box in which the probe is computed [1 / k0].
_PROBE_BOX = 24.0


def interpolation_matrix(
    patch_pixels: int, patch_pixel_size: float, size: int, pixel_size: float
) -> NDArray[np.float64]:
    """Sinc interpolation from the patch's pixels to the image's, shape (size, patch_pixels), both centred at n // 2.

    Parameters
    ----------
    patch_pixels, size : int
        Side of the patch before and after [px].
    patch_pixel_size, pixel_size : float
        Pixel size before and after [A].
    """
    positions = (np.arange(size) - size // 2) * pixel_size / patch_pixel_size
    return np.sinc(positions[:, None] - (np.arange(patch_pixels) - patch_pixels // 2))


def probe_weights(acquisition: Acquisition, pixel_size: tuple[float, float], side: float) -> NDArray[np.float64]:
    r"""Weights of a patch's pixels (eq. 7), cropped to the smallest odd rectangle that holds them; they sum to 1.

    .. math:: w = |\psi_{in}|^2 / \sum |\psi_{in}|^2 \quad \text{where}\ |\psi_{in}|^2 > \max|\psi_{in}|^2 / 10

    Parameters
    ----------
    acquisition : Acquisition
    pixel_size : (float, float)
        Of the image, along rows and columns [A].
    side : float
        Side of the model's patch [A]: no weight beyond it.
    """
    half = math.ceil(_PROBE_BOX / 2 / acquisition.aperture_radius / min(pixel_size))
    wave = optics.probe(
        2 * half,
        pixel_size,
        acquisition.energy,
        acquisition.semiangle,
        acquisition.defocus,
        acquisition.spherical_aberration,
    )
    distance = np.abs(np.arange(2 * half) - half)
    rows_near, columns_near = (distance * size <= side / 2 for size in pixel_size)
    intensity = np.abs(wave) ** 2 * np.outer(rows_near, columns_near)
    weights = np.where(intensity > WEIGHT_THRESHOLD * intensity.max(), intensity, 0)
    reach = [int(distance[places].max()) for places in np.nonzero(weights)]
    rows, columns = (slice(half - r, half + r + 1) for r in reach)
    return weights[rows, columns] / weights.sum()


class Stitcher:
    """Sums patches into the object, scan row by scan row.

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
    """

    def __init__(
        self,
        scan_shape: tuple[int, int],
        acquisition: Acquisition,
        patch_pixels: int,
        patch_pixel_size: float,
        oversample: tuple[int, int],
    ) -> None:
        self.oversample = oversample
        row, column = (step / count for step, count in zip(acquisition.scan_step, oversample, strict=True))
        self.pixel_size = row, column
        self.weights = probe_weights(acquisition, self.pixel_size, _USED_PART * patch_pixels * patch_pixel_size)
        self._margin = [size // 2 for size in self.weights.shape]
        self._interpolation = [
            interpolation_matrix(patch_pixels, patch_pixel_size, size, pixel).astype(np.float32)
            for size, pixel in zip(self.weights.shape, self.pixel_size, strict=True)
        ]
        row, column = (step * acquisition.aperture_radius for step in acquisition.scan_step)
        self._offsets = PatchOffsets(scan_shape, self.weights, oversample, (row, column))
        self._share = np.zeros(scan_shape, np.float32)
        self._shape = [(n - 1) * count + 1 for n, count in zip(scan_shape, oversample, strict=True)]
        padded = [n + 2 * margin for n, margin in zip(self._shape, self._margin, strict=True)]
        self._sum = np.zeros(padded, np.complex64)
        self._weight = np.zeros(padded, np.float32)

    def add_row(
        self, row: int, first: int, patches: NDArray[np.complex64], measured: NDArray[np.bool_] | None = None
    ) -> None:
        r"""Add the patches of neighbouring positions of one scan row.

        Eq. 6 and 8: each patch is reduced to its unit phasor o / |o|, multiplied by the weights and added at its
        position. What is interpolated is o - 1, which vanishes in vacuum.

        Parameters
        ----------
        row, first : int
            Scan row, and scan column of the first patch.
        patches : ndarray of complex64, shape (n, patch_pixels, patch_pixels)
            o = psi_out / psi_in, centred at n // 2.
        measured : ndarray of bool, shape (n,), optional
            Patches that are False are left out.
        """
        rows, columns = self._interpolation
        fine = 1 + np.matmul(np.matmul(rows, patches - 1), columns.T)
        magnitude = np.abs(fine)
        phasors = np.divide(fine, magnitude, out=np.ones_like(fine), where=magnitude > 1e-12)
        share = np.ones(len(patches), np.float32) if measured is None else measured.astype(np.float32)
        self._share[row, first : first + len(patches)] = share
        self._offsets.add(row, first, phasors * share[:, None, None])
        down, right = self.oversample
        for i, j in zip(*np.nonzero(self.weights), strict=True):
            start = first * right + j
            place = (row * down + i, slice(start, start + (len(patches) - 1) * right + 1, right))
            weight = np.float32(self.weights[i, j]) * share
            self._sum[place] += weight * phasors[:, i, j]
            self._weight[place] += weight

    def merge(self, part: Stitcher, row: int) -> None:
        """Add what was summed apart of some scan rows, the first of which is `row`."""
        start = row * self.oversample[0]
        rows = slice(start, start + len(part._sum))
        self._sum[rows] += part._sum
        self._weight[rows] += part._weight
        self._share[row : row + len(part._share)] += part._share
        self._offsets.merge(part._offsets, row)

    def result(self) -> NDArray[np.complex64]:
        r"""The object, shape ((rows - 1) s + 1, (columns - 1) s + 1); 0 where nothing contributed.

        The weighted mean of the phasors, turned by the weighted mean of the patches' offsets c (`PatchOffsets`):

        .. math:: o(r) = \frac{\sum_i w_i(r)\, \hat{o}_i(r)}{\sum_i w_i(r)}
                  \exp\left(i \frac{\sum_i w_i(r)\, c_i}{\sum_i w_i(r)}\right)
        """
        offsets = self._share * self._offsets.solve()
        turned = np.zeros(self._weight.shape, np.float32)
        rows, columns = offsets.shape
        down, right = self.oversample
        for i, j in zip(*np.nonzero(self.weights), strict=True):
            place = slice(i, i + (rows - 1) * down + 1, down), slice(j, j + (columns - 1) * right + 1, right)
            turned[place] += np.float32(self.weights[i, j]) * offsets
        inner = tuple(slice(margin, margin + n) for margin, n in zip(self._margin, self._shape, strict=True))
        total, weight = self._sum[inner], self._weight[inner]
        mean = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
        turn = np.divide(turned[inner], weight, out=np.zeros_like(weight), where=weight > 0)
        return mean * np.exp(1j * turn)
