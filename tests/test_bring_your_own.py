"""Networks made elsewhere: from ONNX operators and the documented metadata alone, and in PyTorch."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from airpi_py4d import Acquisition, models, reconstruct
from airpi_py4d.demo import demo_path
from airpi_py4d.model import Model
from airpi_py4d.plan import Plan
from export import self_contained
from training import dataset
from training.config import read_config

ROOT = Path(self_contained.__file__).parents[1]
DEMO = Acquisition(80e3, 25.0, (0.25, 0.25), (0.05, 0.05), center=(31, 31))
PIXELS, RADIUS, PATCH = 32, 8.0, 12  # on purpose not those of the shipped model
METADATA = {
    "airpi_schema": "1",
    "name": "foreign",
    "version": "3",
    "grid": json.dumps({"kind": "aperture", "pixels": PIXELS, "aperture_radius": RADIUS}),
    "output": json.dumps({"kind": "object_patch", "pixels": PATCH}),
    "domain": "{}",
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A random linear map of the nine patterns' roots and the geometry, opset 18."""
    rng = np.random.default_rng(1)
    constants = {
        "map": rng.normal(0, 3e-3, (9 * PIXELS**2 + 3, PATCH**2 * 2)).astype(np.float32),
        "vacuum": np.float32([1, 0]),
        "flat": np.array([0, 9 * PIXELS**2]),
        "patch": np.array([0, PATCH, PATCH, 2]),
    }
    nodes = [
        helper.make_node("Sqrt", ["patterns"], ["roots"]),
        helper.make_node("Reshape", ["roots", "flat"], ["row"]),
        helper.make_node("Concat", ["row", "geometry"], ["features"], axis=1),
        helper.make_node("MatMul", ["features", "map"], ["mapped"]),
        helper.make_node("Reshape", ["mapped", "patch"], ["change"]),
        helper.make_node("Add", ["change", "vacuum"], ["anything"]),
    ]
    graph = helper.make_graph(
        nodes,
        "foreign",
        [
            helper.make_tensor_value_info("patterns", TensorProto.FLOAT, ["n", 3, 3, PIXELS, PIXELS]),
            helper.make_tensor_value_info("geometry", TensorProto.FLOAT, ["n", 3]),
        ],
        [helper.make_tensor_value_info("anything", TensorProto.FLOAT, ["n", PATCH, PATCH, 2])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, METADATA)
    path = tmp_path_factory.mktemp("foreign") / "foreign.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def scan():
    """8 x 9 positions of the demo."""
    found = []
    with h5py.File(demo_path()) as file:
        file.visititems(lambda _, entry: found.append(entry) if getattr(entry, "ndim", 0) == 4 else None)
        return found[0][24:32, 30:39]


@pytest.fixture(scope="module")
def engine(scan, path):
    result = reconstruct(scan, DEMO, model=path, device="cpu")
    assert result.phase.std() > 1e-3
    assert result.provenance["model"]["name"] == "foreign"
    return result.phase


def test_page_lists_what_is_needed():
    page = (ROOT / "docs" / "bring_your_own.md").read_text()
    table = page[page.index("## What the file must have") : page.index("## An example")]
    assert set(re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \|", table, re.M)) == {
        ("airpi_schema", ""),
        ("name", "version"),
        ("grid", ""),
        ("output", ""),
        ("domain", ""),
    }


def test_py4dstem(scan, path, engine):
    cube = pytest.importorskip("py4DSTEM").DataCube(scan)
    cube.calibration.set_origin(tuple(np.full(scan.shape[:2], 31.0) for _ in range(2)))
    phase = cube.airpi_reconstruct(
        80e3,
        25.0,
        force_scan_sampling=0.25,
        force_reciprocal_sampling=0.05,
        force_com_rotation=0.0,
        force_com_transpose=False,
        model=str(path),
        device="cpu",
        verbose=False,
    )
    np.testing.assert_allclose(phase.data, engine, atol=1e-5)


def test_hyperspy_by_name(scan, path, engine, monkeypatch):
    monkeypatch.setenv("AIRPI_MODELS", str(path.parent))
    phase = (
        pytest.importorskip("hyperspy.api")
        .signals.Signal2D(scan)
        .airpi(
            beam_energy=80.0,
            convergence_angle=25.0,
            scan_step=0.25,
            k_step=0.05,
            center=(31, 31),
            rotation=0.0,
            flip=False,
            model="foreign",
            device="cpu",
            show_progressbar=False,
        )
    )
    np.testing.assert_allclose(phase.data, engine, atol=1e-5)


def test_described(path):
    assert str(models.describe(path)).startswith("foreign, version 3")


def test_self_contained(scan, path):
    """The same patches from raw counts, without this package."""
    graph = self_contained.self_contained(path.read_bytes(), "foreign")
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 18)]
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    numbers = {"energy": 80e3, "semiangle": 25, "k_pixel": 0.05, "scan_step": 0.25, "defocus": 0}
    feeds = {name: np.float32([value]) for name, value in numbers.items()}
    feeds |= {"spherical_aberration": np.float32([0]), "center": np.float32([31, 31])}
    patch = session.run(["object_patch"], feeds | {"patterns": np.float32(scan[None, :3, :3])})[0] @ [1, 1j]
    model = Model(path, "cpu")
    plan = Plan.of(DEMO, model.contract, scan)
    kernel = plan.resampling()(scan[:3, :3].reshape(9, *scan.shape[2:])).reshape(1, 3, 3, PIXELS, PIXELS)
    np.testing.assert_allclose(patch, model(kernel, plan.geometry(1)), atol=1e-4)


@pytest.mark.skipif(find_spec("torch") is None or find_spec("onnxscript") is None, reason="needs PyTorch")
def test_pytorch_example(tmp_path):
    config = read_config(ROOT / "training" / "configs" / "second_data.toml")
    config["scans_per_shard"] = 2
    config["beam"] |= {"energies": [80e3], "energy_shares": [1.0], "semiangle_mean": 25.0, "semiangle_deviation": 0.1}
    config["scan"]["step_range"] = [0.14, 0.16]  # around the demo's, or the engine refuses it
    np.savez(tmp_path / "shard_00000.npz", **dataset.make_shard(config, 0))
    output = tmp_path / "mine.onnx"
    command = [sys.executable, "-m", "examples.train_with_pytorch", str(tmp_path), str(output), "--batches", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert -1 <= float(re.search(r"demo: xc (-?[\d.]+)", done.stdout)[1]) <= 1
    assert models.describe(output).metadata["training"]["samples"] == 18
    assert self_contained.self_contained(output.read_bytes(), "mine").graph.name == "mine"
