"""4D-STEM of one specimen: frozen-phonon multislice in a window around every probe position.

The grid is the scale-free one: the window has the side L = 12 / k0, k0 = alpha / lambda, so that the
bright-field disk has a radius of 12 px on the 64-px detector whatever the voltage and the angle.

    specimen -> potential slices -> probe -> multislice -> mean intensities and coherent exit waves
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import next_fast_len

from airpi_py4d import optics
from training.potentials import potential_slices, transmission
from training.structures import Specimen
from training.transforms import transforms

BRIGHT_FIELD_RADIUS = 12  # [px] on the detector
DETECTOR = 64  # [px]
#: Real detectors' pixels that are smaller are spread over tents as wide when they are resampled to that detector [px].
SMALLEST_PIXEL = 1.1
WINDOW = 128  # [px] multislice window; its k range is twice the detector's
OBJECT = 16  # [px] side of the labels, at the detector's natural sampling L / 64
SCAN = 5  # a scan of 5x5 positions gives 9 kernels of 3x3
MAXIMUM_GRID = 448  # [px] side of the potential


@dataclass(frozen=True)
class Beam:
    """Illumination and scan: energy [eV], semi-angle [mrad], defocus and C_s [A], scan step [px of the window]."""

    energy: float
    semiangle: float
    defocus: float
    spherical_aberration: float
    step_pixels: int

    @property
    def side(self) -> float:
        """Side of the multislice window [A]."""
        return BRIGHT_FIELD_RADIUS / optics.aperture_radius(self.energy, self.semiangle)

    @property
    def pixel_size(self) -> float:
        """Pixel size of the potential [A]."""
        return self.side / WINDOW

    @property
    def scan_step(self) -> float:
        """Scan step [A]."""
        return self.step_pixels * self.pixel_size

    @property
    def grid(self) -> int:
        """Side of the potential [px]: the windows of the whole scan fit in."""
        return int(next_fast_len(WINDOW + (SCAN - 1) * self.step_pixels + 1))


@dataclass(frozen=True)
class Scan:
    """What one specimen gives: SCAN x SCAN patterns and the labels of the inner positions, first index the scan row.

    Attributes
    ----------
    patterns : ndarray of float32, shape (5, 5, 64, 64)
        <|psi(k)|^2> (eq. 9), the fraction of the beam in each detector pixel, centred at pixel 32.
    exit_wave, exit_wave_midplane : ndarray of complex64, shape (3, 3, 16, 16)
        <psi(r)> in the middle of the window, probe at pixel 8: at the exit plane (the paper's label), and
        propagated back to the specimen's mid-plane.
    probe, probe_midplane : ndarray of complex64, shape (16, 16)
        Incident wave at the entrance plane, and propagated to the mid-plane.
    phase : ndarray of float32, shape (3, 3, 16, 16)
        Projected phase sigma v_z [rad] in the same windows, mean over phonons, band-limited to the detector.
    """

    patterns: NDArray[np.float32]
    exit_wave: NDArray[np.complex64]
    exit_wave_midplane: NDArray[np.complex64]
    probe: NDArray[np.complex64]
    probe_midplane: NDArray[np.complex64]
    phase: NDArray[np.float32]


def random_illumination(rng: np.random.Generator, config: dict) -> tuple[float, float, float, float, float]:
    """Draw energy [eV], semi-angle [mrad], defocus [A], C_s [A] and scan step [1 / k0] from sections `beam` and `scan`.

    With `semiangle_truncated` the semi-angle is drawn again when out of its range, else set to the range's end.
    """
    beam = config["beam"]
    shares = np.array(beam["energy_shares"])
    energy = float(rng.choice(beam["energies"], p=shares / shares.sum()))
    semiangle = rng.normal(beam["semiangle_mean"], beam["semiangle_deviation"])
    low, high = beam["semiangle_range"]
    while beam.get("semiangle_truncated", False) and not low <= semiangle <= high:
        semiangle = rng.normal(beam["semiangle_mean"], beam["semiangle_deviation"])
    semiangle = float(np.clip(semiangle, low, high))
    defocus = spherical_aberration = 0.0
    draw = rng.uniform()
    if draw < beam["scherzer_share"]:
        spherical_aberration = float(beam["spherical_aberration"])
        defocus = optics.scherzer_defocus(energy, spherical_aberration)
    elif draw > beam["scherzer_share"] + beam["focused_share"]:
        per_angstrom = float(-optics.aberration_phase(optics.aperture_radius(energy, semiangle) ** 2, energy, 1.0))
        defocus = float(rng.uniform(-1, 1) * beam["defocus_phase_range"] / per_angstrom)
    low, high = config["scan"]["step_range"]
    step = low + (high - low) * rng.uniform() ** config["scan"]["step_skew"]
    return energy, semiangle, defocus, spherical_aberration, step


def random_beam(rng: np.random.Generator, config: dict) -> Beam:
    """Draw the illumination and the step from sections `beam` and `scan` of the configuration."""
    energy, semiangle, defocus, spherical_aberration, step = random_illumination(rng, config)
    step_pixels = max(1, round(step * WINDOW / BRIGHT_FIELD_RADIUS))
    return Beam(energy, semiangle, defocus, spherical_aberration, step_pixels)


def depths(specimen: Specimen, slice_thickness: float, count: int) -> tuple[float, float]:
    """Depth of the atoms' middle as multislice of `count` slices sees it, half a slice above where it is, and of the
    exit plane [A]."""
    z = specimen.atoms.positions[:, 2]
    return float((z.min() + z.max() - slice_thickness) / 2), slice_thickness * count


def squared_frequency(side: float) -> NDArray[np.float64]:
    """k^2 [1/A^2] on the window's FFT grid, shape (128, 128), for a window of `side` [A]."""
    k = np.fft.fftfreq(WINDOW, side / WINDOW)
    return k[:, None] ** 2 + k[None] ** 2


def propagator(side: float, energy: float, distance: float) -> NDArray[np.complex128]:
    r"""Fresnel propagator P(k) = exp(-i pi lambda z k^2), shape (128, 128), FFT order.

    Source: Kirkland (2020), eq. 6.65. `distance` z [A], `side` of the window [A], `energy` [eV].
    """
    return np.exp(-1j * np.pi * optics.wavelength(energy) * distance * squared_frequency(side))


def multislice(
    slices: list[NDArray[np.float32]], slice_thickness: float, beam: Beam, positions: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.complex64]]:
    r"""Mean intensity and mean wave in the far field over the phonon configurations, eq. 9.

    Every slice transmits, T = exp(i sigma v_z), and propagates, band-limited to 2/3 of the window's k range.

    Parameters
    ----------
    slices : list of ndarray, shape (slices, grid, grid)
        [V A]
    slice_thickness : float
        [A]
    beam : Beam
    positions : ndarray of int, shape (n, 2)
        Probe positions on the potential's grid [px], row and column.

    Returns
    -------
    intensity : ndarray of float32, shape (n, 128, 128)
        <|psi(k)|^2>, fraction of the beam, FFT order.
    wave : ndarray of complex64, shape (n, 128, 128)
        <psi(k)> with the probe position in the middle of the window, FFT order.
    """
    count, grid = len(positions), slices[0].shape[-1]
    side, sigma = beam.side, optics.interaction_parameter(beam.energy)
    incident = optics.probe(
        WINDOW, side / WINDOW, beam.energy, beam.semiangle, beam.defocus, beam.spherical_aberration
    ).astype(np.complex64)
    k_squared = squared_frequency(side)
    band = k_squared <= (2 / 3 * WINDOW / (2 * side)) ** 2
    # the plans don't normalise: 1 / n^2 of the inverse transform goes into the propagator
    step = (propagator(side, beam.energy, slice_thickness) * band / WINDOW**2).astype(np.complex64)
    window = np.arange(WINDOW) - WINDOW // 2
    rows = ((positions[:, 0, None] + window) % grid)[:, :, None]
    columns = ((positions[:, 1, None] + window) % grid)[:, None, :]
    waves, forward, backward = transforms((count, WINDOW, WINDOW))
    intensity = np.zeros((count, WINDOW, WINDOW), np.float32)
    wave = np.zeros((count, WINDOW, WINDOW), np.complex64)
    for configuration in slices:
        waves[:] = incident
        for one_slice in transmission(configuration, sigma):
            np.multiply(waves, one_slice[rows, columns], out=waves)
            forward()
            np.multiply(waves, step, out=waves)
            backward()
        forward()
        intensity += waves.real**2 + waves.imag**2
        wave += waves
    scale = 1 / (WINDOW * len(slices))
    # the probe sits at pixel 64: (-1)^(row + column) in k moves it to pixel 0
    sign = (-1.0) ** (np.arange(WINDOW)[:, None] + np.arange(WINDOW)[None])
    return intensity * np.float32(scale / WINDOW), wave * (scale * sign).astype(np.complex64)


