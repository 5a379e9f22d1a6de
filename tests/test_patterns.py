"""The map from detector to grid, against direct computations."""

import numpy as np
import pytest

from airpi_py4d import Acquisition
from airpi_py4d.patterns import (
    Resampling,
    check_disk,
    detector_to_scan,
    repair_matrix,
    resampling_matrix,
    summed,
)

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
    patterns = rng.poisson(3.0, (5, *shape))
    resampled = Resampling(shape, calibration, 64, grid_k_pixel)(patterns)
    assert resampled.shape == (5, 64, 64)
    np.testing.assert_allclose(resampled.sum((1, 2)), patterns.sum((1, 2)), rtol=1e-5)


def test_whole_pixel_binning_is_the_sum():
    rng = np.random.default_rng(1)
    patterns = rng.poisson(2.0, (3, 32, 64))
    # the centre of a bin of 4 x 2 pixels lies half a bin from its first pixel's edge
    calibration = acquisition((0.02, 0.04), center=(16 + 1.5, 32 + 0.5))
    binned = patterns.reshape(3, 8, 4, 32, 2).sum((2, 4))
    np.testing.assert_allclose(Resampling((32, 64), calibration, 32, 0.08)(patterns)[:, 12:20], binned, rtol=1e-6)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rotation", [0.0, 90.0, 180.0, -90.0, 37.0])
def test_an_electron_goes_where_the_documented_equation_says(rotation, transpose):
    shape, center, k_pixel = (40, 56), (19.0, 30.0), (0.05, 0.04)
    calibration = acquisition(k_pixel, center=center, rotation=rotation, transpose=transpose)
    pattern = np.zeros((1, *shape))
    pattern[0, 25, 22] = 1
    d_row, d_column = (25 - 19) * 0.05, (22 - 30) * 0.04
    if transpose:
        d_row, d_column = d_column, d_row
    angle = np.deg2rad(rotation)
    row = np.cos(angle) * d_row - np.sin(angle) * d_column
    column = np.sin(angle) * d_row + np.cos(angle) * d_column
    grid = Resampling(shape, calibration, 64, 0.05)(pattern)[0]
    places = np.arange(64)
    found = (grid.sum(1) @ places, grid.sum(0) @ places)
    np.testing.assert_allclose(found, (32 + row / 0.05, 32 + column / 0.05), atol=0.12)


def test_large_pixels_are_interpolated():
    # a linear ramp of counts stays a linear ramp
    patterns = np.tile(np.arange(16.0), (1, 16, 1))
    calibration = acquisition((0.2, 0.2), center=(8, 8))
    grid = Resampling((16, 16), calibration, 64, 0.05)(patterns)[0]
    np.testing.assert_allclose(np.diff(grid[32, 8:52]), 1 / 4**3, rtol=0.02)


def test_disk_that_does_not_fit():
    with pytest.raises(ValueError, match="larger than the detector"):
        check_disk((32, 32), acquisition((0.02, 0.02)))
    with pytest.raises(ValueError, match=r"covers .* px; check the k-pixel"):
        check_disk((32, 32), acquisition((1.5, 1.5)))


@pytest.mark.parametrize("angle", [0.0, 35.0, 90.0])
@pytest.mark.parametrize("rotation", [0.0, 20.0])
def test_elliptical_distortion_becomes_a_circle(angle, rotation):
    # points on an ellipse, semi-axes 22 px at `angle` from the rows' axis and 18 px
    shape, center = (64, 80), (31.0, 40.0)
    calibration = acquisition((0.05, 0.05), center=center, ellipse=(1.1, 0.9, angle), rotation=rotation)
    resampling = Resampling(shape, calibration, 64, 0.05)
    t, theta = np.arange(12) / 12 * 2 * np.pi, np.deg2rad(angle)
    rows = center[0] + 22 * np.cos(t) * np.cos(theta) - 18 * np.sin(t) * np.sin(theta)
    columns = center[1] + 22 * np.cos(t) * np.sin(theta) + 18 * np.sin(t) * np.cos(theta)
    patterns = np.zeros((12, *shape))
    patterns[np.arange(12), np.rint(rows).astype(int), np.rint(columns).astype(int)] = 1
    grids = resampling(patterns)
    places = np.arange(64) - 32
    radius = np.hypot(grids.sum(2) @ places, grids.sum(1) @ places)
    np.testing.assert_allclose(radius, 22, atol=1.0)  # a detector pixel is one grid pixel


def smooth_patterns(count, shape):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    waves = [np.cos(0.13 * rows + n) + np.cos(0.11 * columns - 0.7 * n) for n in range(count)]
    return 20 + 5 * np.stack(waves)


