"""An encoder of patterns and an image network to one file of the kind that stitches features.

    python -m export.two_parts ENCODER.onnx IMAGE_NETWORK.onnx OUTPUT.onnx METADATA.json --margin PIXELS

METADATA.json holds `name`, `version`, `domain` and what else of docs/models.md is to be in the file; `grid`, `inputs`,
`output`, `label` and the schema are written here.

The image network lies in the file's metadata. As a second part of the same graph it would run whenever the encoder
does: ONNX Runtime (1.18 and 1.32) executes every node, also with `only_execute_path_to_fetches`.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from airpi_py4d.feature_stitching import EXTRA_CHANNELS
from airpi_py4d.models import IMAGE_NETWORK, SCHEMA

#: Of the patterns on the aperture grid [px], of the bright-field disk there, and of what smaller detector
#: pixels are spread to: those of `training.simulation`.
DETECTOR, BRIGHT_FIELD_RADIUS, SMALLEST_PIXEL = 64, 12, 1.1
LABEL = "projected phase"


def _described(features: int, pixels: int, values: int) -> dict[str, Any]:
    """`grid`, `inputs` and `outputs` of the metadata; `values` numbers are in `image_geometry`."""
    names = ("pixel size", "scan step", "defocus phase", "spherical phase", "aperture radius")[:values]
    channels = features + EXTRA_CHANNELS
    aberrations = (
        "phases of defocus, -pi lambda k0^2 defocus, and of C_s, pi C_s lambda^3 k0^4 / 2, at the aperture's edge; 0 "
        "if not known"
    )
    return {
        "grid": {
            "kind": "aperture",
            "pixels": DETECTOR,
            "aperture_radius": BRIGHT_FIELD_RADIUS,
            "smallest_pixel": SMALLEST_PIXEL,
            "description": "the bright-field disk has a radius of 12 pixels: k-pixel = k0 / 12; detector pixels "
            f"smaller than {SMALLEST_PIXEL} grid pixels are spread over tents as wide",
        },
        "inputs": {
            "patterns": {
                "shape": ["batch", DETECTOR, DETECTOR],
                "axes": "batch, detector row, detector column",
                "unit": "electrons",
                "description": "diffraction patterns on the aperture grid, not normalised; optical axis at pixel "
                f"{DETECTOR // 2}, electrons beyond the detector 0; detector axes rotated to the scan axes",
            },
            "geometry": {
                "shape": ["batch", 3],
                "axes": "batch, (scan step, defocus phase, spherical phase)",
                "unit": "1/k0, rad, rad",
                "description": f"scan step times k0 = semi-angle / wavelength; {aberrations}",
            },
            "image_features": {
                "shape": [1, channels, "rows", "columns"],
                "axes": "1, (features, level, coverage), row, column",
                "unit": "1",
                "description": "input of the image network: feature patches stitched by the equations of "
                "airpi_py4d/feature_stitching.py; rows and columns are multiples of 4",
            },
            "image_geometry": {
                "shape": [1, values],
                "axes": f"1, ({', '.join(names)})",
                "unit": ", ".join(("1/k0", "1/k0", "rad", "rad", "1/A")[:values]),
                "description": f"of the image network: pixel size and scan step times k0; {aberrations}",
            },
        },
        "outputs": {
            "feature_patch": {
                "shape": ["batch", features, pixels, pixels],
                "axes": "batch, feature, row, column",
                "unit": "1",
                "pixel_size": "1 / (64 * k0 / 12) A, k0 in 1/A",
                "description": f"features around the probe position, which is pixel {pixels // 2}",
            },
            "phase": {
                "shape": [1, 1, "rows", "columns"],
                "axes": "1, 1, row, column",
                "unit": "rad",
                "description": "of the image network: projected phase sigma v_z, not wrapped, positive for a positive "
                "projected potential",
            },
            "phase_error": {
                "shape": [1, 1, "rows", "columns"],
                "axes": "1, 1, row, column",
                "unit": "rad",
                "description": "of the image network: its estimate of the phase's standard deviation",
            },
        },
    }


def _shapes(entries: Any) -> dict[str, list[int | None]]:
    """Shapes of a graph's inputs or outputs, None for any length."""
    return {
        entry.name: [dim.dim_value if dim.HasField("dim_value") else None for dim in entry.type.tensor_type.shape.dim]
        for entry in entries
    }


