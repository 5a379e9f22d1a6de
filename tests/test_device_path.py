"""The path that keeps arrays on the model's device, run on the CPU: the image of the NumPy path, by the same graphs."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from scipy import sparse
from two_part_models import write_two_parts

from airpi_py4d import Acquisition, device_path, engine, models, optics, reconstruct
from airpi_py4d.device_path import DevicePath, Layout, gathering
from airpi_py4d.model import Model
from airpi_py4d.plan import Plan
from export import reduced
from export.device_graphs import graphs

STITCHED_MODEL = "airpi-3-fast"
K0 = optics.aperture_radius(300e3, 20.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model(write_two_parts(tmp_path_factory.mktemp("two_parts") / "two-parts.onnx"), "cpu")


@pytest.fixture
def both(monkeypatch):
    """A function that reconstructs by NumPy, then with arrays that stay on the device."""

    def images(data, acquisition, model, **options):
        results = []
        for on_device in (False, True):
            monkeypatch.setattr(engine, "_on_device", lambda model, on_device=on_device: on_device)
            results.append(reconstruct(data, acquisition, model=model, **options))
        return results

    return images


def acquisition(shape, scan_step=0.2, radius=6.0, **options):
    center = shape[0] / 2 + 0.3, shape[1] / 2 - 0.2
    return Acquisition(300e3, 20.0, scan_step, (K0 / radius,) * 2, **{"center": center, **options})


def counts(shape=(9, 11, 24, 20), radius=6.0, electrons=20.0):
    rows, columns = np.ogrid[: shape[2], : shape[3]]
    disk = (rows - shape[2] // 2) ** 2 + (columns - shape[3] // 2) ** 2 <= radius**2
    scan = 1 + 0.1 * np.arange(shape[0])[:, None, None, None] + 0.03 * np.arange(shape[1])[:, None, None]
    return np.random.default_rng(0).poisson(scan * electrons * (0.01 + disk)).astype(np.uint16)


def difference(result, expected):
    """Relative L2."""
    return np.linalg.norm(result - expected) / np.linalg.norm(expected)


def assert_same(results, limit=1e-5):
    expected, result = results
    assert difference(result.phase, expected.phase) < limit
    np.testing.assert_array_equal(np.isinf(result.phase_error), np.isinf(expected.phase_error))
    measured = np.isfinite(expected.phase_error)
    assert difference(result.phase_error[measured], expected.phase_error[measured]) < limit
    np.testing.assert_allclose(
        result.provenance["electrons_per_pattern"], expected.provenance["electrons_per_pattern"], rtol=1e-5
    )
    assert np.std(expected.phase) > 1e-3


class TestImage:
    @pytest.mark.parametrize(
        ("detector", "radius", "options"),
        [
            ((24, 20), 6.0, {}),
            ((24, 20), 6.0, {"rotation": 25.0, "transpose": True, "gain": 2.5}),
            ((64, 64), 12.0, {"background": 0.02}),
            ((96, 128), 24.0, {"ellipse": (1.1, 1.0, 20.0)}),
        ],
    )
    def test_detectors(self, both, model, detector, radius, options):
        here = acquisition(detector, radius=radius, **options)
        assert_same(both(counts((6, 7, *detector), radius), here, model))

    @pytest.mark.parametrize("step", [0.09, 0.5, (0.1, 0.35), (0.5, 0.31), 2.0])
    def test_steps(self, both, model, step):
        assert_same(both(counts(), acquisition((24, 20), step), model))

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "float32", "float64", ">u2"])
    def test_types(self, both, model, dtype):
        assert_same(both(counts().astype(dtype), acquisition((24, 20)), model))

    def test_missing(self, both, model):
        """NaN, empty patterns, and NaN in pixels that are known as bad."""
        data = counts((13, 14, 24, 20)).astype(np.float32)
        bad = np.zeros((24, 20), bool)
        bad[0, 0] = bad[11, 9] = bad[12:14, 10] = True
        data[..., bad] = np.nan
        data[3:9, 4:11] = 0
        data[10, 2, 5, 5] = np.nan
        with pytest.warns(UserWarning, match="43 of 182 patterns are missing"):
            results = both(data, acquisition((24, 20), 0.5, bad_pixels=bad), model)
        assert_same(results)
        assert np.isinf(results[1].phase_error).any()

    @pytest.mark.parametrize(
        "options", [{"sum_neighbours": 3}, {"sum_neighbours": 3, "stride": 2}, {"stride": 3}, {"oversample": 5}]
    )
    def test_options(self, both, model, options):
        assert_same(both(counts(), acquisition((24, 20)), model, **options))

    def test_descan(self, both, model):
        descan = np.random.default_rng(2).uniform(-1, 1, (9, 11, 2))
        assert_same(both(counts(), acquisition((24, 20), descan=descan), model))

    @pytest.mark.parametrize("batch", [1, 20, 64, 200])
    @pytest.mark.parametrize("image_rows", [1, 9, 256])
    def test_batches(self, both, model, monkeypatch, batch, image_rows):
        """Parts of a row, single rows, several; sums of one batch and of more; patterns that are read in parts."""
        monkeypatch.setattr(device_path, "_BATCH", batch)
        monkeypatch.setattr(device_path, "_SUM_ROWS", image_rows)
        monkeypatch.setattr(engine, "_BAND_BYTES", 5 * 24 * 20 * 2)
        monkeypatch.setattr(engine, "_LARGEST_BAND_BYTES", 0)
        assert_same(both(counts((9, 47, 24, 20)), acquisition((24, 20), 0.5), model))

    def test_bounded_memory(self, both, model, monkeypatch):
        monkeypatch.setattr(engine, "_BAND_BYTES", 1)
        monkeypatch.setattr("airpi_py4d.phase_image._BAND_BYTES", 0)
        monkeypatch.setattr(device_path, "_SUM_ROWS", 40)
        assert_same(both(counts((70, 5, 24, 20)), acquisition((24, 20)), model))

    @pytest.mark.parametrize(
        ("detector", "radius", "bad"),
        [((64, 64), 12.0, False), ((127, 90), 32.0, False), ((131, 128), 60.0, False), ((128, 130), 50.0, True)],
    )
    def test_shipped(self, both, detector, radius, bad):
        data = counts((10, 12, *detector), radius)
        bad_pixels = (np.random.default_rng(3).random(detector) < 0.003) & bad
        here = acquisition(detector, radius=radius, bad_pixels=bad_pixels)
        assert_same(both(data, here, Model(STITCHED_MODEL, "cpu", 1)), 1e-3)

    @pytest.mark.parametrize(("radius", "factor"), [(20.0, 1), (32.0, 2), (60.0, 4)])
    def test_small_pixels_are_summed_on_the_device(self, radius, factor):
        model, data, here = Model(STITCHED_MODEL, "cpu", 1), counts((4, 4, 131, 128), radius), acquisition((131, 128))
        plan = Plan.of(replace(here, k_pixel=(K0 / radius,) * 2), model.contract, data)
        path = DevicePath(model, plan, data.dtype)
        batch = next(path.batches([(row, 0, patterns, np.ones(4, bool)) for row, patterns in enumerate(data)]))
        assert batch.patterns.shape()[1] == -(-131 // factor) * factor * 128
        factors, matrix, _ = plan.resampling().sums_and_matrix()
        assert factors == (factor, factor)
        assert matrix.nnz < 8 * matrix.shape[1]

    def test_float16(self, both, tmp_path):
        """Of the network's weights and products; sums stay in float32."""
        onnx.save(reduced.float16(onnx.load(models.find(STITCHED_MODEL))), tmp_path / "half.onnx")
        data, here = counts((10, 12, 64, 64), 12.0), acquisition((64, 64), radius=12.0)
        expected, _ = both(data, here, Model(STITCHED_MODEL, "cpu", 1))
        _, result = both(data, here, Model(tmp_path / "half.onnx", "cpu", 1))
        assert 1e-6 < difference(result.phase, expected.phase) < 1e-2

    def test_too_few_electrons_are_refused(self, both, tmp_path):
        path = write_two_parts(tmp_path / "limited.onnx", domain={"electrons_per_pattern": [1e5, 1e7]})
        with pytest.raises(ValueError, match=r"electrons per pattern are .*far outside"):
            both(counts(), acquisition((24, 20)), Model(path, "cpu"))


