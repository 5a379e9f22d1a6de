"""Batches for training: kernels drawn from simulated scans, augmented, with counting noise.

Every random choice derives from (seed, epoch, index), so a resumed run sees the same batches.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from numba import njit
from numpy.typing import NDArray

from airpi_py4d import optics
from training.dataset import KERNELS, PARAMETERS
from training.losses import overlapping_kernels
from training.simulation import BRIGHT_FIELD_RADIUS, DETECTOR, OBJECT, SCAN, SMALLEST_PIXEL

#: Electrons a pattern: the dose is drawn between these, evenly on a logarithmic scale.
DOSE_RANGE = (2.0, 1e7)
NOISE_FREE_SHARE = 0.06
EMPTY_SHARE = 0.03
CROPPED_SHARE = 0.6
MISALIGNED_SHARE = 0.7
CENTER_ERROR = 0.25  # [px], standard deviation
SCALE_ERROR = 0.015  # relative, standard deviation
DEFOCUS_UNTOLD_SHARE = 0.25
DEFOCUS_ERROR = 0.15  # [rad] at the aperture's edge, standard deviation
#: Detectors whose pixels are this many grid pixels wide (bright-field radius 6, 4 and 3 px), and their share.
COARSE_PIXELS = (2, 3, 4)
COARSE_SHARE = 0.25


@njit(nogil=True, cache=True)
def _poisson(mean: float) -> float:
    """One Poisson variate: sequential search below 30, rounded normal above (relative error of the variance < 1 %)."""
    if mean > 30.0:
        return max(0.0, np.floor(mean + np.sqrt(mean) * np.random.standard_normal() + 0.5))
    draw = np.random.random()
    if draw < 1.0 - mean:
        return 0.0
    probability = np.exp(-mean)
    cumulative = probability
    count = 0
    while draw > cumulative and count < 200:
        count += 1
        probability *= mean / count
        cumulative += probability
    return float(count)


@njit(nogil=True, cache=True)
def _count_coarse(mean: NDArray, pixel: int, offset: int, counted: bool) -> None:
    """Counts on detector pixels `pixel` grid pixels wide, spread over the grid linearly; in place, shape (64, 64)."""
    size = len(mean)
    number = size // pixel + 2
    counts = np.zeros((number, number))
    for row in range(size):
        for column in range(size):
            counts[(row + offset) // pixel, (column + offset) // pixel] += mean[row, column]
    if counted:
        for i in range(number):
            for j in range(number):
                counts[i, j] = _poisson(counts[i, j])
    for row in range(size):
        y = max((row + offset + 0.5) / pixel - 0.5, 0.0)
        i = int(y)
        v = y - i
        for column in range(size):
            x = max((column + offset + 0.5) / pixel - 0.5, 0.0)
            j = int(x)
            u = x - j
            upper = (1 - u) * counts[i, j] + u * counts[i, j + 1]
            lower = (1 - u) * counts[i + 1, j] + u * counts[i + 1, j + 1]
            mean[row, column] = ((1 - v) * upper + v * lower) / pixel**2


@njit(nogil=True, cache=True)
def _tent_below(x: float) -> float:
    r"""Part below x [grid pixels] of the tent around 0 that electrons of small detector pixels are spread over.

    .. math:: \frac{R(x + h) - 2 R(x) + R(x - h)}{h^2}, \quad R(x) = \max(x, 0)^2 / 2,
        \quad h = \mathrm{SMALLEST\_PIXEL} / \sqrt{2}

    as `airpi_py4d.patterns.resampling_matrix` does.
    """
    half = SMALLEST_PIXEL / np.sqrt(2)
    return (max(x + half, 0.0) ** 2 - 2 * max(x, 0.0) ** 2 + max(x - half, 0.0) ** 2) / (2 * half**2)


@njit(nogil=True, cache=True)
def _parts(size: int, pixel: float, offset: float) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Detector pixels, `pixel` grid pixels wide, that each of `size` grid pixels is made of, along an axis.

    Returns
    -------
    number : ndarray of int, shape (size,)
    inside : ndarray, shape (size, most)
        Part of the grid pixel that lies in each.
    begins : ndarray of int, shape (size, most)
        First grid pixel that gets some of its electrons.
    shares : ndarray, shape (size, most, 3)
        Part of its electrons there, and in the next two.
    """
    most = int(1 / pixel) + 3
    number, inside = np.zeros(size, np.int64), np.zeros((size, most))
    begins, shares = np.zeros((size, most), np.int64), np.zeros((size, most, 3))
    for i in range(size):
        first = int(np.floor((i - offset) / pixel))
        for d in range(first, first + most):
            start = offset + d * pixel
            overlap = min(start + pixel, i + 1.0) - max(start, float(i))
            if overlap > 1e-9:
                n = number[i]
                inside[i, n] = overlap
                middle = start + pixel / 2
                begins[i, n] = int(np.floor(middle - SMALLEST_PIXEL / np.sqrt(2)))
                for m in range(3):
                    edge = begins[i, n] + m - middle
                    shares[i, n, m] = max(_tent_below(edge + 1) - _tent_below(edge), 0.0)  # but for rounding
                number[i] = n + 1
    return number, inside, begins, shares


