"""Eq. 6 to 8 through the whole engine with an oracle model, against a direct float64 evaluation."""

import numpy as np
import pytest
from oracle import numbered_patterns, write_oracle

from airpi_py4d import Acquisition, optics, reconstruct
from airpi_py4d.model import Model

ROWS, COLUMNS = 4, 6


def direct_probe(rows, columns, calibration):
    """psi_in at offsets (n,) and (m,) by summing plane waves on a fine polar grid: no FFT, no Cartesian aperture."""
    k0 = calibration.aperture_radius
    radius = (np.arange(200) + 0.5) / 200 * k0
    angle = np.arange(180) / 180 * 2 * np.pi
    k, theta = np.meshgrid(radius, angle, indexing="ij")
    lam = optics.wavelength(calibration.energy)
    chi = np.pi * lam * k**2 * (0.5 * calibration.spherical_aberration * lam**2 * k**2 - calibration.defocus)
    waves = k * np.exp(-1j * chi)
    row, column = (
        np.exp(2j * np.pi * rows[:, None, None] * (k * np.cos(theta))),
        np.exp(2j * np.pi * columns[:, None, None] * (k * np.sin(theta))),
    )
    return np.einsum("rkt,ckt,kt->rc", row, column, waves, optimize=True)


def direct_object(patches, calibration, oversample):
    """Eq. 6 to 8, one output pixel and one position at a time."""
    patch_pixel = 12 / calibration.aperture_radius / 64
    pixels = [step / oversample for step in calibration.scan_step]
    rows, columns = (ROWS - 1) * oversample + 1, (COLUMNS - 1) * oversample + 1
    reach = int(np.ceil(6 * patch_pixel / min(pixels)))
    offsets, column_offsets = (np.arange(-reach, reach + 1) * pixel for pixel in pixels)
    intensity = np.abs(direct_probe(offsets, column_offsets, calibration)) ** 2
    weight = np.where(intensity > intensity.max() / 10, intensity, 0)
    weight /= weight.sum()
    total, norm = np.zeros((rows, columns), complex), np.zeros((rows, columns))
    grid = np.arange(16) - 8
    for n in range(ROWS):
        for m in range(COLUMNS):
            for i, y in enumerate(offsets):
                for j, x in enumerate(column_offsets):
                    a, b = n * oversample + i - reach, m * oversample + j - reach
                    if weight[i, j] == 0 or not (0 <= a < rows and 0 <= b < columns):
                        continue
                    kernel = np.outer(np.sinc(y / patch_pixel - grid), np.sinc(x / patch_pixel - grid))
                    value = 1 + np.sum(kernel * (patches[n, m] - 1))
                    total[a, b] += weight[i, j] * value / abs(value)
                    norm[a, b] += weight[i, j]
    return total / norm


@pytest.mark.parametrize(
    ("energy", "semiangle", "defocus", "aberration", "step", "oversample"),
    [
        (300e3, 20.0, 0.0, 0.0, 0.2, 2),
        (80e3, 25.0, 30.0, 1e4, 0.3, 1),
        (200e3, 25.0, -20.0, 0.0, 0.45, 3),
        (300e3, 20.0, 0.0, 0.0, (0.2, 0.33), 2),
    ],
)
def test_engine_stitches_as_the_equations_say(tmp_path, energy, semiangle, defocus, aberration, step, oversample):
    rng = np.random.default_rng(3)
    phase = rng.normal(0, 0.8, (ROWS, COLUMNS, 16, 16))
    patches = (rng.uniform(0.5, 1.5, phase.shape) * np.exp(1j * phase)).astype(np.complex64)
    k_pixel = optics.aperture_radius(energy, semiangle) / 12
    calibration = Acquisition(
        energy,
        semiangle,
        step,
        (k_pixel, k_pixel),
        center=(32, 32),
        defocus=defocus,
        spherical_aberration=aberration,
    )
    model = write_oracle(tmp_path / "oracle.onnx", patches)
    result = reconstruct(
        numbered_patterns(ROWS, COLUMNS), calibration, model=model, device="cpu", oversample=oversample
    )
    expected = direct_object(patches.astype(complex), calibration, oversample)
    assert result.pixel_size == pytest.approx(tuple(np.broadcast_to(step, 2) / oversample))
    np.testing.assert_allclose(result.object, expected, atol=0.01)
    np.testing.assert_allclose(result.confidence, np.abs(expected), atol=0.01)


def test_equal_patches_give_full_confidence(tmp_path):
    patches = np.full((ROWS, COLUMNS, 16, 16), 0.3 * np.exp(0.7j))
    k_pixel = optics.aperture_radius(300e3, 20.0) / 12
    calibration = Acquisition(300e3, 20.0, 0.2, (k_pixel, k_pixel), center=(32, 32))
    model = Model(write_oracle(tmp_path / "oracle.onnx", patches), "cpu")
    result = reconstruct(numbered_patterns(ROWS, COLUMNS), calibration, model=model)
    # sinc interpolation of a patch that ends abruptly rings by a few percent
    np.testing.assert_allclose(result.confidence, 1, atol=2e-2)
    np.testing.assert_allclose(result.phase, 0.7, atol=0.1)
