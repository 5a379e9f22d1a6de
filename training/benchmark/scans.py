"""The scans of the cases: simulated once by abTEM's own multislice, kept as files, read back."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import abtem
import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from airpi_py4d import optics
from airpi_py4d.acquisition import Acquisition
from training.benchmark.cases import CASES, SEED, VALIDATION, WEAK_VALIDATION, Case
from training.reference import BAND, ReferenceScan, projected_phase, scan_positions, simulate_reference
from training.simulation import OBJECT

SPHERICAL_ABERRATION = 1e4  # [A], at Scherzer defocus, as in the paper
MARGIN_LENGTH = 8.0  # [1 / k0] of specimen around the scan
_ACQUISITION = ("energy", "semiangle", "scan_step", "k_pixel", "center", "defocus", "spherical_aberration")
_PARTS = ("patterns", "phase", "exit_patches", "midplane_patches")
Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class SimulatedScan:
    """A case as it was scanned; the patterns stay in their file.

    Attributes
    ----------
    case : Case
    shape : (int, int)
        Scan rows and columns.
    file : Path
    truth : ndarray of float64, shape ((rows - 1) s + 1, (columns - 1) s + 1)
        Projected phase sigma v_z [rad] up to BAND k0 at the pixels of the images, s = `oversample` a step. Pixel (0, 0)
        is the first scan position.
    numbers : ndarray of int, shape (n,)
        Atomic numbers.
    places : ndarray of float64, shape (n, 3)
        Where the atoms are: rows and columns [A] from the first scan position, and depth [A]. All up to 1 A beyond the
        scan, also those of further periods of the specimen.
    """

    case: Case
    shape: tuple[int, int]
    file: Path
    truth: NDArray[np.float64]
    numbers: NDArray[np.int64]
    places: NDArray[np.float64]

    @property
    def oversample(self) -> int:
        """Pixels a scan step of the images and of `truth`."""
        return oversample(self.case)

    def reference(self) -> ReferenceScan:
        """Patterns, calibration, truth at the scan positions and true patches, read from the file."""
        with np.load(self.file) as stored:
            told: dict[str, Any] = json.loads(str(stored["acquisition"]))
            acquisition = Acquisition(**told, sources=dict.fromkeys(_ACQUISITION, "simulation"))
            return ReferenceScan(acquisition=acquisition, **{name: stored[name] for name in _PARTS})

    def on_grid_of(self, image: NDArray) -> tuple[NDArray[np.float64], float, tuple[slice, slice]]:
        """The truth on the pixels of an image (its own or the scan positions), their size [A], what isn't margin."""
        s = self.oversample if image.shape == self.truth.shape else 1
        margin = s * self.case.margin
        truth = self.truth if s == self.oversample else self.at_positions(self.truth)
        return truth, self.case.step / s, (slice(margin, -margin),) * 2

    def at_positions(self, image: NDArray) -> NDArray:
        """An image at the scan positions."""
        return image if image.shape == self.shape else image[:: self.oversample, :: self.oversample]


def oversample(case: Case) -> int:
    """Pixels a scan step so that a pixel is at most 1 / (2 BAND k0): what the engine takes for a scale-free model."""
    return max(1, math.ceil(case.step * 2 * BAND * optics.aperture_radius(case.energy, case.semiangle) - 1e-6))


def specimen(case: Case, shape: tuple[int, int]) -> Atoms:
    """Its atoms, in a box that fits a scan of `shape`."""
    if case.periodic:
        return case.build()
    return case.build(
        (max(shape) - 1) * case.step + 2 * MARGIN_LENGTH / optics.aperture_radius(case.energy, case.semiangle)
    )


def _vacuum(atoms: Atoms, case: Case, shape: tuple[int, int], defocus: float) -> ReferenceScan:
    """Every pattern of a scan without a specimen is abTEM's probe; no phase, and every patch is 1."""
    k0, side = optics.aperture_radius(case.energy, case.semiangle), atoms.cell[0, 0]
    reach = int(BAND * k0 * side)
    probe = abtem.Probe(energy=case.energy, semiangle_cutoff=case.semiangle, extent=side, gpts=4 * reach)
    intensity = np.fft.fftshift(np.abs(np.fft.fft2(np.asarray(probe.build(lazy=False).array))) ** 2)
    kept = slice(reach, 3 * reach + 1)
    pattern = (intensity[kept, kept] / intensity.sum()).astype(np.float32)
    acquisition = Acquisition(
        energy=case.energy,
        semiangle=case.semiangle,
        scan_step=(case.step, case.step),
        k_pixel=(1 / side, 1 / side),
        center=(reach, reach),
        defocus=defocus,
        spherical_aberration=SPHERICAL_ABERRATION,
    )
    patches = np.ones((*shape, OBJECT, OBJECT), np.complex64)
    return ReferenceScan(np.tile(pattern, (*shape, 1, 1)), acquisition, np.zeros(shape), patches, patches)


