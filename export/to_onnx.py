"""Keras to ONNX, with a parity check and the metadata that the engine reads.

    python -m export.to_onnx RUN_FOLDER/model.keras MODEL_CONFIG DATA_FOLDER OUTPUT.onnx --name airpi-2 --version 1

Prints the largest difference between Keras and ONNX Runtime on random and on simulated inputs, and fails above
the tolerance.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import keras
import numpy as np
import onnx
import onnxruntime
import tensorflow as tf
import tf2onnx
from numpy.typing import NDArray

from airpi_py4d.plan import CITATION
from training.batches import DOSE_RANGE, Batches
from training.config import read_config
from training.dataset import KERNELS, load_shards
from training.networks import VacuumObject  # noqa: F401 (registers the layers)
from training.simulation import BRIGHT_FIELD_RADIUS, DETECTOR, OBJECT

OPSET = 17
TOLERANCE = 1e-3
"""Largest absolute difference of the object patch that the parity check accepts; the patch is of the order of 1."""

INPUTS = {
    "patterns": {
        "shape": ["batch", 3, 3, DETECTOR, DETECTOR],
        "axes": "batch, scan row, scan column, detector row, detector column",
        "unit": "electrons",
        "description": "3x3 neighbouring diffraction patterns on the aperture grid, not normalised; optical axis at "
        "pixel 32, electrons beyond the detector 0; detector axes rotated to the scan axes",
    },
    "geometry": {
        "shape": ["batch", 3],
        "axes": "batch, (scan step, defocus phase, spherical phase)",
        "unit": "1/k0, rad, rad",
        "description": "scan step times k0 = semi-angle / wavelength; phases of defocus, -pi lambda k0^2 defocus, and "
        "of C_s, pi C_s lambda^3 k0^4 / 2, at the aperture's edge; 0 if not known",
    },
}
OUTPUT = {
    "kind": "object_patch",
    "name": "object_patch",
    "pixels": OBJECT,
    "shape": ["batch", OBJECT, OBJECT, 2],
    "axes": "batch, row, column, (real, imaginary)",
    "unit": "1",
    "pixel_size": "1 / (64 * k0 / 12) A, k0 in 1/A",
    "description": "psi_out(r) / psi_in(r) around the central probe position, which is pixel 8; its angle is the phase "
    "of the object in rad, positive for a positive projected potential; 1 in vacuum",
}
GRID = {
    "kind": "aperture",
    "pixels": DETECTOR,
    "aperture_radius": BRIGHT_FIELD_RADIUS,
    "description": "the bright-field disk has a radius of 12 pixels: k-pixel = k0 / 12",
}


def domain(parameters: NDArray) -> dict[str, tuple[float, float]]:
    """Ranges of the training data, from the shards' `parameters` (n, 6)."""
    from training.batches import geometry

    relative = geometry(parameters)
    return {
        "energy": (float(parameters[:, 0].min()), float(parameters[:, 0].max())),
        "semiangle": (round(float(parameters[:, 1].min()), 1), round(float(parameters[:, 1].max()), 1)),
        "relative_scan_step": (round(float(relative[:, 0].min()), 3), round(float(relative[:, 0].max()), 3)),
        "electrons_per_pattern": DOSE_RANGE,
        "defocus_phase": (round(float(relative[:, 1].min()), 2), round(float(relative[:, 1].max()), 2)),
        "spherical_phase": (round(float(relative[:, 2].min()), 2), round(float(relative[:, 2].max()), 2)),
    }


def metadata(name: str, version: str, config: dict, data: Path, parameters: NDArray) -> dict[str, str]:
    """`metadata_props` of the ONNX file, schema version 1."""
    description = json.loads((data / "config.json").read_text())
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    return {
        "airpi_schema": "1",
        "name": name,
        "version": version,
        "inputs": json.dumps(INPUTS),
        "grid": json.dumps(GRID),
        "output": json.dumps(OUTPUT),
        "normalisation": "inside the graph: counts over the mean electrons a pattern, to the powers 1/4 and 1/2",
        "label": f"{config['label']}: exit wave over incident wave"
        + (", both propagated to the specimen's mid-plane" if config["label"].endswith("midplane") else ""),
        "domain": json.dumps(domain(parameters)),
        "training": json.dumps(
            {
                "samples": len(parameters) * KERNELS,
                "data_configuration": description,
                "data_configuration_sha256": digest,
                "configuration": config,
            }
        ),
        "license": "GPL-3.0-or-later",
        "citation": CITATION,
    }


def convert(model: keras.Model, properties: dict[str, str]) -> onnx.ModelProto:
    """ONNX graph of the model with a dynamic batch, named inputs and output, and metadata."""
    signature = [
        tf.TensorSpec((None, *entry.shape[1:]), tf.float32, name=entry.name.split(":")[0]) for entry in model.inputs
    ]

    @tf.function(input_signature=signature)
    def object_patch(patterns: tf.Tensor, geometry: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"object_patch": model([patterns, geometry], training=False)}

    graph, _ = tf2onnx.convert.from_function(object_patch, signature, opset=OPSET)
    for key, value in properties.items():
        graph.metadata_props.add(key=key, value=value)
    inputs = json.loads(properties["inputs"])
    for entry in graph.graph.input:
        entry.doc_string = inputs[entry.name]["description"]
    graph.graph.output[0].doc_string = json.loads(properties["output"])["description"]
    onnx.checker.check_model(graph, full_check=True)
    return graph


def parity(model: keras.Model, graph: onnx.ModelProto, inputs: dict[str, NDArray]) -> float:
    """Largest absolute difference of the object patch between Keras and ONNX Runtime (CPU)."""
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = model.predict(inputs, batch_size=64, verbose=0)
    return float(np.abs(session.run(None, inputs)[0] - expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "config", "data", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--version", required=True)
    arguments = parser.parse_args()
    config = read_config(arguments.config)
    model = keras.saving.load_model(arguments.model, compile=False)
    numbers = sorted(int(path.stem.split("_")[1]) for path in arguments.data.glob("shard_*.npz"))
    parameters = np.concatenate(
        [np.load(arguments.data / f"shard_{n:05d}.npz")["parameters"] for n in numbers[config["validation_shards"] :]]
    )
    graph = convert(model, metadata(arguments.name, arguments.version, config, arguments.data, parameters))
    rng = np.random.default_rng(0)
    random = {
        "patterns": rng.poisson(1.0, (64, 3, 3, DETECTOR, DETECTOR)).astype(np.float32),
        "geometry": rng.uniform(-1, 1, (64, 3)).astype(np.float32),
    }
    simulated = Batches(load_shards(arguments.data, numbers[:1]), 512, 1, config["label"], 0)[0][0]
    differences = {"random": parity(model, graph, random), "simulated": parity(model, graph, simulated)}
    for kind, difference in differences.items():
        print(f"Keras - ONNX Runtime, {kind} inputs: at most {difference:.2e}")
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"difference above {TOLERANCE}: nothing written")
    onnx.save(graph, arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB, operators:")
    print(", ".join(sorted({node.op_type for node in graph.graph.node})))


if __name__ == "__main__":
    main()
