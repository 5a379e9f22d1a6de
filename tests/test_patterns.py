"""The map from detector to grid, against direct computations."""

import numpy as np
import pytest

from airpi_py4d import Acquisition
from airpi_py4d.patterns import measure_center, resample, resampling_matrix

K0 = Acquisition(300e3, 20.0, 0.2, (0.05, 0.05)).aperture_radius


def acquisition(k_pixel, **options):
    return Acquisition(300e3, 20.0, 0.2, k_pixel, **options)


@pytest.mark.parametrize("shape", [(64, 64), (33, 48), (24, 90)])
@pytest.mark.parametrize("k_pixel", [(0.02, 0.03), (0.0847, 0.0847), (0.2, 0.15)])
@pytest.mark.parametrize("rotation", [0.0, 90.0, 23.0])
def test_electron_count_is_kept(shape, k_pixel, rotation):
    rng = np.random.default_rng(0)
    center = ((shape[0] - 1) / 2 + 0.3, (shape[1] - 1) / 2 - 0.7)
    calibration = acquisition(k_pixel, center=center, rotation=rotation, transpose=rotation == 23.0)
    grid_k_pixel = 1.6 * max(k_pixel) * max(shape) / 64  # all of the detector is on the grid
    matrix = resampling_matrix(shape, calibration, 64, grid_k_pixel)
    patterns = rng.poisson(3.0, (5, *shape))
    resampled = resample(patterns, matrix)
    assert resampled.shape == (5, 64, 64)
    np.testing.assert_allclose(resampled.sum((1, 2)), patterns.sum((1, 2)), rtol=1e-5)


def test_whole_pixel_binning_is_the_sum():
    rng = np.random.default_rng(1)
    patterns = rng.poisson(2.0, (3, 32, 64))
    # the centre of a bin of 4 x 2 pixels lies half a bin from its first pixel's edge
    calibration = acquisition((0.02, 0.04), center=(16 + 1.5, 32 + 0.5))
    matrix = resampling_matrix((32, 64), calibration, 32, 0.08)
    binned = patterns.reshape(3, 8, 4, 32, 2).sum((2, 4))
    np.testing.assert_allclose(resample(patterns, matrix)[:, 12:20], binned, rtol=1e-6)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rotation", [0.0, 90.0, 180.0, -90.0, 37.0])
def test_an_electron_goes_where_the_documented_equation_says(rotation, transpose):
    shape, center, k_pixel = (40, 56), (19.0, 30.0), (0.05, 0.04)
    calibration = acquisition(k_pixel, center=center, rotation=rotation, transpose=transpose)
    matrix = resampling_matrix(shape, calibration, 64, 0.05)
    pattern = np.zeros((1, *shape))
    pattern[0, 25, 22] = 1
    d_row, d_column = (25 - 19) * 0.05, (22 - 30) * 0.04
    if transpose:
        d_row, d_column = d_column, d_row
    angle = np.deg2rad(rotation)
    row = np.cos(angle) * d_row - np.sin(angle) * d_column
    column = np.sin(angle) * d_row + np.cos(angle) * d_column
    grid = resample(pattern, matrix)[0]
    places = np.arange(64)
    found = (grid.sum(1) @ places, grid.sum(0) @ places)
    np.testing.assert_allclose(found, (32 + row / 0.05, 32 + column / 0.05), atol=0.12)


def test_large_pixels_are_interpolated():
    # a linear ramp of counts stays a linear ramp
    patterns = np.tile(np.arange(16.0), (1, 16, 1))
    calibration = acquisition((0.2, 0.2), center=(8, 8))
    grid = resample(patterns, resampling_matrix((16, 16), calibration, 64, 0.05))[0]
    np.testing.assert_allclose(np.diff(grid[32, 8:52]), 1 / 4**3, rtol=0.02)


@pytest.mark.parametrize("offset", [(0.0, 0.0), (3.4, -2.7)])
def test_center_is_measured(offset):
    rng = np.random.default_rng(2)
    radius = 9.3
    center = (20 + offset[0], 31 + offset[1])
    rows, columns = np.mgrid[:44, :60]
    disk = (rows - center[0]) ** 2 + (columns - center[1]) ** 2 <= radius**2
    data = rng.poisson(0.02 + 2.0 * disk, (12, 9, 44, 60))
    measured = measure_center(data, acquisition((K0 / radius, K0 / radius)))
    np.testing.assert_allclose(measured, center, atol=0.15)


def test_center_of_nothing():
    with pytest.raises(ValueError, match="mean pattern is empty"):
        measure_center(np.zeros((3, 3, 32, 32)), acquisition((0.2, 0.2)))
    with pytest.raises(ValueError, match="larger than the detector"):
        measure_center(np.ones((3, 3, 32, 32)), acquisition((0.02, 0.02)))