def test_bad_pixels_are_filled_from_their_neighbours():
    rng = np.random.default_rng(3)
    shape = (48, 60)
    bad = rng.uniform(size=shape) < 0.02
    bad[20:24] = True  # a gap between modules
    patterns = smooth_patterns(4, shape)
    seen = np.where(bad, 1e6, patterns)
    options = {"center": (24.0, 30.0), "rotation": 12.0}
    expected = Resampling(shape, acquisition((0.05, 0.05), **options), 64, 0.06)(patterns)
    repaired = Resampling(shape, acquisition((0.05, 0.05), bad_pixels=bad, **options), 64, 0.06)(seen)
    np.testing.assert_allclose(repaired, expected, atol=0.04 * expected.max())
    np.testing.assert_allclose(repaired.sum((1, 2)), expected.sum((1, 2)), rtol=5e-3)
    # good pixels keep their counts
    filled = (repair_matrix(bad) @ seen.reshape(4, -1).T).T.reshape(seen.shape)
    np.testing.assert_array_equal(filled[:, ~bad], patterns[:, ~bad])


def test_background_and_gain():
    rng = np.random.default_rng(4)
    shape = (32, 40)
    electrons = rng.poisson(5.0, (3, *shape)).astype(float)
    background = rng.uniform(0, 30, shape)
    plain = Resampling(shape, acquisition((0.05, 0.05), center=(16, 20)), 64, 0.06)(electrons)
    for offset, gain in ((background, 7.5), (11.0, 0.5), (None, 3.0)):
        calibration = acquisition((0.05, 0.05), center=(16, 20), background=offset, gain=gain)
        seen = electrons * gain + (0 if offset is None else offset)
        np.testing.assert_allclose(Resampling(shape, calibration, 64, 0.06)(seen), plain, atol=1e-4)


@pytest.mark.parametrize("k_pixel", [0.0847, 0.02, 0.17])
def test_descan_is_undone(k_pixel):
    # every pattern shifted by whole pixels is the unshifted one on the grid
    rng = np.random.default_rng(5)
    shape = (60, 72)
    patterns = np.zeros((7, *shape))
    patterns[:, 15:45, 20:52] = rng.poisson(3.0, (7, 30, 32))
    shifts = rng.integers(-9, 10, (7, 2))
    moved = np.stack([np.roll(p, tuple(shift), (0, 1)) for p, shift in zip(patterns, shifts, strict=True)])
    resampling = Resampling(shape, acquisition((k_pixel, k_pixel), center=(30, 36)), 64, 0.0847)
    np.testing.assert_allclose(resampling(moved, shifts.astype(float)), resampling(patterns), atol=1e-4)