@njit(nogil=True, cache=True)
def _drawn(probabilities: NDArray, number: int) -> int:
    """One of the first `number` places, at random by their `probabilities`, of any sum."""
    draw = np.random.random() * probabilities[:number].sum()
    for n in range(number - 1):
        draw -= probabilities[n]
        if draw < 0:
            return n
    return number - 1


@njit(nogil=True, cache=True)
def _spread_fine(counts: NDArray, pixel: float, offset: float, counted: bool) -> None:
    """Counts of detector pixels no larger than SMALLEST_PIXEL, as the engine resamples them; in place, shape (64, 64).

    The pixels are `pixel` grid pixels wide and begin `offset` grid pixels off the grid, along both axes. Each electron
    is somewhere in its grid pixel, so in one detector pixel, the electrons of which are shared by the grid pixels
    around. Of many electrons, and where they aren't `counted`, the expectation.
    """
    size = len(counts)
    number, inside, begins, shares = _parts(size, pixel, offset)
    many = np.zeros((size, size))
    given = counts.copy()
    counts[:] = 0.0
    for row in range(size):
        for column in range(size):
            electrons = given[row, column]
            if not counted or electrons > 20.0:
                many[row, column] = electrons
                continue
            for _ in range(int(electrons)):
                a, b = _drawn(inside[row], number[row]), _drawn(inside[column], number[column])
                for m in range(3):
                    k = begins[row, a] + m
                    if 0 <= k < size:
                        for n in range(3):
                            j = begins[column, b] + n
                            if 0 <= j < size:
                                counts[k, j] += shares[row, a, m] * shares[column, b, n]
    if not many.any():
        return
    across = np.zeros((size, size))
    for i in range(size):
        for n in range(number[i]):
            for m in range(3):
                k = begins[i, n] + m
                if 0 <= k < size:
                    across[k, i] += inside[i, n] * shares[i, n, m]
    along = np.zeros((size, size))
    for row in range(size):
        for i in range(max(row - 2, 0), min(row + 3, size)):
            along[row] += across[row, i] * many[i]
    for column in range(size):
        for i in range(max(column - 2, 0), min(column + 3, size)):
            for row in range(size):
                counts[row, column] += across[column, i] * along[row, i]


@njit(nogil=True, cache=True)
def _record(
    clean: NDArray,
    doses: NDArray,
    half_widths: NDArray,
    shifts: NDArray,
    scales: NDArray,
    pixels: NDArray,
    offsets: NDArray,
    seed: int,
    out: NDArray,
) -> None:
    """What a detector records of `clean` (n, 9, 64, 64): misaligned, cut off at `half_widths` [px], counted.

    A dose of 0 stands for no noise: the expected counts at 1e7 electrons. `pixels` is the size of a detector pixel
    [grid pixels]; others than 1 lie `offsets` off the grid, those above SMALLEST_PIXEL (whole numbers) are spread over
    it linearly, those below as `_spread_fine` says.
    """
    np.random.seed(seed)
    n, kernel, size, _ = clean.shape
    middle = size // 2
    out[:] = 0.0
    for b in range(n):
        dose = doses[b] if doses[b] > 0 else 1e7
        weight = dose * scales[b] ** 2
        first = max(0, middle - half_widths[b] + 1)
        last = min(size, middle + half_widths[b])
        fine = pixels[b] <= SMALLEST_PIXEL
        aligned = shifts[b, 0] == 0.0 and shifts[b, 1] == 0.0 and scales[b] == 1.0
        for k in range(kernel):
            for row in range(first, last):
                y = min(max(middle + (row - middle) * scales[b] + shifts[b, 0], 0.0), size - 1.001)
                i = int(y)
                v = np.float32(y - i)
                for column in range(first, last):
                    if aligned:
                        mean = clean[b, k, row, column]
                    else:
                        x = min(max(middle + (column - middle) * scales[b] + shifts[b, 1], 0.0), size - 1.001)
                        j = int(x)
                        u = np.float32(x - j)
                        top = (1 - u) * clean[b, k, i, j] + u * clean[b, k, i, j + 1]
                        bottom = (1 - u) * clean[b, k, i + 1, j] + u * clean[b, k, i + 1, j + 1]
                        mean = (1 - v) * top + v * bottom
                    mean *= weight
                    out[b, k, row, column] = _poisson(mean) if doses[b] > 0 and fine else mean
            if not fine:
                _count_coarse(out[b, k], int(pixels[b]), int(offsets[b]), doses[b] > 0)
            elif pixels[b] != 1:
                _spread_fine(out[b, k], pixels[b], offsets[b], doses[b] > 0)


