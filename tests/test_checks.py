"""Bad input: what raises, what is found in single patterns, what is said and where the warning points."""

import re
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

import airpi_py4d
from airpi_py4d import Acquisition, optics
from airpi_py4d.checks import BadPositions, check_data, read, warn_user
from airpi_py4d.domain import ElectronCheck
from airpi_py4d.model import Contract

K0 = optics.aperture_radius(300e3, 20.0)
SHAPE = (6, 5, 24, 20)
ROWS, COLUMNS = np.ogrid[:24, :20]
DISK = (ROWS - 12) ** 2 + (COLUMNS - 10) ** 2 <= 6**2


def acquisition(**options):
    return Acquisition(300e3, 20.0, 0.2, (K0 / 6, K0 / 6), center=(12, 10), **options)


def counts(mean=20.0, dtype=np.uint16):
    return np.random.default_rng(0).poisson(mean * DISK + 0.05, SHAPE).astype(dtype)


def fed(data, band=None, **options):
    """BadPositions that has seen all of `data`, and the masks it gave; `band` columns at a time."""
    bad = BadPositions(data.shape[:2], acquisition(**options))
    band = band or data.shape[1]
    missing = [
        np.concatenate([bad.add(row, first, patterns[first : first + band]) for first in range(0, len(patterns), band)])
        for row, patterns in enumerate(data)
    ]
    np.testing.assert_array_equal(bad.missing, missing)
    return bad


def places(bad):
    return [tuple(place) for place in np.argwhere(bad.missing).tolist()]


def warned(bad):
    with pytest.warns(UserWarning, match="patterns") as caught:
        messages = bad.finish()
    assert [str(each.message) for each in caught] == messages
    return messages


class TestCheckData:
    @pytest.mark.parametrize("dtype", ["u1", ">u2", "i4", "f2", "f8", "?"])
    def test_accepted(self, dtype):
        check_data(np.zeros((3, 3, 2, 2), dtype))

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (np.ones((4, 5, 6)), r"data has the shape \(4, 5, 6\), expected 4 dimensions: scan rows"),
            ([[1, 2], [3, 4]], r"data has the shape \(\), expected 4 dimensions"),
            (np.ones((2, 5, 24, 20)), "data has 2 x 5 scan positions; the 3x3 kernels need at least 3 x 3"),
            (np.ones((5, 2, 24, 20)), "data has 5 x 2 scan positions"),
            (np.ones((5, 7, 1, 20)), "data has a detector of 1 x 20 px, expected at least 2 x 2"),
            (np.ones((5, 7, 24, 20), complex), "data has the type complex128, expected counts"),
            (np.ones((5, 7, 24, 20), object), "data has the type object, expected counts"),
        ],
    )
    def test_refused(self, data, message):
        with pytest.raises(ValueError, match=f"^{message}"):
            check_data(data)


class TestRead:
    class Source:
        """Rows from `broken` on can't be read."""

        def __init__(self, broken, error):
            self.shape, self.dtype, self._broken, self._error = (8, 5, 4, 4), np.dtype("u2"), broken, error

        def __getitem__(self, where):
            rows = where[0] if isinstance(where, tuple) else where
            if rows.stop > self._broken:
                raise self._error
            return np.zeros(self.shape, self.dtype)[where]

    def test_rows_and_columns(self):
        data = counts()
        np.testing.assert_array_equal(read(data, slice(2, 4)), data[2:4])
        np.testing.assert_array_equal(read(data, slice(2, 4), slice(1, 3)), data[2:4, 1:3])

    @pytest.mark.parametrize("error", [OSError("truncated"), EOFError("end"), ValueError("mmap is too short")])
    @pytest.mark.parametrize("columns", [None, slice(1, 4)])
    def test_unreadable_row_is_named(self, error, columns):
        message = rf"data can't be read at scan row 5 of 8: {error}\. The file may be cut off .*data\[:5\]"
        with pytest.raises(OSError, match=message) as raised:
            read(self.Source(5, error), slice(3, 7), columns)
        assert raised.value.__cause__ is error

    def test_nothing_to_reconstruct_before(self):
        with pytest.raises(OSError, match=r"scan row 1 of 8.*still being written\.$"):
            read(self.Source(1, OSError("gone")), slice(0, 4))

    def test_too_few_rows(self):
        source = self.Source(8, OSError())
        source.__class__ = type("Cut", (), {"__getitem__": lambda self, rows: np.zeros((8, 5, 4, 4))[:5][rows]})
        with pytest.raises(
            OSError, match=r"data ends before scan row 5 of 8: reading rows 4 to 7 gave 1\. .*data\[:5\]"
        ):
            read(source, slice(4, 8))

    def test_other_shape(self):
        source = self.Source(8, OSError())
        source.__class__ = type("Other", (), {"__getitem__": lambda self, rows: np.zeros((4, 5, 4, 3))})
        with pytest.raises(OSError, match=r"data gave patterns of shape \(4, 5, 4, 3\) .*expected \(4, 5, 4, 4\)"):
            read(source, slice(4, 8))

    def test_truncated_hdf5(self, tmp_path):
        path = tmp_path / "scan.h5"
        data = np.random.default_rng(0).integers(0, 9, (16, 8, 64, 64), np.uint16)
        with h5py.File(path, "w") as file:
            file.create_dataset("data", data=data, chunks=(1, 8, 64, 64), compression="gzip")
            where = file["data"].id.get_chunk_info(10).byte_offset
        content = bytearray(path.read_bytes())
        content[where : where + 100] = bytes(100)
        path.write_bytes(content)
        with h5py.File(path) as file:
            np.testing.assert_array_equal(read(file["data"], slice(8, 10)), data[8:10])
            with pytest.raises(OSError, match="data can't be read at scan row 10 of 16"):
                read(file["data"], slice(8, 16))