def crop_detector(far_field: NDArray) -> NDArray:
    """The detector's 64 x 64 px, centred at 32, of arrays of shape (..., 128, 128) in FFT order."""
    edge = (WINDOW - DETECTOR) // 2
    return np.fft.fftshift(far_field, axes=(-2, -1))[..., edge:-edge, edge:-edge]


def object_window(far_field: NDArray) -> NDArray[np.complex64]:
    """Wave in real space around the probe, shape (..., 16, 16) at L / 64, of psi(k) of shape (..., 128, 128)."""
    k = np.fft.ifftshift(crop_detector(far_field), axes=(-2, -1))
    r = np.fft.fftshift(np.fft.ifft2(k, norm="ortho"), axes=(-2, -1))
    edge = (DETECTOR - OBJECT) // 2
    return r[..., edge:-edge, edge:-edge].astype(np.complex64)


def _phase_windows(slices: list[NDArray[np.float32]], beam: Beam, positions: NDArray[np.int64]) -> NDArray[np.float32]:
    """Projected phase [rad] around the positions, shape (n, 16, 16), band-limited to the detector's square."""
    phase = sum(configuration.sum(0) for configuration in slices) / len(slices)
    frequency = np.abs(np.fft.fftfreq(phase.shape[-1], beam.pixel_size)) < DETECTOR / 2 / beam.side
    limited = np.fft.ifft2(np.fft.fft2(phase) * np.outer(frequency, frequency)).real
    offsets = (np.arange(OBJECT) - OBJECT // 2) * (WINDOW // DETECTOR)
    rows = (positions[:, 0, None] + offsets) % phase.shape[0]
    columns = (positions[:, 1, None] + offsets) % phase.shape[1]
    sigma = optics.interaction_parameter(beam.energy)
    return (sigma * limited[rows[:, :, None], columns[:, None, :]]).astype(np.float32)


def simulate_scan(specimen: Specimen, beam: Beam, rng: np.random.Generator, config: dict) -> Scan:
    """Patterns and labels of a 5 x 5 scan over the middle of the specimen.

    The exit wave referred to the mid-plane is P(-(t - z)) psi_out and its incident wave P(z) psi_in, with z the
    depth of the atoms' middle as multislice sees it, half a slice above where it is; their ratio is 1 in vacuum.

    Parameters
    ----------
    specimen : Specimen
        Its side is `beam.grid * beam.pixel_size`.
    beam : Beam
    rng : numpy.random.Generator
        For the phonons.
    config : dict
        Section `simulation` of the data set's configuration.
    """
    slices, slice_thickness = potential_slices(specimen, beam.grid, rng, config)
    steps = beam.grid // 2 + (np.arange(SCAN) - SCAN // 2) * beam.step_pixels
    positions = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
    intensity, wave = multislice(slices, slice_thickness, beam, positions)
    inner = np.arange(SCAN**2).reshape(SCAN, SCAN)[1:-1, 1:-1].ravel()
    middle, total = depths(specimen, slice_thickness, len(slices[0]))
    incident = optics.probe(
        WINDOW, beam.side / WINDOW, beam.energy, beam.semiangle, beam.defocus, beam.spherical_aberration
    )
    incident = np.fft.fft2(np.fft.ifftshift(incident), norm="ortho")
    back = propagator(beam.side, beam.energy, middle - total)
    shape = (SCAN - 2, SCAN - 2, OBJECT, OBJECT)
    return Scan(
        patterns=crop_detector(intensity).reshape(SCAN, SCAN, DETECTOR, DETECTOR),
        exit_wave=object_window(wave[inner]).reshape(shape),
        exit_wave_midplane=object_window(wave[inner] * back).reshape(shape),
        probe=object_window(incident),
        probe_midplane=object_window(incident * propagator(beam.side, beam.energy, middle)),
        phase=_phase_windows(slices, beam, positions[inner]).reshape(shape),
    )
