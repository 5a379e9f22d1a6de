"""Independent reference: 4D-STEM by abTEM's own multislice on the whole supercell, for tests, the demo and benchmarks.

Nothing of the training simulator is used. abTEM's waves give the patterns, the projected potential gives the ground
truth, and the coherent exit waves give the oracle's patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import abtem
import numpy as np
from ase import Atoms
from numpy.typing import NDArray
from scipy.fft import fft2, next_fast_len
from tqdm import tqdm

from airpi_py4d import optics
from airpi_py4d.acquisition import Acquisition
from training.simulation import BRIGHT_FIELD_RADIUS, DETECTOR, OBJECT

#: Largest spatial frequency of patterns and ground truth, in units of k0: the corner-free reach of the model's grid.
BAND = DETECTOR / 2 / BRIGHT_FIELD_RADIUS


@dataclass(frozen=True)
class ReferenceScan:
    """One simulated scan with its truth.

    Attributes
    ----------
    patterns : ndarray of float32, shape (rows, columns, detector rows, detector columns)
        Fraction of the beam in each detector pixel.
    acquisition : Acquisition
        Its calibration; the centre is the simulation's.
    phase : ndarray of float64, shape (rows, columns)
        Ground truth at the scan positions: sigma v_z [rad], mean over the phonon configurations, up to BAND k0.
    exit_patches, midplane_patches : ndarray of complex64, shape (rows, columns, 16, 16)
        True object patches psi_out / psi_in, as published (exit over entrance plane) and referred to the mid-plane.
    """

    patterns: NDArray[np.float32]
    acquisition: Acquisition
    phase: NDArray[np.float64]
    exit_patches: NDArray[np.complex64]
    midplane_patches: NDArray[np.complex64]

    def counts(self, dose: float, seed: int) -> NDArray:
        """Poisson counts at `dose` [electrons / A^2]; infinite for the expected counts at 1e7 electrons a pattern."""
        if np.isinf(dose):
            return self.patterns * np.float32(1e7)
        electrons = dose * math.prod(self.acquisition.scan_step)
        return np.random.default_rng(seed).poisson(self.patterns * electrons).astype(np.uint16)


def _waves_at(k: tuple[NDArray, NDArray], rows: NDArray, columns: NDArray) -> tuple[NDArray, NDArray]:
    """Matrices that evaluate a Fourier series at rows and columns [A]: exp(2 pi i k r), for the two axes."""
    return np.exp(2j * np.pi * np.outer(rows, k[0])), np.exp(2j * np.pi * np.outer(k[1], columns))


def scan_positions(
    atoms: Atoms, scan_step: float, scan_shape: tuple[int, int], oversample: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows and columns [A] of a scan in the middle of the cell, or of its image with `oversample` pixels a step."""
    lengths = [(n - 1) * scan_step for n in scan_shape]
    start = [(side - length) / 2 for side, length in zip(np.diag(atoms.cell), lengths, strict=False)]
    count = [(n - 1) * oversample + 1 for n in scan_shape]
    rows, columns = (first + scan_step / oversample * np.arange(n) for first, n in zip(start, count, strict=True))
    return rows, columns


def _potentials(
    atoms: Atoms, k0: float, phonon_configurations: int, phonon_deviation: float, slices: int, seed: int
) -> list[abtem.PotentialArray]:
    """Built potentials, one a phonon configuration: abTEM 1.0.9 gives wrong waves for a built ensemble of them."""
    side = np.diag(atoms.cell)
    # abTEM keeps 2/3 of the grid's k range
    gpts = [2 * next_fast_len(int(np.ceil(length * 1.5 * (BAND + 0.1) * k0))) for length in side[:2]]
    phonons = abtem.FrozenPhonons(atoms, phonon_configurations, phonon_deviation, seed=seed)
    return [
        abtem.Potential(
            configuration,
            gpts=gpts,
            slice_thickness=side[2] / slices,
            projection="infinite",
            parametrization="lobato",
        ).build(lazy=False)
        for configuration in ([atoms] if phonon_deviation == 0 else phonons)
    ]


def _projected_phase(
    potentials: list[abtem.PotentialArray], energy: float, k0: float, rows: NDArray, columns: NDArray
) -> NDArray[np.float64]:
    """sigma v_z [rad] at rows and columns [A], mean over the potentials, up to BAND k0."""
    gpts, sampling = potentials[0].gpts, potentials[0].sampling
    frequencies = [np.fft.fftfreq(n, pixel) for n, pixel in zip(gpts, sampling, strict=True)]
    kept = [np.abs(k) <= BAND * k0 for k in frequencies]
    k = (frequencies[0][kept[0]], frequencies[1][kept[1]])
    within = (k[0][:, None] ** 2 + k[1][None] ** 2) <= (BAND * k0) ** 2
    projected = np.mean([potential.array.sum(0, dtype=np.float64) for potential in potentials], axis=0)
    coefficients = np.fft.fft2(projected)[np.ix_(*kept)] * within / np.prod(gpts)
    left, right = _waves_at(k, rows, columns)
    return optics.interaction_parameter(energy) * (left @ coefficients @ right).real