class TestMissing:
    @pytest.mark.parametrize("dtype", ["u1", "u2", ">u2", "i2", "i4", "f4", ">f4", "f8", "f2"])
    def test_good_data(self, dtype):
        data = counts(dtype=dtype)
        before = data.copy()
        bad = fed(data)
        assert places(bad) == []
        assert bad.finish() == []
        np.testing.assert_array_equal(data, before)

    @pytest.mark.parametrize("band", [1, 2, 5])
    @pytest.mark.parametrize(
        ("value", "kind"),
        [
            (np.nan, "with NaN or infinity"),
            (np.inf, "with NaN or infinity"),
            (-np.inf, "with NaN or infinity"),
            (0, "empty"),
            (3, "the same in every pixel"),
            (-3, "the same in every pixel"),
        ],
    )
    def test_whole_pattern(self, value, kind, band):
        data = counts(dtype=np.float32)
        data[3, 2] = data[4, 4] = value
        bad = fed(data, band)
        assert places(bad) == [(3, 2), (4, 4)]
        (message,) = warned(bad)
        expected = f"2 of 30 patterns are missing (2 {kind}), at scan positions (3, 2), (4, 4). Their neighbours stand"
        assert message.startswith(expected)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, -1e300])
    def test_one_pixel_is_not_finite(self, value):
        """Beyond float32 neither."""
        data = counts(dtype=np.float64)
        data[1, 2, 3, 4] = value
        assert places(fed(data)) == [(1, 2)]

    def test_mean_below_zero(self):
        data = counts(dtype=np.int16)
        data[1, 2] -= 20
        assert places(fed(data)) == [(1, 2)]
        (message,) = warned(fed(data))
        assert "(1 more negative than positive)" in message

    def test_empty_by_chance(self):
        """At 5 electrons a pattern some are empty; they hold a measurement. At 100 they don't."""
        weak = np.random.default_rng(0).poisson(2.0 / DISK.sum() * DISK, SHAPE)
        assert not weak.sum((2, 3)).all()
        assert places(fed(weak)) == []
        strong = np.random.default_rng(0).poisson(100.0 / DISK.sum() * DISK, SHAPE)
        strong[2, 3] = 0
        assert places(fed(strong)) == [(2, 3)]

    def test_empty_by_chance_is_judged_in_electrons(self):
        weak = np.random.default_rng(0).poisson(2.0 / DISK.sum() * DISK, SHAPE) * 100
        assert places(fed(weak, gain=100.0)) == []
        assert places(fed(weak)) == [tuple(place) for place in np.argwhere(weak.sum((2, 3)) == 0).tolist()]

    @pytest.mark.parametrize("background", [1.0, np.ones(SHAPE[2:])])
    def test_background_is_no_electron(self, background):
        """Background 1 in each of 480 px doesn't make 480 electrons, and nothing above it is empty by chance."""
        weak = np.random.default_rng(0).poisson(2.0 / DISK.sum() * DISK, SHAPE) + 1
        chance = [tuple(place) for place in np.argwhere(weak.sum((2, 3)) == 480).tolist()]
        assert chance
        assert places(fed(weak)) == chance
        assert places(fed(weak, background=background)) == []
        strong = np.random.default_rng(0).poisson(100.0 / DISK.sum() * DISK, SHAPE) + 1
        strong[2, 3] = 1
        assert places(fed(strong, background=background)) == [(2, 3)]

    def test_empty_row(self):
        data = counts()
        data[2] = 0
        assert places(fed(data)) == [(2, column) for column in range(5)]

    def test_last_rows(self):
        data = counts()
        data[4:] = 0
        (message,) = warned(fed(data))
        assert "10 of 30 patterns are missing (10 empty), the first at scan positions (4, 0), (4, 1)" in message
        assert message.count("(4, ") == 5
        assert message.endswith("Nothing comes after scan row 3: the scan may have been stopped or the file cut off.")

    def test_kinds_are_counted(self):
        data = counts(dtype=np.float32)
        data[0, 0], data[1, 1, 0, 0], data[2, 2], data[3, 3] = 0, np.nan, 7, 0
        (message,) = warned(fed(data))
        assert "4 of 30 patterns are missing (1 with NaN or infinity, 2 empty, 1 the same in every pixel)" in message

    @pytest.mark.parametrize("value", [0, 5, np.nan])
    def test_whole_scan(self, value):
        bad = fed(np.full(SHAPE, value, np.float32))
        with pytest.raises(ValueError, match=r"data has no pattern that can be used \(30 .*\): check the file"):
            bad.finish()

    def test_bad_pixels_do_not_count(self):
        """A hot pixel keeps an empty pattern from being zero, a NaN in a gap doesn't spoil the pattern."""
        data = counts(dtype=np.float32)
        bad_pixels = np.zeros(SHAPE[2:], bool)
        bad_pixels[0, 0] = bad_pixels[5, 6] = True
        data[2, 3] = 0
        data[..., 5, 6] = 1e4
        data[..., 0, 0] = np.nan
        before = data.copy()
        assert len(places(fed(data))) == 30
        assert places(fed(data, bad_pixels=bad_pixels)) == [(2, 3)]
        np.testing.assert_array_equal(data, before)


