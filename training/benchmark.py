"""xc with the ground truth for AIRPI, SSB, DPC and the oracle, on crystals that are not in the training set.

    python -m training.benchmark FOLDER [--model FILE] [--positions 56] [--validation]

The scans are simulated once by abTEM (`training.reference`) and kept in FOLDER; the table is printed and written to
FOLDER/benchmark.csv and FOLDER/benchmark.md. With --validation the specimens are others, to choose between models.
Every method gets the same counts, calibration and aberrations. Images are compared at the scan positions, without a
margin of MARGIN positions. The oracle stitches the true exit waves, at the exit plane as published and referred to the
mid-plane: the ceiling of a model with that label.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from airpi_py4d import optics
from airpi_py4d.demo import dpc_phase, ssb_phase
from airpi_py4d.engine import reconstruct
from airpi_py4d.model import Model
from airpi_py4d.stitching import Stitcher
from training.reference import BAND, ReferenceScan, cross_correlation, simulate_reference
from training.specimens import BENCHMARK, VALIDATION

DOSES = (np.inf, 1e5, 1e4, 1e3)  # [electrons / A^2]
MARGIN = 5  # scan positions
SEED = 1
SPHERICAL_ABERRATION = 1e4  # [A], at Scherzer defocus, as in the paper
MARGIN_LENGTH = 8.0  # [1 / k0] of specimen around the scan


def reference_scan(name: str, positions: int, folder: Path) -> ReferenceScan:
    """The simulated scan of one specimen, from the folder if it is there."""
    build, energy, semiangle, step = (BENCHMARK | VALIDATION)[name]
    file = folder / f"{name.replace(' ', '_').replace('[', '').replace(']', '')}_{positions}.npy"
    if file.exists():
        return np.load(file, allow_pickle=True).item()
    side = positions * step + 2 * MARGIN_LENGTH / optics.aperture_radius(energy, semiangle)
    scan = simulate_reference(
        build(side),
        energy,
        semiangle,
        step,
        (positions, positions),
        defocus=optics.scherzer_defocus(energy, SPHERICAL_ABERRATION),
        spherical_aberration=SPHERICAL_ABERRATION,
        seed=SEED,
    )
    np.save(file, np.array(scan, dtype=object), allow_pickle=True)
    return scan


def oracle_phase(patches: NDArray[np.complex64], scan: ReferenceScan) -> NDArray:
    """Phase [rad] at the scan positions of true patches (rows, columns, 16, 16) through the engine's stitching."""
    pixel_size = 1 / (2 * BAND * scan.acquisition.aperture_radius)
    stitcher = Stitcher((len(patches), patches.shape[1]), scan.acquisition, patches.shape[-1], pixel_size, (1, 1))
    for row, of_row in enumerate(patches):
        stitcher.add_row(row, 0, of_row)
    return np.angle(stitcher.result())


def scores(image: NDArray, truth: NDArray) -> dict[str, float]:
    """xc (eq. 14), slope of the image against the truth, and its mean [rad], without the margin."""
    inner = (slice(MARGIN, -MARGIN),) * 2
    image, truth = image[inner].ravel(), truth[inner].ravel()
    slope = np.polyfit(truth, image, 1)[0]
    return {"xc": cross_correlation(image, truth), "slope": float(slope), "mean": float(image.mean())}


def benchmark(names: Iterable[str], folder: Path, model: Model, positions: int) -> list[dict]:
    """Rows of the table: specimen, dose, method, xc, slope, mean, mean of the truth."""
    rows = []
    for name in names:
        scan = reference_scan(name, positions, folder)
        inner = scan.phase[MARGIN:-MARGIN, MARGIN:-MARGIN]
        images = {
            ("oracle, mid-plane", np.inf): oracle_phase(scan.midplane_patches, scan),
            ("oracle, published", np.inf): oracle_phase(scan.exit_patches, scan),
        }
        for dose in DOSES:
            counts = scan.counts(dose, SEED)
            result = reconstruct(counts, scan.acquisition, model=model)
            down, right = result.provenance["oversample"]
            images["AIRPI", dose] = result.phase[::down, ::right]
            untold = replace(scan.acquisition, defocus=0.0, spherical_aberration=0.0)
            result = reconstruct(counts, untold, model=model)
            images["AIRPI, aberrations not given", dose] = result.phase[::down, ::right]
            images["SSB", dose] = ssb_phase(counts, scan.acquisition)
            images["DPC", dose] = dpc_phase(counts, scan.acquisition)
        for (method, dose), image in images.items():
            row = {"specimen": name, "dose": dose, "method": method} | scores(image, scan.phase)
            rows.append(row | {"mean of the truth": float(inner.mean())})
            print(", ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in rows[-1].values()), flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: xc of every method, a line a specimen and dose."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = ["| specimen | dose [e/A^2] | " + " | ".join(methods) + " |", "|" + " --- |" * (len(methods) + 2)]
    for name in dict.fromkeys(row["specimen"] for row in rows):
        for dose in DOSES:
            found = {row["method"]: row["xc"] for row in rows if row["specimen"] == name and row["dose"] == dose}
            shown = "no noise" if np.isinf(dose) else f"{dose:g}"
            cells = [f"{found[method]:.3f}" if method in found else "" for method in methods]
            lines.append(f"| {name} | {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", help="ONNX file or name of a shipped model")
    parser.add_argument("--positions", type=int, default=56, help="scan positions along each axis")
    parser.add_argument("--validation", action="store_true", help="the specimens to choose between models with")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model = Model(arguments.model, "cpu")
    rows = benchmark(VALIDATION if arguments.validation else BENCHMARK, arguments.folder, model, arguments.positions)
    with open(arguments.folder / "benchmark.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    heading = f"Model {model.contract.name} {model.contract.version}, SHA-256 {model.sha256}"
    text = f"{heading}\n\n{table(rows)}\n"
    (arguments.folder / "benchmark.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
