"""Measuring the calibration: against simulated patterns of known geometry, and against py4DSTEM."""

import contextlib
import dataclasses
import io
import warnings

import dask.array as da
import h5py
import numpy as np
import py4DSTEM
import pytest

from airpi_py4d import Acquisition, calibrate, calibration, optics
from airpi_py4d.bad_pixels import find_bad_pixels
from airpi_py4d.demo import demo_path
from airpi_py4d.disk import measure_descan, measure_disk
from airpi_py4d.patterns import detector_to_scan
from airpi_py4d.rotation import measure_rotation

DEMO = {"energy": 80e3, "semiangle": 25.0, "scan_step": 0.25}
DEMO_CENTER = 31


def disk(shape, center, radius, to_circle=((1, 0), (0, 1)), over=8):
    """The part of every pixel that lies in a disk."""
    offset = (np.arange(over) + 0.5) / over - 0.5
    rows, columns = ((np.arange(n)[:, None] + offset).ravel() - c for n, c in zip(shape, center, strict=True))
    place = np.tensordot(to_circle, np.stack(np.meshgrid(rows, columns, indexing="ij")), 1)
    inside = (np.hypot(*place) <= radius).astype(float)
    return inside.reshape(shape[0], over, shape[1], over).mean(axis=(1, 3))


def mean_pattern(kind, shape, center, radius):
    """Mean patterns of several specimens, sum 1."""
    y, x = (np.indices(shape) - np.array(center)[:, None, None]) / radius
    r = np.hypot(y, x)
    bright = disk(shape, center, radius)
    if kind == "empty":
        pattern = bright
    elif kind == "thin":
        pattern = bright + 0.01 / (1 + r**2) ** 1.5
    elif kind == "thick":  # neither flat nor symmetric inside, much scattered outside
        pattern = bright * (0.6 + 0.3 * x + 0.2 * np.cos(3 * y)) + 0.25 * np.exp(-((r / 1.5) ** 2)) + 0.02
    elif kind == "crystal":  # diffracted disks that overlap the bright-field disk
        pattern = 0.5 * bright + 0.03 / (1 + r**2) ** 1.5
        for angle in np.arange(6) * np.pi / 3 + 0.2:
            place = np.add(center, 1.3 * radius * np.array([np.cos(angle), np.sin(angle)]))
            pattern += 0.15 * disk(shape, place, radius)
    return pattern / pattern.sum()


def moved(data, move, shape, keep=1.0, seed=0):
    """Every electron of `data` moved to `move(k, places)`, k being its place relative to the detector's centre."""
    rng = np.random.default_rng(seed)
    rows, columns = data.shape[:2]
    flat = data.reshape(rows * columns, -1)
    electrons = np.repeat(np.arange(flat.size), flat.ravel())
    electrons = electrons[rng.random(len(electrons)) < keep]
    position, pixel = np.divmod(electrons, flat.shape[1])
    k = np.stack(np.divmod(pixel, data.shape[3])) - np.array(data.shape[2:])[:, None] // 2
    row, column = np.rint(move(k + rng.uniform(-0.5, 0.5, k.shape), np.divmod(position, columns))).astype(int)
    inside = (row >= 0) & (row < shape[0]) & (column >= 0) & (column < shape[1])
    index = (position * shape[0] + row) * shape[1] + column
    counts = np.bincount(index[inside], minlength=rows * columns * shape[0] * shape[1])
    return counts.reshape(rows, columns, *shape).astype(np.uint16)


def turned(data, rotation, transpose, shape=(70, 66), center=(36.3, 30.8), keep=1.0):
    """The scan on a detector that is turned against it, by the definition in Acquisition."""
    angle = np.deg2rad(rotation)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    def move(k, _):
        detector = turn.T @ k
        return (detector[::-1] if transpose else detector) + np.array(center)[:, None]

    return moved(data, move, shape, keep)


