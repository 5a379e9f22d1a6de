"""Floating point operations of an ONNX graph, counted at the shapes that really run."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

_COUNTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")


def count_flop(file: str | Path, inputs: dict[str, np.ndarray]) -> Counter[str]:
    """FLOP of convolutions and matrix products, a multiplication and an addition each, by the kind of node.

    Everything else (activations, sums, resizing) isn't counted: it is bound by memory, not by arithmetic.

    Parameters
    ----------
    file : str or Path
    inputs : dict of str to ndarray
        To run the model on.
    """
    model = onnx.load(file)
    nodes = [node for node in model.graph.node if node.op_type in _COUNTED]
    needed = {name for node in nodes for name in (*node.input[:2], node.output[0])}
    shapes = {entry.name: tuple(entry.dims) for entry in model.graph.initializer}
    shapes |= {name: array.shape for name, array in inputs.items()}
    wanted = sorted(needed - shapes.keys())
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    shapes |= {name: array.shape for name, array in zip(wanted, session.run(wanted, inputs), strict=True)}
    count: Counter[str] = Counter()
    for node in nodes:
        left, weights, result = (shapes[name] for name in (*node.input[:2], node.output[0]))
        if node.op_type == "Conv":
            products = math.prod(result) * math.prod(weights[1:])
        elif node.op_type == "ConvTranspose":
            products = math.prod(left) * math.prod(weights[1:])
        else:
            transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
            products = math.prod(result) * left[0 if transposed else -1]
        count[node.op_type] += 2 * products
    return count
