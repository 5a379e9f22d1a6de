"""Electron optics as pure functions: wavelength, interaction, aberrations, probe.

Lengths in A, reciprocal lengths in 1/A (cycles, not radians), energies in eV, angles in mrad.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# CODATA 2018
_PLANCK_TIMES_LIGHT = 12398.419843320026  # h c [eV A]
_REST_ENERGY = 510998.95  # m_e c^2 [eV]


def wavelength(energy: float) -> float:
    r"""Relativistic electron wavelength [A].

    .. math:: \lambda = h c / \sqrt{E (2 m_e c^2 + E)}

    Source: Kirkland, Advanced Computing in Electron Microscopy, 3rd ed. (2020), eq. 2.5.

    Parameters
    ----------
    energy : float
        Energy of the beam electrons [eV].

    Examples
    --------
    >>> round(wavelength(300e3), 5)
    0.01969
    """
    return float(_PLANCK_TIMES_LIGHT / np.sqrt(energy * (2 * _REST_ENERGY + energy)))


def interaction_parameter(energy: float) -> float:
    r"""Phase per projected potential, sigma [rad / (V A)].

    .. math:: \sigma = \frac{2\pi}{\lambda E} \frac{m_e c^2 + E}{2 m_e c^2 + E}

    Source: Kirkland (2020), eq. 5.6.

    Parameters
    ----------
    energy : float
        Energy of the beam electrons [eV].

    Examples
    --------
    >>> round(interaction_parameter(300e3) * 1e4, 3)
    6.526
    """
    relativistic = (_REST_ENERGY + energy) / (2 * _REST_ENERGY + energy)
    return float(2 * np.pi / (wavelength(energy) * energy) * relativistic)


def aperture_radius(energy: float, semiangle: float) -> float:
    r"""Radius of the aperture in reciprocal space, k0 = alpha / lambda [1/A].

    Parameters
    ----------
    energy : float
        Energy of the beam electrons [eV].
    semiangle : float
        Convergence semi-angle [mrad].

    Examples
    --------
    >>> round(aperture_radius(300e3, 20.0), 3)
    1.016
    """
    return semiangle * 1e-3 / wavelength(energy)


def aberration_phase(
    k_squared: ArrayLike, energy: float, defocus: float = 0.0, spherical_aberration: float = 0.0
) -> NDArray[np.float64]:
    r"""Phase of the aberrations chi(k) [rad], eq. 3 of Friedrich et al. (2023).

    .. math:: \chi(k) = \pi \lambda k^2 (C_s \lambda^2 k^2 / 2 - \Delta f)

    Parameters
    ----------
    k_squared : array_like
        Squared spatial frequency [1/A^2], any shape.
    energy : float
        Energy of the beam electrons [eV].
    defocus : float
        Defocus [A], positive for underfocus (the probe is focused behind the entrance plane), as in
        abTEM and py4DSTEM.
    spherical_aberration : float
        Third-order spherical aberration C_s [A].

    Examples
    --------
    >>> round(float(aberration_phase(1.0, 300e3, defocus=100.0)), 3)
    -6.185
    """
    lam = wavelength(energy)
    k2 = np.asarray(k_squared, dtype=np.float64)
    return np.pi * lam * k2 * (0.5 * spherical_aberration * lam**2 * k2 - defocus)


def scherzer_defocus(energy: float, spherical_aberration: float) -> float:
    r"""Scherzer defocus [A], sqrt(3 C_s lambda / 2).

    Source: Kirkland (2020), eq. 3.18 with n_D = 1.

    Parameters
    ----------
    energy : float
        Energy of the beam electrons [eV].
    spherical_aberration : float
        Third-order spherical aberration C_s [A].

    Examples
    --------
    >>> round(scherzer_defocus(300e3, 1e4), 2)
    17.18
    """
    return float(np.sqrt(1.5 * spherical_aberration * wavelength(energy)))


def probe(
    pixels: int,
    pixel_size: float | tuple[float, float],
    energy: float,
    semiangle: float,
    defocus: float = 0.0,
    spherical_aberration: float = 0.0,
) -> NDArray[np.complex128]:
    r"""Probe wave psi_in(r) at the entrance plane, eq. 2 of Friedrich et al. (2023).

    .. math:: \psi_{in}(r) = F^{-1}[A(k) \exp(-i \chi(k))]

    with A = 1 within the aperture k <= alpha / lambda. The exponent is negative because the transmission
    function is exp(+i sigma v_z): the convention of abTEM and of the authors' own code.

    Parameters
    ----------
    pixels : int
        Side n of the square grid [px].
    pixel_size : float or (float, float)
        Pixel size in real space, along rows and columns [A]; the k-pixel is 1 / (n pixel_size).
    energy, semiangle : float
        Beam energy [eV] and convergence semi-angle [mrad].
    defocus, spherical_aberration : float
        See `aberration_phase` [A].

    Returns
    -------
    ndarray of complex, shape (pixels, pixels)
        Centred at pixel n // 2; the intensities sum to 1.

    Examples
    --------
    >>> wave = probe(64, 0.2, 300e3, 20.0)
    >>> wave.shape, round(float((abs(wave) ** 2).sum()), 6), int(abs(wave).argmax()) == 32 * 64 + 32
    ((64, 64), 1.0, True)
    """
    rows, columns = (np.fft.fftfreq(pixels, size) for size in np.broadcast_to(pixel_size, 2))
    k_squared = rows[:, None] ** 2 + columns[None] ** 2
    aperture = k_squared <= aperture_radius(energy, semiangle) ** 2
    wave = aperture * np.exp(-1j * aberration_phase(k_squared, energy, defocus, spherical_aberration))
    centred = np.fft.fftshift(np.fft.ifft2(wave, norm="ortho"))
    return centred / np.sqrt(aperture.sum())
