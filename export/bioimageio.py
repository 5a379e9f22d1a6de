"""A bioimage.io 0.5 package of a model: the self-contained graph with test tensors, tolerances, README and cover.

    python -m export.bioimageio MODEL.onnx OUTPUT.zip [--keras MODEL.keras]
    bioimageio test OUTPUT.zip

The package describes the graph of `export.self_contained` from its metadata. The test tensors are 3x3 kernels of the
shipped demo scan and what ONNX Runtime makes of them. A Keras file goes along as an attachment: bioimageio.core 0.11
gives Keras and TensorFlow weights one input only, and this model has more.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import onnxruntime
from bioimageio.spec import save_bioimageio_package
from bioimageio.spec.common import FileDescr
from bioimageio.spec.generic.v0_3 import Author, CiteEntry, Doi, LicenseId
from bioimageio.spec.model import v0_5
from matplotlib.figure import Figure
from numpy.typing import NDArray

from airpi_py4d import Acquisition, models, reconstruct
from airpi_py4d.demo import demo_path
from export.self_contained import self_contained

#: Calibration of the demo scan, which lies in its file too.
DEMO = Acquisition(80e3, 25.0, (0.25, 0.25), (0.05, 0.05), center=(31, 31))
#: The scan has no aberrations, but the specification refuses test tensors that are 0.
TEST_ABERRATIONS = {"defocus": 1.0, "spherical_aberration": 100.0}  # [A]
#: First scan positions, row and column, of the kernels in the test tensors: second layer, its edge, single layer.
TEST_KERNELS = ((5, 5), (28, 30), (30, 36), (40, 50))
#: Of the largest absolute value of a test output; and relative to every value.
ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE = 1e-3, 1e-3
_LONGEST_TEXT = 128  # characters of a tensor's description


def demo_scan() -> NDArray[np.uint8]:
    """Counts of the demo scan (scan rows, scan columns, detector rows, detector columns)."""
    found: list[Any] = []
    with h5py.File(demo_path()) as file:
        file.visititems(lambda _, entry: found.append(entry) if getattr(entry, "ndim", 0) == 4 else None)
        return np.asarray(found[0])


def example_inputs(scan: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
    """The graph's inputs for TEST_KERNELS of the demo scan."""
    kernels = np.stack([scan[row : row + 3, column : column + 3] for row, column in TEST_KERNELS])
    scalars = {
        "energy": DEMO.energy,
        "semiangle": DEMO.semiangle,
        "k_pixel": DEMO.k_pixel[0],
        "scan_step": DEMO.scan_step[0],
        **TEST_ABERRATIONS,
    }
    assert DEMO.center is not None
    return {
        "patterns": kernels.astype(np.float32),
        **{name: np.array([value], np.float32) for name, value in scalars.items()},
        "center": np.array(DEMO.center, np.float32),
    }


def _axes(entry: Mapping[str, Any], index: Any) -> list[Any]:
    """Axes of an input or output of the metadata; `index` is the class of an axis that is only counted.

    Names in parentheses are those of an axis's elements: a channel axis.
    """
    axes: list[Any] = []
    outside_parentheses = r",\s*(?![^(]*\))"
    for name, size in zip(re.split(outside_parentheses, entry["axes"]), entry["shape"], strict=True):
        if name.startswith("("):
            axes.append(v0_5.ChannelAxis(channel_names=[part.strip() for part in name[1:-1].split(",")]))
        elif name == "batch":
            axes.append(v0_5.BatchAxis())
        else:
            whole = size if isinstance(size, int) else v0_5.ParameterizedSize(min=8, step=1)
            axes.append(index(id=v0_5.AxisId(name.replace(" ", "_") or "index"), size=whole))
    return axes


def _tensor(kind: Any, index: Any, name: str, entry: Mapping[str, Any], folder: Path, value: NDArray) -> Any:
    """Description of an input or output, with its test tensor as a file in the folder."""
    path = folder / f"{name}.npy"
    np.save(path, value)
    return kind(
        id=v0_5.TensorId(name),
        description=textwrap.shorten(f"[{entry['unit']}] {entry['description']}", _LONGEST_TEXT, placeholder=" ..."),
        axes=_axes(entry, index),
        test_tensor=FileDescr(source=path),
        data=v0_5.IntervalOrRatioDataDescr(type="float32"),
    )