def vacuum_pattern() -> NDArray[np.float32]:
    """Pattern of an empty specimen, shape (64, 64): the bright-field disk with a sum of 1."""
    k = np.arange(DETECTOR) - DETECTOR // 2
    disk = (k[:, None] ** 2 + k[None] ** 2 <= BRIGHT_FIELD_RADIUS**2).astype(np.float32)
    return disk / disk.sum()


def _mirrored(array: NDArray, axis: int) -> NDArray:
    """Reverse an axis of even length n about its centre pixel n // 2 (pixel 0 stays)."""
    return np.roll(np.flip(array, axis), 1, axis)


def symmetry(patterns: NDArray, patches: NDArray, operation: int) -> tuple[NDArray, NDArray]:
    """One of the eight symmetries of the square, the same on scan, detector and object.

    Parameters
    ----------
    patterns : ndarray, shape (3, 3, 64, 64)
    patches : ndarray, shape (16, 16, channels)
    operation : int
        0 to 7: bit 0 mirrors the columns, bit 1 the rows, bit 2 swaps rows and columns.
    """
    if operation & 1:
        patterns, patches = _mirrored(patterns[:, ::-1], 3), _mirrored(patches, 1)
    if operation & 2:
        patterns, patches = _mirrored(patterns[::-1], 2), _mirrored(patches, 0)
    if operation & 4:
        patterns, patches = patterns.transpose(1, 0, 3, 2), patches.swapaxes(0, 1)
    return patterns, patches


def aperture_radii(parameters: NDArray) -> NDArray[np.float64]:
    """k0 [1/A], shape (n,), of rows that begin with energy [eV] and semi-angle [mrad], as PARAMETERS do."""
    return np.array([optics.aperture_radius(energy, semiangle) for energy, semiangle in parameters[:, :2].tolist()])


def geometry(parameters: NDArray) -> NDArray[np.float32]:
    """The model's `geometry` input, shape (n, 3), of rows of PARAMETERS: scan step [1 / k0], phases of defocus and C_s
    at the aperture's edge [rad] (the two terms of eq. 3)."""
    energy, _, defocus, spherical, step, _ = parameters.T
    k0 = aperture_radii(parameters)
    lam = np.array([optics.wavelength(e) for e in energy])
    spherical_phase = 0.5 * np.pi * spherical * lam**3 * k0**4
    return np.stack([step * k0, -np.pi * lam * k0**2 * defocus, spherical_phase], -1).astype(np.float32)


