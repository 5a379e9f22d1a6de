"""Whole small scans: patterns of neighbouring positions and the projected phase of the image that they make.

For networks that turn every pattern into a feature patch and see the stitched image (`training.image_networks`).
Grid and units are those of `training.simulation`; positions need not fall on the potential's pixels.

    specimen -> potential slices -> multislice at every position -> mean intensities
                                         -> projected phase at the image's pixels
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import next_fast_len

from airpi_py4d import optics
from training.potentials import potential_slices, transmission
from training.simulation import (
    BRIGHT_FIELD_RADIUS,
    DETECTOR,
    WINDOW,
    crop_detector,
    propagator,
    random_illumination,
    squared_frequency,
)
from training.structures import Specimen
from training.transforms import transforms

#: Largest spatial frequency of patterns and phase [1 / k0], and the pixel that samples it.
BAND = DETECTOR / 2 / BRIGHT_FIELD_RADIUS
PIXEL = 1 / (2 * BAND)
#: Positions along each axis: more where the step [1 / k0] is small, that patches overlap in the scan's middle.
SMALL_STEP = 0.25
POSITIONS_SMALL_STEP, POSITIONS = 24, 16
_BATCH = 32


@dataclass(frozen=True)
class Illumination:
    """Energy [eV], semi-angle [mrad], defocus and C_s [A], scan step [1 / k0], and, if not as the step decides, scan
    positions along each axis."""

    energy: float
    semiangle: float
    defocus: float
    spherical_aberration: float
    relative_step: float
    chosen_positions: int | None = None

    @property
    def k0(self) -> float:
        """Radius of the aperture [1/A]."""
        return optics.aperture_radius(self.energy, self.semiangle)

    @property
    def positions(self) -> int:
        """Scan positions along each axis."""
        if self.chosen_positions is not None:
            return self.chosen_positions
        return POSITIONS_SMALL_STEP if self.relative_step < SMALL_STEP else POSITIONS

    @property
    def oversample(self) -> int:
        """Image pixels a scan step, as the engine chooses them."""
        return max(1, math.ceil(self.relative_step / PIXEL - 1e-6))

    @property
    def pixel_size(self) -> float:
        """Of the potential [A]."""
        return BRIGHT_FIELD_RADIUS / self.k0 / WINDOW

    @property
    def step_pixels(self) -> float:
        """Scan step [px of the potential]."""
        return self.relative_step * WINDOW / BRIGHT_FIELD_RADIUS

    @property
    def grid(self) -> int:
        """Side of the potential [px]: the windows of all positions fit in."""
        return int(next_fast_len(WINDOW + math.ceil((self.positions - 1) * self.step_pixels) + 2))

    @property
    def places(self) -> NDArray[np.float64]:
        """Scan positions along each axis [px of the potential], shape (positions,)."""
        return self.grid // 2 + (np.arange(self.positions) - (self.positions - 1) / 2) * self.step_pixels


def random_scan_illumination(rng: np.random.Generator, config: dict) -> Illumination:
    """Drawn from sections `beam` and `scan` of the configuration; `positions` of the latter, if there, are those along
    each axis."""
    return Illumination(*random_illumination(rng, config), config["scan"].get("positions"))


def intensities(
    slices: list[NDArray[np.float32]], slice_thickness: float, illumination: Illumination
) -> NDArray[np.float32]:
    r"""Mean intensity <|psi(k)|^2> over the phonon configurations at every position of the scan (eq. 9).

    Parameters
    ----------
    slices : list of ndarray, shape (slices, grid, grid)
        [V A], one array a phonon configuration.
    slice_thickness : float
        [A]
    illumination : Illumination

    Returns
    -------
    ndarray of float32, shape (n, n, 64, 64)
        Fraction of the beam in each detector pixel, centred at pixel 32.
    """
    at, n, grid = illumination, illumination.positions, illumination.grid
    side, sigma = at.pixel_size * WINDOW, optics.interaction_parameter(at.energy)
    k_squared = squared_frequency(side)
    aperture = k_squared <= at.k0**2
    chi = optics.aberration_phase(k_squared, at.energy, at.defocus, at.spherical_aberration)
    incident = aperture * np.exp(-1j * chi) / np.sqrt(aperture.sum())
    incident *= (-1.0) ** (np.arange(WINDOW)[:, None] + np.arange(WINDOW)[None]) / WINDOW
    band = k_squared <= (2 / 3 * WINDOW / (2 * side)) ** 2
    # the plans don't normalise: 1 / n^2 of the inverse transform goes into the propagator
    step = (propagator(side, at.energy, slice_thickness) * band / WINDOW**2).astype(np.complex64)
    whole = np.rint(at.places).astype(int)
    k = np.fft.fftfreq(WINDOW)
    ramps = np.exp(-2j * np.pi * np.outer(at.places - whole, k))
    window = np.arange(WINDOW) - WINDOW // 2
    taken = (whole[:, None] + window) % grid
    transmissions = [transmission(configuration, sigma) for configuration in slices]
    pairs = np.stack(np.meshgrid(np.arange(n), np.arange(n), indexing="ij"), -1).reshape(-1, 2)
    result = np.empty((n * n, DETECTOR, DETECTOR), np.float32)
    waves, forward, backward = transforms((_BATCH, WINDOW, WINDOW))
    for first in range(0, len(pairs), _BATCH):
        some = pairs[first : first + _BATCH]
        count = len(some)
        waves[:count] = incident * ramps[some[:, 0]][:, :, None] * ramps[some[:, 1]][:, None, :]
        backward()
        start = waves[:count].copy()
        rows, columns = taken[some[:, 0]][:, :, None], taken[some[:, 1]][:, None, :]
        total = np.zeros((count, WINDOW, WINDOW), np.float32)
        for configuration in transmissions:
            waves[:count] = start
            for number, one_slice in enumerate(configuration):
                waves[:count] *= one_slice[rows, columns]
                forward()
                if number < len(configuration) - 1:  # propagation behind the last slice changes no intensity
                    waves[:count] *= step
                    backward()
            total += waves.real[:count] ** 2 + waves.imag[:count] ** 2
        # unitary transform at the end: 1 / n^2 of the squared sum
        result[first : first + count] = crop_detector(total) / (WINDOW**2 * len(slices))
    return result.reshape(n, n, DETECTOR, DETECTOR)


def projected_phase(slices: list[NDArray[np.float32]], illumination: Illumination) -> NDArray[np.float32]:
    r"""Projected phase sigma v_z [rad] at the image's pixels, mean over the phonons, up to BAND k0.

    Shape ((n - 1) s + 1, (n - 1) s + 1), s = `oversample`; pixel (0, 0) is the first position.
    """
    at = illumination
    projected = sum(configuration.sum(0, dtype=np.float64) for configuration in slices) / len(slices)
    frequency = np.fft.fftfreq(at.grid)
    limit = BAND * at.k0 * at.pixel_size
    kept = np.abs(frequency) <= limit
    k = frequency[kept]
    within = k[:, None] ** 2 + k[None] ** 2 <= limit**2
    coefficients = np.fft.fft2(projected)[np.ix_(kept, kept)] * within / at.grid**2
    pixels = at.places[0] + np.arange((at.positions - 1) * at.oversample + 1) * at.step_pixels / at.oversample
    waves = np.exp(2j * np.pi * np.outer(pixels, k))
    phase = optics.interaction_parameter(at.energy) * (waves @ coefficients @ waves.T).real
    return phase.astype(np.float32)


def simulate_scan(
    specimen: Specimen, illumination: Illumination, rng: np.random.Generator, config: dict
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Patterns (n, n, 64, 64) [fraction of the beam] and projected phase [rad] of a scan over the specimen's middle.

    Parameters
    ----------
    specimen : Specimen
        Its side is `illumination.grid * illumination.pixel_size`.
    illumination : Illumination
    rng : numpy.random.Generator
        For the phonons.
    config : dict
        Section `simulation` of the data set's configuration; `phonon_choices`, if there, are numbers of phonon
        configurations to draw from (1 is a snapshot: a crystal with static displacements), `phonon_deviations`, if
        there, the lowest and highest root mean square displacement along each axis [A] to draw uniformly from.
    """
    if "phonon_choices" in config:
        config = config | {"phonon_configurations": int(rng.choice(config["phonon_choices"]))}
    if "phonon_deviations" in config:
        config = config | {"phonon_deviation": float(rng.uniform(*config["phonon_deviations"]))}
    slices, slice_thickness = potential_slices(specimen, illumination.grid, rng, config)
    return intensities(slices, slice_thickness, illumination), projected_phase(slices, illumination)