@pytest.mark.parametrize(("finer", "smallest"), [(1, 0.0), (1, 1.1), (3, 1.1)])
def test_descan_by_parts_of_a_pixel(finer, smallest):
    side, radius = 48 * finer, 12.0 * finer
    rows, columns = np.mgrid[:side, :side] - side // 2
    shifts = finer * np.array([[0.0, 0.0], [0.5, -0.25], [-0.3, 0.4]])
    # a smooth spot of the disk's size, sampled where the shift puts it
    moved = np.stack([np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / radius**2) for y, x in shifts.tolist()])
    calibration = acquisition((K0 / radius,) * 2, center=(side // 2, side // 2))
    resampling = Resampling((side, side), calibration, 64, K0 / 12, smallest)
    grids = resampling(moved, shifts)
    uncorrected = resampling(moved)
    for n in (1, 2):
        error = np.abs(grids[n] - grids[0]).max()
        assert error < 0.35 * np.abs(uncorrected[n] - grids[0]).max()


def test_arrays_that_do_not_fit_the_detector():
    for name, value in (("bad_pixels", np.zeros((8, 8), bool)), ("background", np.zeros((8, 8)))):
        calibration = acquisition((0.1, 0.1), center=(16, 16), **{name: value})
        with pytest.raises(ValueError, match=rf"{name} has the shape \(8, 8\), expected .* \(32, 32\)"):
            Resampling((32, 32), calibration, 64, 0.08)


@pytest.mark.parametrize("radius", [6.0, 8.0, 9.0, 16.0])
def test_rounding_errors_of_the_calibration_change_nothing(radius):
    # points of these detectors fall on the edges of the grid's pixels
    exact = acquisition((K0 / radius,) * 2, center=(20.0, 18.0))
    rounded = acquisition((K0 / radius * (1 + 1e-15),) * 2, center=(20.0 + 1e-14, 18.0 - 1e-14))
    one, other = (resampling_matrix((40, 36), each, 64, K0 / 12).toarray() for each in (exact, rounded))
    np.testing.assert_allclose(one, other, atol=1e-6)


def spots(pixel, smallest):
    """Every pixel of a detector with one electron alone, on the grid: (side**2, 24, 24); `pixel` in grid pixels."""
    side = int(20 / pixel)
    calibration = acquisition((pixel, pixel), center=(side / 2 + 0.23, side / 2 - 0.31), rotation=17.0)
    return resampling_matrix((side, side), calibration, 24, 1.0, smallest).toarray().T.reshape(-1, 24, 24)


@pytest.mark.parametrize("pixel", [0.2, 0.55, 0.9])
def test_an_electron_of_a_small_pixel_has_the_same_roots_everywhere(pixel):
    noise = {}
    for smallest in (0.0, 1.1):
        grids = spots(pixel, smallest)
        grids = grids[grids.sum((1, 2)) > 0.999]
        roots = np.sqrt(grids).sum((1, 2))
        noise[smallest] = roots.std() / roots.mean()
    assert noise[1.1] < 0.05 < noise[0.0]


@pytest.mark.parametrize("rotation", [0.0, 17.0, 45.0])
@pytest.mark.parametrize(("pixel", "error"), [(0.2, 0.03), (0.4, 0.03), (0.62, 0.03), (0.78, 0.03), (1.0, 0.07)])
def test_equal_counts_of_small_pixels_stay_equal(pixel, error, rotation):
    side = int(40 / pixel)
    calibration = acquisition((pixel, pixel), center=(side / 2 + 0.23, side / 2 - 0.31), rotation=rotation)
    grid = Resampling((side, side), calibration, 24, 1.0, 1.1)(np.ones((1, side, side)))
    np.testing.assert_allclose(grid * pixel**2, 1, atol=error)


@pytest.mark.parametrize("smallest", [0.6, 1.1, 2.3])
def test_small_pixels_are_spread_to_a_width(smallest):
    pixel, side = 0.5, 40
    grids = spots(pixel, smallest)
    rows, columns = np.mgrid[:24, :24]
    from_axis = np.mgrid[:side, :side].reshape(2, -1) - np.array([[side / 2 + 0.23], [side / 2 - 0.31]])
    turned = detector_to_scan(acquisition((pixel, pixel), rotation=17.0)) @ from_axis
    whole = (np.abs(turned) < 8).all(0)
    np.testing.assert_allclose(grids.sum((1, 2))[whole], 1, atol=1e-6)
    for axis, place in zip((rows, columns), turned, strict=True):
        off = axis - 12 - place[:, None, None]
        moments = [(grids * off**n).sum((1, 2))[whole].mean() for n in (1, 2)]
        assert abs(moments[0]) < 0.01
        # the grid's own pixels come on top
        assert moments[1] == pytest.approx((smallest**2 + 1) / 12, rel=0.02)


def test_larger_pixels_stay_as_they_are():
    for pixel in (1.15, 1.5, 3.0):
        np.testing.assert_array_equal(spots(pixel, 1.1), spots(pixel, 0.0))


@pytest.mark.parametrize("factors", [(1, 1), (2, 2), (4, 1), (2, 8)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "float32", "float64", "bool"])
def test_sums_of_neighbours(factors, dtype):
    rng = np.random.default_rng(6)
    for largest in (2, 120, 60000):
        patterns = rng.integers(largest, size=(3, 30, 43)).astype(dtype)
        rows, columns = factors
        padded = np.pad(patterns.astype(float), ((0, 0), (0, -30 % rows), (0, -43 % columns)))
        expected = padded.reshape(3, -(-30 // rows), rows, -(-43 // columns), columns).sum((2, 4))
        np.testing.assert_array_equal(summed(patterns, rows, columns), expected)


@pytest.mark.parametrize(
    ("shape", "pixel"), [((64, 64), 0.78), ((127, 121), 0.39), ((256, 250), 0.2), ((90, 160), 0.3)]
)
@pytest.mark.parametrize("options", [{}, {"background": 2.5, "gain": 3.0}, {"bad_pixels": True}])
def test_sums_and_matrix_resample_elsewhere(shape, pixel, options):
    rng = np.random.default_rng(7)
    if "bad_pixels" in options:
        options = {"bad_pixels": rng.uniform(size=shape) < 0.01}
    center = (shape[0] / 2 + 0.3, shape[1] / 2 - 0.4)
    calibration = acquisition((K0 / 12 * pixel,) * 2, center=center, rotation=11.0, **options)
    resampling = Resampling(shape, calibration, 64, K0 / 12, 1.1)
    patterns = rng.poisson(4.0, (9, *shape)).astype(np.uint16)
    factors, matrix, background = resampling.sums_and_matrix()
    assert (max(factors) > 1) == (pixel < 0.5 and "bad_pixels" not in options)
    expected = (matrix @ summed(patterns, *factors).reshape(9, -1).T.astype(float)).T - background
    grids = resampling(patterns)
    np.testing.assert_allclose(grids.reshape(9, -1), expected, atol=1e-4)
    # as without sums, but for less than a grid pixel
    plain = Resampling(shape, calibration, 64, K0 / 12)(patterns)
    smooth = [g[:, :60, :60].reshape(9, 5, 12, 5, 12).sum((2, 4)) for g in (grids, plain)]
    np.testing.assert_allclose(smooth[0], smooth[1], atol=0.04 * smooth[1].max())
