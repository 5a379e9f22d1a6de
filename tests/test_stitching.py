"""Eq. 6 to 8 and the patches' offsets, through the whole engine with an oracle model, against a direct evaluation."""

import numpy as np
import pytest
from oracle import numbered_patterns, write_oracle

from airpi_py4d import Acquisition, optics, reconstruct
from airpi_py4d.model import Model
from airpi_py4d.offsets import KEPT_DISTANCE, PatchOffsets

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


def direct_offsets(phasors, weight, calibration, oversample):
    """Offsets by dense least squares, over every pair of neighbours; phasors (rows, columns, h, w)."""
    equations, right_hand = [], []
    places = [(n, m) for n in range(ROWS) for m in range(COLUMNS)]
    steps = np.array(calibration.scan_step) * calibration.aperture_radius
    for n, m in places:
        for axis, other in enumerate([(n + 1, m), (n, m + 1)]):
            if other not in places:
                continue
            total = 0
            for i, j in np.ndindex(weight.shape):
                there = (i - oversample, j) if axis == 0 else (i, j - oversample)
                if min(there) >= 0:
                    total += (
                        np.sqrt(weight[i, j] * weight[there]) * phasors[n, m, i, j] * np.conj(phasors[other][there])
                    )
            equation = np.zeros((ROWS, COLUMNS))
            equation[other], equation[n, m] = 1, -1
            equations.append(equation.ravel() / steps[axis])
            right_hand.append(np.angle(total) / steps[axis])
    equations += list(np.eye(ROWS * COLUMNS) / KEPT_DISTANCE)
    right_hand += [0] * (ROWS * COLUMNS)
    return np.linalg.lstsq(np.array(equations), np.array(right_hand), rcond=None)[0].reshape(ROWS, COLUMNS)


def direct_object(patches, calibration, oversample):
    """Eq. 6 to 8 and the offsets, one output pixel and one position at a time."""
    patch_pixel = 12 / calibration.aperture_radius / 64
    pixels = [step / oversample for step in calibration.scan_step]
    rows, columns = (ROWS - 1) * oversample + 1, (COLUMNS - 1) * oversample + 1
    reach = int(np.ceil(6 * patch_pixel / min(pixels)))
    offsets, column_offsets = (np.arange(-reach, reach + 1) * pixel for pixel in pixels)
    intensity = np.abs(direct_probe(offsets, column_offsets, calibration)) ** 2
    weight = np.where(intensity > intensity.max() / 10, intensity, 0)
    weight /= weight.sum()
    total, norm, turn = (np.zeros((rows, columns), kind) for kind in (complex, float, float))
    grid = np.arange(16) - 8
    row_kernels, column_kernels = (np.sinc(o[:, None] / patch_pixel - grid) for o in (offsets, column_offsets))
    phasors = 1 + np.einsum("ia,nmab,jb->nmij", row_kernels, patches - 1, column_kernels)
    phasors /= abs(phasors)
    found = direct_offsets(phasors, weight, calibration, oversample)
    for n in range(ROWS):
        for m in range(COLUMNS):
            for i in range(len(offsets)):
                for j in range(len(column_offsets)):
                    a, b = n * oversample + i - reach, m * oversample + j - reach
                    if weight[i, j] == 0 or not (0 <= a < rows and 0 <= b < columns):
                        continue
                    total[a, b] += weight[i, j] * phasors[n, m, i, j]
                    turn[a, b] += weight[i, j] * found[n, m]
                    norm[a, b] += weight[i, j]
    return total / norm * np.exp(1j * turn / norm)


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


@pytest.mark.parametrize("shape", [(9, 7), (1, 5), (12, 1)])
@pytest.mark.parametrize("batch", [2, 100])
def test_offsets_of_equal_objects_are_found(shape, batch):
    """Patches of one object, each turned by a phase of its own: what is left are the offsets' long waves."""
    rng = np.random.default_rng(4)
    h, w, down, right = 7, 5, 1, 2
    true = rng.normal(0, 0.2, shape)
    image = np.exp(1j * rng.normal(0, 0.3, (h + (shape[0] - 1) * down, w + (shape[1] - 1) * right)))
    found = PatchOffsets(shape, np.ones((h, w)), (down, right), (0.02, 0.02))
    rows = rng.permutation(shape[0])
    for row in rows:
        patches = np.array(
            [
                image[row * down : row * down + h, n * right : n * right + w] * np.exp(1j * true[row, n])
                for n in range(shape[1])
            ]
        )
        for first in range(0, shape[1], batch):
            found.add(row, first, patches[first : first + batch].astype(np.complex64))
    error = found.solve() + true - true.mean()
    assert np.abs(error).max() < 0.05 * np.abs(true).max()
    assert len(found._held) <= 2  # the first and the last row


def test_offsets_found_apart_are_those_found_together():
    rng = np.random.default_rng(5)
    shape, weights = (8, 4), rng.uniform(0.1, 1, (5, 5))
    phasors = np.exp(1j * rng.normal(0, 1, (*shape, 5, 5))).astype(np.complex64)
    together, total = (PatchOffsets(shape, weights, (1, 2), (0.1, 0.2)) for _ in range(2))
    for row in range(8):
        together.add(row, 0, phasors[row])
    for first, stop in ((5, 8), (0, 2), (2, 3)):
        part = PatchOffsets((stop - first, 4), weights, (1, 2), (0.1, 0.2))
        for row in range(first, stop):
            part.add(row - first, 0, phasors[row])
        total.merge(part, first)
    for row in (4, 3):
        total.add(row, 0, phasors[row])
    expected = together.solve()
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(total.solve(), expected, atol=1e-6)
