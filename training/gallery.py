"""One simulated scan through every defect of a real detector, raw and corrected: picture and table.

    python -m training.gallery SCANS_FOLDER docs

SCANS_FOLDER holds the benchmark's simulated scans, `python -m training.benchmark SCANS_FOLDER --only dose`. "Raw"
takes the detector as ideal, its middle as the optical axis, everything else as it comes; "corrected" goes through
`datacube.airpi_reconstruct` with voltage, semi-angle and scan step, and what no data can tell: the ellipse, the gain,
the background and the beam stop's mask. The last lines put all of the benchmark's specimens on an off-centre, rotated,
flipped 256 x 256 detector with hot pixels.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from airpi_py4d.acquisition import Acquisition
from airpi_py4d.calibration import calibrate
from airpi_py4d.demo import _import_py4dstem
from airpi_py4d.engine import reconstruct
from airpi_py4d.model import Model
from training.benchmark.cases import MARGIN, selected
from training.benchmark.scans import reference_scan
from training.detectors import Detector
from training.reference import ReferenceScan, cross_correlation

SPECIMEN = "SrTiO3 [001] 8 A"
DOSE = 1e5  # [electrons / A^2]
SEED = 3
IDEAL = Detector()
DEFECTS = {
    "none": IDEAL,
    "off-centre by 7.3 and -5.6 px": Detector(offset=(7.3, -5.6)),
    "rotated by 23 degrees": Detector(rotation=23.0),
    "rotated by -100 degrees and flipped": Detector(rotation=-100.0, transpose=True),
    "elliptical, 8 %": Detector(ellipse=(1.08, 1.0, 30.0)),
    "0.2 % hot and 0.2 % dead pixels": Detector(hot=0.002, dead=0.002),
    "gap of 4 px between modules": Detector(gap=4),
    "beam stop": Detector(stop=7),
    "descan of 6 px": Detector(descan=(4.0, -2.0, 1.0, 5.0)),
    "gain 37.5 and background 60": Detector(gain=37.5, background=60.0),
    "bright-field radius 3 px": Detector(shape=(24, 20), radius=3.0),
    "cut off at 1.1 times the disk": Detector(shape=(40, 40)),
    "columns twice as far apart as rows": Detector(column_step=2),
    "3 % of the positions dead": Detector(dead_positions=0.03),
    "256 x 256 px": Detector(shape=(256, 256), radius=48.0),
}
EVERYTHING = Detector(shape=(256, 256), radius=48.0, offset=(5.0, -5.0), rotation=23.0, transpose=True, hot=0.002)
PAGE = """# Every defect of a real detector, raw and corrected

Simulated, no experiment: abTEM's multislice of {specimen}, {dose:g} electrons / A^2, put through each defect by a
direct computation (`training/detectors.py`) that shares nothing with the correction. "Raw" takes the detector's middle
as the optical axis and everything else as it comes. "Corrected" is
`datacube.airpi_reconstruct(energy, semiangle, force_scan_sampling=step)`: centre, size of a detector pixel, rotation,
flip, descan and bad pixels are measured. Told besides are only the ellipse (in `datacube.calibration`), the beam stop's
mask, gain and background, and (by `airpi_py4d.calibrate`) unequal steps. Neither is told the Scherzer focus and C_s,
which is why xc is below the benchmark's. Dead positions are found on every path. Where both are good, the defect hurts
this specimen little.

Model {model}; xc with the truth at the scan positions without a margin of {margin}. Made by
`python -m training.gallery SCANS_FOLDER docs` (seeds and detectors are in the script).

![first pattern, raw and corrected image of every defect](gallery.png)