def _cover(path: Path, scan: NDArray[Any], model: Path) -> None:
    """Mean pattern of the demo and the phase image that the model makes of it, side by side, 2:1."""
    phase = reconstruct(scan, DEMO, model=model, device="cpu").phase
    figure = Figure(figsize=(8, 4), layout="constrained")
    images = {"mean of the patterns (log)": np.log10(1e-3 + scan.mean(axis=(0, 1))), "phase": phase}
    for axes, (title, image) in zip(figure.subplots(1, 2), images.items(), strict=True):
        axes.imshow(image, cmap="magma")
        axes.set_title(title)
        axes.set_axis_off()
    figure.savefig(path, dpi=100)


def _readme(description: models.Description, card: str) -> str:
    """README of the package: the card, what goes in and out, how to validate."""
    return f"""{card}

## Inputs and outputs

```text
{description}
```

## Validation

The test tensors are four 3x3 kernels of a simulated WS2 scan, and what ONNX Runtime made of them. To validate the model
on data of your own, simulate a scan whose phase is known, reconstruct it
(`examples/reconstruct_with_onnxruntime.py` of airpi_py4d needs nothing but NumPy, ONNX Runtime and this model),
and compare Pearson's correlation with the projected phase; `python -m training.benchmark` does that for crystals which
the model was not trained on.
"""


def package(model: Path, output: Path, keras: Path | None = None) -> Path:
    """Write the package.

    Parameters
    ----------
    model : Path
        ONNX file of `export.to_onnx`; a card beside it (same name, .md) becomes the README's first part.
    output : Path
        Zip file.
    keras : Path, optional
        Keras file of the same model, to attach.

    Raises
    ------
    ValueError
        If the model has no airpi metadata, can't be wrapped, or the description isn't valid.
    """
    graph = self_contained(model.read_bytes(), str(model))
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    described = {name: json.loads(metadata[name]) for name in ("inputs", "outputs")}
    scan = demo_scan()
    feeds = example_inputs(scan)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    results = dict(zip(described["outputs"], session.run(list(described["outputs"]), feeds), strict=True))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = folder / f"{metadata['name']}-self-contained.onnx"
        onnx.save(graph, weights)
        card = model.with_suffix(".md")
        title = f"# {metadata['name']}\n\n{metadata['normalisation']}"
        readme = _readme(models.describe(weights), card.read_text() if card.is_file() else title)
        (folder / "README.md").write_text(readme.replace(f"{temporary}/", ""))
        _cover(folder / "cover.png", scan, model)
        tolerances = [
            v0_5.ReproducibilityTolerance(
                relative_tolerance=RELATIVE_TOLERANCE,
                absolute_tolerance=ABSOLUTE_TOLERANCE * float(np.abs(result).max()),
                output_ids=[v0_5.TensorId(name)],
            )
            for name, result in results.items()
        ]
        description = v0_5.ModelDescr(
            name=f"{metadata['name']} {metadata['version']} (phase of 4D-STEM)",
            description="Complex object patch and exit wave of the central of 3x3 neighbouring diffraction patterns "
            "(4D-STEM), from raw counts and the calibration",
            authors=[Author(name="authors of airpi_py4d")],
            cite=[CiteEntry(text=metadata["citation"], doi=Doi(re.findall(r"10\.\S+", metadata["citation"])[0]))],
            license=LicenseId(metadata["license"]),
            tags=["4D-STEM", "electron microscopy", "phase retrieval", "ptychography"],
            documentation=FileDescr(source=folder / "README.md"),
            covers=[FileDescr(source=folder / "cover.png")],
            attachments=[] if keras is None else [FileDescr(source=keras)],
            inputs=[
                _tensor(v0_5.InputTensorDescr, v0_5.IndexInputAxis, name, entry, folder, feeds[name])
                for name, entry in described["inputs"].items()
            ],
            outputs=[
                _tensor(v0_5.OutputTensorDescr, v0_5.IndexOutputAxis, name, entry, folder, results[name])
                for name, entry in described["outputs"].items()
            ],
            weights=v0_5.WeightsDescr(
                onnx=v0_5.OnnxWeightsDescr(source=weights, opset_version=graph.opset_import[0].version)
            ),
            config=v0_5.Config(bioimageio=v0_5.BioimageioConfig(reproducibility_tolerance=tolerances)),
        )
        return save_bioimageio_package(description, output_path=output)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and write the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="file that export.to_onnx wrote")
    parser.add_argument("output", type=Path, help="zip file to write")
    parser.add_argument("--keras", type=Path, help="Keras file of the same model, to attach")
    chosen = parser.parse_args(arguments)
    try:
        package(chosen.model, chosen.output, chosen.keras)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    print(f"{chosen.output}: {chosen.output.stat().st_size / 1e6:.1f} MB; check it: bioimageio test {chosen.output}")


if __name__ == "__main__":
    main()