class TestNegative:
    def test_noise_around_zero(self):
        data = counts(200.0) + np.random.default_rng(1).normal(0, 0.2, SHAPE)
        assert data.min() < 0
        bad = fed(data)
        assert places(bad) == []
        assert bad.finish() == []

    def test_much_noise(self):
        data = counts(1.0) + np.random.default_rng(1).normal(0, 0.2, SHAPE)
        share = -data[data < 0].sum() / data[data > 0].sum()
        assert 0.01 < share < 0.5
        (message,) = warned(fed(data))
        assert message.startswith(
            f"30 of 30 patterns have negative counts of {share:.0%} of the positive ones, the first"
        )
        assert "expect noise and a wrong phase scale. Give background= what the detector" in message

    def test_wrong_zero(self):
        data = counts(5.0) - 1.0
        with pytest.raises(
            ValueError, match=r"30 of 30 patterns have negative counts.*their zero is wrong\. Give backgr"
        ):
            fed(data).finish()

    def test_below_zero_everywhere(self):
        with pytest.raises(ValueError, match=r"no pattern that can be used \(30 more negative .*Give background="):
            fed(counts(5.0) - 10.0).finish()

    def test_unsigned_counts_stored_as_signed(self):
        data = np.random.default_rng(0).poisson(40000 * DISK + 100, SHAPE).astype(np.uint16).view(np.int16)
        with pytest.raises(ValueError, match="view them as unsigned"):
            fed(data).finish()

    def test_background(self):
        """Taken off first, whatever the type; too large a one is named as the caller does."""
        data = counts(200.0) + np.uint16(100)
        noise = np.random.default_rng(1).integers(-1, 2, SHAPE)
        assert fed(data, background=100.0).finish() == []
        assert fed(data + noise, background=np.full(SHAPE[2:], 100.0)).finish() == []
        with pytest.raises(ValueError, match=r"zero is wrong\. dark may be too large"):
            fed(data, background=135.0, argument_names={"background": "dark"}).finish()

    def test_single_pattern_with_few(self):
        data = counts(dtype=np.float32)
        data[2, 2, 0, 0] = -100.0
        assert -data[2, 2].min() / data[2, 2].sum() > 0.01
        assert fed(data).finish() == []

    def test_bad_pixels_do_not_count(self):
        data = counts(dtype=np.int32)
        bad_pixels = np.zeros(SHAPE[2:], bool)
        bad_pixels[5, 6] = True
        data[..., 5, 6] = -(2**31)
        with pytest.raises(ValueError, match="no pattern that can be used"):
            fed(data).finish()
        assert fed(data, bad_pixels=bad_pixels).finish() == []


