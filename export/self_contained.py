"""One ONNX graph from raw counts to the object, for programs that have an ONNX runtime and nothing of this package.

    python -m export.self_contained MODEL.onnx OUTPUT.onnx

The graph resamples the patterns to the model's grid, turns the calibration into the model's geometry, runs the model
and computes the probe and its weights. Operators of ai.onnx only; any detector size and any batch. What the engine does
beyond that stays with the caller: kernels of 3x3 positions, rotation of the detector, bad pixels, descan, stitching.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, compose, helper, numpy_helper, shape_inference

from airpi_py4d import optics, patterns, stitching
from airpi_py4d.model import Contract, read_contract

#: Versions of ai.onnx whose operators the graph is written in: that of the model.
OPSETS = range(17, 22)
#: Radius of the aperture on the grid that the probe is summed over [px]; no grid point lies on the edge.
PROBE_RADIUS = 24.5
_WRAPPED = "model/"

INPUTS: dict[str, dict[str, Any]] = {
    "patterns": {
        "shape": ["batch", 3, 3, "rows", "columns"],
        "axes": "batch, scan row, scan column, detector row, detector column",
        "unit": "electrons",
        "description": "3x3 neighbouring diffraction patterns as counted. Detector rows and columns must run along "
        "scan rows and columns: the graph does not rotate. Bad pixels must be filled, detector units divided by the "
        "gain",
    },
    "energy": {"shape": [1], "axes": "", "unit": "eV", "description": "energy of the beam electrons"},
    "semiangle": {"shape": [1], "axes": "", "unit": "mrad", "description": "convergence semi-angle"},
    "k_pixel": {
        "shape": [1],
        "axes": "",
        "unit": "1/A",
        "description": "size of a detector pixel, the same along rows and columns, in cycles",
    },
    "scan_step": {
        "shape": [1],
        "axes": "",
        "unit": "A",
        "description": "distance of neighbouring scan positions, the same along rows and columns",
    },
    "defocus": {
        "shape": [1],
        "axes": "",
        "unit": "A",
        "description": "positive for underfocus; 0 if not known",
        "default": 0.0,
    },
    "spherical_aberration": {
        "shape": [1],
        "axes": "",
        "unit": "A",
        "description": "third-order spherical aberration C_s; 0 if not known",
        "default": 0.0,
    },
    "center": {
        "shape": [2],
        "axes": "(row, column)",
        "unit": "px",
        "description": "optical axis on the detector; the first pixel's centre is (0, 0)",
    },
}


def outputs(pixels: int) -> dict[str, dict[str, Any]]:
    """Outputs of the graph, in their order, for patches of `pixels` x `pixels`."""
    wave = {"axes": "batch, row, column, (real, imaginary)", "unit": "1", "shape": ["batch", pixels, pixels, 2]}
    middle = f"the central probe position is pixel {pixels // 2}"
    return {
        "object_patch": {
            **wave,
            "description": f"psi_out(r) / psi_in(r); {middle}; its angle is the phase of the object in rad, positive "
            "for a positive projected potential; 1 in vacuum",
        },
        "exit_wave": {**wave, "description": f"psi_out(r), object_patch times probe, where `label` has them; {middle}"},
        "probe": {
            "axes": "row, column, (real, imaginary)",
            "unit": "1",
            "shape": [pixels, pixels, 2],
            "description": f"psi_in(r) (eq. 2); its intensities over the whole plane sum to 1; {middle}",
        },
        "weights": {
            "axes": "row, column",
            "unit": "1",
            "shape": [pixels, pixels],
            "description": "weights of the patch's pixels (eq. 7); they sum to 1",
        },
        "patch_pixel_size": {
            "axes": "",
            "unit": "A",
            "shape": [1],
            "description": "pixel size of object_patch, exit_wave, probe and weights",
        },
    }


class _Value:
    """The name of a tensor, with NumPy's arithmetic."""

    def __init__(self, graph: _Graph, name: str) -> None:
        self.graph, self.name = graph, name

    def __add__(self, other: _Value | ArrayLike) -> _Value:
        return self.graph("Add", self, other)

    def __sub__(self, other: _Value | ArrayLike) -> _Value:
        return self.graph("Sub", self, other)

    def __mul__(self, other: _Value | ArrayLike) -> _Value:
        return self.graph("Mul", self, other)

    def __truediv__(self, other: _Value | ArrayLike) -> _Value:
        return self.graph("Div", self, other)

    def __matmul__(self, other: _Value | ArrayLike) -> _Value:
        return self.graph("MatMul", self, other)


