"""Models: what is refused, on which device they run, and what the shipped one says of itself."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from oracle import KERNEL_MODEL, METADATA, write_oracle

from airpi_py4d import Acquisition, models, reconstruct
from airpi_py4d.demo import demo_path
from airpi_py4d.model import Model

STITCHED_MODEL = "airpi-3-fast"
CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]
GPU = ["TensorrtExecutionProvider", *CUDA]
INPUTS = {
    "patterns": (TensorProto.FLOAT, ["batch", 3, 3, 64, 64]),
    "geometry": (TensorProto.FLOAT, ["batch", 3]),
}


def write_model(path: Path, metadata=METADATA, inputs=INPUTS, output=(16, 16, 2)) -> Path:
    """Write a model that gives the same number everywhere."""
    entries = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    first = next(iter(inputs))
    nodes = [
        helper.make_node("Shape", [first], ["shape"], start=0, end=1),
        helper.make_node("Constant", [], ["rest"], value_ints=list(output)),
        helper.make_node("Concat", ["shape", "rest"], ["full"], axis=0),
        helper.make_node("ConstantOfShape", ["full"], ["object_patch"]),
    ]
    result = helper.make_tensor_value_info("object_patch", TensorProto.FLOAT, ["batch", *output])
    graph = helper.make_graph(nodes, "constant", entries, [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "mine.onnx"


def changed(**entries):
    """Valid metadata but for these, which are removed (None) or replaced."""
    metadata = {**METADATA, **entries}
    return {key: value for key, value in metadata.items() if value is not None}


class TestRefused:
    @pytest.mark.parametrize("model", ["missing.onnx", "airpi-0", "", Path("/nowhere/airpi-2.onnx"), Path("/")])
    def test_not_there(self, model):
        shown = str(model).replace("/", "\\/")
        with pytest.raises(ValueError, match=rf"model is '{shown}': neither a file nor a shipped model \(airpi-2.*\)"):
            Model(model, "cpu")

    @pytest.mark.parametrize("content", [b"", b"not a model", b"\x89HDF\r\n\x1a\n" + bytes(100)])
    def test_not_onnx(self, path, content):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model .*mine\.onnx can't be loaded by ONNX Runtime"):
            Model(path, "cpu")

    def test_cut_off(self, path):
        content = write_oracle(path, np.ones((3, 3, 16, 16))).read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"model .*mine\.onnx can't be loaded by ONNX Runtime"):
            Model(path, "cpu")

    def test_no_metadata(self, path):
        with pytest.raises(ValueError, match=r"mine\.onnx has no airpi metadata; export it with export.to_onnx"):
            Model(write_model(path, metadata={"author": "somebody"}), "cpu")

    def test_schema(self, path):
        with pytest.raises(ValueError, match=r"metadata of schema '2'; .* reads schema '1': update airpi_py4d"):
            Model(write_model(path, changed(airpi_schema="2")), "cpu")

    @pytest.mark.parametrize(
        ("entries", "problem"),
        [
            ({"name": None}, "'name'"),
            ({"version": None}, "'version'"),
            ({"grid": None}, "'grid'"),
            ({"output": None}, "'output'"),
            ({"domain": None}, "'domain'"),
            ({"grid": "{"}, "JSONDecodeError"),
            ({"grid": "[]"}, "TypeError"),
            ({"grid": '{"kind": "aperture", "pixels": 64}'}, "'aperture_radius'"),
            ({"grid": '{"kind": "aperture", "pixels": "many", "aperture_radius": 12}'}, "'many'"),
            ({"grid": '{"kind": "aperture", "pixels": 64, "aperture_radius": 12, "smallest_pixel": -1}'}, "is -1.0"),
            ({"grid": '{"kind": "aperture", "pixels": 64, "aperture_radius": 12, "smallest_pixel": NaN}'}, "is nan"),
            ({"output": '{"kind": "object_patch"}'}, "'pixels'"),
            ({"domain": "[]"}, "AttributeError"),
            ({"domain": '{"energy": [1]}'}, "ValueError"),
            ({"domain": '{"energy": 3e5}'}, "TypeError"),
        ],
    )
    def test_incomplete_metadata(self, path, entries, problem):
        with pytest.raises(
            ValueError, match=rf"mine\.onnx has incomplete airpi metadata: .*{problem}.*export it again"
        ):
            Model(write_model(path, changed(**entries)), "cpu")

    @pytest.mark.parametrize(
        ("entries", "problem"),
        [
            ({"grid": '{"kind": "detector"}'}, "'detector' grid and gives 'object_patch'"),
            ({"output": '{"kind": "exit_wave"}'}, "'aperture' grid and gives 'exit_wave'"),
        ],
    )
    def test_kind(self, path, entries, problem):
        with pytest.raises(
            ValueError, match=f"{problem}; this engine serves 'aperture' and 'whole_detector' grids and 'object_patch'"
        ):
            Model(write_model(path, changed(**entries)), "cpu")

    @pytest.mark.parametrize(
        "inputs",
        [
            {"patterns": INPUTS["patterns"]},
            {**INPUTS, "probe": INPUTS["geometry"]},
            {"counts": INPUTS["patterns"], "geometry": INPUTS["geometry"]},
            {**INPUTS, "patterns": (TensorProto.FLOAT, ["batch", 3, 3, 32, 32])},
            {**INPUTS, "patterns": (TensorProto.FLOAT, ["batch", 64, 64, 9])},
            {**INPUTS, "patterns": (TensorProto.FLOAT16, ["batch", 3, 3, 64, 64])},
            {**INPUTS, "geometry": (TensorProto.FLOAT, ["batch", 2])},
            {"patterns": (TensorProto.FLOAT, [1, 3, 3, 64, 64]), "geometry": (TensorProto.FLOAT, [1, 3])},
        ],
    )
    def test_inputs(self, path, inputs):
        message = r"has the inputs .*; its metadata promise float32 patterns \(n, 3, 3, 64, 64\) and geometry \(n, 3\)"
        with pytest.raises(ValueError, match=message):
            Model(write_model(path, inputs=inputs), "cpu")

    @pytest.mark.parametrize("output", [(8, 8, 2), (16, 16), (2, 16, 16)])
    def test_output(self, path, output):
        model = Model(write_model(path, output=output), "cpu")
        message = r"output of shape \(4, .*\), its metadata promise \(n, 16, 16, 2\)"
        with pytest.raises(ValueError, match=message):
            model(np.ones((4, 3, 3, 64, 64), np.float32), np.ones((4, 3), np.float32))


class TestDevice:
    @pytest.mark.parametrize("device", ["auto", "cpu"])
    def test_cpu(self, path, device):
        assert Model(write_model(path), device).provider == "CPUExecutionProvider"

    @pytest.fixture
    def falls_back(self, monkeypatch):
        """A runtime for CUDA and TensorRT on a machine without; what the session was asked for."""
        asked = SimpleNamespace()
        session = onnxruntime.InferenceSession

        def on_cpu(content, options, providers):
            asked.providers = providers
            return session(content, options, providers=["CPUExecutionProvider"])

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: GPU)
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
        monkeypatch.setattr(onnxruntime, "InferenceSession", on_cpu)
        return asked

    @pytest.mark.parametrize(("device", "number"), [("cuda", 0), ("cuda:1", 1), ("tensorrt", 0), ("tensorrt:2", 2)])
    def test_falls_back(self, path, falls_back, device, number):
        message = f"device='{device}' was asked for, but ONNX Runtime fell back to CPUExecutionProvider"
        with pytest.raises(RuntimeError, match=message):
            Model(write_model(path), device)
        options = {"CUDAExecutionProvider": {"use_tf32": 0}}
        names = CUDA if device.startswith("cuda") else GPU
        expected = [(name, {"device_id": number, **options.get(name, {})}) for name in names[:-1]]
        assert falls_back.providers == [*expected, names[-1]]

    def test_auto_says_what_runs(self, path, falls_back):
        assert Model(write_model(path), "auto").provider == "CPUExecutionProvider"
        assert falls_back.providers[0][0] == "CUDAExecutionProvider"

    def test_cpu_where_cuda_is(self, path, falls_back):
        Model(write_model(path), "cpu")
        assert falls_back.providers == ["CPUExecutionProvider"]

    def test_stays_on_its_provider(self, path):
        """ONNX Runtime would go on elsewhere after an error of the GPU's."""
        assert not Model(write_model(path), "auto")._session._enable_fallback


