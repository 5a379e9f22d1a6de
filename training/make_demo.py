"""Simulate the scan that the demo ships: WS2 with vacancies and the edge of a second layer, never trained on.

``python -m training.make_demo`` writes ``airpi_py4d/demo_data/ws2_simulated.h5``: a py4DSTEM file with the counts, the
calibration, the ground truth and how they were made, which HyperSpy reads as well (``file_format="HSPY"``).
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

import h5py
import hyperspy.api as hs
import numpy as np
import py4DSTEM
from ase import Atoms
from emdfile import Array, Metadata
from numpy.typing import NDArray

from airpi_py4d.demo import demo_path
from training.reference import ReferenceScan, simulate_reference
from training.structures import cut_slab, rotation_to_z

ENERGY, SEMIANGLE = 80e3, 25.0  # [eV], [mrad]
STEP, SCAN_SHAPE = 0.25, (56, 64)  # [A]
SIDE = 20.0  # [A], gives 63 x 63 px of 0.05 / A
DOSE = 1e4  # [electrons / A^2]
PHONONS, DEVIATION = 8, 0.08  # rms displacement [A]
SEED = 20231
LATTICE, HEIGHT, SPACING = 3.153, 3.14, 6.16  # WS2: a, S to S within a layer, layer to layer [A]
VACANCIES = {"S": 4, "W": 1}
TITLE = "WS2 (simulated)"


def specimen(rng: np.random.Generator) -> Atoms:
    """A 2H WS2 monolayer with vacancies, and a second layer over about a third of the scan, in a box of SIDE."""
    cell = np.array([[1, 0, 0], [-0.5, np.sqrt(0.75), 0], [0, 0, 1]]) * [[LATTICE], [LATTICE], [HEIGHT + 1]]
    middle, top = HEIGHT / 2 / (HEIGHT + 1), HEIGHT / (HEIGHT + 1)
    rotation, offset = rotation_to_z(np.array([0.0, 0.0, 1.0]), np.radians(13.0)), np.array([0.2, 0.4, 0.0])

    def layer(metal: tuple[float, float], sulphur: tuple[float, float]) -> Atoms:
        sites = [(*metal, middle), (*sulphur, 0.0), (*sulphur, top)]
        crystal = Atoms("WS2", scaled_positions=sites, cell=cell, pbc=True)
        # Smaller than the box, so that no atom meets a periodic image
        atoms = cut_slab(crystal, rotation, HEIGHT + 0.9, SIDE - 1.0, offset)
        if atoms is None:
            raise RuntimeError("the layer has too many atoms")
        atoms.positions += [0.5, 0.5, 0.5]
        return atoms

    a, b = (0.0, 0.0), (1 / 3, 2 / 3)
    lower, upper = layer(a, b), layer(b, a)
    lower.set_cell([SIDE, SIDE, SPACING + HEIGHT + 1.0])
    upper.positions[:, 2] += SPACING
    lower_beyond, upper_beyond = (x.positions[:, :2] @ [1.0, 0.35] - 0.78 * SIDE for x in (lower, upper))
    from_middle = abs(lower.positions[:, :2] - SIDE / 2)
    uncovered = (from_middle < np.array(SCAN_SHAPE) * STEP / 2 - 2.0).all(1) & (lower_beyond < -1.5)
    vacant = [
        rng.choice(np.flatnonzero(uncovered & (lower.symbols == element)), number, replace=False)
        for element, number in VACANCIES.items()
    ]
    del lower[np.concatenate(vacant)]
    upper = upper[upper_beyond > 0]
    return lower + upper


def provenance(atoms: Atoms) -> dict[str, str | float | int]:
    """How the data were made, for the file's metadata."""
    return {
        "provenance": "Simulated, not measured: abTEM multislice on the whole supercell, Poisson counts. "
        "Ground truth: sigma v_z, mean over the frozen phonons, band limited.",
        "specimen": f"WS2 monolayer, {VACANCIES['S']} S and {VACANCIES['W']} W vacancies, edge of a second 2H layer",
        "formula": str(atoms.symbols.formula.convert("hill")),
        "energy_eV": ENERGY,
        "semiangle_mrad": SEMIANGLE,
        "defocus_A": 0.0,
        "spherical_aberration_A": 0.0,
        "dose_electrons_per_A2": DOSE,
        "phonon_configurations": PHONONS,
        "phonon_rms_displacement_A": DEVIATION,
        "seed": SEED,
        "abTEM_version": version("abtem"),
        "command": "python -m training.make_demo",
        "license": "CC0-1.0",
    }


