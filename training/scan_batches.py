"""Batches of whole scans for the networks of `training.image_networks`: augmented, counted, of one size a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from training.batches import (
    COARSE_PIXELS,
    COARSE_SHARE,
    CROPPED_SHARE,
    EMPTY_SHARE,
    NOISE_FREE_SHARE,
    _record,
    aperture_radii,
    geometry,
    vacuum_pattern,
)
from training.dataset import load_images
from training.image_networks import stitching_matrices
from training.simulation import DETECTOR

#: Image pixels and positions along an axis that a batch's scans have at most, and its patterns, about.
LARGEST_IMAGE = 64
LARGEST_SCAN = 32
PATTERNS_A_BATCH = 1024
#: Smaller errors of the calibration than `training.batches` has: they blur what many electrons could show.
DEFOCUS_UNTOLD_SHARE, DEFOCUS_ERROR = 0.1, 0.08
MISALIGNED_SHARE, CENTER_ERROR, SCALE_ERROR = 0.6, 0.15, 0.01
#: Of detector pixels that aren't coarse [grid pixels].
FINE_PIXELS = (0.2, 1.1)
#: Of a detector that isn't augmented [grid pixels].
VALIDATION_PIXEL = 0.5
#: Electrons in an area of 1 / k0^2.
SCAN_DOSE_RANGE = (60.0, 3e6)


class Scans:
    """Scans in their files: amplitudes (p, p, 64, 64) and phase [rad] of each; in memory, rows of PARAMETERS and the
    aperture's radius k0 [1/A].

    Parameters
    ----------
    folder : Path
    numbers : list of int
        Shards.
    """

    def __init__(self, folder: Path, numbers: list[int]) -> None:
        self.parameters, images = load_images(folder, numbers, "parameters", ("amplitudes", "phase"))
        self.amplitudes, self.phases = images
        self.geometry = geometry(self.parameters)
        self.aperture_radius = aperture_radii(self.parameters).astype(np.float32)

    def __len__(self) -> int:
        return len(self.amplitudes)

    def oversample(self, scan: int) -> int:
        """Image pixels a scan step."""
        return (len(self.phases[scan]) - 1) // (len(self.amplitudes[scan]) - 1)


def mirrored(patterns: NDArray, phase: NDArray, operation: int) -> tuple[NDArray, NDArray]:
    """One of the eight symmetries of the square, the same on scan, detector and image (see `batches.symmetry`).

    Parameters
    ----------
    patterns : ndarray, shape (p, p, 64, 64)
    phase : ndarray, shape (pixels, pixels)
    operation : int
        0 to 7: bit 0 mirrors the columns, bit 1 the rows, bit 2 swaps rows and columns.
    """
    if operation & 1:
        patterns, phase = np.roll(patterns[:, ::-1, :, ::-1], 1, 3), phase[:, ::-1]
    if operation & 2:
        patterns, phase = np.roll(patterns[::-1, :, ::-1], 1, 2), phase[::-1]
    if operation & 4:
        patterns, phase = patterns.transpose(1, 0, 3, 2), phase.T
    return patterns, phase


class ScanBatches(keras.utils.PyDataset):
    """Keras data set of (inputs, target): inputs as `StitchedNetwork` takes them, target (n, pixels, pixels, 2): phase
    [rad] and, everywhere the same, 1 / electrons in 1 / k0^2 (0 without noise), as `losses.PhaseImageError` wants it.

    The phase has zeros beyond the image that make its pixels a multiple of 4.

    The scans of a batch have the same number of positions and of image pixels a step; of large scans, and of those
    with large images, a part is taken.

    Parameters
    ----------
    scans : Scans
    batches : int
        An epoch.
    seed, epoch : int
        They decide every random choice.
    dose : float, optional
        For validation: this many electrons in 1 / k0^2 (0 for no noise), every scan once and no augmentation.
    whole : bool
        Every scan once, alone and as large as it is.
    dose_range : (float, float)
        Electrons in 1 / k0^2, drawn evenly on a logarithmic scale.
    """

    def __init__(
        self,
        scans: Scans,
        batches: int,
        seed: int,
        epoch: int = 0,
        dose: float | None = None,
        whole: bool = False,
        dose_range: tuple[float, float] = SCAN_DOSE_RANGE,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.scans, self.seed, self.epoch, self.dose, self.whole = scans, seed, epoch, dose, whole
        self.dose_range = dose_range
        self.in_order = whole or dose is not None
        self.batches = len(scans) if self.in_order else batches
        sizes = [(len(a), scans.oversample(n)) for n, a in enumerate(scans.amplitudes)]
        self.alike = {size: np.array([n for n, other in enumerate(sizes) if other == size]) for size in set(sizes)}
        self.sizes = sizes
        rows = np.array([positions for positions, _ in sizes], float)
        self.shares = rows / rows.sum()

    def __len__(self) -> int:
        return self.batches

    def shape(self, positions: int, oversample: int) -> tuple[int, int, int]:
        """Scans of a batch, positions along an axis, and image pixels along an axis but for the zeros beyond."""
        taken = positions if self.whole else min(positions, LARGEST_SCAN, (LARGEST_IMAGE - 1) // oversample + 1)
        count = 1 if self.in_order else max(2, min(8, round(PATTERNS_A_BATCH / taken**2)))
        return count, taken, (taken - 1) * oversample + 1

    def first_scan(self, index: int, rng: np.random.Generator) -> int:
        """A scan, which decides the batch's shapes.

        At random, in proportion to its rows; for validation and whole scans in their order.

        From its first two batches Keras concludes which lengths are constant, so none of theirs are equal.
        """
        if self.in_order:
            return index
        if index > 1:
            return int(rng.choice(len(self.scans), p=self.shares))
        shapes = np.array([self.shape(*size) for size in self.sizes])
        shapes[:, 2] += -shapes[:, 2] % 4
        small = shapes[:, 1] == shapes[:, 1].max()
        chosen = np.random.default_rng([self.seed, self.epoch]).choice(np.flatnonzero(small))
        if index == 1:
            other = np.flatnonzero((shapes != shapes[chosen]).all(1))
            chosen = rng.choice(other) if len(other) else chosen
        return int(chosen)

    def __getitem__(self, index: int) -> tuple[dict[str, NDArray], NDArray]:
        rng = np.random.default_rng([self.seed, self.epoch, index])
        augment = self.dose is None
        first = self.first_scan(index, rng)
        positions, oversample = self.sizes[first]
        count, taken, pixels = self.shape(positions, oversample)
        chosen = [first, *rng.choice(self.alike[self.sizes[first]], count - 1).tolist()]
        clean = np.empty((count, taken**2, DETECTOR, DETECTOR), np.float32)
        target = np.zeros((count, pixels + -pixels % 4, pixels + -pixels % 4, 2), np.float32)
        for b, scan in enumerate(chosen):
            row, column = rng.integers(positions - taken + 1, size=2) if augment else [(positions - taken) // 2] * 2
            patterns = self.scans.amplitudes[scan][row : row + taken, column : column + taken]
            top, left = row * oversample, column * oversample
            phase = self.scans.phases[scan][top : top + pixels, left : left + pixels]
            if augment:
                patterns, phase = mirrored(patterns, phase, int(rng.integers(8)))
            clean[b] = patterns.reshape(taken**2, DETECTOR, DETECTOR)
            target[b, :pixels, :pixels, 0] = phase
        np.square(clean, out=clean)
        told = self.scans.geometry[chosen].copy()
        doses = np.full(count, 0.0 if augment else self.dose)
        half_widths, shifts, scales = np.full(count, DETECTOR), np.zeros((count, 2)), np.ones(count)
        pixel_widths, offsets = np.full(count, VALIDATION_PIXEL), np.zeros(count)
        if augment:
            empty = rng.uniform(size=count) < EMPTY_SHARE
            clean[empty] = vacuum_pattern()
            target[empty, ..., 0] = 0
            low, high = np.log(self.dose_range)
            doses = np.exp(rng.uniform(low, high, size=count))
            doses[rng.uniform(size=count) < NOISE_FREE_SHARE] = 0.0
            cropped = rng.uniform(size=count) < CROPPED_SHARE
            half_widths[cropped] = rng.integers(13, 32, size=cropped.sum())
            misaligned = rng.uniform(size=count) < MISALIGNED_SHARE
            shifts[misaligned] = rng.normal(0, CENTER_ERROR, (misaligned.sum(), 2))
            scales[misaligned] = rng.normal(1, SCALE_ERROR, misaligned.sum())
            coarse = rng.uniform(size=count) < COARSE_SHARE
            pixel_widths[coarse] = rng.choice(COARSE_PIXELS, coarse.sum())
            offsets[coarse] = rng.integers(0, pixel_widths[coarse].astype(int))
            pixel_widths[~coarse] = rng.uniform(*FINE_PIXELS, (~coarse).sum())
            offsets[~coarse] = rng.uniform(0, pixel_widths[~coarse])
            told[:, 1] += rng.normal(0, DEFOCUS_ERROR, count)
            told[rng.uniform(size=count) < DEFOCUS_UNTOLD_SHARE, 1:] = 0
        target[..., 1] = np.divide(1, doses, out=np.zeros(count), where=doses > 0)[:, None, None]
        steps = self.scans.geometry[chosen, 0].astype(float)
        doses *= steps**2
        counts = np.empty_like(clean)
        _record(clean, doses, half_widths, shifts, scales, pixel_widths, offsets, int(rng.integers(2**31)), counts)
        matrices = [stitching_matrices(taken, oversample, step) for step in steps]
        inputs = {
            "patterns": counts.reshape(count, taken, taken, DETECTOR, DETECTOR),
            "geometry": told,
            "features_matrix": np.stack([features for features, _ in matrices]),
            "window_matrix": np.stack([window for _, window in matrices]),
            "pixel_size": (steps[:, None] / oversample).astype(np.float32),
            "aperture_radius": self.scans.aperture_radius[chosen, None],
        }
        return inputs, target
