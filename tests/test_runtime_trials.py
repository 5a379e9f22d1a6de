"""The trials of ONNX Runtime's options: that they measure what they say."""

import numpy as np
import onnx
import onnxruntime
import runtime_trials
from runtime_trials import Variant, loaded, offline, options
from two_part_models import encoder, write_two_parts

MODEL = "airpi-3-fast"


def test_table(monkeypatch):
    """A changed network shows in the image, one that doesn't run is a row."""

    def changed():
        encoder, image = runtime_trials.networks(MODEL)
        graph = onnx.load_from_string(image)
        weights = next(entry for entry in graph.graph.initializer if np.prod(entry.dims) > 1000)
        weights.CopyFrom(onnx.numpy_helper.from_array(1.1 * onnx.numpy_helper.to_array(weights), weights.name))
        return Variant([encoder, graph.SerializeToString()], options())

    tried = {
        "as shipped": lambda: Variant(runtime_trials.networks(MODEL), options()),
        "changed": changed,
        "broken": lambda: Variant([b"no network"] * 2, options()),
    }
    monkeypatch.setattr(runtime_trials, "variants", lambda name, scan: iter(tried.items()))
    _, _, shipped, other, broken = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in runtime_trials.table(MODEL, 1)
    )
    assert (shipped[0], shipped[4], float(shipped[6])) == ("as shipped", "1.00", 0)
    assert float(shipped[5]) > 0.97
    assert 0 < float(shipped[3]) < float(shipped[2])
    assert float(other[6]) > 1e-3
    assert broken[1].startswith("doesn't run: ")


def test_offline_is_the_same_network():
    content = encoder().SerializeToString()
    (optimised,) = offline([content])
    inputs = {"patterns": np.ones((2, 64, 64), np.float32), "geometry": np.ones((2, 3), np.float32)}
    results = [
        onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"]).run(None, inputs)[0]
        for part in (content, optimised)
    ]
    assert optimised != content
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_variants_are_made(tmp_path):
    """Of a model in two parts, all but static quantisation, which needs its scan, and what the CPU doesn't run."""
    path = write_two_parts(tmp_path / "two-parts.onnx")
    for label, make in runtime_trials.variants(path, None):
        if label in ("int8, static", "bfloat16"):
            continue
        phase, _ = loaded(path, make()).image(np.ones((1, 5, 8, 8), np.float32), np.zeros((1, 5), np.float32))
        assert phase.shape == (8, 8)
