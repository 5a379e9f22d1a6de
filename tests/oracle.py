"""An oracle: an ONNX model with the engine's contract that returns known patches.

The patterns carry the number of their scan position as their electron count, position n having n + 1 electrons; the
graph sums the central pattern and looks the patch up.
"""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

#: Of the shipped models, that which gives object patches of 3x3 kernels.
KERNEL_MODEL = "airpi-2"
METADATA = {
    "airpi_schema": "1",
    "name": "oracle",
    "version": "1",
    "grid": json.dumps({"kind": "aperture", "pixels": 64, "aperture_radius": 12}),
    "output": json.dumps({"kind": "object_patch", "pixels": 16}),
    "domain": json.dumps({}),
}


def write_oracle(path: Path, patches: np.ndarray, metadata: dict[str, str] | None = None) -> Path:
    """Write an oracle that returns `patches` (scan rows, scan columns, 16, 16)."""
    flat = patches.reshape(-1, 16, 16)
    table = np.stack([flat.real, flat.imag], -1).astype(np.float32)
    constants = {"table": table, "centre": np.int64(1), "one": np.float32(1), "axes": np.array([1, 2])}
    nodes = [
        helper.make_node("Gather", ["patterns", "centre"], ["row"], axis=1),
        helper.make_node("Gather", ["row", "centre"], ["pattern"], axis=1),
        helper.make_node("ReduceSum", ["pattern", "axes"], ["electrons"], keepdims=0),
        helper.make_node("Sub", ["electrons", "one"], ["position"]),
        helper.make_node("Round", ["position"], ["rounded"]),
        helper.make_node("Cast", ["rounded"], ["number"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "number"], ["object_patch"], axis=0),
    ]
    graph = helper.make_graph(
        nodes,
        "oracle",
        [
            helper.make_tensor_value_info("patterns", TensorProto.FLOAT, ["batch", 3, 3, 64, 64]),
            helper.make_tensor_value_info("geometry", TensorProto.FLOAT, ["batch", 3]),
        ],
        [helper.make_tensor_value_info("object_patch", TensorProto.FLOAT, ["batch", 16, 16, 2])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    for key, value in (METADATA if metadata is None else metadata).items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)
    return path


def numbered_patterns(rows: int, columns: int, detector: tuple[int, int] = (64, 64)) -> np.ndarray:
    """Patterns of shape (rows, columns, *detector) with position n's n + 1 electrons in the middle pixel."""
    data = np.zeros((rows, columns, *detector), np.uint16)
    numbers = np.arange(rows * columns).reshape(rows, columns) + 1
    data[:, :, detector[0] // 2, detector[1] // 2] = numbers
    return data