"""
EVERYTHING_TEXT = (
    "All of the benchmark's specimens on a 256 x 256 px detector with a bright-field disk of 48 px, off-centre by 5\n"
    "and -5 px, rotated by 23 degrees, flipped, with 0.2 % hot pixels, against the same detector without defects;\n"
    "nothing given but voltage, semi-angle and scan step:"
)
CLEAN = Detector(shape=(256, 256), radius=48.0)


def raw_phase(data: NDArray, detector: Detector, scan: ReferenceScan) -> NDArray[np.float32]:
    """Phase [rad] at the scan positions, the detector taken for ideal."""
    k_pixel = scan.acquisition.aperture_radius / detector.radius
    middle = (detector.shape[0] // 2, detector.shape[1] // 2)
    ideal = Acquisition(
        scan.acquisition.energy,
        scan.acquisition.semiangle,
        scan.acquisition.scan_step,
        (k_pixel, k_pixel),
        center=middle,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = reconstruct(data, ideal, oversample=1, device="cpu")
    return result.phase


def corrected_phase(data: NDArray, detector: Detector, scan: ReferenceScan) -> NDArray[np.float32]:
    """Phase [rad] at the scan positions by ``datacube.airpi_reconstruct``, told what the module's docstring says."""
    energy, semiangle, step = scan.acquisition.energy, scan.acquisition.semiangle, scan.acquisition.scan_step[0]
    if detector.column_step > 1:
        steps = (step, step * detector.column_step)
        calibrated = calibrate(data, energy=energy, semiangle=semiangle, scan_step=steps)
        return reconstruct(data, calibrated, oversample=1, device="cpu").phase
    datacube = _import_py4dstem().DataCube(data)
    told: dict = {}
    if detector.ellipse is not None:
        first, second, angle = detector.ellipse
        datacube.calibration.set_p_ellipse((*detector.center, first, second, np.deg2rad(angle)))
    if detector.stop:
        told["mask"] = detector.stopped()
    if detector.gain != 1 or detector.background:
        told |= {"gain": detector.gain, "background": detector.dark_image(SEED)}
    phase = datacube.airpi_reconstruct(
        energy,
        semiangle,
        force_scan_sampling=step,
        oversample=1,
        device="cpu",
        verbose=False,
        **told,
    )
    return np.asarray(phase.data)


def score(phase: NDArray, detector: Detector, scan: ReferenceScan) -> float:
    """xc with the truth, without the margin."""
    inner = (slice(MARGIN, -MARGIN),) * 2
    return cross_correlation(phase[inner], scan.phase[:, :: detector.column_step][inner])


def main() -> None:
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", type=Path)
    parser.add_argument("docs", type=Path)
    parser.add_argument("--positions", type=int, default=56)
    arguments = parser.parse_args()
    scan = reference_scan(SPECIMEN, arguments.positions, arguments.scans)
    lines = ["| defect | xc raw | xc corrected |", "| --- | --- | --- |"]
    figure, axes = plt.subplots(3, len(DEFECTS), figsize=(1.9 * len(DEFECTS), 6.3))
    limits = {"vmin": np.percentile(scan.phase, 1), "vmax": np.percentile(scan.phase, 99)}
    for column, (name, detector) in zip(axes.T, DEFECTS.items(), strict=True):
        data = detector.record(scan, DOSE, SEED)
        images = [raw_phase(data, detector, scan), corrected_phase(data, detector, scan)]
        found = [score(image, detector, scan) for image in images]
        lines.append(f"| {name} | {found[0]:.3f} | {found[1]:.3f} |")
        print(lines[-1], flush=True)
        shown = [np.log1p(data[0, 0].clip(0)), *images]
        for axis, image, title in zip(
            column, shown, (name, f"raw, xc {found[0]:.3f}", f"corrected, xc {found[1]:.3f}"), strict=True
        ):
            axis.imshow(image, cmap="gray", aspect="auto", **({} if image is shown[0] else limits))
            axis.set_title(title, fontsize=6)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(arguments.docs / "gallery.png", dpi=90)
    lines += ["", EVERYTHING_TEXT, "", "| specimen | clean | everything | difference |", "| --- | --- | --- | --- |"]
    for name in (case.name for case in selected(("dose",))):
        scan = reference_scan(name, arguments.positions, arguments.scans)
        clean, all_of_it = (
            score(corrected_phase(detector.record(scan, DOSE, SEED), detector, scan), detector, scan)
            for detector in (CLEAN, EVERYTHING)
        )
        lines.append(f"| {name} | {clean:.3f} | {all_of_it:.3f} | {all_of_it - clean:+.3f} |")
        print(lines[-1], flush=True)
    contract = Model(None, "cpu").contract
    heading = PAGE.format(specimen=SPECIMEN, dose=DOSE, model=f"{contract.name} {contract.version}", margin=MARGIN)
    (arguments.docs / "gallery.md").write_text(heading + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
