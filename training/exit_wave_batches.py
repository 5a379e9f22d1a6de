"""Batches for networks that give the exit wave on the detector's own grid.

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
from training.batches import _poisson, symmetry
from training.dataset import KERNELS
from training.simulation import DETECTOR, SCAN
from training.supercell import PARAMETERS, Illumination

#: Electrons a pattern, drawn evenly on a logarithmic scale.
DOSE_RANGE = (3.0, 3e9)
EMPTY_SHARE = 0.03
LABELS = ("exit_wave", "exit_wave_midplane", "projected_phase")


@njit(nogil=True, cache=True)
def _count(mean: NDArray, doses: NDArray, seed: int) -> None:
    """Poisson counts of `mean` (n, values), fractions of a pattern's electrons `doses`, in place."""
    np.random.seed(seed)
    for b in range(len(mean)):
        for i in range(mean.shape[1]):
            mean[b, i] = _poisson(mean[b, i] * doses[b])


def real_space(wave: NDArray) -> NDArray:
    """psi(r) of psi(k), both centred at pixel 32, unitary, over the last two axes."""
    shifted = np.fft.ifft2(np.fft.ifftshift(wave, axes=(-2, -1)), norm="ortho")
    return np.fft.fftshift(shifted, axes=(-2, -1))


def reciprocal_space(wave: NDArray) -> NDArray:
    """psi(k) of psi(r), the inverse of `real_space`."""
    shifted = np.fft.fft2(np.fft.ifftshift(wave, axes=(-2, -1)), norm="ortho")
    return np.fft.fftshift(shifted, axes=(-2, -1))


def labelled_wave(label: str, row: NDArray, wave: NDArray, phase: NDArray | None) -> NDArray:
    r"""The wave psi(k) that a network is to give, shape (64, 64).

    `exit_wave`: <psi> at the exit plane, as published. `exit_wave_midplane`: psi_in(r) times the object
    o = P(-(t - z)) psi_out / P(z) psi_in, both waves at the depth z of the specimen's middle (t the exit plane's), so
    that the network needs no thickness. `projected_phase`: psi_in(r) exp(i sigma v_z).

    Parameters
    ----------
    label : str
        One of LABELS.
    row : ndarray
        Of the shard's `parameters`.
    wave : ndarray of complex, shape (64, 64)
        <psi(k)> at the exit plane.
    phase : ndarray, shape (64, 64), optional
        Projected phase [rad], for that label.
    """
    if label == "exit_wave":
        return wave
    illumination = Illumination(*row[: len(PARAMETERS) - 3])
    probe = illumination.probe()
    if label == "projected_phase":
        return reciprocal_space(real_space(probe) * np.exp(1j * np.asarray(phase, np.float64)))
    if label != "exit_wave_midplane":
        raise ValueError(f"label is {label!r}, expected one of {', '.join(LABELS)}.")
    middle, end = row[-2:]
    k = illumination.detector_frequencies()
    fresnel = -1j * np.pi * optics.wavelength(illumination.energy) * (k[:, None] ** 2 + k[None] ** 2)
    there = real_space(probe * np.exp(fresnel * middle))
    back = real_space(wave * np.exp(fresnel * (middle - end)))
    weight = np.abs(there) ** 2
    # 1 where there is no probe
    change = (back - there) * there.conj() / (weight + 1e-4 * weight.max())
    return reciprocal_space(real_space(probe) * (1 + change))