@pytest.fixture(scope="module")
def demo():
    with h5py.File(demo_path()) as file:
        return file["datacube_root/datacube/data"][()]


def disk_radius(k_pixel=0.05):
    return optics.aperture_radius(80e3, 25.0) / k_pixel


@pytest.fixture(scope="module")
def phase_object():
    """Scan of gaussian atoms by direct Fourier transforms: steps of 0.2 and 0.4 A, 300 kV, 20 mrad, few atoms."""
    pixels, size = 96, 0.2
    rng = np.random.default_rng(4)
    y, x = np.indices((pixels, pixels))
    phase = np.zeros((pixels, pixels))
    for row, column in rng.uniform(0, pixels, (60, 2)):
        dy, dx = ((a - b + pixels / 2) % pixels - pixels / 2 for a, b in ((y, row), (x, column)))
        phase += 0.4 * np.exp(-(dy**2 + dx**2) / (2 * 2.0**2))
    transmission = np.exp(1j * phase)
    probe = optics.probe(pixels, size, 300e3, 20.0)
    patterns = np.empty((60, 40, 48, 48))
    inner = slice(24, 72)
    for i in range(60):
        for j in range(40):
            shift = (pixels // 2 - (15 + i), pixels // 2 - (5 + 2 * j))
            exit_wave = probe * np.roll(transmission, shift, axis=(0, 1))
            patterns[i, j] = np.abs(np.fft.fftshift(np.fft.fft2(exit_wave, norm="ortho")))[inner, inner] ** 2
    counts = rng.poisson(1000 * patterns)
    return counts, 1 / (pixels * size)  # k-pixel


class TestBadPixels:
    @pytest.mark.parametrize("kind", ["empty", "thin", "thick", "crystal"])
    @pytest.mark.parametrize(
        ("shape", "radius", "electrons"),
        [((64, 64), 10.0, 1.6e5), ((128, 120), 3.0, 1e6), ((256, 256), 40.0, 2e6), ((256, 256), 40.0, 1e9)],
    )
    def test_found(self, kind, shape, radius, electrons):
        """0.2 % hot and 0.2 % dead ones; 1.6e5 electrons are 4096 positions of 0.2 A at 1e3 electrons / A^2."""
        rng = np.random.default_rng(1)
        expected = electrons * mean_pattern(kind, shape, (shape[0] / 2 + 0.3, shape[1] / 2 - 1.2), radius)
        counts = rng.poisson(expected).astype(float)
        dead, hot = rng.random((2, *shape)) < 0.002
        hot &= ~dead
        counts[dead] = 0
        counts[hot] += expected.max() * rng.uniform(2, 50, hot.sum())
        found = find_bad_pixels(counts / 4096, 1.0, 4096)
        assert (found & hot).sum() >= 0.97 * hot.sum()
        missing = dead & (expected > 20)
        assert (missing & ~found).sum() <= max(1, 0.03 * missing.sum())
        assert (found & ~hot & ~dead).sum() <= 2e-4 * found.size

    @pytest.mark.parametrize("kind", ["empty", "thin", "thick", "crystal"])
    @pytest.mark.parametrize("electrons", [3e3, 1.6e5, 1e7, np.inf])
    def test_none(self, kind, electrons):
        expected = mean_pattern(kind, (96, 90), (44.3, 50.1), 11.3)
        counts = expected if np.isinf(electrons) else np.random.default_rng(2).poisson(electrons * expected)
        assert find_bad_pixels(counts / 4096, 1e-9 if np.isinf(electrons) else 1.0, 4096).sum() <= 2

    def test_gaps(self):
        pattern = np.random.default_rng(3).poisson(2e5 * mean_pattern("thin", (96, 80), (44.0, 41.0), 14.0))
        gaps = np.zeros(pattern.shape, bool)
        gaps[50:53], gaps[:, 39] = True, True
        found = find_bad_pixels(np.where(gaps, 0, pattern) / 1000, 1.0, 1000)
        assert found[gaps].all()
        assert (found & ~gaps).sum() <= 0.001 * found.size

    def test_dark_margins_are_not_gaps(self):
        pattern = np.zeros((64, 64))
        pattern[20:44, 16:50] = 5
        assert not find_bad_pixels(pattern, 1.0, 1000).any()

    def test_gain_sets_the_noise(self):
        """20 electrons instead of 3 are significant, 20 detector units of a gain of 100 are noise."""
        pattern = np.full((16, 16), 3.0)
        pattern[5, 5] = 20
        assert find_bad_pixels(pattern, 0.1).sum() == 1
        assert not find_bad_pixels(pattern, 100.0).any()


class TestDisk:
    @pytest.mark.parametrize("kind", ["empty", "thin", "thick"])
    @pytest.mark.parametrize("electrons", [2e6, np.inf])
    @pytest.mark.parametrize(
        ("shape", "center", "radius"),
        [
            ((32, 36), (14.3, 18.8), 3.0),
            ((64, 64), (40.2, 23.9), 5.3),
            ((63, 64), (22.7, 39.1), 12.0),
            ((64, 64), (31.7, 31.2), 30.3),
            ((128, 96), (70.3, 44.2), 20.7),
            ((256, 256), (120.4, 140.7), 64.3),
        ],
    )
    def test_accuracy(self, kind, electrons, shape, center, radius):
        pattern = mean_pattern(kind, shape, center, radius)
        if np.isfinite(electrons):
            pattern = np.random.default_rng(0).poisson(electrons * pattern)
        found = measure_disk(pattern)
        assert np.hypot(*np.subtract(found.center, center)) < 0.1
        assert abs(found.radius - radius) < 0.1

    @pytest.mark.parametrize("radius", [6.2, 12.0, 25.0])
    def test_crystal(self, radius):
        center = (44.6, 51.3)
        found = measure_disk(np.random.default_rng(0).poisson(1e6 * mean_pattern("crystal", (96, 96), center, radius)))
        assert np.hypot(*np.subtract(found.center, center)) < 0.15
        assert abs(found.radius - radius) < 0.15

    def test_bad_pixels_and_beam_stop(self):
        rng = np.random.default_rng(0)
        pattern = rng.poisson(1e6 * mean_pattern("thin", (64, 64), (30.2, 33.7), 12.0)).astype(float)
        bad = rng.random(pattern.shape) < 0.01
        bad[28:34, :36] = True
        pattern[bad] = 0
        pattern[3, 3] = bad[3, 3] = 1e9
        found = measure_disk(pattern, bad)
        assert np.hypot(*np.subtract(found.center, (30.2, 33.7))) < 0.1
        assert abs(found.radius - 12) < 0.1

    def test_ellipse(self):
        to_circle = detector_to_scan(Acquisition(300e3, 20.0, 0.2, (1.0, 0.8), ellipse=(1.1, 1.0, 30.0)))
        pattern = disk((80, 80), (41.4, 36.2), 15.0, to_circle) + 0.01
        found = measure_disk(pattern, to_circle=to_circle)
        assert np.hypot(*np.subtract(found.center, (41.4, 36.2))) < 0.1
        assert abs(found.radius - 15) < 0.1

    def test_errors_are_of_the_right_size(self):
        pattern = 3e4 * mean_pattern("thin", (48, 48), (22.4, 25.1), 9.0)
        found = [measure_disk(np.random.default_rng(n).poisson(pattern)) for n in range(20)]
        scatter = np.std([each.radius for each in found])
        assert 0.5 * scatter < np.median([each.radius_error for each in found]) < 2 * scatter

    @pytest.mark.parametrize("pattern", [np.zeros((32, 32)), np.full((32, 32), 7.0)])
    def test_no_disk(self, pattern):
        with pytest.raises(ValueError, match="the mean pattern"):
            measure_disk(pattern)


class TestDescan:
    SLOPES = np.array([[1.0, 0.5], [-0.4, 0.7]])  # [px] over the scan

    @staticmethod
    def tiles(slopes, electrons=1e5, kind="thin"):
        places = np.stack(np.meshgrid(np.linspace(3, 56, 6), np.linspace(4, 75, 6), indexing="ij"), -1).reshape(-1, 2)
        rng = np.random.default_rng(0)
        tiles = []
        for place in places:
            center = (31.3, 30.6) + slopes @ (place / (59, 79) - 0.5)
            tiles.append(rng.poisson(electrons * mean_pattern(kind, (64, 64), center, 12.0)))
        return np.array(tiles, float), places

    @pytest.mark.parametrize("kind", ["thin", "thick"])
    @pytest.mark.parametrize("factor", [1, 4])
    def test_plane(self, kind, factor):
        tiles, places = self.tiles(factor * self.SLOPES, 3e5, kind)
        found = measure_descan(tiles, places, measure_disk(tiles.mean(axis=0)), (60, 80))
        assert found.shape == (60, 80, 2)
        assert found[-1, 0] - found[0, 0] == pytest.approx(factor * self.SLOPES[:, 0], abs=0.1)
        assert found[0, -1] - found[0, 0] == pytest.approx(factor * self.SLOPES[:, 1], abs=0.1)
        assert found.mean(axis=(0, 1)) == pytest.approx((0, 0), abs=1e-9)

    @pytest.mark.parametrize("slopes", [0 * SLOPES, 0.1 * SLOPES])
    def test_still(self, slopes):
        tiles, places = self.tiles(slopes)
        assert measure_descan(tiles, places, measure_disk(tiles.mean(axis=0)), (60, 80)) is None

    def test_noise_is_no_descan(self):
        tiles, places = self.tiles(0 * self.SLOPES, 100)
        assert measure_descan(tiles, places, measure_disk(tiles.mean(axis=0)), (60, 80)) is None


def py4dstem_rotation(data, step, k_pixel):
    """Rotation [degrees] and transposition by py4DSTEM's DPC."""
    datacube = py4DSTEM.DataCube(data.astype(np.float32))
    for space, size, units in (("R", step, "A"), ("Q", k_pixel, "A^-1")):
        getattr(datacube.calibration, f"set_{space}_pixel_size")(size)
        getattr(datacube.calibration, f"set_{space}_pixel_units")(units)
    hidden = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
        warnings.simplefilter("ignore")
        from py4DSTEM.process.phase import DPC

        dpc = DPC(datacube=datacube, energy=80e3, verbose=False)
        dpc.preprocess(plot_rotation=False, plot_center_of_mass=None)
    return float(np.rad2deg(dpc._rotation_best_rad)), bool(dpc._rotation_best_transpose)


def angle_between(a, b, period=360.0):
    return abs((a - b + period / 2) % period - period / 2)


class TestRotation:
    @pytest.mark.parametrize(
        ("rotation", "transpose", "keep", "tolerance"),
        [
            (0, False, 1, 1.5),
            (37, False, 1, 1.5),
            (-120, True, 1, 1.5),
            (-95, False, 1, 1.5),
            (64, True, 1, 1.5),
            (175, False, 0.1, 5),
            (-66, True, 0.1, 5),
        ],
    )
    def test_of_py4dstem(self, demo, rotation, transpose, keep, tolerance):
        """The known angle, 180 degrees included, and py4DSTEM's value, which isn't sure of 180 degrees."""
        data = turned(demo, rotation, transpose, keep=keep)
        found = calibrate(data, **DEMO)
        assert angle_between(found.rotation, rotation) < tolerance
        assert found.transpose is transpose
        assert found.sources["rotation"].startswith("measured from the centre of mass")
        assert found.sources["transpose"].startswith("measured from the centre of mass")
        angle, flip = py4dstem_rotation(data, 0.25, 0.05)
        assert flip is transpose
        assert angle_between(found.rotation, angle, 180) < tolerance + 1

    def test_few_electrons(self, demo):
        with pytest.warns(UserWarning, match=r"^rotation and transpose can't be measured and default to 0 and False"):
            found = calibrate(turned(demo, 37, False, keep=0.003), **DEMO)
        assert (found.rotation, found.transpose) == (0, False)
        assert found.sources["rotation"].startswith("default, not measured: ")

    def test_vacuum(self):
        data = np.random.default_rng(0).poisson(5 * disk((40, 40), (20, 19), 9.0), (24, 30, 40, 40))
        with pytest.warns(UserWarning, match="can't be measured"):
            found = calibrate(data, **DEMO)
        assert (found.rotation, found.transpose) == (0, False)

    def test_vacuum_without_noise(self):
        data = np.broadcast_to(disk((40, 40), (20, 19), 9.3).astype(np.float32), (12, 14, 40, 40))
        with pytest.warns(UserWarning, match="can't be measured"):
            found = calibrate(data, **DEMO)
        assert found.bad_pixels is None
        assert found.descan is None

    def test_noise_is_no_rotation(self):
        rng = np.random.default_rng(0)
        found = [
            measure_rotation([rng.normal(size=(30, 34, 2))], [[rng.normal(size=(30, 34))]], (0.2, 0.2))
            for _ in range(100)
        ]
        assert sum(rotation is not None for rotation in found) <= 2

    def test_stripes_have_no_transposition(self):
        """A specimen that varies along one direction is as free of curl either way."""
        field = np.zeros((40, 44, 2))
        field[..., 0] = np.random.default_rng(0).normal(size=40)[:, None]
        assert measure_rotation([field], [[field[..., 0]]], (0.2, 0.2)) is None
        found = measure_rotation([field], [[field[..., 0]]], (0.2, 0.2), transpose=False)
        assert angle_between(found.degrees, 0, 180) < 0.1

    @pytest.mark.parametrize("given", [{"rotation": 37.0}, {"transpose": False}])
    def test_one_is_given(self, demo, given):
        found = calibrate(turned(demo, 37, False), **DEMO, **given)
        assert angle_between(found.rotation, 37) < 1.5
        assert found.transpose is False
        (name,) = given
        assert name not in found.sources  # which means argument
        assert found.describe()[name]["source"] == "argument"

    @pytest.mark.parametrize(("rotation", "transpose"), [(25, False), (-140, True)])
    def test_anisotropic_scan_and_detector(self, phase_object, rotation, transpose):
        counts, k_pixel = phase_object
        data = turned(counts, rotation, transpose, (60, 62), (28.6, 31.1))
        found = calibrate(data, energy=300e3, semiangle=20.0, scan_step=(0.2, 0.4), k_pixel=k_pixel)
        assert angle_between(found.rotation, rotation) < 2
        assert found.transpose is transpose

    def test_equal_steps_would_be_wrong(self, phase_object):
        counts, k_pixel = phase_object
        data = turned(counts, 25, False, (60, 62), (28.6, 31.1))
        fields = {"energy": 300e3, "semiangle": 20.0, "k_pixel": k_pixel}
        right = calibrate(data, scan_step=(0.2, 0.4), **fields).sources["rotation"]
        assert "curl" in right
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrong = calibrate(data, scan_step=0.3, **fields)
        assert wrong.sources["rotation"] != right

    @pytest.mark.parametrize("rotation", [25, -155])
    def test_detector_cut_off_outside_the_disk(self, phase_object, rotation):
        """No annular signal: the bright-field signal tells the sign, or the user is told that nothing does."""
        counts, k_pixel = phase_object
        radius = optics.aperture_radius(300e3, 20.0) / k_pixel
        side = int(2 * radius) + 4
        data = turned(counts, rotation, False, (side, side), (side / 2 - 0.3, side / 2 - 0.8))
        found = calibrate(data, energy=300e3, semiangle=20.0, scan_step=(0.2, 0.4))
        assert found.center == pytest.approx((side / 2 - 0.3, side / 2 - 0.8), abs=0.1)
        assert angle_between(found.rotation, rotation) < 2

    def test_ellipse(self, phase_object):
        """Elliptical distortion bends the deflections; it is taken off before the curl."""
        counts, k_pixel = phase_object
        ellipse = (1.15, 1.0, 30.0)
        straight = Acquisition(300e3, 20.0, 0.2, (1.0, 1.0), ellipse=ellipse)
        inverse = np.linalg.inv(detector_to_scan(straight))
        data = moved(counts, lambda k, _: inverse @ k + np.array([[30.0], [30.0]]), (60, 60))
        given = {"energy": 300e3, "semiangle": 20.0, "scan_step": (0.2, 0.4)}
        found = calibrate(data, ellipse=ellipse, **given)
        assert angle_between(found.rotation, 0) < 2
        assert found.k_pixel == pytest.approx((k_pixel, k_pixel), rel=0.01)
        assert found.ellipse == ellipse
        assert calibrate(data, **given).k_pixel[0] / k_pixel == pytest.approx(1.15**0.5, rel=0.02)  # a circle's

    def test_unknown_sign(self, phase_object):
        deflection = np.stack(np.gradient(np.random.default_rng(0).normal(size=(40, 40)).cumsum(0)), -1)
        found = measure_rotation([deflection], [[np.ones((40, 40))]], (0.2, 0.2))
        assert found is not None
        assert not found.sign_known
        assert -90 < found.degrees <= 90


class TestCalibrate:
    def test_everything_is_measured(self, demo):
        rng = np.random.default_rng(0)
        data = turned(demo, 37, True)
        hot = np.argwhere(rng.random(data.shape[2:]) < 0.002)
        data[(slice(None), slice(None), *hot.T)] = rng.poisson(40, (*data.shape[:2], len(hot)))
        before = data.copy()
        found = calibrate(data, **DEMO)
        assert found.bad_pixels[tuple(hot.T)].all()
        assert found.bad_pixels.sum() <= len(hot) + 1
        assert found.center == pytest.approx((36.3, 30.8), abs=0.1)
        assert found.k_pixel == pytest.approx((0.05, 0.05), rel=0.02)
        assert angle_between(found.rotation, 37) < 2
        assert found.transpose is True
        assert found.descan is None
        for name in ("bad_pixels", "center", "k_pixel", "rotation", "transpose", "descan"):
            assert found.sources[name].startswith("measured from the"), name
        for name in ("defocus", "gain", "ellipse", "background", "spherical_aberration"):
            assert found.sources[name] == "default"
        assert np.array_equal(data, before)
        assert dataclasses.replace(found, rotation=0.0).center == found.center

    def test_semiangle_is_measured(self, demo):
        found = calibrate(demo, energy=80e3, scan_step=0.25, k_pixel=0.05)
        assert found.semiangle == pytest.approx(25, rel=0.02)
        assert found.sources["semiangle"].startswith("measured from the radius of the bright-field disk, 11.")
        assert found.k_pixel == (0.05, 0.05)

    def test_descan(self, demo):
        slopes = np.array([[1.0, 0.5], [-0.4, 0.7]])

        def move(k, place):
            where = np.stack([place[0] / 55 - 0.5, place[1] / 63 - 0.5])
            return k + slopes @ where + np.array([[35.0], [34.2]])

        data = moved(demo, move, (70, 70))
        found = calibrate(data, **DEMO)
        assert found.descan.shape == (56, 64, 2)
        assert found.descan[-1, 0] - found.descan[0, 0] == pytest.approx(slopes[:, 0], abs=0.15)
        assert found.descan[0, -1] - found.descan[0, 0] == pytest.approx(slopes[:, 1], abs=0.15)
        assert found.center == pytest.approx((35, 34.2), abs=0.1)
        assert angle_between(found.rotation, 0) < 2
        still = calibrate(data, **DEMO, descan=np.zeros((56, 64, 2)))
        assert not still.descan.any()

    def test_large_descan_does_not_widen_the_disk(self, demo):
        def move(k, place):
            return k + 6 * np.stack([place[0] / 55 - 0.5, 0.5 - place[1] / 63]) + 36.0

        found = calibrate(moved(demo, move, (73, 73)), **DEMO)
        plain = calibrate(demo, **DEMO)
        assert found.k_pixel == pytest.approx(plain.k_pixel, rel=0.01)

    def test_given_values_stay(self, demo):
        given = {
            "k_pixel": (0.05, 0.0501),
            "center": (31.0, 31.5),
            "rotation": 12.0,
            "transpose": True,
            "bad_pixels": np.eye(63, dtype=bool),
            "descan": np.zeros((56, 64, 2)),
            "gain": 2.0,
            "background": 0.0,
            "defocus": 10.0,
            "spherical_aberration": 1e4,
            "ellipse": (1.0, 1.01, 20.0),
        }
        sources = {"center": "metadata"}
        found = calibrate(Unreadable(demo), **DEMO, **given, sources=sources)
        for name, value in given.items():
            assert np.array_equal(getattr(found, name), value), name
        assert found.sources == {"center": "metadata"}

    def test_sources_of_what_is_given_and_measured(self, demo):
        found = calibrate(demo, **DEMO, center=(31, 31), sources={"center": "axes", "scan_step": "metadata"})
        assert found.describe()["center"] == {"value": [31.0, 31.0], "unit": "px", "source": "axes"}
        assert found.describe()["scan_step"]["source"] == "metadata"
        assert found.describe()["energy"]["source"] == "argument"

    def test_gain_and_background(self, demo):
        background = np.random.default_rng(0).uniform(4, 6, demo.shape[2:]).astype(np.float32)
        data = demo[:, :40] * np.float32(7) + background
        found = calibrate(data, **DEMO, gain=7.0, background=background)
        plain = calibrate(demo[:, :40], **DEMO)
        assert found.center == pytest.approx(plain.center, abs=0.02)
        assert found.rotation == pytest.approx(plain.rotation, abs=0.5)
        assert found.bad_pixels is None

    def test_missing_patterns_are_left_out(self, demo):
        data = demo.astype(np.float32)
        data[3, 5, 10, 10] = np.nan
        data[30:32, 7] = np.inf
        data[11, :] = 0
        found, plain = calibrate(data, **DEMO), calibrate(demo, **DEMO)
        assert found.center == pytest.approx(plain.center, abs=0.02)
        assert angle_between(found.rotation, plain.rotation) < 3

    @pytest.mark.parametrize("source", ["memmap", "h5py", "dask"])
    def test_sources_of_data(self, demo, tmp_path, source):
        part = np.ascontiguousarray(demo[:30])
        with h5py.File(tmp_path / "scan.h5", "w") as file:
            if source == "memmap":
                np.save(tmp_path / "scan.npy", part)
                data = np.load(tmp_path / "scan.npy", mmap_mode="r")
            elif source == "h5py":
                data = file.create_dataset("data", data=part, chunks=(4, 16, 63, 63))
            else:
                data = da.from_array(part, chunks=(7, 20, 63, 63))
            assert calibrate(data, **DEMO) == calibrate(part, **DEMO)

    def test_bands_of_large_scans(self, demo, monkeypatch):
        monkeypatch.setattr(calibration, "_READ_PIXELS", 36 * 64 * 63**2)
        data = Counting(turned(np.concatenate([demo, demo, demo]), 37, False))
        found = calibrate(data, **DEMO)
        assert len(data.seen) == 36
        assert {0, 167} < data.seen
        assert angle_between(found.rotation, 37) < 3
        assert found.center == pytest.approx((36.3, 30.8), abs=0.1)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({}, r"^semiangle and k_pixel are both unknown\. Give semiangle \[mrad\] or k_pixel \[1/A\]"),
            ({"argument_names": {"k_pixel": "k_step"}}, "^semiangle and k_step are both unknown"),
            ({"semiangle": 0.02}, "semiangle is 0.02 mrad"),
            ({"semiangle": 25.0, "energy": 80}, "energy is 80 eV"),
            ({"semiangle": 25.0, "bad_pixels": np.zeros((5, 5), bool)}, r"bad_pixels has the shape \(5, 5\), expected"),
            ({"semiangle": 25.0, "descan": np.zeros((5, 5, 2))}, r"descan has the shape .*that of the scan"),
            ({"semiangle": 25.0, "background": np.zeros((5, 5))}, r"background has the shape .*that of the detector"),
        ],
    )
    def test_errors_before_anything_is_read(self, demo, given, message):
        with pytest.raises(ValueError, match=message):
            calibrate(Unreadable(demo), **{"energy": 80e3, "scan_step": 0.25, **given})

    @pytest.mark.parametrize("value", [0, 3])
    def test_no_disk(self, value):
        data = np.full((5, 6, 20, 20), value, np.uint16)
        with pytest.raises(
            ValueError, match=r"^center and k_step can't be measured: the mean pattern .* Give center and"
        ):
            calibrate(data, **DEMO, argument_names={"k_pixel": "k_step"})

    def test_contradiction(self, demo):
        message = (
            r"^semiangle 25 mrad and k_pixel 0.06 1/A make the radius of the bright-field disk 9\.97\d px, but 11\.\d+ "
            r"px were measured, 18% more"
        )
        with pytest.warns(UserWarning, match=message):
            found = calibrate(demo, **DEMO, k_pixel=0.06)
        assert found.k_pixel == (0.06, 0.06)

    def test_center_that_contradicts(self, demo):
        center = calibrate(demo, **DEMO).center
        given = (center[0] + 2.0, center[1])
        message = rf"^center is \({given[0]:.2f}, .*\) px, but .* measured at \({center[0]:.2f}, .* px, 2 px away"
        with pytest.warns(UserWarning, match=message):
            found = calibrate(demo, **DEMO, center=given)
        assert found.center == given
        rounded = tuple(float(round(value)) for value in center)
        assert calibrate(demo, **DEMO, center=rounded).center == rounded

    def test_agreement(self, demo):
        assert calibrate(demo, **DEMO, k_pixel=0.05).k_pixel == (0.05, 0.05)

    def test_tiny_disks_contradict_nothing(self):
        rng = np.random.default_rng(0)
        data = rng.poisson(20 * mean_pattern("thin", (24, 24), (11.4, 12.3), 3.0), (12, 12, 24, 24))
        k_pixel = optics.aperture_radius(80e3, 25.0) / 3.15  # 5 % off, which is 0.15 px
        found = calibrate(data, **DEMO, k_pixel=k_pixel, rotation=0.0, transpose=False)
        assert found.center == pytest.approx((11.4, 12.3), abs=0.1)


class Unreadable:
    """Has a shape and a type, but no patterns."""

    def __init__(self, data):
        self.shape, self.dtype = data.shape, data.dtype

    def __getitem__(self, rows):
        raise AssertionError("read")


class Counting:
    """Remembers which scan rows were read."""

    def __init__(self, data):
        self.data, self.shape, self.dtype, self.seen = data, data.shape, data.dtype, set()

    def __getitem__(self, rows):
        self.seen |= set(range(rows.start, rows.stop))
        return self.data[rows]
