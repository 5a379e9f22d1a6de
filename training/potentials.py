"""Projected potentials of a specimen's slices: those of abTEM's `Potential` (Lobato, infinite projection), faster.

abTEM starts anew for every slice and phonon configuration; here the scattering factors are evaluated once an element
and all slices are transformed together. The same code runs on CuPy arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.fft
from abtem.core.backend import get_array_module
from abtem.integrals import sinc
from abtem.parametrizations import LobatoParametrization
from ase.data import chemical_symbols
from numpy.typing import NDArray

from training.structures import Specimen


def scattering_factor(number: int, grid: int, side: float) -> NDArray[np.float32]:
    r"""Projected scattering factor of an element over abTEM's sinc, V(k) = f_Z(|k|) / (d^2 sin(|k| d) / (|k| d)).

    d = side / grid; f_Z of Lobato and Van Dyck, Acta Cryst. A 70 (2014) 636. The sinc is what abTEM divides by for the
    pixels that `deltas` are shared between (Van den Broek et al., Ultramicroscopy 158 (2015) 89), as it is there:
    without the pi of sin(pi k d) / (pi k d), so high frequencies are a little too weak.

    Parameters
    ----------
    number : int
        Atomic number.
    grid : int
        [px]
    side : float
        [A]

    Returns
    -------
    ndarray of float32, shape (grid, grid // 2 + 1)
        [V A], in the order of `scipy.fft.rfft2`.
    """
    pixel = side / grid
    k_squared = np.fft.fftfreq(grid, pixel)[:, None] ** 2 + np.fft.rfftfreq(grid, pixel)[None] ** 2
    factor = LobatoParametrization().projected_scattering_factor(chemical_symbols[number])(k_squared)
    return (factor / sinc((grid, grid), (pixel, pixel))[:, : factor.shape[1]]).astype(np.float32)


def deltas(positions: NDArray[np.float64], slice_numbers: NDArray[np.int64], count: int, grid: int, xp: Any) -> Any:
    """Every atom as a weight of 1, shared linearly between the four pixels around it.

    Parameters
    ----------
    positions : ndarray, shape (n, 2)
        Row and column [px], periodic.
    slice_numbers : ndarray of int, shape (n,)
    count, grid : int
        Number of slices, and their side [px].
    xp : module
        NumPy or CuPy.

    Returns
    -------
    array of float32, shape (count, grid, grid)
    """
    corner = np.floor(positions).astype(np.int64)
    share = positions - corner
    places, weights = [], []
    for offset in np.ndindex(2, 2):
        row, column = np.add(corner, offset).T % grid
        places.append((slice_numbers * grid + row) * grid + column)
        weights.append(np.prod(np.where(offset, share, 1 - share), 1))
    flat = xp.bincount(
        xp.asarray(np.concatenate(places)), xp.asarray(np.concatenate(weights)), minlength=count * grid**2
    )
    return flat.reshape(count, grid, grid).astype(xp.float32)


def potential_slices(
    specimen: Specimen, grid: int, rng: np.random.Generator, config: dict, device: str = "cpu"
) -> tuple[list[NDArray[np.float32]], float]:
    r"""Projected potential of the slices for each phonon configuration, an atom wholly in the slice of its centre.

    V(k) = \sum_elements f_Z(k) \sum_atoms exp(-2 pi i k . r), with Lobato's scattering factors.

    Parameters
    ----------
    specimen : Specimen
    grid : int
        Side of the potential [px].
    rng : numpy.random.Generator
        For the phonons.
    config : dict
        Section `simulation` of the data set's configuration.
    device : {"cpu", "gpu"}
        "gpu" gives CuPy arrays.

    Returns
    -------
    slices : list of array of float32, shape (slices, grid, grid)
        [V A], one array a phonon configuration.
    slice_thickness : float
        [A]
    """
    xp = get_array_module(device)
    fft = scipy.fft if xp is np else xp.fft  # NumPy's would be in double precision
    count = max(1, round(specimen.thickness / config["slice_thickness"]))
    thickness, side, numbers = specimen.thickness / count, specimen.atoms.cell[0, 0], specimen.atoms.numbers
    factors = {number: xp.asarray(scattering_factor(number, grid, side)) for number in np.unique(numbers)}
    slices = []
    for _ in range(config["phonon_configurations"]):
        moved = specimen.atoms.positions + rng.normal(0, config["phonon_deviation"], (len(numbers), 3))
        slice_numbers = np.clip(np.floor(moved[:, 2] / thickness), 0, count - 1).astype(np.int64)
        coefficients = 0.0
        for number, factor in factors.items():
            chosen = numbers == number
            atoms = deltas(moved[chosen, :2] * (grid / side), slice_numbers[chosen], count, grid, xp)
            coefficients = coefficients + factor * fft.rfft2(atoms)
        slices.append(fft.irfft2(coefficients, s=(grid, grid)))
    return slices, thickness


def transmission(slices: Any, sigma: float) -> Any:
    """T(r) = exp(i sigma v_z), eq. 1 of Friedrich et al. (2023); [V A] and [rad / (V A)] to complex64."""
    xp = get_array_module(slices)
    phase = slices * np.float32(sigma)
    result = xp.empty(phase.shape, xp.complex64)
    result.real, result.imag = xp.cos(phase), xp.sin(phase)
    return result