class ExitWaveBatches(keras.utils.PyDataset):
    """Keras data set of (inputs, target) batches, each kernel of the data set once an epoch, in random order.

    inputs: `patterns` (n, 3, 3, 64, 64) [electrons], `probe` (n, 64, 64, 2), amplitude and phase [rad], `scan_step`
    (n, 1) [A]; target (n, 64, 64, 4): real and imaginary part of psi_out(k) and of psi_in(k).

    Parameters
    ----------
    shards : dict of ndarray
        As `training.dataset.load_shards` gives them for a data set on the detector's grid.
    batch_size : int
    batches : int, optional
        In an epoch; by default all whole batches.
    label : str
        One of LABELS.
    seed, epoch : int
        They decide every random choice. Keras fetches ahead, so each epoch has an object of its own.
    augment : bool
        Whether kernels are mirrored and transposed, and some replaced by an empty specimen.
    dose : float, optional
        Electrons a pattern, infinite for 1e9 without noise; random if not given.
    """

    def __init__(
        self,
        shards: dict,
        batch_size: int,
        label: str,
        seed: int,
        epoch: int = 0,
        batches: int | None = None,
        augment: bool = True,
        dose: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.shards, self.batch_size, self.label, self.seed, self.epoch = shards, batch_size, label, seed, epoch
        self.augment, self.dose = augment, dose
        samples = KERNELS * len(shards["parameters"])
        self.order = np.random.default_rng([seed, epoch]).permutation(samples)
        self.batches = samples // batch_size if batches is None else batches
        if self.batches == 0:
            raise ValueError(f"batch_size is {batch_size}, but the data set has {samples} samples; lower it.")

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> tuple[dict[str, NDArray], NDArray]:
        rng = np.random.default_rng([self.seed, self.epoch, index])
        n = self.batch_size
        patterns = np.empty((n, 3, 3, DETECTOR, DETECTOR), np.float32)
        target = np.empty((n, DETECTOR, DETECTOR, 4), np.float32)
        steps = np.empty((n, 1), np.float32)
        empty = rng.uniform(size=n) < EMPTY_SHARE
        for b in range(n):
            scan, place = divmod(int(self.order[(index * n + b) % len(self.order)]), KERNELS)
            row, column = divmod(place, SCAN - 2)
            parameters = self.shards["parameters"][scan]
            illumination = Illumination(*parameters[: len(PARAMETERS) - 3])
            probe = illumination.probe()
            amplitudes = self.shards["amplitudes"][scan, row : row + 3, column : column + 3].astype(np.float32)
            phase = self.shards["phase"][scan, row, column] if "phase" in self.shards else None
            wave = labelled_wave(self.label, parameters, self.shards["exit_wave"][scan, row, column], phase)
            if self.augment and empty[b]:
                amplitudes[:], wave = np.abs(probe), probe
            both = np.stack([wave.real, wave.imag, probe.real, probe.imag], -1)
            if self.augment:
                amplitudes, both = symmetry(amplitudes, both, int(rng.integers(8)))
            patterns[b], target[b], steps[b] = amplitudes, both, illumination.scan_step
        np.square(patterns, out=patterns)
        if self.dose is not None and math.isinf(self.dose):
            patterns *= 1e9
        else:
            low, high = DOSE_RANGE if self.dose is None else (self.dose, self.dose)
            doses = np.exp(rng.uniform(math.log(low), math.log(high), size=n))
            _count(patterns.reshape(n, -1), doses, int(rng.integers(2**31)))
        incident = target[..., 2] + 1j * target[..., 3]
        inputs = {
            "patterns": patterns,
            "probe": np.stack([np.abs(incident), np.angle(incident)], -1),
            "scan_step": steps,
        }
        return inputs, target


def correlation(target: NDArray, prediction: NDArray) -> float:
    """Pearson's correlation of true and predicted object phase (eq. 14), over the pixels where eq. 7 has weight, of
    all samples together, each about its mean.

    Parameters
    ----------
    target : ndarray, shape (n, 64, 64, 4)
    prediction : ndarray, shape (n, 64, 64, 2)
        As for `training.exit_wave_loss.loss_terms`.
    """
    incident = real_space(target[..., 2] + 1j * target[..., 3])
    true = np.angle(real_space(target[..., 0] + 1j * target[..., 1]) * incident.conj())
    predicted = np.angle(real_space(prediction[..., 0] * np.exp(1j * prediction[..., 1])) * incident.conj())
    strength = np.abs(incident) ** 2
    mask = strength > strength.max((1, 2), keepdims=True) / 10

    def centred(phase: NDArray) -> NDArray:
        mean = (phase * mask).sum((1, 2), keepdims=True) / mask.sum((1, 2), keepdims=True)
        return (phase - mean)[mask]

    return float(np.corrcoef(centred(true), centred(predicted))[0, 1])