class _Graph:
    """Nodes and constants in the order of their making; numbers are taken as float64 unless they have another type."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def value(self, number: _Value | ArrayLike) -> _Value:
        if isinstance(number, _Value):
            return number
        array = np.asarray(number) if isinstance(number, (np.ndarray, np.generic)) else np.asarray(number, np.float64)
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return _Value(self, name)

    def __call__(self, operator: str, *inputs: _Value | ArrayLike, output: str = "", **attributes: Any) -> _Value:
        name = output or f"{operator.lower()}_{len(self.nodes)}"
        taken = [self.value(entry).name for entry in inputs]
        self.nodes.append(helper.make_node(operator, taken, [name], name=name, **attributes))
        return _Value(self, name)

    def double(self, value: _Value) -> _Value:
        return self("Cast", value, to=TensorProto.DOUBLE)

    def single(self, value: _Value, output: str = "") -> _Value:
        return self("Cast", value, to=TensorProto.FLOAT, output=output)

    def range(self, count: _Value) -> _Value:
        """0, 1 ... count - 1 as float64; count is an int64 of shape (1,)."""
        scalar = self("Squeeze", count)
        return self.double(self("Range", np.int64(0), scalar, np.int64(1)))


def _resampling_matrix(graph: _Graph, count: _Value, center: _Value, ratio: _Value, grid: int) -> _Value:
    """Map from `count` detector pixels of `ratio` grid pixels to the grid, along one axis, shape (grid, count).

    `airpi_py4d.patterns.resampling_matrix` where the detector is not rotated: it is then the product of two of these.
    """
    large = graph("Greater", ratio, patterns._LARGE_PIXEL)
    points = graph("Ceil", ratio * float(patterns._POINTS_PER_GRID_PIXEL) - patterns._ROUNDING)
    points = graph("Max", points, 2.0)
    span = graph("Where", large, 2.0, 1.0)
    offsets = (graph.range(graph("Cast", span * points, to=TensorProto.INT64)) + 0.5) / points - span / 2.0
    weights = graph("Where", large, graph("Sub", 1.0, graph("Abs", offsets)), 1.0) / points
    pixels = graph("Unsqueeze", graph.range(count) - center, np.array([1]))
    place = graph("Floor", (pixels + offsets) * ratio + (grid // 2 + 0.5 + patterns._ROUNDING))
    hits = graph("Equal", graph("Unsqueeze", place, np.array([0])), np.arange(float(grid)).reshape(grid, 1, 1))
    return graph.double(hits) @ weights


def _probe(
    graph: _Graph, defocus_phase: _Value, spherical_phase: _Value, contract: Contract
) -> tuple[_Value, _Value, _Value]:
    r"""Real and imaginary part of the probe on the patch's pixels and its intensity, each of shape (p, p).

    .. math:: \psi_{in}(r) = \frac{a}{n K \sqrt N} \sum_{|k| < k_0} \exp(2 \pi i k r - i \chi(k)),
        \quad \chi = \chi_1 (k / k_0)^2 + \chi_3 (k / k_0)^4

    (eq. 2) over the N points k = k0 (i, j) / K in the aperture, with K = PROBE_RADIUS, a the aperture's radius on the
    model's grid of n pixels, and chi_1, chi_3 the phases of defocus and C_s at the aperture's edge. The sum is even in
    both components of k, so cosines do.
    """
    index = np.arange(-int(PROBE_RADIUS), int(PROBE_RADIUS) + 1)
    k_squared = (index[:, None] ** 2 + index[None] ** 2) / PROBE_RADIUS**2
    aperture = k_squared < 1
    position = np.arange(contract.object_pixels) - contract.object_pixels // 2
    assert contract.aperture_pixels is not None
    pixel = contract.aperture_pixels / contract.grid_pixels / PROBE_RADIUS
    cosines = np.cos(2 * np.pi * pixel * position[:, None] * index)
    aberrations = graph.single(defocus_phase * k_squared + spherical_phase * k_squared**2)
    scale = pixel / np.sqrt(aperture.sum())
    real, imaginary = (
        graph.value(cosines) @ (graph.double(graph(function, aberrations)) * (sign * scale * aperture)) @ cosines.T
        for function, sign in (("Cos", 1), ("Sin", -1))
    )
    return real, imaginary, real * real + imaginary * imaginary


def _weights(graph: _Graph, intensity: _Value, pixels: int) -> _Value:
    """Weights of eq. 7, shape (pixels, pixels), as `airpi_py4d.stitching.probe_weights`."""
    near: NDArray = np.abs(np.arange(pixels) - pixels // 2) <= stitching._USED_PART * pixels / 2
    seen = intensity * np.outer(near, near).astype(float)
    threshold = graph("ReduceMax", seen, keepdims=0) * stitching.WEIGHT_THRESHOLD
    kept = graph("Where", graph("Greater", seen, threshold), seen, 0.0)
    return kept / graph("ReduceSum", kept, keepdims=0)


def _complex(graph: _Graph, real: _Value, imaginary: _Value, output: str = "") -> _Value:
    """Real and imaginary part along a new last axis."""
    parts = [graph("Unsqueeze", part, np.array([-1])) for part in (real, imaginary)]
    return graph("Concat", *parts, axis=-1, output=output)


def _prepare(graph: _Graph, contract: Contract) -> _Value:
    """Everything before the model: its inputs, and what depends on the calibration only. Returns the probe."""
    assert contract.aperture_pixels is not None
    energy, semiangle, k_pixel, step, defocus, spherical, center = (
        graph.double(_Value(graph, name)) for name in list(INPUTS)[1:]
    )
    momentum = graph("Sqrt", energy * (energy + 2 * optics._REST_ENERGY))
    wavelength = graph("Div", optics._PLANCK_TIMES_LIGHT, momentum)
    k0 = semiangle * 1e-3 / wavelength
    edge = wavelength * k0 * k0 * np.pi
    defocus_phase = graph("Neg", edge * defocus)
    spherical_phase = edge * spherical * (semiangle * semiangle * 0.5e-6)

    shape = graph("Shape", _Value(graph, "patterns"))
    ratio = k_pixel * contract.aperture_pixels / k0
    maps = [
        graph.single(
            _resampling_matrix(
                graph,
                graph("Gather", shape, np.array([3 + axis])),
                graph("Gather", center, np.array([axis])),
                ratio,
                contract.grid_pixels,
            )
        )
        for axis in (0, 1)
    ]
    rows = maps[0] @ _Value(graph, "patterns")
    graph("MatMul", rows, graph("Transpose", maps[1]), output=f"{_WRAPPED}patterns")
    geometry = graph.single(graph("Concat", step * k0, defocus_phase, spherical_phase, axis=0))
    batch = graph("Concat", graph("Gather", shape, np.array([0])), np.array([3]), axis=0)
    graph("Expand", geometry, batch, output=f"{_WRAPPED}geometry")

    real, imaginary, intensity = _probe(graph, defocus_phase, spherical_phase, contract)
    graph.single(_weights(graph, intensity, contract.object_pixels), output="weights")
    patch_pixel_size = graph("Div", contract.aperture_pixels / contract.grid_pixels, k0)
    graph.single(patch_pixel_size, output="patch_pixel_size")
    return graph.single(_complex(graph, real, imaginary), output="probe")


def _multiply(graph: _Graph, patch: _Value, probe: _Value) -> None:
    """The exit wave: product of complex numbers held as (real, imaginary) along the last axis."""
    (a, b), (c, d) = ([graph("Gather", value, np.int64(part), axis=-1) for part in (0, 1)] for value in (patch, probe))
    _complex(graph, a * c - b * d, a * d + b * c, output="exit_wave")


def _metadata(wrapped: dict[str, str], contract: Contract, sha256: str) -> dict[str, str]:
    """The wrapped model's metadata, but for what the graph takes and gives."""
    described = outputs(contract.object_pixels)
    kind = {
        "kind": "object_patch",
        "pixels": contract.object_pixels,
        "name": "object_patch",
        **described["object_patch"],
        "pixel_size": "output patch_pixel_size",
    }
    return {
        **wrapped,
        "inputs": json.dumps(INPUTS),
        "grid": json.dumps({"kind": "detector", "description": "patterns as detected, of any number of pixels"}),
        "output": json.dumps(kind),
        "outputs": json.dumps(described),
        "wraps": json.dumps({"name": contract.name, "version": contract.version, "sha256": sha256}),
    }