def write_py4dstem(path: Path, counts: NDArray, scan: ReferenceScan, made: dict[str, str | float | int]) -> None:
    """Save counts, calibration, truth and metadata with py4DSTEM."""
    datacube = py4DSTEM.DataCube(counts, name="datacube")
    calibration = datacube.calibration
    calibration.set_R_pixel_size(STEP)
    calibration.set_R_pixel_units("A")
    calibration.set_Q_pixel_size(scan.acquisition.k_pixel[0])
    calibration.set_Q_pixel_units("A^-1")
    calibration.set_convergence_semiangle_mrad(SEMIANGLE)
    datacube.metadata = Metadata("simulation", made)
    dims = [np.arange(n) * STEP for n in SCAN_SHAPE]
    truth = Array(
        scan.phase.astype(np.float32), "phase_truth", "radians", dims, dim_units=["A", "A"], dim_names=["Rx", "Ry"]
    )
    datacube.attach(truth)
    py4DSTEM.save(str(path), datacube, mode="o")


def write_hyperspy(path: Path, counts: NDArray, k_pixel: float) -> None:
    """Save counts and calibration with HyperSpy."""
    signal = hs.signals.Signal2D(counts)
    signal.metadata.General.title = TITLE
    signal.metadata.set_item("Acquisition_instrument.TEM.beam_energy", ENERGY / 1e3)
    signal.metadata.set_item("Acquisition_instrument.TEM.convergence_angle", SEMIANGLE)
    for axis, name, size in zip(signal.axes_manager._axes, ("y", "x", "ky", "kx"), counts.shape, strict=True):
        real = name in "xy"
        axis.name, axis.units, axis.scale = name, "Å" if real else "1/Å", STEP if real else k_pixel
        axis.offset = 0.0 if real else -(size // 2) * k_pixel
    signal.save(path, overwrite=True)


def write(path: Path, counts: NDArray, scan: ReferenceScan, made: dict[str, str | float | int]) -> None:
    """One compressed file for py4DSTEM and HyperSpy, which share the counts by a hard link."""
    with tempfile.TemporaryDirectory() as folder:
        for_py4dstem, for_hyperspy = Path(folder, "demo.h5"), Path(folder, "demo.hspy")
        write_py4dstem(for_py4dstem, counts, scan, made)
        write_hyperspy(for_hyperspy, counts, scan.acquisition.k_pixel[0])
        with h5py.File(path, "w") as both:
            data = both.create_dataset("counts", data=counts, chunks=(8, 16, *counts.shape[2:]), compression=9)
            for source, owner in ((for_py4dstem, "datacube_root/datacube"), (for_hyperspy, f"Experiments/{TITLE}")):
                with h5py.File(source, "a") as single:
                    attributes = dict(single[owner]["data"].attrs)
                    del single[owner]["data"]
                    both.attrs.update(single.attrs)
                    for name in single:
                        single.copy(name, both)
                both[owner]["data"] = data
                data.attrs.update(attributes)
            del both["counts"]


def main() -> None:
    """Simulate and write."""
    rng = np.random.default_rng(SEED)
    atoms = specimen(rng)
    scan = simulate_reference(
        atoms,
        ENERGY,
        SEMIANGLE,
        STEP,
        SCAN_SHAPE,
        phonon_configurations=PHONONS,
        phonon_deviation=DEVIATION,
        seed=SEED,
    )
    counts = scan.counts(DOSE, SEED)
    counts = counts.astype(np.min_scalar_type(counts.max()))
    demo_path().parent.mkdir(exist_ok=True)
    write(demo_path(), counts, scan, provenance(atoms))
    print(f"{demo_path()}: {counts.dtype}, {counts.shape}, {demo_path().stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