class TestNoRuntime:
    def test_message(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        acquisition = Acquisition(300e3, 20.0, 0.2, (0.2, 0.2))
        message = r'pip install "airpi_py4d\[cpu\]" .* or pip install "airpi_py4d\[gpu\]"'
        with pytest.raises(ImportError, match=f"needs ONNX Runtime, and none is installed.*{message}"):
            reconstruct(np.ones((3, 3, 24, 20)), acquisition)

    def test_import(self):
        code = """if True:
            import sys
            sys.modules["onnxruntime"] = None
            import airpi_py4d, airpi_py4d.model
            try:
                airpi_py4d.model.Model()
            except ImportError as error:
                assert "airpi_py4d[cpu]" in str(error)
            else:
                raise AssertionError
        """
        subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


class TestThreads:
    def test_are_the_sessions(self, monkeypatch):
        asked = []
        session = onnxruntime.InferenceSession

        def spy(content, options, providers):
            spinning = options.get_session_config_entry("session.intra_op.allow_spinning")
            asked.append((options.intra_op_num_threads, spinning))
            return session(content, options, providers=providers)

        monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
        Model(KERNEL_MODEL, "cpu")
        Model(KERNEL_MODEL, "cpu", threads=1)
        Model(STITCHED_MODEL, "cpu", threads=1)  # an encoder and an image network
        assert asked == [(0, "0"), (1, "0"), (1, "0"), (1, "0")]


class TestShipped:
    @pytest.fixture(scope="class")
    @staticmethod
    def file():
        return models.find(KERNEL_MODEL)

    @pytest.fixture(scope="class")
    @staticmethod
    def model(file):
        return Model(KERNEL_MODEL, "cpu")

    @pytest.fixture(scope="class")
    @staticmethod
    def graph(file):
        return onnx.load(file)

    def test_names(self, model, file):
        for named in (KERNEL_MODEL, file, str(file)):
            assert Model(named, "cpu").sha256 == model.sha256

    def test_sha256(self, model, file):
        assert model.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()

    def test_graph(self, graph):
        onnx.checker.check_model(graph, full_check=True)
        assert {node.domain for node in graph.graph.node} == {""}  # ONNX's own operators only
        assert [entry.name for entry in graph.graph.input] == ["patterns", "geometry"]
        assert [entry.name for entry in graph.graph.output] == ["object_patch"]
        assert all(entry.doc_string for entry in (*graph.graph.input, *graph.graph.output))

    def test_metadata(self, graph):
        metadata = {entry.key: entry.value for entry in graph.metadata_props}
        assert set(metadata) >= {
            *("airpi_schema", "name", "version", "inputs", "grid", "output", "normalisation", "label", "domain"),
            *("training", "license", "citation"),
        }
        assert all(metadata.values())
        inputs, output = json.loads(metadata["inputs"]), json.loads(metadata["output"])
        assert inputs["patterns"]["shape"] == ["batch", 3, 3, 64, 64]
        assert inputs["geometry"]["shape"] == ["batch", 3]
        assert output["shape"] == ["batch", output["pixels"], output["pixels"], 2]
        for entry in (*inputs.values(), output):
            assert entry["unit"]
            assert entry["axes"]
            assert entry["description"]
        assert json.loads(metadata["grid"])["kind"] == "aperture"
        assert metadata["license"] == "GPL-3.0-or-later"
        assert "10.1093/micmic/ozac002" in metadata["citation"]
        assert isinstance(json.loads(metadata["training"]), dict)

    def test_domain(self, model):
        assert set(model.contract.domain) == {
            *("energy", "semiangle", "relative_scan_step", "electrons_per_pattern"),
            *("defocus_phase", "spherical_phase"),
        }
        assert all(low < high for low, high in model.contract.domain.values())

    def test_batches(self, model):
        """Every kernel is reconstructed by itself, whatever shares its batch."""
        rng = np.random.default_rng(0)
        patterns = rng.poisson(0.5, (130, 3, 3, 64, 64)).astype(np.float32)
        geometry = rng.uniform(0.1, 0.5, (130, 3)).astype(np.float32)
        patches = model(patterns, geometry)
        p = model.contract.object_pixels
        assert patches.shape == (130, p, p)
        assert patches.dtype == np.complex64
        for part in (slice(0, 1), slice(128, 130)):
            np.testing.assert_allclose(model(patterns[part], geometry[part]), patches[part], atol=1e-5)


class TestShippedStitched:
    """The model that stitches features."""

    @pytest.fixture(scope="class")
    @staticmethod
    def model():
        return Model(STITCHED_MODEL, "cpu")

    def test_contract(self, model):
        assert model.contract.name == STITCHED_MODEL
        assert model.contract.kernel_side == 1
        assert model.contract.features > 0
        assert all(low < high for low, high in model.contract.domain.values())
        described = models.describe(STITCHED_MODEL).metadata
        assert described["label"] == "projected phase"
        assert described["license"] == "GPL-3.0-or-later"
        assert models.find(STITCHED_MODEL).with_suffix(".md").read_text().startswith(f"# {STITCHED_MODEL}\n")

    def test_patterns_do_not_see_each_other(self, model):
        rng = np.random.default_rng(0)
        patterns = rng.poisson(0.5, (40, 64, 64)).astype(np.float32)
        geometry = rng.uniform(0.1, 0.5, (40, 3)).astype(np.float32)
        features = model(patterns, geometry)
        for part in (slice(0, 1), slice(37, 40)):
            np.testing.assert_allclose(model(patterns[part], geometry[part]), features[part], atol=1e-4)

    def test_finds_the_atoms_of_the_demo(self, model):
        """xc with the truth on the simulated WS2 scan, which it never saw."""
        with h5py.File(demo_path()) as file:
            counts = file["datacube_root/datacube/data"][()]
            truth = file["datacube_root/datacube/phase_truth/data"][()]
        acquisition = Acquisition(80e3, 25.0, 0.25, (0.05, 0.05), center=(31, 31))
        image = reconstruct(counts, acquisition, model=model)
        down, right = image.provenance["oversample"]
        inner = np.s_[5:-5, 5:-5]
        found = image.phase[::down, ::right][inner].ravel()
        assert np.corrcoef(found, truth[inner].ravel())[0, 1] > 0.9
