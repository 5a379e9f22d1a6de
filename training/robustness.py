"""xc with the truth against errors of the calibration: centre, rotation, k-pixel, semi-angle and defocus.

    python -m training.robustness SCANS_FOLDER docs

SCANS_FOLDER holds the benchmark's simulated scans, `python -m training.benchmark SCANS_FOLDER --only dose`. One
value is told wrong at a time, everything else is right. Writes robustness.csv and robustness.png.
"""

from __future__ import annotations

import argparse
import csv
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

from airpi_py4d.acquisition import Acquisition
from airpi_py4d.engine import reconstruct
from airpi_py4d.model import Model
from training.benchmark.cases import MARGIN
from training.benchmark.scans import reference_scan
from training.reference import ReferenceScan, cross_correlation
from training.simulation import BRIGHT_FIELD_RADIUS

SPECIMENS = ("SrTiO3 [001] 8 A", "WS2 with vacancies")
DOSE = 1e5  # [electrons / A^2]
SEED = 4
#: Error: unit, and its values.
ERRORS = {
    "centre": ("px of a disk of radius 12 px", (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)),
    "rotation": ("degrees", (0.0, 2.0, 4.0, 6.0, 8.0, 10.0)),
    "k-pixel": ("%", (-10.0, -5.0, -2.0, 0.0, 2.0, 5.0, 10.0)),
    "semi-angle": ("%", (-10.0, -5.0, -2.0, 0.0, 2.0, 5.0, 10.0)),
    "defocus": ("nm", (-10.0, -5.0, -2.0, 0.0, 2.0, 5.0, 10.0)),
}


def mistaken(right: Acquisition, error: str, value: float) -> Acquisition:
    """The acquisition with one error."""
    assert right.center is not None
    if error == "centre":
        pixel = right.aperture_radius / BRIGHT_FIELD_RADIUS * value / np.sqrt(2)
        row, column = (c + pixel / k for c, k in zip(right.center, right.k_pixel, strict=True))
        return replace(right, center=(row, column))
    if error == "rotation":
        return replace(right, rotation=right.rotation + value)
    if error == "k-pixel":
        row, column = (k * (1 + value / 100) for k in right.k_pixel)
        return replace(right, k_pixel=(row, column))
    if error == "semi-angle":
        return replace(right, semiangle=right.semiangle * (1 + value / 100))
    return replace(right, defocus=right.defocus + 10 * value)


def robustness(scan: ReferenceScan, model: Model) -> list[dict]:
    """A row for every error and value: xc with the truth."""
    counts = scan.counts(DOSE, SEED)
    inner = (slice(MARGIN, -MARGIN),) * 2
    rows = []
    for error, (unit, values) in ERRORS.items():
        for value in values:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = reconstruct(
                    counts, mistaken(scan.acquisition, error, value), model=model, oversample=1, strict=False
                )
            xc = cross_correlation(result.phase[inner], scan.phase[inner])
            rows.append({"error": error, "unit": unit, "value": value, "xc": round(xc, 4)})
    return rows


def plot(rows: list[dict], title: str, path: Path) -> None:
    """One panel an error, one line a specimen."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(ERRORS), figsize=(3 * len(ERRORS), 3))
    for axis, (error, (unit, _)) in zip(axes, ERRORS.items(), strict=True):
        for name in SPECIMENS:
            found = [row for row in rows if row["error"] == error and row["specimen"] == name]
            axis.plot([float(row["value"]) for row in found], [float(row["xc"]) for row in found], "o-", label=name)
        axis.set_title(f"{error} [{unit}]", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("xc with the truth")
    axes[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", type=Path)
    parser.add_argument("docs", type=Path)
    parser.add_argument("--positions", type=int, default=56)
    arguments = parser.parse_args()
    model = Model(None, "cpu")
    rows = []
    for name in SPECIMENS:
        scan = reference_scan(name, arguments.positions, arguments.scans)
        rows += [{"specimen": name} | row for row in robustness(scan, model)]
    with open(arguments.docs / "robustness.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    title = f"{model.contract.name}, {DOSE:g} electrons / A$^2$, simulated; error of the value told"
    plot(rows, title, arguments.docs / "robustness.png")


if __name__ == "__main__":
    main()
