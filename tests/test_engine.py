"""The engine with models that only add up what they are given, so that an image reveals what the engine read."""

import json
import tracemalloc
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from oracle import METADATA

from airpi_py4d import Acquisition, engine, optics, reconstruct
from airpi_py4d.model import Model
from airpi_py4d.plan import relative_geometry

K0 = optics.aperture_radius(300e3, 20.0)
STEP = 1.5 / K0  # further apart than the probe is wide: with oversample=1 every image pixel is one position's phase


def write_sum(path: Path, patterns=None, geometry=(0, 0, 0), domain=None) -> Path:
    """Write a model whose patches have everywhere the phase sum(patterns * weights) + sum(geometry * weights)."""
    weights = np.zeros((3, 3, 64, 64)) if patterns is None else np.broadcast_to(patterns, (3, 3, 64, 64))
    constants = {
        "pattern_weights": weights.astype(np.float32),
        "geometry_weights": np.array(geometry, np.float32),
        "pattern_axes": np.array([1, 2, 3, 4]),
        "one": np.array([1]),
        "as_patch": np.array([-1, 1, 1, 1]),
        "repeats": np.array([1, 16, 16, 1]),
    }
    nodes = [
        helper.make_node("Mul", ["patterns", "pattern_weights"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "pattern_axes"], ["from_patterns"], keepdims=0),
        helper.make_node("Mul", ["geometry", "geometry_weights"], ["weighted_geometry"]),
        helper.make_node("ReduceSum", ["weighted_geometry", "one"], ["from_geometry"], keepdims=0),
        helper.make_node("Add", ["from_patterns", "from_geometry"], ["phase"]),
        helper.make_node("Reshape", ["phase", "as_patch"], ["pixel"]),
        helper.make_node("Cos", ["pixel"], ["real"]),
        helper.make_node("Sin", ["pixel"], ["imaginary"]),
        helper.make_node("Concat", ["real", "imaginary"], ["parts"], axis=-1),
        helper.make_node("Tile", ["parts", "repeats"], ["object_patch"]),
    ]
    graph = helper.make_graph(
        nodes,
        "sum",
        [
            helper.make_tensor_value_info("patterns", TensorProto.FLOAT, ["batch", 3, 3, 64, 64]),
            helper.make_tensor_value_info("geometry", TensorProto.FLOAT, ["batch", 3]),
        ],
        [helper.make_tensor_value_info("object_patch", TensorProto.FLOAT, ["batch", 16, 16, 2])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    for key, value in {**METADATA, "name": "sum", "domain": json.dumps(domain or {})}.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def mixing(tmp_path_factory):
    """A model in whose phase every pixel of every pattern of the kernel counts."""
    weights = np.random.default_rng(5).uniform(-3e-3, 3e-3, (3, 3, 64, 64))
    return Model(write_sum(tmp_path_factory.mktemp("mixing") / "sum.onnx", weights), "cpu")


@pytest.fixture(scope="module")
def constant(tmp_path_factory):
    return Model(write_sum(tmp_path_factory.mktemp("constant") / "sum.onnx"), "cpu")


def acquisition(radius=6.0, **options):
    """300 keV, 20 mrad, with a bright-field disk of `radius` px."""
    return Acquisition(
        **{"energy": 300e3, "semiangle": 20.0, "scan_step": 0.2, "k_pixel": (K0 / radius,) * 2, **options}
    )


def counts(shape=(5, 7, 24, 20), radius=6.0):
    """A noisy disk in the middle, at most 255 electrons a pixel."""
    rows, columns = np.ogrid[: shape[2], : shape[3]]
    disk = (rows - shape[2] // 2) ** 2 + (columns - shape[3] // 2) ** 2 <= radius**2
    return np.random.default_rng(0).poisson(0.1 + 20.0 * disk, shape).astype(np.uint8)


class Scan:
    """Array-like that makes its rows when they are read and counts how often."""

    dtype = np.dtype(np.uint16)

    def __init__(self, shape):
        self.shape = shape
        self.reads = np.zeros(shape[0], int)
        self.largest = 0

    def __getitem__(self, rows):
        self.reads[rows] += 1
        numbers = np.arange(self.shape[0])[rows]
        self.largest = max(self.largest, len(numbers))
        row, column = np.ogrid[: self.shape[2], : self.shape[3]]
        disk = (row - self.shape[2] // 2) ** 2 + (column - self.shape[3] // 2) ** 2 <= 36
        patterns = (numbers + 1).astype(self.dtype)[:, None, None, None] * disk.astype(self.dtype)
        return np.broadcast_to(patterns, (len(numbers), *self.shape[1:]))


class TestSources:
    @pytest.fixture(scope="class")
    @staticmethod
    def expected(mixing):
        result = reconstruct(counts(), acquisition(), model=mixing)
        assert np.ptp(result.phase) > 0.01
        return result.object

    @pytest.fixture
    def check(self, mixing, expected, monkeypatch):
        monkeypatch.setattr(engine, "_BAND_BYTES", 2 * counts()[0].nbytes)

        def check(data):
            np.testing.assert_array_equal(reconstruct(data, acquisition(), model=mixing).object, expected)

        return check

    @pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "i4", "<f4", ">f4", "f8", "f2"])
    def test_ndarray(self, check, dtype):
        check(counts().astype(dtype))

    def test_not_contiguous(self, check):
        check(np.asfortranarray(counts()))
        check(np.repeat(counts(), 2, axis=1)[:, ::2])
        check(counts()[::-1, :, ::-1].copy()[::-1, :, ::-1])
        check(counts().transpose(3, 1, 0, 2).copy().transpose(2, 1, 3, 0))

    def test_read_only(self, check):
        data = counts()
        data.flags.writeable = False
        check(data)

    def test_left_as_it_was(self, check):
        data = counts()
        check(data)
        np.testing.assert_array_equal(data, counts())

    def test_memmap(self, check, tmp_path):
        data = counts()
        data.astype(">u2").tofile(tmp_path / "scan.raw")
        check(np.memmap(tmp_path / "scan.raw", ">u2", "r", shape=data.shape))

    @pytest.mark.parametrize("chunks", [None, (1, 1, 24, 20), (3, 4, 10, 20)])
    def test_h5py(self, check, tmp_path, chunks):
        h5py = pytest.importorskip("h5py")
        with h5py.File(tmp_path / "scan.h5", "w") as file:
            check(file.create_dataset("data", data=counts(), chunks=chunks))

    @pytest.mark.parametrize("chunks", [-1, (1, 7, 24, 20), (3, 2, 24, 20), (2, 7, 11, 9)])
    def test_dask(self, check, chunks):
        da = pytest.importorskip("dask.array")
        check(da.from_array(counts(), chunks=chunks))

    @pytest.mark.parametrize("chunks", [(5, 7, 24, 20), (2, 3, 24, 20)])
    def test_zarr(self, check, chunks):
        zarr = pytest.importorskip("zarr")
        check(zarr.array(counts(), chunks=chunks))


@pytest.mark.parametrize("detector", [(24, 20), (31, 64), (130, 97), (6, 7)])
def test_any_detector(tmp_path, detector):
    """The electrons that arrive at the network are the detector's, whatever its size."""
    radius = min(detector) / 3
    model = write_sum(tmp_path / "sum.onnx", 1e-3 / 9)
    data = np.zeros((3, 4, *detector), np.uint16)
    data[..., detector[0] // 2, detector[1] // 2] = 900
    center = (detector[0] // 2, detector[1] // 2)
    result = reconstruct(
        data, acquisition(radius, center=center, scan_step=STEP), model=model, oversample=1, device="cpu"
    )
    np.testing.assert_allclose(result.phase, 0.9, atol=1e-4)
    assert result.provenance["electrons_per_pattern"] == pytest.approx(900, rel=1e-4)
    assert result.provenance["detector_shape"] == list(detector)


@pytest.mark.parametrize("neighbour", [(i, j) for i in range(3) for j in range(3)])
def test_kernels(tmp_path, neighbour):
    """Position [row, column]'s kernel holds [row - 1 ... row + 1, column - 1 ... column + 1], edges replicated."""
    weights = np.zeros((3, 3, 1, 1))
    weights[neighbour] = 0.01
    data = np.zeros((4, 6, 24, 20), np.uint16)
    numbers = np.arange(24).reshape(4, 6) * 10 + 5
    data[:, :, 12, 10] = numbers
    model = write_sum(tmp_path / "sum.onnx", weights)
    result = reconstruct(data, acquisition(center=(12, 10), scan_step=STEP), model=model, oversample=1, device="cpu")
    rows = np.clip(np.arange(4) + neighbour[0] - 1, 0, 3)
    columns = np.clip(np.arange(6) + neighbour[1] - 1, 0, 5)
    np.testing.assert_allclose(result.phase, 0.01 * numbers[np.ix_(rows, columns)], atol=1e-4)


def test_detector_orientation(tmp_path):
    """The network's patterns are [detector row][detector column], the axis in the middle, in the scan's axes."""
    weights = np.zeros((3, 3, 64, 64))
    weights[1, 1] = 1e-3 * (np.arange(64)[:, None] - 32) + 1e-5 * (np.arange(64) - 32)
    model = Model(write_sum(tmp_path / "sum.onnx", weights), "cpu")
    data = np.zeros((3, 3, 24, 20), np.uint16)
    data[:, :, 12 + 4, 10 - 2] = 100  # at (8, -4) px of the model's grid
    expected = {(0, False): (8, -4), (90, False): (4, 8), (0, True): (-4, 8), (90, True): (-8, -4)}
    for (rotation, transpose), (row, column) in expected.items():
        calibration = acquisition(center=(12, 10), rotation=rotation, transpose=transpose, scan_step=STEP)
        phase = reconstruct(data, calibration, model=model, oversample=1).phase
        np.testing.assert_allclose(phase, 100 * (1e-3 * row + 1e-5 * column), atol=1e-4)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, 0, 0), 0.2 * K0),
        ((0, 1, 0), -np.pi * optics.wavelength(300e3) * K0**2 * 30),
        ((0, 0, 1), np.pi / 2 * 1e5 * optics.wavelength(300e3) ** 3 * K0**4),
    ],
)
def test_geometry(tmp_path, weights, expected):
    model = write_sum(tmp_path / "sum.onnx", geometry=weights)
    calibration = acquisition(defocus=30, spherical_aberration=1e5)
    phase = reconstruct(counts(), calibration, model=model, device="cpu").phase
    np.testing.assert_allclose(np.median(phase), expected, rtol=0.02)
    assert relative_geometry(calibration)[weights.index(1)] == pytest.approx(expected)


