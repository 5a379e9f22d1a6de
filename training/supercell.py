"""4D-STEM of one specimen on a detector's own grid: frozen-phonon multislice of the whole supercell for every probe.

The detector has 64 x 64 px and a bright-field disk of any radius, as for the paper's network. The specimen is one
periodic cell, a whole number of times 64 real-space pixels of the detector wide, so that what a window leaves out
(`training.simulation`) is simulated too; probes move by phase ramps (eqs. 4 and 5), to any position.
The same code runs on the CPU and, with `device = "gpu"`, on CuPy arrays.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from abtem.antialias import antialias_aperture
from abtem.core.backend import asnumpy, get_array_module
from numpy.typing import NDArray
from scipy.fft import next_fast_len

from airpi_py4d import optics
from training.potentials import potential_slices, transmission
from training.simulation import DETECTOR, SCAN, depths, random_illumination
from training.structures import Specimen
from training.transforms import transforms

SMALLEST_SIDE = 10.0  # [1 / k0] of the supercell: 98 % of an Airy probe
REACH = 2.67  # [k0] at least what multislice keeps, the inner two thirds of its k range


@dataclass(frozen=True)
class Illumination:
    """Beam, scan and detector.

    Attributes
    ----------
    energy, semiangle : float
        [eV], [mrad]
    defocus, spherical_aberration, scan_step : float
        [A]
    bright_field_radius : float
        [px] of the 64-px detector.
    astigmatism, astigmatism_angle : float
        Twofold, [A] and [rad]: defocus becomes defocus - astigmatism cos(2 (angle of k - astigmatism_angle)), the angle
        counted from rows to columns (abTEM's C12 and phi12).
    source_size, focal_spread : float
        Standard deviations of the probe's position along each axis and of its defocus [A], incoherent.
    """

    energy: float
    semiangle: float
    defocus: float
    spherical_aberration: float
    scan_step: float
    bright_field_radius: float
    astigmatism: float = 0.0
    astigmatism_angle: float = 0.0
    source_size: float = 0.0
    focal_spread: float = 0.0

    @property
    def repeats(self) -> int:
        """Side of the supercell over 64 real-space pixels of the detector: k samples a detector pixel."""
        return int(np.ceil(SMALLEST_SIDE / self.bright_field_radius))

    @property
    def side(self) -> float:
        """Side of the supercell [A]."""
        return self.repeats * self.bright_field_radius / optics.aperture_radius(self.energy, self.semiangle)

    @property
    def grid(self) -> int:
        """Side of the supercell [px]: two thirds of its k range hold the detector but its corners, and REACH.

        Sixteen times a product of 2, 3 and 5, which FFTW transforms fastest.
        """
        kept = max(40 * self.repeats, REACH * self.bright_field_radius * self.repeats)
        return 16 * int(next_fast_len(int(np.ceil(3 * kept / 16)), real=True))

    def wave(self, k_rows: NDArray, k_columns: NDArray, defocus: float = 0.0) -> NDArray[np.complex128]:
        """A(k) exp(-i chi(k)), eq. 2, at frequencies [1/A], with `defocus` [A] on top; not normalised."""
        k_squared = k_rows[:, None] ** 2 + k_columns[None] ** 2
        rows, columns = np.nonzero(k_squared <= optics.aperture_radius(self.energy, self.semiangle) ** 2)
        within = k_squared[rows, columns]
        angle = np.arctan2(k_columns[columns], k_rows[rows]) - self.astigmatism_angle
        aberrations = optics.aberration_phase(
            within, self.energy, self.defocus + defocus, self.spherical_aberration
        ) - optics.aberration_phase(within * np.cos(2 * angle), self.energy, self.astigmatism)
        wave = np.zeros(k_squared.shape, np.complex128)
        wave[rows, columns] = np.exp(-1j * aberrations)
        return wave

    def probe(self) -> NDArray[np.complex64]:
        """psi_in(k) on the detector, shape (64, 64), centred at pixel 32; the intensities sum to 1."""
        k = self.detector_frequencies()
        wave = self.wave(k, k)
        return (wave / np.sqrt((np.abs(wave) ** 2).sum())).astype(np.complex64)

    def detector_frequencies(self) -> NDArray[np.float64]:
        """Spatial frequency of the detector's pixels along each axis [1/A], shape (64,)."""
        pixel = optics.aperture_radius(self.energy, self.semiangle) / self.bright_field_radius
        return (np.arange(DETECTOR) - DETECTOR // 2) * pixel


#: Columns of `parameters` of shards on the detector's grid; the last three: thickness of the specimen, depths of the
#: atoms' middle and of the exit plane [A].
PARAMETERS = (*Illumination.__dataclass_fields__, "thickness", "middle", "exit")


@dataclass(frozen=True)
class DetectorScan:
    """What one specimen gives: 5 x 5 patterns and the labels of the inner positions, first index the scan row.

    Attributes
    ----------
    patterns : ndarray of float32, shape (5, 5, 64, 64)
        <|psi(k)|^2> (eq. 9), the fraction of the beam in each detector pixel, centred at pixel 32.
    exit_wave : ndarray of complex64, shape (3, 3, 64, 64)
        <psi(k)> at the exit plane, sampled at the pixels' centres, the probe's position at pixel 32 of psi(r); the
        incident wave's intensities sum to 1.
    phase : ndarray of float32, shape (3, 3, 64, 64)
        Projected phase sigma v_z [rad], mean over phonons, band-limited to the detector, probe at pixel 32.
    depths : (float, float)
        Of the atoms' middle and of the exit plane [A].
    """

    patterns: NDArray[np.float32]
    exit_wave: NDArray[np.complex64]
    phase: NDArray[np.float32]
    depths: tuple[float, float]


def random_detector_illumination(rng: np.random.Generator, config: dict) -> Illumination:
    """Draw beam, step, bright-field/collection ratio and the optional aberrations from the configuration."""
    energy, semiangle, defocus, spherical_aberration, step = random_illumination(rng, config)
    beam, k0 = config["beam"], optics.aperture_radius(energy, semiangle)
    per_phase = 1 / (np.pi * optics.wavelength(energy) * k0**2)  # defocus [A] of 1 rad at the aperture's edge
    return Illumination(
        energy=energy,
        semiangle=semiangle,
        defocus=defocus,
        spherical_aberration=spherical_aberration,
        scan_step=step / k0,
        bright_field_radius=float(DETECTOR / 2 * rng.uniform(*config["scan"]["bright_field_ratio_range"])),
        astigmatism=float(rng.uniform(0, beam["astigmatism_phase"]) * per_phase),
        astigmatism_angle=float(rng.uniform(0, np.pi)),
        source_size=float(rng.uniform(0, beam["source_size"]) / k0),
        focal_spread=float(rng.uniform(0, beam["focal_spread_phase"]) * per_phase),
    )


def band_limited(transmissions: Any, aperture: Any) -> Any:
    """Transmission functions (n, grid, grid) times `aperture` in k, in place."""
    waves, forward, backward = transforms((1, *transmissions.shape[1:]), get_array_module(transmissions))
    for one in transmissions:
        waves[0] = one
        forward()
        waves *= aperture
        backward()
        one[:] = waves[0]
    return transmissions


def multislice(
    slices: list[NDArray[np.float32]],
    slice_thickness: float,
    illumination: Illumination,
    positions: NDArray[np.float64],
    shifts: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.complex64]]:
    r"""Mean intensity and mean wave over the phonon configurations, eq. 9, over the whole k range of the supercell.

    Every slice transmits, T = exp(i sigma v_z), and propagates, both band-limited to two thirds of the k range by
    abTEM's aperture. On the CPU the waves go through one after the other: a single one stays in the cache.

    Parameters
    ----------
    slices : list of array, shape (slices, grid, grid)
        [V A], NumPy or CuPy, one a phonon configuration.
    slice_thickness : float
        [A]
    illumination : Illumination
    positions : ndarray, shape (n, 2)
        Probe positions, row and column [A].
    shifts : ndarray, shape (configurations, 3), optional
        For partial coherence: displacement of the source, row and column, and change of defocus [A], one a phonon
        configuration.

    Returns
    -------
    intensity : array of float32, shape (n, grid, grid)
        <|psi(k)|^2>, fraction of the beam, FFT order.
    wave : array of complex64, shape (n, grid, grid)
        <psi(k)> with the position (not displaced) at the origin, FFT order; |psi_in|^2 sums to 1.
    """
    xp = get_array_module(slices[0])
    count, grid, side = len(positions), slices[0].shape[-1], illumination.side
    sigma = optics.interaction_parameter(illumination.energy)
    k = np.fft.fftfreq(grid, side / grid)
    k_squared = k[:, None] ** 2 + k[None] ** 2
    fresnel = np.exp(-1j * np.pi * optics.wavelength(illumination.energy) * slice_thickness * k_squared)
    # the transforms don't normalise: 1 / grid^2, for each one back to r, is in both apertures
    band = antialias_aperture((grid, grid), (side / grid, side / grid), xp=np) / grid**2
    step, limit = (xp.asarray(array.astype(np.complex64)) for array in (fresnel * band, band))
    batch = 1 if xp is np else count
    parts = [slice(first, first + batch) for first in range(0, count, batch)]
    waves, forward, backward = transforms((batch, grid, grid), xp)

    def ramps(displacement: NDArray[np.float64]) -> tuple[Any, Any]:
        """exp(-2 pi i k . r), eq. 4, for all positions, of rows and of columns."""
        rows, columns = (np.exp(-2j * np.pi * np.outer(r, k)) for r in (positions + displacement).T)
        return xp.asarray(rows.astype(np.complex64))[:, :, None], xp.asarray(columns.astype(np.complex64))[:, None]

    def incident(displacement: NDArray[np.float64], defocus: float) -> Any:
        """psi_in(r) at all positions, times grid^2."""
        wave = illumination.wave(k, k, defocus)
        wave = xp.asarray((wave / np.sqrt((np.abs(wave) ** 2).sum())).astype(np.complex64))
        rows, columns = ramps(displacement)
        probes = xp.empty((count, grid, grid), xp.complex64)
        for part in parts:
            waves[:] = wave * rows[part] * columns[part]
            backward()
            probes[part] = waves
        return probes

    shifts = np.zeros((len(slices), 3)) if shifts is None else shifts
    intensity = xp.zeros((count, grid, grid), xp.float32)
    wave = xp.zeros((count, grid, grid), xp.complex64)
    for n, configuration in enumerate(slices):
        if n == 0 or (shifts[n] != shifts[n - 1]).any():
            probes = incident(shifts[n, :2], shifts[n, 2])
        transmissions = band_limited(transmission(configuration, sigma), limit)
        for part in parts:
            waves[:] = probes[part]
            for number, one in enumerate(transmissions):
                if number:
                    backward()
                waves *= one
                forward()
                waves *= step
            intensity[part] += waves.real**2 + waves.imag**2
            wave[part] += waves
    rows, columns = ramps(np.zeros(2))
    return intensity / len(slices), wave * (rows.conj() * columns.conj()) / len(slices)


def on_detector(intensity: Any, repeats: int) -> Any:
    """Sum over the k samples of each detector pixel; (n, grid, grid) in FFT order to (n, 64, 64), centred at 32."""
    xp = get_array_module(intensity)
    shares = np.ones(repeats) if repeats % 2 else np.concatenate([[0.5], np.ones(repeats - 1), [0.5]])
    matrix = np.zeros((DETECTOR, intensity.shape[-1]), np.float32)
    for pixel in range(DETECTOR):
        samples = repeats * (pixel - DETECTOR // 2) + np.arange(len(shares)) - len(shares) // 2
        matrix[pixel, samples] = shares
    matrix = xp.asarray(matrix)
    return matrix @ intensity @ matrix.T


def at_detector(wave: Any, repeats: int) -> Any:
    """psi(k) at the pixels' centres; (n, grid, grid) in FFT order, |psi_in|^2 of sum 1 there, to (n, 64, 64)."""
    samples = repeats * (np.arange(DETECTOR) - DETECTOR // 2)
    return wave[:, samples[:, None], samples[None]]


def phase_patches(
    slices: list[NDArray[np.float32]], illumination: Illumination, positions: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Projected phase [rad] around the positions (n, 2) [A], shape (n, 64, 64), up to the detector's edge."""
    projected = asnumpy(sum(configuration.sum(0) for configuration in slices)) / len(slices)
    repeats, side, grid = illumination.repeats, illumination.side, projected.shape[-1]
    index = np.arange(-repeats * DETECTOR // 2 + 1, repeats * DETECTOR // 2)
    coefficients = np.fft.fft2(projected)[np.ix_(index, index)] / grid**2
    k = index / side
    offsets = (np.arange(DETECTOR) - DETECTOR // 2) * side / (repeats * DETECTOR)
    patches = []
    for row, column in positions:
        left = np.exp(2j * np.pi * np.outer(row + offsets, k))
        right = np.exp(2j * np.pi * np.outer(k, column + offsets))
        patches.append((left @ coefficients @ right).real)
    return (optics.interaction_parameter(illumination.energy) * np.stack(patches)).astype(np.float32)


def simulate_detector_scan(
    specimen: Specimen, illumination: Illumination, rng: np.random.Generator, config: dict, device: str = "cpu"
) -> DetectorScan:
    """Patterns and labels of a 5 x 5 scan over the middle of the specimen.

    The label is the wave of a perfectly coherent probe, whatever the coherence that the patterns were recorded with.

    Parameters
    ----------
    specimen : Specimen
        Its side is `illumination.side`.
    illumination : Illumination
    rng : numpy.random.Generator
        For phonons, source and focus.
    config : dict
        Section `simulation` of the data set's configuration.
    device : {"cpu", "gpu"}
    """
    slices, slice_thickness = potential_slices(specimen, illumination.grid, rng, config, device)
    steps = illumination.side / 2 + (np.arange(SCAN) - SCAN // 2) * illumination.scan_step
    positions = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
    inner = np.arange(SCAN**2).reshape(SCAN, SCAN)[1:-1, 1:-1].ravel()
    shifts = None
    if illumination.source_size or illumination.focal_spread:
        deviations = [illumination.source_size, illumination.source_size, illumination.focal_spread]
        shifts = rng.normal(size=(len(slices), 3)) * deviations
    intensity, wave = multislice(slices, slice_thickness, illumination, positions, shifts)
    wave = wave[inner] if shifts is None else multislice(slices, slice_thickness, illumination, positions[inner])[1]
    repeats, shape = illumination.repeats, (SCAN - 2, SCAN - 2, DETECTOR, DETECTOR)
    k = np.fft.fftfreq(illumination.grid, illumination.side / illumination.grid)
    sampled = at_detector(illumination.wave(k, k)[None], repeats)
    scale = np.sqrt((np.abs(illumination.wave(k, k)) ** 2).sum() / (np.abs(sampled) ** 2).sum())
    return DetectorScan(
        patterns=asnumpy(on_detector(intensity, repeats)).reshape(SCAN, SCAN, DETECTOR, DETECTOR),
        exit_wave=(asnumpy(at_detector(wave, repeats)) * np.float32(scale)).reshape(shape),
        phase=phase_patches(slices, illumination, positions[inner]).reshape(shape),
        depths=depths(specimen, slice_thickness, len(slices[0])),
    )


def parameters(specimen: Specimen, illumination: Illumination, scan: DetectorScan) -> tuple[float, ...]:
    """Row of a shard's `parameters`, in the order of PARAMETERS."""
    return (*asdict(illumination).values(), specimen.thickness, *scan.depths)
