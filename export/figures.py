"""Figures of merit into a model's metadata: the correlations that the benchmark measured of it.

    python -m training.benchmark FOLDER --model MODEL.onnx
    python -m export.figures MODEL.onnx FOLDER/benchmark.csv OUTPUT.onnx

The weights stay as they are; the file's SHA-256 changes.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any

import onnx

METHOD = "AIRPI"  # of the benchmark's rows, if it had one model


def figures(table: Path, model: str) -> dict[str, Any]:
    """What `python -m training.benchmark` wrote to benchmark.csv, as the metadata's `figures`.

    Parameters
    ----------
    table : Path
    model : str
        Its name and version, as the table calls it if there were several.

    Raises
    ------
    ValueError
        If the table has no rows of this model.
    """
    methods = (METHOD, f"{METHOD} {model}")
    correlations: dict[str, dict[str, float]] = {}
    with open(table, newline="") as file:
        for row in csv.DictReader(file):
            if row.get("method") in methods and row.get("xc"):
                dose = float(row["dose"])
                shown = "no noise" if math.isinf(dose) else f"{dose:g} electrons / A^2"
                correlations.setdefault(row["specimen"], {})[shown] = round(float(row["xc"]), 3)
    if not correlations:
        raise ValueError(f"{table} has no rows of {' or '.join(methods)}; give what training.benchmark wrote.")
    return {
        "description": "xc, Pearson's correlation with the projected phase (eq. 14), on simulated crystals",
        "command": "python -m training.benchmark",
        "xc": correlations,
    }


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "table", "output"):
        parser.add_argument(name, type=Path)
    chosen = parser.parse_args(arguments)
    model = onnx.load(chosen.model)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    try:
        properties["figures"] = json.dumps(figures(chosen.table, f"{properties['name']} {properties['version']}"))
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, properties)
    onnx.save(model, chosen.output)
    print(f"{chosen.output}: {len(json.loads(properties['figures'])['xc'])} specimens")


if __name__ == "__main__":
    main()