class TestSaturated:
    @pytest.mark.parametrize(("dtype", "full"), [("u1", 255), ("u2", 65535), ("u2", 4095), ("f4", 4095), ("i2", 32767)])
    def test_full_scale(self, dtype, full):
        data = np.minimum(np.random.default_rng(0).poisson(1.1 * full * DISK, SHAPE), full)
        data[2:] = data[2:] // 3
        bad = fed(data.astype(dtype))
        assert places(bad) == []
        (message,) = warned(bad)
        assert message.startswith("10 of 30 patterns are saturated, the first at scan positions (0, 0), (0, 1)")
        assert f"they reach {float(full):.5g}, the largest value in the data" in message

    def test_everywhere(self):
        (message,) = warned(fed((255 * DISK * np.ones(SHAPE)).astype(np.uint16)))
        assert message.startswith("30 of 30 patterns are saturated")

    def test_plateau_at_another_value(self):
        data = np.minimum(np.random.default_rng(0).poisson(np.linspace(500, 1500, 30).reshape(6, 5, 1, 1) * DISK), 1000)
        (message,) = warned(fed(data))
        assert "are saturated" in message
        assert "they reach 1000," in message

    def test_noise_free_empty_specimen(self):
        assert fed((100 * DISK * np.ones(SHAPE)).astype(np.float32)).finish() == []

    def test_few_electrons(self):
        """Many pixels hold the largest value of a pattern of single electrons."""
        for mean in (0.01, 0.1, 0.3, 1.0, 3.0):
            data = np.random.default_rng(0).poisson(mean * DISK, SHAPE)
            assert fed(data).finish() == []

    def test_a_hot_pixel_is_no_plateau(self):
        data = counts()
        data[..., 3, 3] = 65535
        assert fed(data).finish() == []


class TestRunningSums:
    """What is kept is the same in any order and in parts, and small."""

    @pytest.fixture
    def data(self):
        data = np.minimum(np.random.default_rng(0).poisson(np.linspace(500, 1500, 30).reshape(6, 5, 1, 1) * DISK), 1000)
        data = data + np.random.default_rng(1).normal(0, 9, SHAPE).round().astype(int) * (data == 0)
        data[2, 3] = 0
        return data.clip(max=1000)

    def test_parts(self, data):
        expected = warned(fed(data))
        assert len(expected) == 3
        for order in ((slice(0, 2), slice(2, 3), slice(3, 6)), (slice(3, 6), slice(0, 2), slice(2, 3))):
            whole = BadPositions(SHAPE[:2], acquisition())
            for rows in order:
                whole.merge(fed(data[rows]), rows.start)
            assert warned(whole) == expected

    def test_a_larger_value_begins_again(self):
        data = np.minimum(np.random.default_rng(0).poisson(np.full((6, 5, 1, 1), 1500) * DISK), 1000)
        data[4] = np.minimum(np.random.default_rng(0).poisson(np.full((5, 1, 1), 3000) * DISK), 2000)
        (message,) = warned(fed(data))
        assert message.startswith("5 of 30 patterns are saturated, at scan positions (4, 0), (4, 1)")
        assert "they reach 2000," in message

    def test_bytes_a_position(self):
        shape = 500, 400
        patterns = np.full((400, 4, 4), -1.0) + 3 * np.eye(4)
        tracemalloc.start()
        kept = BadPositions(shape, acquisition()), ElectronCheck(Contract("", "", 64, 12.0, 16, {}), shape)
        for row in range(shape[0]):
            missing = kept[0].add(row, 0, patterns)
            kept[1].add(patterns.sum((1, 2)), missing)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held / np.prod(shape) < 5.1


class TestWarnUser:
    def test_points_at_the_caller_of_the_package(self):
        """Through generators and other packages in between."""
        inside = str(Path(airpi_py4d.__file__).parent / "inside.py")
        names = {"warn_user": warn_user, "sorted": sorted}
        source = "def entry():\n    return sorted([1], key=deep)\ndef deep(_):\n    warn_user('found')\n    return 0\n"
        exec(compile(source, inside, "exec"), names)

        def between(key):
            return sorted([1], key=key)

        names["sorted"] = lambda values, key: between(key)
        with pytest.warns(UserWarning, match="^found$") as caught:
            names["entry"]()
        line = re.search(r"names\[.entry.\]\(\)", Path(__file__).read_text().splitlines()[caught[0].lineno - 1])
        assert caught[0].filename == __file__
        assert line

    def test_finish(self):
        data = counts()
        data[1, 1] = 0
        bad = fed(data)
        with pytest.warns(UserWarning, match="missing") as caught:
            bad.finish()
        assert caught[0].filename == __file__
