"""Self-contained models against the engine's own path, and the examples that use them without this package."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from oracle import KERNEL_MODEL, METADATA, write_oracle
from scipy.special import j1

from airpi_py4d import Acquisition, models, optics, reconstruct
from airpi_py4d.demo import demo_path
from airpi_py4d.model import Model
from airpi_py4d.offsets import PatchOffsets
from airpi_py4d.patterns import Resampling
from airpi_py4d.plan import relative_geometry
from airpi_py4d.stitching import probe_weights
from export import self_contained as module

EXAMPLES = Path(module.__file__).parents[1] / "examples"
NPM_PACKAGE = "onnxruntime-node@1.22.0"
DEMO = Acquisition(80e3, 25.0, 0.25, (0.05, 0.05), center=(31, 31))


@pytest.fixture(scope="module")
def shipped():
    return models.find(KERNEL_MODEL)


@pytest.fixture(scope="module")
def path(shipped, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "self_contained.onnx"
    module.main([str(shipped), str(path)])
    return path


@pytest.fixture(scope="module")
def graph(path):
    return onnx.load(path)


@pytest.fixture(scope="module")
def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def scan():
    """12 x 14 positions of the demo at the edge of the second layer."""
    found = []
    with h5py.File(demo_path()) as file:
        file.visititems(lambda _, entry: found.append(entry) if getattr(entry, "ndim", 0) == 4 else None)
        return found[0][24:36, 30:44]


def inputs(kernels, acquisition):
    """What the graph takes."""
    scalars = {
        "energy": acquisition.energy,
        "semiangle": acquisition.semiangle,
        "k_pixel": acquisition.k_pixel[0],
        "scan_step": acquisition.scan_step[0],
        "defocus": acquisition.defocus,
        "spherical_aberration": acquisition.spherical_aberration,
    }
    feeds = {name: np.float32([value]) for name, value in scalars.items()}
    return {**feeds, "center": np.float32(acquisition.center), "patterns": np.float32(kernels)}


def as_complex(pairs):
    return pairs[..., 0] + 1j * pairs[..., 1]


def kernels_of(patterns):
    """The kernels of the inner positions of a scan."""
    rows, columns = (n - 2 for n in patterns.shape[:2])
    return np.stack([patterns[i : i + 3, j : j + 3] for i in range(rows) for j in range(columns)])


def binned(scan, size):
    rows, columns = (n // size for n in scan.shape[2:])
    whole = scan[:, :, : rows * size, : columns * size].astype(np.float32)
    return whole.reshape(*scan.shape[:2], rows, size, columns, size).sum((3, 5))


class TestGraph:
    def test_checked(self, graph):
        onnx.checker.check_model(graph, full_check=True)
        onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True)
        assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 17)]
        assert {node.domain for node in graph.graph.node} == {""}
        assert graph.doc_string
        assert graph.graph.doc_string

    def test_inputs_and_outputs(self, graph):
        def shapes(entries):
            return {
                entry.name: [size.dim_param or size.dim_value for size in entry.type.tensor_type.shape.dim]
                for entry in entries
            }

        scalars = ("energy", "semiangle", "k_pixel", "scan_step", "defocus", "spherical_aberration")
        assert shapes(graph.graph.input) == {
            "patterns": ["batch", 3, 3, "rows", "columns"],
            **{name: [1] for name in scalars},
            "center": [2],
        }
        assert shapes(graph.graph.output) == {
            "object_patch": ["batch", 16, 16, 2],
            "exit_wave": ["batch", 16, 16, 2],
            "probe": [16, 16, 2],
            "weights": [16, 16],
            "patch_pixel_size": [1],
        }
        for entry in (*graph.graph.input, *graph.graph.output):
            assert entry.type.tensor_type.elem_type == TensorProto.FLOAT
            assert entry.doc_string.startswith("[")
        assert "does not rotate" in graph.graph.input[0].doc_string

    def test_metadata(self, graph, shipped):
        metadata = {entry.key: entry.value for entry in graph.metadata_props}
        content = shipped.read_bytes()
        before = models.read_metadata(content, "shipped")
        replaced = {"inputs", "grid", "output"}
        assert {key: metadata[key] for key in before if key not in replaced} == {
            key: value for key, value in before.items() if key not in replaced
        }
        assert set(metadata) - set(before) == {"outputs", "wraps"}
        assert list(json.loads(metadata["inputs"])) == [entry.name for entry in graph.graph.input]
        assert list(json.loads(metadata["outputs"])) == [entry.name for entry in graph.graph.output]
        wrapped = json.loads(metadata["wraps"])
        named = {name: before[name] for name in ("name", "version")}
        assert wrapped == {**named, "sha256": hashlib.sha256(content).hexdigest()}

    def test_described(self, path, shipped):
        text = " ".join(str(models.describe(path)).split())
        assert "k_pixel [1/A], 1: size of a detector pixel" in text
        assert f"wraps {KERNEL_MODEL}, version {models.describe(shipped).metadata['version']}" in text
        assert "weights [1], 16 x 16" in text

    def test_reference_implementation(self, graph, session, scan):
        acquisition = Acquisition(
            80e3, 25.0, 0.25, (0.05, 0.05), center=(20.4, 18.7), defocus=15.0, spherical_aberration=1e4
        )
        feeds = inputs(kernels_of(scan[:3, :4, 10:50, 12:48]), acquisition)
        expected = ReferenceEvaluator(graph).run(None, feeds)
        for one, other in zip(session.run(None, feeds), expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


class TestAgainstTheEngine:
    @pytest.mark.parametrize(
        ("binning", "rows", "columns", "changes"),
        [
            (1, 63, 63, {}),
            (1, 63, 50, {"center": (31.3, 30.8), "defocus": 30.0}),
            (1, 48, 63, {"k_pixel": (0.043, 0.043), "defocus": -20.0, "spherical_aberration": 1e4}),
            (1, 63, 63, {"energy": 300e3, "semiangle": 9.0, "k_pixel": (0.013, 0.013), "scan_step": 1.0}),
            (2, 31, 31, {"k_pixel": (0.1, 0.1), "center": (15.0, 15.25)}),
            (4, 15, 15, {"k_pixel": (0.2, 0.2), "center": (7.4, 7.5)}),
        ],
    )
    def test_object_patch(self, session, shipped, scan, binning, rows, columns, changes):
        given = {"energy": 80e3, "semiangle": 25.0, "scan_step": 0.25, "k_pixel": (0.05, 0.05), "center": (31, 31)}
        acquisition = Acquisition(**{**given, **changes})
        patterns = binned(scan[:6, :7], binning)[:, :, :rows, :columns]
        model = Model(shipped, "cpu")
        side = model.contract.grid_pixels
        grid_k_pixel = acquisition.aperture_radius / model.contract.aperture_pixels
        resampling = Resampling(patterns.shape[2:], acquisition, side, grid_k_pixel)
        resampled = resampling(patterns.reshape(-1, *patterns.shape[2:])).reshape(*patterns.shape[:2], side, side)
        kernels = kernels_of(resampled)
        expected = model(kernels, np.tile(np.float32(relative_geometry(acquisition)), (len(kernels), 1)))
        assert np.abs(expected - 1).max() > 0.1
        patch, exit_wave, probe, weights, size = session.run(None, inputs(kernels_of(patterns), acquisition))
        np.testing.assert_allclose(as_complex(patch), expected, atol=1e-4)
        np.testing.assert_allclose(as_complex(exit_wave), expected * as_complex(probe), atol=1e-4)
        assert size == pytest.approx(1 / (side * grid_k_pixel), rel=1e-6)

        pixel = 1 / (side * grid_k_pixel)
        wave = optics.probe(
            128,
            pixel,
            acquisition.energy,
            acquisition.semiangle,
            acquisition.defocus,
            acquisition.spherical_aberration,
        )[56:72, 56:72]
        np.testing.assert_allclose(as_complex(probe), wave, atol=0.015 * np.abs(wave).max())
        engine = probe_weights(acquisition, (pixel, pixel), 0.75 * 16 * pixel)
        margins = [(8 - n // 2, 7 - n // 2) for n in engine.shape]
        np.testing.assert_allclose(weights, np.pad(engine, margins), atol=0.015 * engine.max())
        assert weights.sum() == pytest.approx(1, abs=1e-5)

    def test_in_focus_the_probe_is_an_airy_disk(self, session, scan):
        """psi(r) = p sqrt(pi) k0 2 J1(x) / x, x = 2 pi k0 r, of which the sum over all pixels p is 1."""
        _, _, probe, _, size = session.run(None, inputs(scan[None, :3, :3], DEMO))
        k0, n = DEMO.aperture_radius, np.arange(16) - 8
        x = 2 * np.pi * k0 * size * np.hypot(n[:, None], n)
        x[8, 8] = 1e-9
        airy = size * np.sqrt(np.pi) * k0 * 2 * j1(x) / x
        np.testing.assert_allclose(as_complex(probe), airy, atol=0.01 * airy.max())

    def test_batches(self, session, scan):
        feeds = inputs(kernels_of(scan[:4, :5]), DEMO)
        patch = session.run(["object_patch"], feeds)[0]
        alone = session.run(["object_patch"], {**feeds, "patterns": feeds["patterns"][2:3]})[0]
        np.testing.assert_allclose(alone[0], patch[2], atol=1e-5)


class TestRefused:
    def test_by_the_engine(self, path):
        with pytest.raises(ValueError, match="takes patterns on a 'detector' grid"):
            Model(path, "cpu")

    def test_wrapped_twice(self, path, tmp_path, capsys):
        output = tmp_path / "twice.onnx"
        with pytest.raises(SystemExit):
            module.main([str(path), str(output)])
        assert "takes patterns on a 'detector' grid" in capsys.readouterr().err
        assert not output.exists()

    def test_no_metadata(self, tmp_path):
        content = write_oracle(tmp_path / "mine.onnx", np.ones((3, 3, 16, 16)), {"author": "somebody"}).read_bytes()
        with pytest.raises(ValueError, match="mine has no airpi metadata"):
            module.self_contained(content, "mine")

    def test_other_opset(self, tmp_path):
        model = onnx.load(write_oracle(tmp_path / "mine.onnx", np.ones((3, 3, 16, 16)), METADATA))
        model.opset_import[0].version = 16
        with pytest.raises(ValueError, match=r"mine has operators of .*, opset 16; expected .* opset 17 to 21"):
            module.self_contained(model.SerializeToString(), "mine")

    def test_no_file(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            module.main([str(tmp_path / "missing.onnx"), str(tmp_path / "output.onnx")])
        assert "missing.onnx" in capsys.readouterr().err


class TestExamples:
    CALIBRATION = ("--energy", "80e3", "--semiangle", "25", "--k_pixel", "0.05", "--scan_step", "0.25")

    @pytest.fixture(autouse=True)
    def _without_offsets(self, monkeypatch):
        """The examples stitch by eq. 6 to 8 alone."""
        monkeypatch.setattr(PatchOffsets, "solve", lambda self: np.zeros(self._shape, np.float32))

    @pytest.fixture
    def engine(self, scan):
        return reconstruct(scan, DEMO, model=KERNEL_MODEL, device="cpu").phase

    @pytest.fixture
    def folder(self, tmp_path, scan):
        np.save(tmp_path / "scan.npy", scan)
        return tmp_path

    def python(self, folder, model, *arguments):
        """Run the example where this package can't be imported; the image."""
        script = EXAMPLES / "reconstruct_with_onnxruntime.py"
        code = (
            "import runpy, sys\n"
            "sys.modules['airpi_py4d'] = None\n"
            "del sys.argv[0]\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "assert not [name for name in sys.modules if name.startswith('airpi_py4d.')]\n"
        )
        command = [sys.executable, "-I", "-W", "error", "-c", code, script, model, "scan.npy", "image.npy", *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=self.environment())
        assert done.returncode == 0, done.stderr
        return np.load(folder / "image.npy")

    @staticmethod
    def environment():
        return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def test_length(self):
        lines = (EXAMPLES / "reconstruct_with_onnxruntime.py").read_text().splitlines()
        assert len(lines) <= 40

    def test_python(self, folder, path, engine):
        image = self.python(folder, path, *self.CALIBRATION, "--center", "31", "31")
        assert image.shape == engine.shape
        assert np.corrcoef(image.ravel(), engine.ravel())[0, 1] > 0.999
        np.testing.assert_allclose(image, engine, atol=5e-3)

    def test_python_with_image_pixels_finer_than_the_step(self, folder, path):
        """At half the angle; a step of more than a patch's pixel."""
        acquisition = Acquisition(80e3, 12.5, 0.7, (0.025, 0.025), center=(31, 31), defocus=25.0)
        given = ["--energy", "80e3", "--semiangle", "12.5", "--k_pixel", "0.025", "--scan_step", "0.7"]
        image = self.python(folder, path, *given, "--center", "31", "31", "--defocus", "25")
        engine = reconstruct(np.load(folder / "scan.npy"), acquisition, model=KERNEL_MODEL, device="cpu").phase
        assert image.shape == engine.shape == (23, 27)
        assert np.corrcoef(image.ravel(), engine.ravel())[0, 1] > 0.999

    def test_javascript(self, folder, path, engine):
        node, npm = shutil.which("node"), shutil.which("npm")
        if node is None or npm is None:
            pytest.skip("needs Node.js with npm")
        shutil.copy(EXAMPLES / "reconstruct.mjs", folder)
        command = [npm, "install", "--no-save", "--ignore-scripts", "--no-audit", "--no-fund", NPM_PACKAGE]
        installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        if installed.returncode:
            pytest.skip(f"npm can't install {NPM_PACKAGE}: {installed.stderr[-300:]}")
        command = [node, "reconstruct.mjs", path, "scan.npy", "image.npy", *self.CALIBRATION]
        command += ["--center_row", "31", "--center_column", "31"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        shutil.rmtree(folder / "node_modules")
        assert done.returncode == 0, done.stderr
        image = np.load(folder / "image.npy")
        assert image.shape == engine.shape
        assert np.corrcoef(image.ravel(), engine.ravel())[0, 1] > 0.999
        np.testing.assert_allclose(image, engine, atol=5e-3)
        python = self.python(folder, path, *self.CALIBRATION, "--center", "31", "31")
        np.testing.assert_allclose(image, python, atol=1e-4)