def _places(atoms: Atoms, case: Case, shape: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Atomic numbers, and rows, columns and depths [A] from the first scan position, of all atoms within the scan."""
    rows, columns = scan_positions(atoms, case.step, shape)
    side = np.array([*np.diag(atoms.cell)[:2], 1.0])
    shifts = np.array([(i, j, 0) for i in range(-3, 4) for j in range(-3, 4)]) if case.periodic else np.zeros((1, 3))
    places = (atoms.positions - [rows[0], columns[0], 0] + (shifts * side)[:, None]).reshape(-1, 3)
    numbers = np.tile(atoms.numbers, len(shifts))
    reach = [rows[-1] - rows[0], columns[-1] - columns[0]]
    inside = ((places[:, :2] >= -1.0) & (places[:, :2] <= np.add(reach, 1.0))).all(1)
    return numbers[inside], places[inside]


def scan_file(case: Case, shape: tuple[int, int], folder: Path) -> Path:
    """Where its scan is kept; the name holds a digest of specimen, beam and scan, so that none is mistaken for it."""
    atoms = specimen(case, shape)
    told = (case.energy, case.semiangle, case.step, shape, SEED, SPHERICAL_ABERRATION)
    digest = hashlib.sha256(repr(told).encode())
    for array in (atoms.numbers, atoms.positions.round(4), atoms.cell[:].round(4)):
        digest.update(np.ascontiguousarray(array + 0.0).tobytes())
    slug = "".join(letter if letter.isalnum() else "_" for letter in case.name)
    return folder / f"{slug}_{shape[0]}x{shape[1]}_{digest.hexdigest()[:8]}.npz"


def simulate(case: Case, shape: tuple[int, int], folder: Path) -> Path:
    """Simulate a case, unless that was done before; the file appears when it is complete."""
    file = scan_file(case, shape, folder)
    if file.exists():
        return file
    atoms, defocus = specimen(case, shape), optics.scherzer_defocus(case.energy, SPHERICAL_ABERRATION)
    fine = scan_positions(atoms, case.step, shape, oversample(case))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # abTEM's, of its dependencies
        if len(atoms):
            scan = simulate_reference(
                atoms,
                case.energy,
                case.semiangle,
                case.step,
                shape,
                defocus=defocus,
                spherical_aberration=SPHERICAL_ABERRATION,
                seed=SEED,
            )
            truth = projected_phase(atoms, case.energy, case.semiangle, *fine, seed=SEED)
        else:
            scan = _vacuum(atoms, case, shape, defocus)
            truth = np.zeros([len(positions) for positions in fine])
    acquisition = json.dumps({name: getattr(scan.acquisition, name) for name in _ACQUISITION})
    numbers, places = _places(atoms, case, shape)
    arrays: dict[str, Any] = {name: getattr(scan, name) for name in _PARTS}
    temporary = file.with_suffix(f".{os.getpid()}.part")
    with open(temporary, "wb") as out:
        np.savez(out, acquisition=acquisition, truth=truth, numbers=numbers, places=places, **arrays)
    temporary.replace(file)
    return file


def load(case: Case, shape: tuple[int, int], folder: Path) -> SimulatedScan:
    """The simulated scan of a case, from the folder or made now."""
    file = simulate(case, shape, folder)
    with np.load(file) as stored:
        return SimulatedScan(case, shape, file, stored["truth"], stored["numbers"], stored["places"])


def reference_scan(name: str, positions: int, folder: Path) -> ReferenceScan:
    """The simulated scan of the case called so, from the folder or made now; `positions` see `Case.scaled`."""
    case = next(case for case in CASES + VALIDATION + WEAK_VALIDATION if case.name == name)
    return load(case, case.scaled(positions), folder).reference()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Worker processes that start here compute on one thread each."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def in_processes(work: Callable[[Given], Made], items: Iterable[Given], jobs: int) -> Iterator[Made]:
    """What `work` makes of every item, in order; in `jobs` processes if that is more than one."""
    if jobs == 1:
        yield from map(work, items)
        return
    with _one_thread(), multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(work, items)


def _simulate(case: Case, positions: int, folder: Path) -> str:
    return simulate(case, case.scaled(positions), folder).name


def simulate_all(cases: Iterable[Case], positions: int, folder: Path, jobs: int) -> None:
    """Simulate every case, and say so."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in in_processes(partial(_simulate, positions=positions, folder=folder), cases, jobs):
        print(name, flush=True)