class TestChoice:
    def test_by_the_models_memory(self):
        chosen = [engine._on_device(SimpleNamespace(memory=memory)) for memory in (("cpu", 0), ("cuda", 1))]
        assert chosen == [False, True]

    def test_cpu(self, model):
        assert model.memory == ("cpu", 0)


class TestTraffic:
    def test_patterns_cross_once(self, model, monkeypatch):
        """As they were counted; nothing but electrons comes back before the sums."""
        data, here = counts((8, 31, 24, 20)), acquisition((24, 20))
        plan = Plan.of(here, model.contract, data)
        path = DevicePath(model, plan, data.dtype)
        down, up = [], []
        to_device, to_host = path._on_device, onnxruntime.OrtValue.numpy
        monkeypatch.setattr(path, "_on_device", lambda array: up.append(array) or to_device(array))
        monkeypatch.setattr(onnxruntime.OrtValue, "numpy", lambda value: down.append(value.shape()) or to_host(value))
        parts = ((row, 0, patterns, np.ones(31, bool)) for row, patterns in enumerate(data))
        sums = [path(batch) for batch in path.batches(parts)]
        layout = path.layout
        assert [array.dtype for array in up] == [np.uint16, bool]
        assert sum(array.nbytes for array in up) == (2 * 24 * 20 + 1) * layout.rows * layout.columns
        assert down == [[layout.rows * layout.columns], list(layout.sums_shape)]
        assert layout.rows == 8
        assert layout.columns < 62
        assert sums[0].features.shape[0] == model.contract.features + 2

    def test_wide_scan(self, model):
        """Batches of a wide scan are parts of a row; its sums stay small."""
        data = np.broadcast_to(np.uint8(1), (4096, 4096, 24, 20))
        plan = Plan.of(acquisition((24, 20)), model.contract, data)
        layout = Layout.of(plan.scan_shape, plan.oversample, plan.patch_windows, 12, 1024)
        assert layout.rows == 1
        assert 900 < layout.columns <= 1024
        assert 4 * np.prod(layout.sums_shape) < 100e6


class TestGraphs:
    def test_are_those_of_the_export(self):
        folder = Path(device_path.__file__).parent / "graphs"
        made = {f"{name}.onnx": graph.SerializeToString(deterministic=True) for name, graph in graphs().items()}
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == made

    def test_gathering(self):
        matrix = sparse.random(40, 60, 0.1, "csr", np.float32, np.random.default_rng(0))
        places, weights = gathering(matrix)
        values = np.random.default_rng(1).random(60).astype(np.float32)
        values[np.setdiff1d(np.arange(60), matrix.indices)] = np.nan
        np.testing.assert_allclose((values[places] * weights).sum(0), matrix @ np.nan_to_num(values), rtol=1e-5)
