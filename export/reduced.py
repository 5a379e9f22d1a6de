"""A model in a smaller number format: its network, or both, with the same metadata.

    python -m export.reduced MODEL.onnx OUTPUT.onnx [--format float16]

What the formats cost: docs/models.md and docs/speed.md.
"""

from __future__ import annotations

import argparse
import base64
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process

from airpi_py4d.models import IMAGE_NETWORK

#: Computed with float16; counts and their sums would overflow.
_HALF_OPERATORS = {"Conv", "MatMul", "Gemm"}
#: Weights of one operator, from which on they are quantised.
_MANY_WEIGHTS = 10_000

Conversion = Callable[[onnx.ModelProto], onnx.ModelProto]


def converted(model: onnx.ModelProto, conversion: Conversion, suffix: str) -> onnx.ModelProto:
    """The model's networks converted, with the suffix behind its name."""
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if IMAGE_NETWORK in properties:
        second = conversion(onnx.load_from_string(base64.b64decode(properties[IMAGE_NETWORK])))
        onnx.checker.check_model(second, full_check=True)
        properties[IMAGE_NETWORK] = base64.b64encode(second.SerializeToString()).decode("ascii")
    result = conversion(model)
    del result.metadata_props[:]
    helper.set_model_props(result, {**properties, "name": properties["name"] + suffix})
    onnx.checker.check_model(result, full_check=True)
    return result


def float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convolutions and matrix products in float16, with their weights; everything else, inputs and output, in float32.

    ONNX Runtime's own converter casts the graph's inputs first, which counts above 65,504 do not survive.
    """
    return converted(model, half, "-float16")


def int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """Large weights in int8, one scale a channel; what they are multiplied with is quantised as it comes (dynamically).

    Fourier transforms and the first convolution have few weights and a wide range of inputs: they stay in float32.
    """
    return converted(model, quantised, "-int8")


def half(model: onnx.ModelProto, kind: int = TensorProto.FLOAT16) -> onnx.ModelProto:
    """One network in float16 or bfloat16, without its metadata."""
    result = onnx.load_from_string(model.SerializeToString())
    weights = {entry.name: entry for entry in result.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    dtype = helper.tensor_dtype_to_np_dtype(kind)

    def cast(name: str, output: str, kind: int) -> str:
        nodes.append(helper.make_node("Cast", [name], [output], name=f"cast/{output}", to=kind))
        return output

    for node in result.graph.node:
        if node.op_type not in _HALF_OPERATORS:
            nodes.append(node)
            continue
        for place, name in enumerate(node.input):
            if name in weights:
                if f"{name}/half" not in weights:
                    value = numpy_helper.to_array(weights[name]).astype(dtype)
                    weights[f"{name}/half"] = numpy_helper.from_array(value, f"{name}/half")
                node.input[place] = f"{name}/half"
            else:
                node.input[place] = cast(name, f"{name}/half/{node.name}", kind)
        output = node.output[0]
        node.output[0] = f"{output}/half"
        nodes.append(node)
        cast(f"{output}/half", output, TensorProto.FLOAT)
    used = {name for node in nodes for name in node.input}
    for field, entries in (("node", nodes), ("initializer", [weights[name] for name in weights if name in used])):
        result.graph.ClearField(field)
        getattr(result.graph, field).extend(entries)
    result.graph.ClearField("value_info")
    return result


def quantised(
    model: onnx.ModelProto, quantise: Callable[..., None] = quantize_dynamic, **options: Any
) -> onnx.ModelProto:
    """One network with its large weights in int8, by a function of ONNX Runtime's."""
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, result = (Path(folder) / f"{name}.onnx" for name in ("source", "prepared", "result"))
        onnx.save(model, source)
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        large = {entry.name for entry in graph.initializer if math.prod(entry.dims) > _MANY_WEIGHTS}
        excluded = [node.name for node in graph.node if large.isdisjoint(node.input)]
        options |= {"per_channel": True, "weight_type": QuantType.QInt8, "nodes_to_exclude": excluded}
        quantise(prepared, result, **options)
        return onnx.load(result)


FORMATS = {"float16": float16, "int8": int8}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--format", choices=FORMATS, default="float16")
    chosen = parser.parse_args(arguments)
    onnx.save(FORMATS[chosen.format](onnx.load(chosen.model)), chosen.output)
    print(f"{chosen.output}: {chosen.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
