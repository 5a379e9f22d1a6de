"""Models that stitch features: the equations written out, the image network in tiles, and the engine around them."""

import json
from dataclasses import replace
from typing import ClassVar

import numpy as np
import onnx
import pytest
from two_part_models import FEATURES, MARGIN, encoder, unet, write_two_parts

from airpi_py4d import Acquisition, engine, models, optics, phase_image, reconstruct
from airpi_py4d.feature_stitching import FeatureStitcher
from airpi_py4d.model import Model
from airpi_py4d.phase_image import PhaseImage
from airpi_py4d.plan import Plan
from export.self_contained import self_contained
from export.two_parts import join

K0 = optics.aperture_radius(300e3, 20.0)
PATCH_PIXEL = 12 / 64 / K0


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_two_parts(tmp_path_factory.mktemp("two_parts") / "two-parts.onnx")


@pytest.fixture(scope="module")
def model(path):
    return Model(path, "cpu")


def acquisition(scan_step=0.2, radius=6.0, **options):
    return Acquisition(300e3, 20.0, scan_step, (K0 / radius,) * 2, **{"center": (12, 10), **options})


def counts(shape=(9, 11, 24, 20), electrons=20.0):
    rows, columns = np.ogrid[: shape[2], : shape[3]]
    disk = (rows - shape[2] // 2) ** 2 + (columns - shape[3] // 2) ** 2 <= 36
    scan = 1 + 0.1 * np.arange(shape[0])[:, None, None, None] + 0.03 * np.arange(shape[1])[:, None, None]
    return np.random.default_rng(0).poisson(scan * electrons * (0.01 + disk)).astype(np.uint16)


def written_out(patches, electrons, measured, step, oversample):
    """The equations, pixel by pixel and position by position."""
    length = patches.shape[-1] * PATCH_PIXEL
    pixel = np.divide(step, oversample)
    shape = [(n - 1) * count + 1 for n, count in zip(measured.shape, oversample, strict=True)]
    sums, electron_sum, covered = np.zeros((patches.shape[2], *shape)), np.zeros(shape), np.zeros(shape)
    places = [np.arange(n) * size for n, size in zip(shape, pixel, strict=True)]
    for row, column in np.argwhere(measured):
        y, x = (place - n * s for place, n, s in zip(places, (row, column), step, strict=True))
        u = np.outer(
            np.where(abs(y) < length / 2 - 1e-9, np.cos(np.pi * y / length) ** 2, 0),
            np.where(abs(x) < length / 2 - 1e-9, np.cos(np.pi * x / length) ** 2, 0),
        )
        pixels = np.arange(patches.shape[-1]) - patches.shape[-1] // 2
        down, right = (np.sinc(t[:, None] / PATCH_PIXEL - pixels) for t in (y, x))
        sums += electrons[row, column] * u * (down @ patches[row, column] @ right.T)
        electron_sum += electrons[row, column] * u
        covered += u
    with np.errstate(invalid="ignore", divide="ignore"):
        features = np.where(electron_sum > 0, sums / electron_sum, 0)
        level = np.where(covered > 0, np.log10(np.maximum(electron_sum / covered, 1)) / 7, 0)
    coverage = covered * np.prod(np.multiply(step, K0)) / ((length * K0) ** 2 / 4)
    return np.concatenate([features, np.minimum(level, 1)[None], coverage[None]])


class TestStitching:
    @pytest.mark.parametrize(
        ("step", "oversample"),
        [
            ((0.2, 0.2), (2, 2)),
            ((0.09, 0.09), (1, 1)),
            ((0.5, 0.31), (3, 2)),
            ((0.1, 0.25), (1, 4)),
            ((1.2 / K0, 1.2 / K0), (1, 3)),
            ((1.5 / K0, 0.75 / K0), (1, 1)),  # the window ends at the next position
            ((2 / K0, 0.2 / K0), (1, 1)),  # gaps between the rows
        ],
    )
    def test_equations(self, step, oversample):
        rng = np.random.default_rng(1)
        patches = rng.normal(size=(5, 23, FEATURES, 16, 16)).astype(np.float32)
        electrons = rng.uniform(0, 300, (5, 23)).astype(np.float32)
        measured = rng.random((5, 23)) > 0.2
        electrons[2, 3] = 0
        given = patches.copy()
        given[~measured] = np.nan
        stitcher = FeatureStitcher((5, 23), acquisition(step), 16, PATCH_PIXEL, oversample, FEATURES)
        for row in (3, 0, 4, 2, 1):
            for first, stop in ((0, 10), (10, 23)):
                here = row, slice(first, stop)
                stitcher.add_row(row, first, given[here], measured[here], electrons[here])
        expected = written_out(patches, electrons, measured, step, oversample)
        rows = range(expected.shape[1])
        result = stitcher.feature_image(rows, range(expected.shape[2]))
        # where a window is all but 0, its mean is of rounding
        seen = expected[-1] > 1e-6 * expected[-1].max()
        np.testing.assert_allclose(result[:, seen], expected[:, seen], atol=2e-3)
        np.testing.assert_allclose(result[-2:, seen], expected[-2:, seen], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(stitcher.measured(rows, range(expected.shape[2]))[seen], expected[-2][seen] > 0)
        assert np.median(abs(result[:, seen] - expected[:, seen])) < 1e-6

    def test_coverage(self):
        """1 in the middle of a complete scan, 1/2 at its edges, 1/4 in its corners."""
        stitcher = FeatureStitcher((41, 43), acquisition(0.1 / K0), 16, PATCH_PIXEL, (1, 1), 1)
        for row in range(41):
            stitcher.add_row(row, 0, np.ones((43, 1, 16, 16), "f"), np.ones(43, bool), np.full(43, 1e4, "f"))
        features, level, coverage = stitcher.feature_image(range(41), range(43))
        np.testing.assert_allclose(level, 4 / 7, rtol=1e-6)
        assert coverage[20, 21] == pytest.approx(1, rel=1e-5)
        assert coverage[0, 21] == pytest.approx(0.5 + 0.5 * 0.1 / 1.5, rel=1e-5)  # the edge's positions count whole
        assert coverage[40, 42] == pytest.approx((0.5 + 0.5 * 0.1 / 1.5) ** 2, rel=1e-5)
        assert features[20, 21] == pytest.approx(1, abs=0.05)

    def test_merge(self):
        """Parts of some rows each, in any order."""
        rng = np.random.default_rng(1)
        patches = rng.normal(size=(7, 6, 2, 16, 16)).astype(np.float32)

        def stitcher(rows, place=0):
            made = FeatureStitcher((len(rows), 6), acquisition(), 16, PATCH_PIXEL, (2, 3), 2)
            for row in rows:
                made.add_row(row - rows[0], 0, patches[row], np.ones(6, bool), np.full(6, 9, np.float32))
            return made

        whole, merged = stitcher(range(7)), FeatureStitcher((7, 6), acquisition(), 16, PATCH_PIXEL, (2, 3), 2)
        assert not merged.changes()
        for rows in (range(5, 7), range(2), range(2, 5)):
            merged.merge(stitcher(rows), rows[0])
        rows, columns = range(13), range(16)
        np.testing.assert_allclose(merged.feature_image(rows, columns), whole.feature_image(rows, columns), atol=1e-4)
        assert merged.changes() == rows


class TestTiles:
    """The image network in tiles gives the result of the whole image."""

    @pytest.mark.parametrize("shape", [(41, 67), (64, 64), (3, 5), (97, 30), (33, 101)])
    @pytest.mark.parametrize("tile", [16, 20, 512])
    @pytest.mark.parametrize("step", [1, 7])
    def test_whole_image(self, model, monkeypatch, shape, tile, step):
        monkeypatch.setattr(phase_image, "LARGEST_TILE", tile)
        rng = np.random.default_rng(2)
        image = PhaseImage(shape, MARGIN, FEATURES + 2)
        held = image.band + 2 * MARGIN + 9
        stitcher = FeatureStitcher(shape, acquisition(0.5), 16, PATCH_PIXEL, (1, 1), FEATURES, held)
        everything = FeatureStitcher(shape, acquisition(0.5), 16, PATCH_PIXEL, (1, 1), FEATURES)
        geometry = np.array([[0.2, 0.5, 0, 0, 1]], np.float32)
        measured = rng.random(shape) > 0.1
        for row in range(shape[0]):
            patches = rng.normal(size=(shape[1], FEATURES, 16, 16)).astype(np.float32)
            electrons = rng.uniform(1, 9, shape[1]).astype(np.float32)
            for each in (stitcher, everything):
                each.add_row(row, 0, patches, measured[row], electrons)
            if row % step == 0 or row == shape[0] - 1:
                image.advance(lambda features: model.image(features, geometry), stitcher, stitcher.complete(row + 1))
        features = everything.feature_image(*map(range, shape))
        padded = np.zeros((1, FEATURES + 2, *(-(-n // 4) * 4 for n in shape)), np.float32)
        padded[0, :, : shape[0], : shape[1]] = features
        phase, error = (each[: shape[0], : shape[1]] for each in model.image(padded, geometry))
        assert everything.measured(*map(range, shape)).all()
        np.testing.assert_allclose(image.phase, phase, atol=2e-5)
        np.testing.assert_allclose(image.error, error, atol=2e-5)
        np.testing.assert_allclose(image.confidence, np.exp(-(error**2) / 2), atol=2e-5)
        assert np.std(phase) > 0.1
        assert shape[0] < 60 or stitcher._sum.nbytes < everything._sum.nbytes or tile == 512

    def test_the_margin_counts(self, model, monkeypatch):
        """A smaller one than the network's shows at the tiles' edges."""
        monkeypatch.setattr(phase_image, "LARGEST_TILE", 16)
        stitcher = FeatureStitcher((64, 64), acquisition(0.5), 16, PATCH_PIXEL, (1, 1), FEATURES)
        rng = np.random.default_rng(3)
        for row in range(64):
            patches = rng.normal(size=(64, FEATURES, 16, 16)).astype(np.float32)
            stitcher.add_row(row, 0, patches, np.ones(64, bool), np.ones(64, np.float32))
        images = [PhaseImage((64, 64), margin, FEATURES + 2) for margin in (4, MARGIN, MARGIN + 8)]
        for image in images:
            image.advance(lambda features: model.image(features, np.zeros((1, 5), np.float32)), stitcher, 64)
        assert np.abs(images[0].phase - images[1].phase).max() > 1e-3
        np.testing.assert_allclose(images[1].phase, images[2].phase, atol=2e-5)


class TestEngine:
    def test_result(self, model):
        result = reconstruct(counts(), acquisition(), model=model)
        assert result.phase.shape == result.confidence.shape == result.object.shape == result.phase_error.shape
        assert result.phase.dtype == result.phase_error.dtype == np.float32
        assert result.phase.min() < -np.pi  # not wrapped
        np.testing.assert_allclose(result.confidence, np.exp(-(result.phase_error**2) / 2), atol=1e-6)
        np.testing.assert_allclose(result.object, result.confidence * np.exp(1j * result.phase), atol=1e-6)
        assert result.provenance["model"]["name"] == "two parts"
        report = str(result.report())
        assert "phases fold" not in report
        assert "error of the phase" in report

    def test_image_geometry(self, model):
        here = acquisition((0.1, 0.3), defocus=30.0, spherical_aberration=1e5)
        plan = Plan.of(here, model.contract, counts(), 3, stride=2)
        pixel, *geometry, radius = plan.image_geometry[0]
        assert radius == pytest.approx(K0)
        step = np.sqrt(0.2 * 0.6) * K0
        assert pixel == pytest.approx(step / 3)
        np.testing.assert_allclose(geometry, plan.geometry(1)[0])
        wavelength = optics.wavelength(300e3)
        expected = step, -np.pi * wavelength * K0**2 * 30, np.pi / 2 * 1e5 * wavelength**3 * K0**4
        np.testing.assert_allclose(geometry, expected, rtol=1e-5)

    @pytest.mark.parametrize(("patterns", "band"), [(1, 1), (4, 2), (11, 3), (40, 100), (1000, 100)])
    def test_batches_and_bands(self, model, monkeypatch, patterns, band):
        expected = reconstruct(counts(), acquisition(), model=model)
        monkeypatch.setattr(engine, "_BAND_BYTES", band * counts()[0].nbytes)
        monkeypatch.setattr(engine, "_BATCH", patterns)
        result = reconstruct(counts(), acquisition(), model=model)
        np.testing.assert_allclose(result.phase, expected.phase, atol=1e-5)
        np.testing.assert_allclose(result.phase_error, expected.phase_error, atol=1e-5)

    @pytest.mark.parametrize("oversample", [1, 4])
    def test_bounded_memory(self, model, monkeypatch, oversample):
        """Bands of image rows as scan rows come, and the image of the whole at once."""
        data = counts((70, 5, 24, 20))
        expected = reconstruct(data, acquisition(), model=model, oversample=oversample)
        monkeypatch.setattr(phase_image, "_BAND_BYTES", 0)
        result = reconstruct(data, acquisition(), model=model, oversample=oversample)
        np.testing.assert_allclose(result.phase, expected.phase, atol=1e-5)

    def test_wide_scan(self, model):
        """Of the features of a scan of 4096 columns, and an image of 16381, a band is held."""
        data = np.broadcast_to(np.uint8(1), (300, 4096, 24, 20))
        contract = replace(model.contract, features=12, margin=40)
        plan = Plan.of(acquisition(), contract, data, 4)
        stitcher = plan.feature_stitcher(300, plan.phase_image().band)
        assert stitcher._sum.nbytes < 250e6
        assert plan.feature_stitcher(300)._sum.nbytes > 1e9  # not touched

    @pytest.mark.parametrize(("neighbours", "stride"), [(3, 1), (3, 2), (1, 3)])
    def test_data_repetition(self, model, neighbours, stride):
        data, half = counts(), neighbours // 2
        result = reconstruct(data, acquisition(), model=model, sum_neighbours=neighbours, stride=stride)
        summed = np.empty((-(-9 // stride), -(-11 // stride), 24, 20))
        for i, j in np.ndindex(summed.shape[:2]):
            rows = slice(max(0, i * stride - half), i * stride + half + 1)
            columns = slice(max(0, j * stride - half), j * stride + half + 1)
            summed[i, j] = data[rows, columns].mean((0, 1)) * neighbours**2
        expected = reconstruct(summed, acquisition(0.2 * stride), model=model)
        np.testing.assert_allclose(result.phase, expected.phase, atol=1e-4)

    def test_missing(self, model):
        data = counts((13, 14, 24, 20))
        data[3:10, 4:11] = 0
        with pytest.warns(UserWarning, match="49 of 182 patterns are missing"):
            result = reconstruct(data, acquisition(0.5), model=model)
        down, right = result.provenance["oversample"]
        middle = 6 * down, 7 * right
        assert result.confidence[middle] == result.phase[middle] == 0
        assert np.isinf(result.phase_error[middle])
        assert (result.confidence[0] > 0).all()
        assert np.isfinite(result.phase).all()
        assert "not measured" in result.confidence_summary()
        assert "nan" not in str(result.report())

    def test_domain(self, model, tmp_path):
        """The steps themselves count, as there are no kernels; and the electrons."""
        limits = {"relative_scan_step": [0.3, 0.5], "electrons_per_pattern": [1e5, 1e7]}
        path = write_two_parts(tmp_path / "limited.onnx", domain=limits)
        with pytest.warns(UserWarning, match="outside of") as caught:
            result = reconstruct(counts(), acquisition((0.2, 0.6)), model=path, device="cpu", strict=False)
        messages = [str(each.message) for each in caught]
        assert messages == result.provenance["outside_training_domain"]
        assert messages[0].startswith("scan_step is (0.2, 0.6) A, up to 0.6095 lambda / alpha, outside of 0.3 to 0.5")
        assert messages[1].startswith("The electrons per pattern are")
        with pytest.raises(ValueError, match=r"electrons per pattern are .*far outside"):
            reconstruct(counts(), acquisition(0.4), model=path, device="cpu")

    def test_no_self_contained_file(self, path):
        with pytest.raises(ValueError, match="gives stitched features"):
            self_contained(path.read_bytes())


class TestModel:
    def test_registry(self, path, monkeypatch):
        monkeypatch.setenv("AIRPI_MODELS", str(path.parent))
        assert [entry.problem for entry in models.list() if entry.name == "two-parts"] == [""]
        description = str(models.describe("two-parts"))
        assert "projected phase" in description
        for name in ("patterns", "image_features", "image_geometry", "feature_patch", "phase", "phase_error"):
            assert f" {name} [" in description
        assert len(description) < 6000

    def test_contract(self, model):
        contract = model.contract
        assert (contract.features, contract.margin, contract.kernel_side) == (FEATURES, MARGIN, 1)
        assert (contract.object_pixels, contract.geometry_values) == (16, 3)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("image_network", None, r"incomplete airpi metadata: KeyError\('image_network'\).*export.two_parts"),
            ("image_network", "no base64!", "incomplete airpi metadata: Error.*export.two_parts"),
            ("image_network", "abcd", "the image network of model .*can't be loaded by ONNX Runtime"),
            ("output", '{"kind": "stitched_features", "pixels": 16, "margin": 8}', "'features'"),
            ("output", '{"kind": "stitched_features", "pixels": 16, "features": 3}', "'margin'"),
            ("output", '{"kind": "stitched_features", "pixels": 16, "features": 3, "margin": 0}', "margin is 0"),
            ("grid", '{"kind": "whole_detector", "pixels": 64}', "'whole_detector' grid and gives 'stitched_features'"),
            (
                "output",
                '{"kind": "stitched_features", "pixels": 16, "features": 4, "margin": 8}',
                r"the image network of model .* has the inputs .*; its metadata promise float32 image_features "
                r"\(1, 6, h, w\), for any h and w, and image_geometry \(1, 4\) or \(1, 5\)",
            ),
            ("grid", '{"kind": "aperture", "pixels": 48, "aperture_radius": 9}', r"float32 patterns \(n, 48, 48\)"),
        ],
    )
    def test_refused(self, path, tmp_path, key, value, message):
        changed = onnx.load(path)
        entries = {entry.key: entry.value for entry in changed.metadata_props}
        del changed.metadata_props[:]
        for name, text in {**entries, key: value}.items():
            if text is not None:
                changed.metadata_props.add(key=name, value=text)
        onnx.save(changed, tmp_path / "changed.onnx")
        with pytest.raises(ValueError, match=message):
            Model(tmp_path / "changed.onnx", "cpu")

    def test_four_numbers_of_image_geometry(self, model, tmp_path):
        four = Model(write_two_parts(tmp_path / "four.onnx", (encoder(), unet(values=4))), "cpu")
        features, geometry = np.ones((1, FEATURES + 2, 8, 8), np.float32), np.array([[0.1, 0.2, 1, 2, 0]], np.float32)
        np.testing.assert_array_equal(four.image(features, geometry), model.image(features, geometry))
        geometry[0, 4] = 3
        np.testing.assert_array_equal(
            four.image(features, geometry), four.image(features, np.float32([[0.1, 0.2, 1, 2]]))
        )
        assert np.abs(np.subtract(four.image(features, geometry), model.image(features, geometry))).max() > 1e-3

    def test_output(self, model):
        changed = Model.__new__(Model)
        changed.contract, changed._session = model.contract, model._image_session
        changed._session = type("Session", (), {"run": lambda *_: [np.zeros((2, 16, 16, 2), np.float32)]})()
        with pytest.raises(
            ValueError, match=r"output of shape \(2, 16, 16, 2\), its metadata promise \(n, 3, 16, 16\)"
        ):
            changed(np.zeros((2, 64, 64), np.float32), np.zeros((2, 3), np.float32))


class TestJoin:
    METADATA: ClassVar = {"name": "mine", "version": "1", "domain": {"energy": [3e4, 3e5]}}

    def test_metadata(self):
        joined = join(encoder(), unet(), 12, {**self.METADATA, "license": "GPL-3.0-or-later"})
        metadata = {entry.key: entry.value for entry in joined.metadata_props}
        output = json.loads(metadata["output"])
        assert {key: output[key] for key in ("kind", "features", "pixels", "margin")} == {
            "kind": "stitched_features",
            "features": FEATURES,
            "pixels": 16,
            "margin": 12,
        }
        assert metadata["label"] == "projected phase"
        assert json.loads(metadata["domain"]) == self.METADATA["domain"]
        assert metadata["license"] == "GPL-3.0-or-later"

    def test_refused(self):
        other = unet(FEATURES + 1)
        with pytest.raises(ValueError, match=r"image_network has the inputs .*expected image_features \(1, 5, h, w\)"):
            join(encoder(), other, 12, self.METADATA)
        with pytest.raises(ValueError, match="metadata lack domain, version"):
            join(encoder(), unet(), 12, {"name": "mine"})
        with pytest.raises(ValueError, match="margin is 0 px"):
            join(encoder(), unet(), 0, self.METADATA)
        with pytest.raises(ValueError, match=r"encoder has the outputs .*expected feature_patch"):
            join(unet(), unet(), 12, self.METADATA)
        wrong = encoder()
        wrong.graph.input[1].type.tensor_type.shape.dim[1].dim_value = 5
        with pytest.raises(ValueError, match=r"encoder has the inputs .*geometry \(n, 3\)"):
            join(wrong, unet(), 12, self.METADATA)
        wrong = unet()
        wrong.graph.output[0].name = "angle"
        with pytest.raises(ValueError, match="expected phase and phase_error"):
            join(encoder(), wrong, 12, self.METADATA)