class TestStreaming:
    @pytest.mark.parametrize(("band", "batch"), [(1, 1), (1, 3), (2, 128), (3, 7), (100, 2)])
    def test_bands_and_batches(self, mixing, monkeypatch, band, batch):
        data = counts()
        expected = reconstruct(data, acquisition(), model=mixing)
        monkeypatch.setattr(engine, "_BAND_BYTES", band * data[0].nbytes)
        monkeypatch.setattr(engine, "_BATCH", batch)
        result = reconstruct(data, acquisition(), model=mixing)
        np.testing.assert_allclose(result.object, expected.object, atol=1e-6)

    @pytest.mark.parametrize("band", [0.5, 1, 2, 100])
    def test_every_row_is_read_once(self, constant, monkeypatch, band):
        scan = Scan((9, 3, 24, 20))
        monkeypatch.setattr(engine, "_BAND_BYTES", band * 3 * 24 * 20 * 2)
        reconstruct(scan, acquisition(center=(12, 10)), model=constant)
        assert scan.reads.tolist() == [1] * 9
        assert scan.largest == min(9, max(1, int(band)))

    def test_center_takes_a_part_of_the_rows_more(self, constant, monkeypatch):
        monkeypatch.setattr("airpi_py4d.calibration._READ_PIXELS", 12 * 3 * 24 * 20)
        scan = Scan((80, 3, 24, 20))
        result = reconstruct(scan, acquisition(), model=constant)
        assert set(scan.reads) == {1, 2}
        assert np.count_nonzero(scan.reads == 2) == 36
        assert scan.reads[0] == scan.reads[-1] == 2
        assert result.provenance["acquisition"]["center"]["source"] == "measured from the bright-field disk's edge"

    def test_memory(self, constant, monkeypatch):
        """Rows add to memory what the image takes of them, a small part of what they hold."""
        monkeypatch.setattr(engine, "_BAND_BYTES", 2 * 6 * 32 * 32 * 2)

        def peak(rows):
            scan = Scan((rows, 6, 32, 32))
            tracemalloc.start()
            result = reconstruct(scan, acquisition(scan_step=0.2), model=constant, oversample=1)
            memory = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return memory, result.object.nbytes

        peak(3)  # what is loaded once
        (small, small_image), (large, large_image) = peak(16), peak(64)
        assert large - small < 4 * (large_image - small_image) + 20_000
        assert 48 * 6 * 32 * 32 * 2 > 500_000  # what the further rows hold


