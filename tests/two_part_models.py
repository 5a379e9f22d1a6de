"""Small random models of the kind that stitches features: an encoder and a U-Net, or parts that reveal their input."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.two_parts import join

FEATURES = 3
#: Half width of the receptive field of `unet`: convolutions of 3x3 at 1, 2, 4, 2 and 1 pixels.
MARGIN = 16
_VALUE = helper.make_tensor_value_info


def _graph(name, nodes, inputs, outputs, constants):
    graph = helper.make_graph(
        nodes,
        name,
        [_VALUE(key, TensorProto.FLOAT, shape) for key, shape in inputs.items()],
        [_VALUE(key, TensorProto.FLOAT, shape) for key, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def encoder(features=FEATURES, seed=0):
    """Features of the patch's pixels: the logarithm of the electrons, in pixels of 4 x 4, times random weights."""
    rng = np.random.default_rng(seed)
    constants = {
        "weights": rng.normal(0, 1, (features, 1, 3, 3)).astype(np.float32),
        "by_geometry": rng.normal(0, 1, (3, features)).astype(np.float32),
        "one": np.float32(1),
        "channel": np.array([1]),
        "space": np.array([2, 3]),
    }
    nodes = [
        helper.make_node("Unsqueeze", ["patterns", "channel"], ["images"]),
        helper.make_node("AveragePool", ["images"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Add", ["pooled", "one"], ["above"]),
        helper.make_node("Log", ["above"], ["logarithm"]),
        helper.make_node("Conv", ["logarithm", "weights"], ["convolved"], pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["geometry", "by_geometry"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "space"], ["offset"]),
        helper.make_node("Add", ["convolved", "offset"], ["feature_patch"]),
    ]
    inputs = {"patterns": ["batch", 64, 64], "geometry": ["batch", 3]}
    return _graph("encoder", nodes, inputs, {"feature_patch": ["batch", features, 16, 16]}, constants)


def unet(features=FEATURES, seed=1, width=4, values=5):
    """A U-Net with two poolings, a convolution a level on the way down and up, and so many numbers of geometry."""
    rng = np.random.default_rng(seed)
    channels = {"a": (features + 2, width), "b": (width, width), "c": (width, width), "d": (2 * width, width)}
    channels["e"] = (2 * width, 2)
    constants = {
        f"weights_{name}": rng.normal(0, (9 * before) ** -0.5, (after, before, 3, 3)).astype(np.float32)
        for name, (before, after) in channels.items()
    }
    constants["by_geometry"] = rng.normal(0, 0.1, (5, 1)).astype(np.float32)[:values]
    constants["scales"] = np.array([1, 1, 2, 2], np.float32)
    constants["space"] = np.array([2, 3])

    def convolution(name, before, after):
        return helper.make_node("Conv", [before, f"weights_{name}"], [after], pads=[1, 1, 1, 1])

    def pooling(before, after):
        return helper.make_node("MaxPool", [before], [after], kernel_shape=[2, 2], strides=[2, 2])

    def doubled(before, after):
        return helper.make_node("Resize", [before, "", "scales"], [after], mode="nearest")

    nodes = [
        convolution("a", "image_features", "a"),
        helper.make_node("Tanh", ["a"], ["full"]),
        pooling("full", "pooled"),
        convolution("b", "pooled", "b"),
        helper.make_node("Tanh", ["b"], ["half"]),
        pooling("half", "pooled_again"),
        convolution("c", "pooled_again", "c"),
        helper.make_node("Tanh", ["c"], ["quarter"]),
        doubled("quarter", "up"),
        helper.make_node("Concat", ["up", "half"], ["joined"], axis=1),
        convolution("d", "joined", "d"),
        helper.make_node("Tanh", ["d"], ["half_again"]),
        doubled("half_again", "up_again"),
        helper.make_node("Concat", ["up_again", "full"], ["joined_again"], axis=1),
        convolution("e", "joined_again", "e"),
        helper.make_node("MatMul", ["image_geometry", "by_geometry"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "space"], ["offset"]),
        helper.make_node("Split", ["e"], ["first", "second"], axis=1),
        helper.make_node("Mul", ["first", "four"], ["scaled"]),
        helper.make_node("Add", ["scaled", "offset"], ["phase"]),
        helper.make_node("Softplus", ["second"], ["phase_error"]),
    ]
    constants["four"] = np.float32(4)
    inputs = {"image_features": [1, features + 2, "rows", "columns"], "image_geometry": [1, values]}
    outputs = {key: [1, 1, "rows", "columns"] for key in ("phase", "phase_error")}
    return _graph("unet", nodes, inputs, outputs, constants)


def write_two_parts(path: Path, parts=None, margin=MARGIN, **metadata) -> Path:
    """Write a model of both parts, random ones if none are given."""
    parts = (encoder(), unet()) if parts is None else parts
    onnx.save(join(*parts, margin, {"name": "two parts", "version": "1", "domain": {}, **metadata}), path)
    return path