def projected_phase(
    atoms: Atoms,
    energy: float,
    semiangle: float,
    rows: NDArray,
    columns: NDArray,
    *,
    phonon_configurations: int = 4,
    phonon_deviation: float = 0.08,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Ground truth of `simulate_reference` at any rows and columns [A] of the cell: the same phonons for the same seed.

    Returns
    -------
    ndarray, shape (rows, columns)
        sigma v_z [rad], mean over the phonon configurations, up to BAND k0.
    """
    k0 = optics.aperture_radius(energy, semiangle)
    potentials = _potentials(atoms, k0, phonon_configurations, phonon_deviation, 1, seed)
    return _projected_phase(potentials, energy, k0, rows, columns)


def simulate_reference(
    atoms: Atoms,
    energy: float,
    semiangle: float,
    scan_step: float,
    scan_shape: tuple[int, int],
    *,
    defocus: float = 0.0,
    spherical_aberration: float = 0.0,
    phonon_configurations: int = 4,
    phonon_deviation: float = 0.08,
    slice_thickness: float = 2.0,
    seed: int = 0,
) -> ReferenceScan:
    """Simulate a scan in the middle of the cell.

    Parameters
    ----------
    atoms : Atoms
        Its orthogonal cell is the supercell: as long as the scan and the probe's tails, or a period of the specimen.
    energy, semiangle : float
        [eV], [mrad]
    scan_step : float
        [A]
    scan_shape : (int, int)
    defocus, spherical_aberration : float
        [A]
    phonon_configurations, phonon_deviation : int, float
        Frozen phonons; root mean square displacement along each axis [A].
    slice_thickness : float
        [A]
    seed : int
        Of the phonons.
    """
    k0 = optics.aperture_radius(energy, semiangle)
    side = np.diag(atoms.cell)
    slices = max(1, round(side[2] / slice_thickness))
    potentials = _potentials(atoms, k0, phonon_configurations, phonon_deviation, slices, seed)
    gpts = potentials[0].gpts
    probe = abtem.Probe(energy=energy, semiangle_cutoff=semiangle, defocus=defocus, Cs=spherical_aberration)
    probe.grid.match(potentials[0])
    frequencies = [np.fft.fftfreq(n, length / n) for n, length in zip(gpts, side[:2], strict=True)]
    kept = [np.abs(k) <= BAND * k0 for k in frequencies]
    k = (frequencies[0][kept[0]], frequencies[1][kept[1]])
    rows, columns = scan_positions(atoms, scan_step, scan_shape)
    phase = _projected_phase(potentials, energy, k0, rows, columns)

    depth = atoms.positions[:, 2]
    middle = (depth.min() + depth.max() - side[2] / slices) / 2
    k_squared = k[0][:, None] ** 2 + k[1][None] ** 2
    fresnel = -1j * np.pi * optics.wavelength(energy) * k_squared
    offsets = (np.arange(OBJECT) - OBJECT // 2) / (2 * BAND * k0)

    def patches(waves: NDArray) -> NDArray:
        """Waves (n, k, k) at the offsets around their probe position (n of one scan row)."""
        left, _ = _waves_at(k, row + offsets, offsets)
        return np.stack(
            [left @ w @ _waves_at(k, offsets, column + offsets)[1] for w, column in zip(waves, columns, strict=True)]
        )

    def far_field(waves: abtem.Waves) -> NDArray:
        """psi(k) (..., k, k) on the kept frequencies, of total intensity 1."""
        array = fft2(np.asarray(waves.array))[..., kept[0], :][..., kept[1]]
        return array / norm

    incident = np.asarray(probe.build(scan=[(0.0, 0.0)], lazy=False).array)
    norm = np.sqrt((np.abs(np.fft.fft2(incident)) ** 2).sum())
    patterns: list[NDArray] = []
    exits: list[NDArray] = []
    midplanes: list[NDArray] = []
    for row in tqdm(rows, "abTEM", unit="row"):
        scan = abtem.CustomScan([(row, column) for column in columns])
        out = np.stack([far_field(probe.multislice(potential, scan=scan, lazy=False)) for potential in potentials])
        patterns.append(np.fft.fftshift((np.abs(out) ** 2).mean(0), axes=(-2, -1)).astype(np.float32))
        mean, in_ = out.mean(0), far_field(probe.build(scan=scan, lazy=False))
        there, back = np.exp(fresnel * middle), np.exp(fresnel * (middle - side[2]))
        for kind, numerator, denominator in (
            (exits, patches(mean), patches(in_)),
            (midplanes, patches(mean * back), patches(in_ * there)),
        ):
            weight = np.abs(denominator) ** 2
            regularised = weight + 1e-6 * weight.max((1, 2), keepdims=True)
            kind.append((numerator * denominator.conj() / regularised).astype(np.complex64))
    sources = dict.fromkeys(("energy", "semiangle", "scan_step", "k_pixel", "center"), "simulation")
    acquisition = Acquisition(
        energy=energy,
        semiangle=semiangle,
        scan_step=(scan_step, scan_step),
        k_pixel=(1 / side[0], 1 / side[1]),
        center=(len(k[0]) // 2, len(k[1]) // 2),
        defocus=defocus,
        spherical_aberration=spherical_aberration,
        sources=sources,
    )
    return ReferenceScan(np.stack(patterns), acquisition, phase, np.stack(exits), np.stack(midplanes))


def cross_correlation(image: NDArray, truth: NDArray) -> float:
    r"""Pearson's correlation of two images of one shape, eq. 14 of Friedrich et al. (2023)."""
    return float(np.corrcoef(np.ravel(image), np.ravel(truth))[0, 1])