def self_contained(content: bytes, origin: str = "model") -> onnx.ModelProto:
    """Wrap a model into one graph from raw counts to the object.

    Parameters
    ----------
    content : bytes
        Of an ONNX file as `export.to_onnx` writes it.
    origin : str
        What to call it in messages.

    Returns
    -------
    onnx.ModelProto
        With the inputs of `INPUTS` and the outputs of `outputs`, all float32; checked.

    Raises
    ------
    ValueError
        If it isn't a model of object patches on the aperture grid, or of another opset.
    """
    model = onnx.load_from_string(content)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    contract = read_contract(properties, origin)
    if contract.features:
        raise ValueError(
            f"{origin} gives stitched features, which are an image only together with those of its neighbours; a "
            "self-contained file takes a model of object patches."
        )
    if contract.aperture_pixels is None:
        raise ValueError(f"{origin} takes the whole detector; a self-contained graph is made of 'aperture' grids.")
    versions = {entry.domain: entry.version for entry in model.opset_import}
    domains = {node.domain for node in model.graph.node}
    if versions.get("") not in OPSETS or domains != {""}:
        raise ValueError(
            f"{origin} has operators of {sorted(domains)}, opset {versions.get('')}; expected ai.onnx's own, opset "
            f"{OPSETS[0]} to {OPSETS[-1]}: export it again."
        )
    inner = compose.add_prefix(model, _WRAPPED).graph
    graph = _Graph()
    probe = _prepare(graph, contract)
    graph.nodes.extend(inner.node)
    patch = graph("Identity", _Value(graph, inner.output[0].name), output="object_patch")
    _multiply(graph, patch, probe)
    described = {**INPUTS, **outputs(contract.object_pixels)}
    entries = [
        helper.make_tensor_value_info(
            name, TensorProto.FLOAT, entry["shape"], doc_string=f"[{entry['unit']}] {entry['description']}"
        )
        for name, entry in described.items()
    ]
    whole = helper.make_graph(
        graph.nodes,
        contract.name,
        entries[: len(INPUTS)],
        entries[len(INPUTS) :],
        [*graph.constants, *inner.initializer],
        doc_string=f"{contract.name} {contract.version}: 3x3 diffraction patterns (raw counts) to the object's patch",
    )
    result = helper.make_model(
        whole,
        opset_imports=[helper.make_opsetid("", versions[""])],
        ir_version=model.ir_version,
        producer_name="airpi_py4d",
        doc_string=__doc__.split("\n")[0],
    )
    helper.set_model_props(result, _metadata(properties, contract, hashlib.sha256(content).hexdigest()))
    result = shape_inference.infer_shapes(result, check_type=True, strict_mode=True, data_prop=True)
    onnx.checker.check_model(result, full_check=True)
    return result


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="file that export.to_onnx wrote")
    parser.add_argument("output", type=Path)
    chosen = parser.parse_args(arguments)
    try:
        onnx.save(self_contained(chosen.model.read_bytes(), str(chosen.model)), chosen.output)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    print(f"{chosen.output}: {chosen.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
