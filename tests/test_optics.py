"""Optics against abTEM, which implements them independently."""

import abtem
import numpy as np
import pytest
from abtem.core.energy import energy2sigma, energy2wavelength

from airpi_py4d import optics


@pytest.mark.parametrize("energy", [30e3, 60e3, 80e3, 200e3, 300e3])
def test_wavelength_and_interaction_parameter(energy):
    assert optics.wavelength(energy) == pytest.approx(energy2wavelength(energy), rel=1e-6)
    assert optics.interaction_parameter(energy) == pytest.approx(energy2sigma(energy), rel=1e-5)


@pytest.mark.parametrize(
    ("energy", "semiangle", "defocus", "spherical_aberration"),
    [(300e3, 20.0, 0.0, 0.0), (300e3, 20.0, 60.0, 0.0), (60e3, 30.0, -25.0, 1e4), (80e3, 25.0, 27.0, 1e4)],
)
def test_probe_is_abtems(energy, semiangle, defocus, spherical_aberration):
    pixels, pixel_size = 128, 0.1
    ours = optics.probe(pixels, pixel_size, energy, semiangle, defocus, spherical_aberration)
    theirs = abtem.Probe(
        energy=energy,
        semiangle_cutoff=semiangle,
        defocus=defocus,
        Cs=spherical_aberration,
        gpts=pixels,
        sampling=pixel_size,
        soft=False,
    )
    wave = theirs.build(scan=[(pixels // 2 * pixel_size,) * 2], lazy=False).array.reshape(pixels, pixels)
    overlap = np.vdot(ours, wave) / np.sqrt(np.vdot(ours, ours) * np.vdot(wave, wave))
    assert abs(overlap - 1) < 2e-3  # the complex overlap: the sign of the aberrations counts


def test_probe_is_normalised_and_centred_on_odd_grids():
    wave = optics.probe(63, 0.15, 200e3, 22.0)
    assert (np.abs(wave) ** 2).sum() == pytest.approx(1)
    assert np.unravel_index(np.abs(wave).argmax(), wave.shape) == (31, 31)


def test_scherzer_defocus_flattens_the_phase():
    energy, aberration = 300e3, 1e4
    defocus = optics.scherzer_defocus(energy, aberration)
    k = np.linspace(0, 3, 500)
    phase = optics.aberration_phase(k**2, energy, defocus, aberration)
    assert phase.min() == pytest.approx(-3 * np.pi / 4, rel=0.01)  # Kirkland: the minimum at Scherzer's focus
