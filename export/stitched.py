"""Networks of `training.image_networks` to one ONNX file, with a parity check and the metadata that the engine reads.

    python -m export.stitched RUN_FOLDER/model.keras MODEL_CONFIG DATA_FOLDER OUTPUT.onnx --name airpi-3 --version 1

Prints the largest difference between Keras and ONNX Runtime on simulated inputs, and fails above the tolerance. With
`--symmetries` the file holds the mean over the eight symmetries of the square: the same weights, eight times the work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import onnxruntime
import tensorflow as tf
import tf2onnx
from keras import ops
from numpy.typing import NDArray

from airpi_py4d.plan import CITATION
from export.to_onnx import OPSET, TOLERANCE, domain
from export.two_parts import join
from training.config import read_config
from training.dataset import shard_path
from training.image_networks import EXTRA_CHANNELS, StitchedNetwork, receptive_margin
from training.losses import PhaseImageError  # noqa: F401 (registers the loss)
from training.scan_batches import SCAN_DOSE_RANGE, ScanBatches, Scans
from training.simulation import DETECTOR, OBJECT


def turned(x: Any, operation: int, centred: bool, inverse: bool = False) -> Any:
    """One of the eight symmetries of the square on the last two axes, or its inverse.

    Parameters
    ----------
    x : tensor
    operation : int
        0 to 7: bit 0 mirrors the columns, bit 1 the rows, bit 2 swaps rows and columns then.
    centred : bool
        Mirror about pixel n // 2 of an even length n (pixel 0 stays), or about the middle.
    """

    def mirrored(values: Any, axis: int) -> Any:
        values = ops.flip(values, axis)
        return ops.roll(values, 1, axis) if centred else values

    swapped = (*range(len(x.shape) - 2), len(x.shape) - 1, len(x.shape) - 2)
    if operation & 4 and inverse:
        x = ops.transpose(x, swapped)
    for bit, axis in ((1, -1), (2, -2)):
        if operation & bit:
            x = mirrored(x, axis)
    return ops.transpose(x, swapped) if operation & 4 and not inverse else x


class Symmetric(keras.Model):
    """A `StitchedNetwork` of which every output is the mean over the eight symmetries of scan, detector and image.

    Its encoder gives the features of each symmetry, one behind the other; its image network sees each apart.
    """

    def __init__(self, network: StitchedNetwork) -> None:
        super().__init__()
        self.network = network

    def encoder(self, inputs: list, **kwargs: Any) -> Any:
        patterns, geometry = inputs
        views = ops.concatenate([turned(patterns, operation, centred=True) for operation in range(8)])
        features = self.network.encoder([views, ops.tile(geometry, [8, 1])], **kwargs)
        parts = ops.split(features, 8)
        return ops.concatenate(
            [turned(part, operation, centred=True, inverse=True) for operation, part in enumerate(parts)], axis=1
        )

    def image(self, inputs: list, **kwargs: Any) -> dict[str, Any]:
        x, geometry = inputs
        features, extra = x[:, :-EXTRA_CHANNELS], x[:, -EXTRA_CHANNELS:]
        parts = ops.split(features, 8, axis=1)
        means: dict[str, Any] = {"phase": 0.0, "phase_error": 0.0}
        for same_shape in (range(4), range(4, 8)):  # as given, and with rows and columns swapped
            views = [
                turned(ops.concatenate([parts[operation], extra], axis=1), operation, centred=False)
                for operation in same_shape
            ]
            outputs = self.network.image([ops.concatenate(views), ops.tile(geometry, [4, 1])], **kwargs)
            for name in means:
                for operation, part in zip(same_shape, ops.split(outputs[name], 4), strict=True):
                    means[name] = means[name] + turned(part, operation, centred=False, inverse=True) / 8
        return means

    def stitched(self, *arguments: Any) -> Any:
        return self.network.stitched(*arguments)


def convert(model: StitchedNetwork | Symmetric, features: int) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """ONNX graphs of the encoder, which gives so many features, and of the image network."""

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, DETECTOR, DETECTOR), tf.float32, name="patterns"),
            tf.TensorSpec((None, 3), tf.float32, name="geometry"),
        ]
    )
    def encoder(patterns: tf.Tensor, geometry: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"feature_patch": model.encoder([patterns, geometry], training=False)}

    @tf.function(
        input_signature=[
            tf.TensorSpec((1, features + EXTRA_CHANNELS, None, None), tf.float32, name="image_features"),
            tf.TensorSpec((1, 5), tf.float32, name="image_geometry"),
        ]
    )
    def image(image_features: tf.Tensor, image_geometry: tf.Tensor) -> dict[str, tf.Tensor]:
        return dict(model.image([image_features, image_geometry], training=False))

    graphs = tuple(
        tf2onnx.convert.from_function(function, function.input_signature, opset=OPSET)[0]
        for function in (encoder, image)
    )
    for graph in graphs:
        for output in graph.graph.output:  # what conversion loses of the shapes
            dims = output.type.tensor_type.shape.dim
            known = {1: features, 2: OBJECT, 3: OBJECT} if output.name == "feature_patch" else {0: 1, 1: 1}
            for axis, length in known.items():
                dims[axis].dim_value = length
        onnx.checker.check_model(graph, full_check=True)
    return graphs[0], graphs[1]


def parity(
    model: StitchedNetwork | Symmetric, graphs: tuple[onnx.ModelProto, onnx.ModelProto], inputs: dict
) -> dict[str, float]:
    """Largest absolute differences between Keras and ONNX Runtime (CPU): of the features, of the phase [rad].

    Parameters
    ----------
    inputs : dict of ndarray
        As `StitchedNetwork` takes them, of one scan.
    """
    sessions = [
        onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"]) for graph in graphs
    ]
    patterns = inputs["patterns"].reshape(-1, DETECTOR, DETECTOR)
    geometry = np.repeat(inputs["geometry"], len(patterns), axis=0)
    expected = np.asarray(model.encoder([patterns, geometry]))
    features = sessions[0].run(["feature_patch"], {"patterns": patterns, "geometry": geometry})[0]
    stitched = np.asarray(model.stitched(inputs["patterns"], expected, inputs, inputs["geometry"][:, :1]))
    numbers = [inputs[name] for name in ("pixel_size", "geometry", "aperture_radius")]
    image_geometry = np.concatenate(numbers, 1).astype(np.float32)
    phase = np.asarray(model.image([stitched, image_geometry])["phase"])
    found = sessions[1].run(["phase"], {"image_features": stitched, "image_geometry": image_geometry})[0]
    return {"features": float(np.abs(features - expected).max()), "phase": float(np.abs(found - phase).max())}


def metadata(name: str, version: str, config: dict, data: Path, parameters: NDArray) -> dict:
    """What `export.two_parts.join` writes into the file beside the contract."""
    description = json.loads((data / "config.json").read_text())
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    limits = domain(parameters)
    electrons = [dose * step**2 for dose, step in zip(SCAN_DOSE_RANGE, limits["relative_scan_step"], strict=True)]
    return {
        "name": name,
        "version": version,
        "normalisation": "inside the graph: counts over the electrons of the pattern, to the powers 1/4 and 1/2",
        "domain": limits | {"electrons_per_pattern": electrons},
        "training": {
            "scans": len(parameters),
            "data_configuration": description,
            "data_configuration_sha256": digest,
            "configuration": config,
        },
        "license": "GPL-3.0-or-later",
        "citation": CITATION,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "config", "data", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--symmetries", action="store_true", help="the mean over the eight symmetries of the square")
    arguments = parser.parse_args()
    config = read_config(arguments.config)
    model = keras.saving.load_model(arguments.model, compile=False)
    margin, features = receptive_margin(**model.arguments["image"]), model.encoder.output.shape[1]
    if arguments.symmetries:
        model, features = Symmetric(model), 8 * features
    numbers = sorted(int(path.stem.split("_")[1]) for path in arguments.data.glob("shard_*.npz"))
    paths = [shard_path(arguments.data, n) for n in numbers[config["validation_shards"] :]]
    parameters = np.concatenate([np.load(path)["parameters"] for path in paths])
    graphs = convert(model, features)
    scans = Scans(arguments.data, numbers[:1])
    for number, dose in enumerate((0.0, 100.0, 10.0)):
        differences = parity(model, graphs, ScanBatches(scans, 0, 0, 0, dose)[number][0])
        shown = ", ".join(f"{name} {value:.2e}" for name, value in differences.items())
        print(f"Keras - ONNX Runtime, {dose:g} electrons a pattern (0: no noise): at most {shown}")
        if max(differences.values()) > TOLERANCE:
            raise SystemExit(f"difference above {TOLERANCE}: nothing written")
    described = metadata(arguments.name, arguments.version, config, arguments.data, parameters)
    joined = join(*graphs, margin, described)
    onnx.save(joined, arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB, operators:")
    print(", ".join(sorted({node.op_type for graph in graphs for node in graph.graph.node})))


if __name__ == "__main__":
    main()