def join(
    encoder: onnx.ModelProto, image_network: onnx.ModelProto, margin: int, metadata: Mapping[str, Any]
) -> onnx.ModelProto:
    """One model of both parts, with the metadata that the engine reads.

    Parameters
    ----------
    encoder : onnx.ModelProto
        Inputs `patterns` (n, 64, 64) and `geometry` (n, 3); output `feature_patch` (n, features, p, p).
    image_network : onnx.ModelProto
        Inputs `image_features` (1, features + 2, h, w) and `image_geometry` (1, 4), or (1, 5) with k0 [1/A]; outputs
        `phase` and `phase_error` (1, 1, h, w).
    margin : int
        Half width of the image network's receptive field [px].
    metadata : mapping
        At least `name`, `version` and `domain`; texts, or what becomes JSON. Goes before what is written here.

    Returns
    -------
    onnx.ModelProto
        The encoder, the image network in base64 in its metadata.

    Raises
    ------
    ValueError
        If inputs or outputs are others, or metadata are missing.
    """
    missing = {"name", "version", "domain"}.difference(metadata)
    if missing:
        raise ValueError(f"metadata lack {', '.join(sorted(missing))}.")
    if margin < 1:
        raise ValueError(f"margin is {margin} px, expected at least 1.")
    given, image_given = _shapes(encoder.graph.output), _shapes(image_network.graph.output)
    patch = given.get("feature_patch", [])
    if len(patch) != 4 or patch[1] is None or patch[2] is None or patch[2] != patch[3]:
        raise ValueError(f"encoder has the outputs {given}, expected feature_patch (n, features, p, p).")
    features, pixels = patch[1], patch[2]
    taken = _shapes(encoder.graph.input)
    if taken != {"patterns": [None, DETECTOR, DETECTOR], "geometry": [None, 3]}:
        raise ValueError(
            f"encoder has the inputs {taken}, expected patterns (n, {DETECTOR}, {DETECTOR}) and geometry (n, 3)."
        )
    taken = _shapes(image_network.graph.input)
    channels = features + EXTRA_CHANNELS
    values = 4 if taken.get("image_geometry") == [1, 4] else 5
    if taken != {"image_features": [1, channels, None, None], "image_geometry": [1, values]}:
        raise ValueError(
            f"image_network has the inputs {taken}, expected image_features (1, {channels}, h, w) and image_geometry "
            "(1, 4) or (1, 5)."
        )
    if set(image_given) != {"phase", "phase_error"}:
        raise ValueError(f"image_network has the outputs {image_given}, expected phase and phase_error.")
    described = _described(features, pixels, values)
    output = {"kind": "stitched_features", "features": features, "pixels": pixels, "margin": margin}
    properties = {
        "airpi_schema": SCHEMA,
        "label": LABEL,
        **described,
        "output": {"name": "feature_patch", **output, **described["outputs"]["feature_patch"]},
        **metadata,
        IMAGE_NETWORK: base64.b64encode(image_network.SerializeToString()).decode("ascii"),
    }
    joined = onnx.ModelProto()
    joined.CopyFrom(encoder)
    del joined.metadata_props[:]
    for key, value in properties.items():
        joined.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    return joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("encoder", "image_network", "output", "metadata"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--margin", type=int, required=True)
    arguments = parser.parse_args()
    parts = onnx.load(arguments.encoder), onnx.load(arguments.image_network)
    joined = join(*parts, arguments.margin, json.loads(arguments.metadata.read_text()))
    onnx.save(joined, arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