class Batches(keras.utils.PyDataset):
    """Keras data set of (inputs, target) batches.

    inputs: `patterns` (n, 3, 3, 64, 64) [electrons] and `geometry` (n, 3); target (n, 16, 16, 4): real and imaginary
    part of the object patch minus 1, the weight |psi_in|^2 of each pixel (sum 1), and 1 / K, as
    `losses.StitchedExitWaveError` wants them. The second half of a batch is the first with other counts.

    Parameters
    ----------
    shards : dict of ndarray
        As `training.dataset.load_shards` gives them.
    batch_size, batches : int
        Predictions a batch (even: two a kernel), batches an epoch.
    label : {"exit_wave_midplane", "exit_wave"}
        Exit wave referred to the mid-plane, or at the exit plane as in the paper.
    seed, epoch : int
        They decide every random choice. Keras fetches ahead, so each epoch has an object of its own.
    dose : float, optional
        For validation: this many electrons a pattern (0 for no noise), and no augmentation.
    stitched : bool
        Whether K is that of the scan step, or 1.
    """

    def __init__(
        self,
        shards: dict,
        batch_size: int,
        batches: int,
        label: str,
        seed: int,
        epoch: int = 0,
        dose: float | None = None,
        stitched: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.shards, self.batch_size, self.batches = shards, batch_size, batches
        self.label, self.seed, self.epoch, self.dose = label, seed, epoch, dose
        self.stitched = stitched
        self.geometry = geometry(shards["parameters"])
        assert shards["parameters"].shape[1] == len(PARAMETERS)

    def __len__(self) -> int:
        return self.batches

    def target(self, scan: int, row: int, column: int) -> NDArray[np.float32]:
        """Object patch minus 1 and weights, shape (16, 16, 3), of an inner position of a scan."""
        incident = self.shards["probe_midplane" if self.label == "exit_wave_midplane" else "probe"][scan]
        weight = np.abs(incident) ** 2
        ratio = self.shards[self.label][scan, row, column] * incident.conj() / (weight + 1e-4 * weight.max())
        ratio = np.where(weight > 1e-3 * weight.max(), ratio - 1, 0)
        return np.stack([ratio.real, ratio.imag, weight / weight.sum()], -1)

    def __getitem__(self, index: int) -> tuple[dict[str, NDArray], NDArray]:
        rng = np.random.default_rng([self.seed, self.epoch, index])
        n, size = self.batch_size // 2, DETECTOR
        augment = self.dose is None
        clean = np.empty((n, 9, size, size), np.float32)
        target = np.empty((n, OBJECT, OBJECT, 4), np.float32)
        scans, places = rng.integers(len(self.geometry), size=n), rng.integers(KERNELS, size=n)
        if not augment:  # the same kernels for every epoch, which decides the counts alone
            scans = (np.arange(n) + index * n) % len(self.geometry)
            places = scans % KERNELS
        told = self.geometry[scans].copy()
        for b, (scan, place) in enumerate(zip(scans, places, strict=True)):
            row, column = divmod(int(place), SCAN - 2)
            patterns = self.shards["amplitudes"][scan, row : row + 3, column : column + 3]
            patch = self.target(scan, row, column)
            if augment:
                patterns, patch = symmetry(patterns, patch, int(rng.integers(8)))
            clean[b] = patterns.astype(np.float32).reshape(9, size, size)
            target[b, ..., :3] = patch
        np.square(clean, out=clean)
        doses = np.full(n, 0.0 if augment else self.dose)
        half_widths, shifts, scales = np.full(n, size), np.zeros((n, 2)), np.ones(n)
        pixels, offsets = np.ones(n, np.int64), np.zeros(n, np.int64)
        target[..., 3] = (1 / overlapping_kernels(told[:, 0]) if self.stitched else np.ones(n))[:, None, None]
        if augment:
            empty = rng.uniform(size=n) < EMPTY_SHARE
            clean[empty] = vacuum_pattern()
            target[empty, ..., :2] = 0
            doses = np.exp(rng.uniform(math.log(DOSE_RANGE[0]), math.log(DOSE_RANGE[1]), size=n))
            doses[rng.uniform(size=n) < NOISE_FREE_SHARE] = 0.0
            cropped = rng.uniform(size=n) < CROPPED_SHARE
            half_widths[cropped] = rng.integers(13, 32, size=cropped.sum())
            misaligned = rng.uniform(size=n) < MISALIGNED_SHARE
            shifts[misaligned] = rng.normal(0, CENTER_ERROR, (misaligned.sum(), 2))
            scales[misaligned] = rng.normal(1, SCALE_ERROR, misaligned.sum())
            coarse = rng.uniform(size=n) < COARSE_SHARE
            pixels[coarse] = rng.choice(COARSE_PIXELS, coarse.sum())
            offsets[coarse] = rng.integers(0, pixels[coarse])
            told[:, 1] += rng.normal(0, DEFOCUS_ERROR, n)
            told[rng.uniform(size=n) < DEFOCUS_UNTOLD_SHARE, 1:] = 0
        counts = np.empty((2 * n, 9, size, size), np.float32)
        for half in (counts[:n], counts[n:]):
            seed = int(rng.integers(2**31))
            _record(clean, doses, half_widths, shifts, scales, pixels, offsets, seed, half)
        inputs = {"patterns": counts.reshape(2 * n, 3, 3, size, size), "geometry": np.concatenate([told, told])}
        return inputs, np.concatenate([target, target])