class TestCorrections:
    """Linear maps on the way in give the image of the data without the defect."""

    @pytest.mark.parametrize(("neighbours", "stride"), [(3, 1), (5, 2), (1, 2)])
    def test_data_repetition(self, mixing, neighbours, stride):
        data = counts((7, 9, 24, 20))
        result = reconstruct(
            data, acquisition(center=(12, 10)), model=mixing, sum_neighbours=neighbours, stride=stride, device="cpu"
        )
        half = neighbours // 2
        summed = np.empty((-(-7 // stride), -(-9 // stride), 24, 20))
        for i in range(summed.shape[0]):
            for j in range(summed.shape[1]):
                rows = slice(max(0, i * stride - half), i * stride + half + 1)
                columns = slice(max(0, j * stride - half), j * stride + half + 1)
                summed[i, j] = data[rows, columns].mean((0, 1), dtype=float) * neighbours**2
        calibration = acquisition(center=(12, 10), scan_step=0.2 * stride)
        expected = reconstruct(summed, calibration, model=mixing, device="cpu")
        assert result.pixel_size == expected.pixel_size
        np.testing.assert_allclose(result.object, expected.object, atol=1e-5)
        assert np.std(expected.phase) > 1e-3
        assert (result.provenance["sum_neighbours"], result.provenance["stride"]) == (neighbours, stride)

    @pytest.mark.parametrize(("name", "value"), [("sum_neighbours", 2), ("sum_neighbours", 0), ("stride", 1.5)])
    def test_data_repetition_in_whole_numbers(self, mixing, name, value):
        with pytest.raises(ValueError, match=rf"{name} is {value}, expected an? (odd|whole) number of at least 1"):
            reconstruct(counts(), acquisition(), model=mixing, **{name: value})

    def test_descan(self, mixing):
        data = counts((5, 7, 40, 36))
        shifts = np.random.default_rng(1).integers(-6, 7, (5, 7, 2))
        moved = np.empty_like(data)
        for place in np.ndindex(5, 7):
            moved[place] = np.roll(data[place], tuple(shifts[place]), (0, 1))
        expected = reconstruct(data, acquisition(center=(20, 18)), model=mixing, device="cpu")
        # the dark field wraps around where it was rolled: away from the grid's rim alone the data are the same
        result = reconstruct(moved, acquisition(center=(20, 18), descan=shifts), model=mixing, device="cpu")
        uncorrected = reconstruct(moved, acquisition(center=(20, 18)), model=mixing, device="cpu")
        error = np.abs(result.object - expected.object).max()
        assert error < 0.02
        assert error < 0.1 * np.abs(uncorrected.object - expected.object).max()

    def test_descan_of_another_scan(self, mixing):
        with pytest.raises(ValueError, match=r"descan has the shape \(4, 7, 2\), expected \(5, 7, 2\)"):
            reconstruct(counts(), acquisition(descan=np.zeros((4, 7, 2))), model=mixing)

    def test_gain_background_and_bad_pixels(self, mixing):
        data = counts()
        bad = np.zeros((24, 20), bool)
        bad[2, 3] = bad[20, 15] = True
        background = np.random.default_rng(2).uniform(50, 90, (24, 20))
        expected = reconstruct(
            data, acquisition(center=(12, 10), bad_pixels=bad), model=mixing, device="cpu", oversample=1
        )
        seen = data * 12.5 + background
        seen[:, :, bad] = 1e7
        calibration = acquisition(center=(12, 10), gain=12.5, background=background, bad_pixels=bad)
        result = reconstruct(seen, calibration, model=mixing, device="cpu", oversample=1)
        np.testing.assert_allclose(result.object, expected.object, atol=1e-4)
        assert result.provenance["acquisition"]["bad_pixels"]["value"] == 2

    def test_rows_larger_than_memory_are_read_in_parts(self, mixing, monkeypatch):
        data = counts()
        expected = reconstruct(data, acquisition(center=(12, 10)), model=mixing, device="cpu")
        monkeypatch.setattr("airpi_py4d.engine._LARGEST_BAND_BYTES", 3000)
        monkeypatch.setattr("airpi_py4d.engine._BAND_BYTES", 1000)
        result = reconstruct(data, acquisition(center=(12, 10)), model=mixing, device="cpu")
        np.testing.assert_allclose(result.object, expected.object, atol=1e-6)


class TestResult:
    @pytest.mark.parametrize("oversample", [1, 2, np.int64(3)])
    def test_shape(self, constant, oversample):
        result = reconstruct(counts(), acquisition(), model=constant, oversample=oversample)
        assert result.object.shape == (4 * oversample + 1, 6 * oversample + 1)
        assert result.object.dtype == np.complex64
        assert result.phase.dtype == result.confidence.dtype == np.float32
        assert result.pixel_size == pytest.approx((0.2 / oversample,) * 2)

    @pytest.mark.parametrize(
        ("steps", "expected"), [(0.5, 1), (1.0, 1), (1.01, 2), (2.0, 2), (2.5, 3)], ids=lambda value: f"{value}"
    )
    def test_default_oversample(self, constant, steps, expected):
        """The fewest that make the pixel no larger than the model's, 12 / (64 k0)."""
        result = reconstruct(counts(), acquisition(scan_step=steps * 12 / 64 / K0), model=constant)
        assert result.provenance["oversample"] == [expected, expected]
        assert max(result.pixel_size) <= 12 / 64 / K0 * 1.00001

    @pytest.mark.parametrize("oversample", [0, -1, 1.5, np.nan, "two", [2], np.inf])
    def test_oversample_is_a_positive_integer(self, constant, oversample):
        with pytest.raises(ValueError, match=r"oversample is .*, expected a whole number of at least 1"):
            reconstruct(counts(), acquisition(), model=constant, oversample=oversample)

    def test_default_oversample_of_unequal_steps(self, constant):
        steps = (0.9 * 12 / 64 / K0, 2.3 * 12 / 64 / K0)
        result = reconstruct(counts(), acquisition(scan_step=steps), model=constant)
        assert result.provenance["oversample"] == [1, 3]
        assert result.pixel_size == pytest.approx((steps[0], steps[1] / 3))
        assert result.object.shape == (5, 19)

    @pytest.mark.parametrize("center", [None, (12, 10)])
    def test_provenance(self, constant, center):
        calibration = acquisition(center=center, sources={"scan_step": "metadata"})
        provenance = reconstruct(counts(), calibration, model=constant).provenance
        assert json.loads(json.dumps(provenance, allow_nan=False)) == provenance
        assert provenance["software"] == "airpi_py4d"
        assert provenance["version"] == version("airpi_py4d")
        assert "10.1093/micmic/ozac002" in provenance["method"]
        assert provenance["model"] == {"name": "sum", "version": "1", "sha256": constant.sha256, "domain": {}}
        assert provenance["data_checks"] == []
        assert provenance["provider"] == "CPUExecutionProvider"
        assert (provenance["scan_shape"], provenance["detector_shape"]) == ([5, 7], [24, 20])
        assert min(provenance["oversample"]) >= 1
        assert provenance["pixel_size"] == [0.2 / count for count in provenance["oversample"]]
        assert provenance["outside_training_domain"] == []
        assert provenance["electrons_per_pattern"] == pytest.approx(np.median(counts().sum((2, 3))), rel=2e-3)
        assert provenance["positions_per_second"] == pytest.approx(35 / provenance["seconds"])
        parameters = provenance["acquisition"]
        assert set(parameters) == {
            *("energy", "semiangle", "scan_step", "k_pixel", "center", "rotation", "transpose"),
            *("defocus", "spherical_aberration", "ellipse", "gain"),
        }
        assert all(set(entry) == {"value", "unit", "source"} for entry in parameters.values())
        assert parameters["scan_step"]["source"] == "metadata"
        assert parameters["center"]["source"] == (
            "argument" if center else "measured from the bright-field disk's edge"
        )
        assert parameters["center"]["value"] == pytest.approx([12, 10], abs=0.1)

    def test_summary(self, constant):
        result = reconstruct(counts(), acquisition(), model=constant)
        summary = result.summary()
        for shown in (
            "energy: 3e+05 eV (argument)",
            "provider: CPUExecutionProvider",
            f"sum 1 (SHA-256 {constant.sha256[:12]})",
            "measured from the bright-field disk's edge",
            f"{result.object.shape[0]} x {result.object.shape[1]} px",
        ):
            assert shown in summary

    def test_progress(self, constant, capsys):
        reconstruct(counts(), acquisition(), model=constant)
        assert capsys.readouterr() == ("", "")
        reconstruct(counts(), acquisition(), model=constant, show_progress=True)
        assert "5/5" in capsys.readouterr().err


class TestDomain:
    DOMAIN: ClassVar = {
        "energy": (6e4, 2e5),
        "semiangle": (25.0, 33.0),
        "relative_scan_step": (0.3, 0.8),
        "electrons_per_pattern": (2.0, 1e7),
        "defocus_phase": (-2.0, 2.0),
    }

    @pytest.mark.parametrize(
        ("name", "options", "scale", "message"),
        [
            ("energy", {}, 1, r"energy is 3e\+05 eV, outside of 6e\+04 to 2e\+05 eV"),
            ("semiangle", {}, 1, "semiangle is 20 mrad, outside of 25 to 33 mrad"),
            ("relative_scan_step", {}, 1, "scan_step is 0.2 A, 0.2032 lambda / alpha, outside of 0.3 to 0.8"),
            (
                "defocus_phase",
                {"defocus": -40},
                1,
                "defocus is -40 A, at the aperture's edge 2.55.* rad, outside of -2 to 2 rad",
            ),
            ("electrons_per_pattern", {}, 6e-4, r"The electrons per pattern are 1\.\d+, outside of 2 to 1e"),
            ("electrons_per_pattern", {}, 2e4, r"The electrons per pattern are 4.*e\+07, outside of 2 to 1e"),
        ],
    )
    def test_warning(self, tmp_path, name, options, scale, message):
        model = write_sum(tmp_path / "sum.onnx", domain={name: self.DOMAIN[name]})
        data = counts().astype(np.float32) * scale
        with pytest.warns(UserWarning, match=f"^{message}.*model sum was trained on") as caught:
            result = reconstruct(data, acquisition(center=(12, 10), **options), model=model, device="cpu")
        assert [str(each.message) for each in caught] == result.provenance["outside_training_domain"]

    def test_named_as_the_caller_does(self, tmp_path):
        model = write_sum(tmp_path / "sum.onnx", domain=self.DOMAIN)
        calibration = acquisition(argument_names={"semiangle": "semiangle_cutoff"})
        with pytest.warns(UserWarning, match="outside of") as caught:
            reconstruct(counts(), calibration, model=model, device="cpu")
        assert [str(each.message).split()[0] for each in caught] == ["energy", "semiangle_cutoff", "scan_step"]

    @pytest.mark.parametrize(
        ("options", "scale", "message"),
        [({"scan_step": 2.0}, 1, "scan_step is 2 A"), ({}, 1e-5, "The electrons per pattern are 0.02")],
    )
    def test_far_outside_is_an_error_unless_told_otherwise(self, tmp_path, options, scale, message):
        domain = {name: self.DOMAIN[name] for name in ("relative_scan_step", "electrons_per_pattern")}
        model = write_sum(tmp_path / "sum.onnx", domain=domain)
        data = counts().astype(np.float32) * scale
        calibration = acquisition(center=(12, 10), **{"scan_step": 0.5, **options})
        with pytest.raises(ValueError, match=f"^{message}.*far outside.*strict=False"):
            reconstruct(data, calibration, model=model, device="cpu")
        with pytest.warns(UserWarning, match=f"^{message}.*far outside"):
            result = reconstruct(data, calibration, model=model, device="cpu", strict=False)
        assert len(result.provenance["outside_training_domain"]) == 1

    def test_inside(self, tmp_path):
        model = write_sum(tmp_path / "sum.onnx", domain=self.DOMAIN)
        calibration = acquisition(energy=200e3, semiangle=25, scan_step=0.4)  # the bounds are inside
        assert reconstruct(counts(), calibration, model=model, device="cpu").provenance["outside_training_domain"] == []


class TestErrors:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (np.ones((4, 5, 6)), r"data has the shape \(4, 5, 6\), expected 4 dimensions: scan rows"),
            (np.ones((1, 4, 5, 6, 7)), r"data has the shape \(1, 4, 5, 6, 7\), expected 4 dimensions"),
            ([[1, 2], [3, 4]], r"data has the shape \(\), expected 4 dimensions"),
            (np.ones((2, 5, 24, 20)), "data has 2 x 5 scan positions; the 3x3 kernels need at least 3 x 3"),
            (np.ones((5, 2, 24, 20)), "data has 5 x 2 scan positions; .* at least 3 x 3"),
            (np.ones((0, 5, 24, 20)), "data has 0 x 5 scan positions"),
            (np.ones((5, 7, 1, 20)), "data has a detector of 1 x 20 px, expected at least 2 x 2"),
            (np.ones((5, 7, 24, 20), complex), "data has the type complex128, expected counts"),
            (np.ones((5, 7, 24, 20), object), "data has the type object, expected counts"),
            (np.zeros((5, 7, 24, 20)), "center can't be measured: the mean pattern is empty. Give center"),
        ],
    )
    def test_data(self, constant, data, message):
        with pytest.raises(ValueError, match=message):
            reconstruct(data, acquisition(), model=constant)

    @pytest.mark.parametrize("center", [None, (12, 10)])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, mixing, monkeypatch, value, center):
        monkeypatch.setattr(engine, "_BAND_BYTES", 2 * 7 * 24 * 20 * 4)
        clean = counts((12, 7, 24, 20))
        data = clean.astype(np.float32)
        data[9, 2, 1, 1] = data[9, 5, 0, 0] = value
        before = data.copy()
        message = r"2 of 84 patterns are missing \(2 with NaN or infinity\), at scan positions \(9, 2\), \(9, 5\)"
        with pytest.warns(UserWarning, match=message) as caught:
            result = reconstruct(data, acquisition(center=center), model=mixing, device="cpu")
        assert len(caught) == 1
        assert np.isfinite(result.object).all()
        assert result.provenance["data_checks"] == [str(caught[0].message)]
        np.testing.assert_array_equal(data, before)
        # far from the holes nothing changes but the patches' offsets, which fade over a few steps
        expected = reconstruct(clean, acquisition(center=(12, 10)), model=mixing, device="cpu")
        if center:
            np.testing.assert_allclose(result.confidence[:12], expected.confidence[:12], atol=1e-6)
            np.testing.assert_allclose(result.object[:4], expected.object[:4], atol=5e-4)
            assert np.abs(result.object[18] - expected.object[18]).max() > 1e-3

    def test_holes_have_no_confidence(self, mixing):
        data = counts((13, 12, 24, 20))
        data[4:11, 3:10] = 0
        with pytest.warns(UserWarning, match=r"49 of 156 patterns are missing \(49 empty\)"):
            result = reconstruct(data, acquisition(scan_step=0.4, center=(12, 10)), model=mixing, device="cpu")
        down, right = result.provenance["oversample"]
        confidence = result.confidence[::down, ::right]
        assert confidence[7, 6] == 0
        assert (confidence[:3] > 0.5).all()
        assert (confidence[:, 0] > 0.5).all()

    def test_file_that_ends_early(self, constant):
        class Cut:
            shape, dtype = (9, 7, 24, 20), np.dtype(np.uint8)

            def __getitem__(self, rows):
                return counts(self.shape)[:6][rows]

        with pytest.raises(OSError, match="data ends before scan row 6 of 9"):
            reconstruct(Cut(), acquisition(center=(12, 10)), model=constant)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"energy": 300}, r"energy is 300 eV, expected 10000 to 1e\+06 eV. For 300 kV give energy=300e3."),
            ({"energy": -3e5}, r"energy is -300000 eV, expected 10000 to 1e\+06 eV"),
            ({"energy": None}, "energy is None, expected a number in eV"),
            ({"energy": "300 kV"}, "energy is '300 kV', expected a number in eV"),
            ({"energy": np.nan}, "energy is nan, expected a finite number in eV"),
            ({"semiangle": 0.02}, "semiangle is 0.02 mrad, .* For 0.02 rad give semiangle=20."),
            ({"semiangle": 0}, "semiangle is 0 mrad, expected 0.5 to 200 mrad"),
            ({"scan_step": 0}, "scan_step is 0 A, expected 0.001 to 1000 A"),
            ({"scan_step": -0.2}, "scan_step is -0.2 A, expected"),
            ({"scan_step": np.inf}, "scan_step is inf, expected a finite number in A"),
            ({"k_pixel": (0.05, 0)}, "k_pixel is 0 1/A, expected 1e-05 to 10 1/A"),
            ({"k_pixel": (-0.05, 0.05)}, "k_pixel is -0.05 1/A, expected"),
            ({"k_pixel": 0.05}, r"k_pixel is 0.05, expected two numbers \(row, column\)"),
            ({"k_pixel": None}, "k_pixel is None, expected two numbers"),
            ({"center": (1, 2, 3)}, r"center is \(1, 2, 3\), expected two numbers"),
            ({"center": (1, np.nan)}, "center is nan, expected a finite number in px"),
            ({"rotation": 400}, "rotation is 400 degrees, expected -360 to 360 degrees"),
            ({"defocus": 1e6}, r"defocus is 1e\+06 A, expected"),
            (
                {"semiangle": None, "argument_names": {"semiangle": "semiangle_cutoff"}},
                "semiangle_cutoff is None, expected a number in mrad",
            ),
        ],
    )
    def test_acquisition(self, options, message):
        with pytest.raises(ValueError, match=f"^{message}"):
            acquisition(**options)

    @pytest.mark.parametrize("center", [None, (12, 10)])
    @pytest.mark.parametrize(
        ("k_pixel", "message"),
        [
            (
                (1.0, 1.0),
                r"force_q is \(1.0, 1.0\) 1/A: the bright-field disk of radius 1.016 1/A covers 3.2 px; check",
            ),
            ((0.005, 0.005), r"force_q is \(0.005, 0.005\) 1/A: .* is larger than the detector of 24 x 20 px; check"),
        ],
    )
    def test_disk_and_detector(self, constant, center, k_pixel, message):
        calibration = acquisition(k_pixel=k_pixel, center=center, argument_names={"k_pixel": "force_q"})
        with pytest.raises(ValueError, match=message):
            reconstruct(counts(), calibration, model=constant)

    @pytest.mark.parametrize("center", [(-1, 10), (12, 19.6), (24, 10), (10, 1e6)])
    def test_center_beside_the_detector(self, constant, center):
        with pytest.raises(ValueError, match=r"center is \(.*\), beside the detector of 24 x 20 px; expected the row"):
            reconstruct(counts(), acquisition(center=center), model=constant)

    def test_model_is_checked_before_data_are_read(self, tmp_path):
        (tmp_path / "not.onnx").write_bytes(b"no model")
        scan = Scan((5, 7, 24, 20))
        with pytest.raises(ValueError, match=r"not\.onnx can't be loaded"):
            reconstruct(scan, acquisition(), model=tmp_path / "not.onnx")
        assert not scan.reads.any()

    def test_loaded_model_on_another_device(self, constant):
        with pytest.raises(RuntimeError, match="device='cuda' was asked for, but the loaded model runs on CPUExec"):
            reconstruct(counts(), acquisition(), model=constant, device="cuda")


class TestBands:
    """How many scan rows are read at once."""

    def rows(self, monkeypatch, chunks, band_rows):
        source = SimpleNamespace(shape=(64, 4, 8, 8), dtype=np.dtype("u2"), chunks=chunks)
        monkeypatch.setattr(engine, "_BAND_BYTES", band_rows * 4 * 8 * 8 * 2)
        monkeypatch.setattr(engine, "_LARGEST_BAND_BYTES", 40 * 4 * 8 * 8 * 2)
        return engine._rows_per_band(source)

    @pytest.mark.parametrize("chunks", [((16, 16, 16, 16), (4,), (8,), (8,)), (16, 2, 8, 8)])
    def test_whole_chunks(self, monkeypatch, chunks):
        assert self.rows(monkeypatch, chunks, 2) == 16
        assert self.rows(monkeypatch, chunks, 33) == 32

    def test_no_chunks_or_too_large_ones(self, monkeypatch):
        assert self.rows(monkeypatch, None, 5) == 5
        assert self.rows(monkeypatch, (64, 4, 8, 8), 5) == 5
