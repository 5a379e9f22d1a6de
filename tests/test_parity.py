"""Keras against ONNX Runtime: the shipped model, reduced number formats, and a difference that must be found."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from oracle import KERNEL_MODEL

from airpi_py4d import models
from airpi_py4d.model import Model
from export import parity, self_contained

KERAS = self_contained.Path(self_contained.__file__).parents[1] / "training" / "weights" / f"{KERNEL_MODEL}.keras"


@pytest.fixture(scope="module")
def shipped():
    return onnx.load(models.find(KERNEL_MODEL))


@pytest.fixture(scope="module")
def inputs():
    """Few and many electrons; bright-field disks of 12 px with a gradient in them."""
    rng = np.random.default_rng(3)
    k = np.arange(64) - 32
    disk = (k[:, None] ** 2 + k**2 <= 144) * (1 + 0.02 * k)
    doses = np.geomspace(5, 1e7, 24)
    mean = (doses / disk.sum())[:, None, None, None, None] * np.broadcast_to(disk, (24, 3, 3, 64, 64))
    geometry = np.stack([np.linspace(0.1, 1.5, 24), np.linspace(-2, 2, 24), np.linspace(0, 0.5, 24)], -1)
    return {"patterns": rng.poisson(mean).astype(np.float32), "geometry": geometry.astype(np.float32)}


@pytest.fixture(scope="module")
def rows(shipped, inputs):
    network = parity.keras.saving.load_model(KERAS, compile=False)
    changed = onnx.load_from_string(shipped.SerializeToString())
    last = next(entry for entry in reversed(changed.graph.initializer) if np.prod(entry.dims) > 1000)
    last.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(last), last.name))
    candidates = {
        "float32": shipped,
        "float16": parity.float16(shipped),
        "int8": parity.int8(shipped),
        "changed": changed,
    }
    found = parity.compare(
        network.predict_on_batch,
        {name: parity.runtime(model) for name, model in candidates.items()},
        iter([inputs, inputs]),
    )
    return {row["file"]: row for row in found}


def test_float32(rows):
    assert rows["float32"]["largest relative"] < parity.TOLERANCE
    assert rows["float32"]["samples"] == 48
    assert rows["float32"]["rms of the contrast"] > 0.01


def test_float16(rows):
    assert parity.TOLERANCE < rows["float16"]["largest"] < 0.02


def test_int8(rows):
    assert rows["int8"]["rms"] > rows["float16"]["rms"]


def test_a_changed_weight_is_found(rows):
    assert rows["changed"]["largest relative"] > parity.TOLERANCE


@pytest.mark.parametrize("kind", [parity.float16, parity.int8])
def test_reduced_files_run_in_the_engine(kind, shipped, inputs, tmp_path):
    path = tmp_path / "reduced.onnx"
    graph = kind(shipped)
    assert {node.domain for node in graph.graph.node} == {""}
    onnx.save(graph, path)
    assert path.stat().st_size < 0.6 * models.find(KERNEL_MODEL).stat().st_size
    model = Model(path, "cpu")
    assert model.contract.name == f"{KERNEL_MODEL}-{kind.__name__}"
    assert model.contract.domain == Model(KERNEL_MODEL, "cpu").contract.domain
    assert np.isfinite(model(inputs["patterns"], inputs["geometry"])).all()


def test_batch_of_any_size(shipped, inputs):
    graph = parity.float16(shipped)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    whole = session.run(None, inputs)[0]
    alone = session.run(None, {name: value[5:6] for name, value in inputs.items()})[0]
    np.testing.assert_allclose(alone[0], whole[5], atol=2e-3)


def test_too_few_samples(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parity.main(["a.keras", "a.onnx", str(tmp_path), "--samples", "50"])
    assert "expected a multiple of 100" in capsys.readouterr().err
