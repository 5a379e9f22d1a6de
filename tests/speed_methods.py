"""What `benchmark_speed.py` measures: the scan, and every method from the patterns in a file to the image."""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from airpi_py4d import Acquisition, engine, optics, reconstruct
from airpi_py4d.demo import _calibrated, _preprocessing, _quiet, dpc_phase, ssb_phase
from airpi_py4d.model import Model
from airpi_py4d.plan import Plan

ENERGY, SEMIANGLE, STEP, ELECTRONS = 300e3, 20.0, 0.2, 1000
PERIOD = 16  # of the specimen [scan steps]
ITERATIONS = 8  # of single-slice ptychography, py4DSTEM's default
LAZY_POSITIONS, LAZY_SCAN = 100_000, 4096


class Case(NamedTuple):
    """One measurement: a method, on a scan of some size.

    Attributes
    ----------
    section, method : str
    rows, columns : int
        Of the scan.
    detector : int
        Side [px].
    model : str or None
        Name or path, for AIRPI.
    threads : int
        For every library.
    batch : int or None
        Positions that AIRPI's network sees at once on the CPU, None for the engine's own number.
    device : str
        That AIRPI runs on.
    """

    section: str
    method: str
    rows: int
    columns: int
    detector: int
    model: str | None
    threads: int
    batch: int | None = None
    device: str = "cpu"

    @property
    def positions(self) -> int:
        return LAZY_POSITIONS if self.method == "airpi_lazy" else self.rows * self.columns

    @property
    def label(self) -> str:
        return self.method if self.model is None else f"{self.method} {Path(self.model).stem}"


def radius(detector: int) -> int:
    """Of the bright-field disk [px]: the same part of every detector."""
    return 3 * detector // 16


def acquisition(detector: int) -> Acquisition:
    k_pixel = optics.aperture_radius(ENERGY, SEMIANGLE) / radius(detector)
    return Acquisition(ENERGY, SEMIANGLE, STEP, (k_pixel, k_pixel), center=(detector // 2, detector // 2))


def expected(detector: int) -> np.ndarray:
    """Mean counts at the positions of one period, shape (PERIOD, PERIOD, detector, detector).

    A weak phase object with one atom-like maximum a period: a probe in focus, and a product with its transmission.
    """
    k = np.arange(detector) - detector // 2
    aperture = np.fft.ifftshift(np.hypot(*np.meshgrid(k, k)) <= radius(detector))
    r = k / (detector * acquisition(detector).k_pixel[0])  # [A]
    probe = np.fft.fftshift(np.fft.ifft2(aperture))
    patterns = np.empty((PERIOD, PERIOD, detector, detector))
    for row in range(PERIOD):
        for column in range(PERIOD):
            u, v = (np.cos(np.pi * (r / STEP + n) / PERIOD) ** 8 for n in (row, column))
            patterns[row, column] = np.abs(np.fft.fft2(probe * np.exp(0.5j * u[:, None] * v))) ** 2
    return np.fft.fftshift(patterns, (2, 3)) * ELECTRONS / patterns.sum((2, 3), keepdims=True)


def counts(columns: int, detector: int) -> np.ndarray:
    """Counts of PERIOD scan rows, shape (PERIOD, columns, detector, detector), uint16."""
    mean, rng = expected(detector), np.random.default_rng(0)
    place = np.arange(columns) % PERIOD
    return np.stack([rng.poisson(row[place]).astype(np.uint16) for row in mean])


def write_scan(file: Path, rows: int, columns: int, detector: int) -> None:
    """Scan in an HDF5 file, not in chunks; rows repeat, noise and all, after PERIOD."""
    band = counts(columns, detector)
    with h5py.File(file, "w") as opened:
        data = opened.create_dataset("data", (rows, *band.shape[1:]), np.uint16)
        for first in range(0, rows, PERIOD):
            data[first : first + PERIOD] = band[: rows - first]


class Enough(Exception):
    """So many positions were read as were to be measured."""


class LazyScan:
    """A scan of any size whose patterns are made where it is sliced, as far as `positions`.

    Examples
    --------
    >>> LazyScan((4096, 4096), 64, 8192)[1:2, :3].shape
    (1, 3, 64, 64)
    """

    dtype = np.dtype(np.uint16)

    def __init__(self, scan_shape: tuple[int, int], detector: int, positions: int) -> None:
        self.shape = (*scan_shape, detector, detector)
        self.ndim = 4
        self.left = positions
        self._period = counts(PERIOD, detector)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: object) -> np.ndarray:
        if self.left <= 0:
            raise Enough
        row_key, column_key = key if isinstance(key, tuple) else (key, slice(None))
        rows, columns = np.arange(self.shape[0])[row_key], np.arange(self.shape[1])[column_key]
        self.left -= rows.size * columns.size
        return self._period[np.ix_(rows % PERIOD, columns % PERIOD)]


@contextmanager
def _batch(size: int | None):
    """Let the engine take batches of another size."""
    before = engine._BATCH
    engine._BATCH = before if size is None else size
    try:
        yield
    finally:
        engine._BATCH = before


def airpi(file: Path, case: Case) -> str:
    with h5py.File(file) as opened, _batch(case.batch):
        model = Model(case.model, case.device, case.threads)
        result = reconstruct(opened["data"], acquisition(case.detector), model=model)
    return result.provenance["provider"]


def airpi_lazy(file: Path, case: Case) -> str:
    """The first LAZY_POSITIONS of a scan that doesn't fit into memory."""
    data = LazyScan((case.rows, case.columns), case.detector, case.positions)
    try:
        reconstruct(data, acquisition(case.detector), model=Model(case.model, case.device, case.threads))
    except Enough:
        return "made while it was read, stopped"
    raise RuntimeError(f"the scan of {data.shape} ended before {case.positions} positions")


def ssb(file: Path, case: Case) -> str:
    with h5py.File(file) as opened:
        ssb_phase(opened["data"][()], acquisition(case.detector))
    return "py4DSTEM, 1 job"


def dpc(file: Path, case: Case) -> str:
    with h5py.File(file) as opened:
        dpc_phase(opened["data"][()], acquisition(case.detector))
    return "py4DSTEM"


def parallax(file: Path, case: Case) -> str:
    with h5py.File(file) as opened:
        datacube = _calibrated(opened["data"][()], acquisition(case.detector))
    from py4DSTEM.process.phase import Parallax

    with _quiet():
        method = Parallax(energy=ENERGY, datacube=datacube, verbose=False)
        method.preprocess(plot_average_bf=False, force_transpose=False)
        method.reconstruct(progress_bar=False, plot_aligned_bf=False, plot_convergence=False)
        method.aberration_fit(plot_CTF_comparison=False, plot_BF_shifts_comparison=False)
        method.aberration_correct(plot_corrected_phase=False)
    return "py4DSTEM, aligned, fitted and corrected"


def single_slice(file: Path, case: Case) -> str:
    calibration = acquisition(case.detector)
    with h5py.File(file) as opened:
        patterns = opened["data"][()]
    datacube = _calibrated(patterns, calibration)
    from py4DSTEM.process.phase import SingleslicePtychography

    with _quiet():
        method = SingleslicePtychography(
            energy=ENERGY, datacube=datacube, semiangle_cutoff=SEMIANGLE, polar_parameters={"C10": 0.0}, verbose=False
        )
        method.preprocess(plot_probe_overlaps=False, **_preprocessing(patterns, calibration))
        method.reconstruct(num_iter=ITERATIONS, max_batch_size=256, seed_random=0, progress_bar=False)
    return f"py4DSTEM, {ITERATIONS} iterations, batches of 256"


def libertem_ssb(file: Path, case: Case) -> str:
    from libertem.api import Context
    from ptychography40.reconstruction.common import wavelength
    from ptychography40.reconstruction.ssb import SSB_UDF

    with Context.make_with("inline") as context:
        udf = SSB_UDF(
            lamb=wavelength(ENERGY / 1e3),
            dpix=STEP * 1e-10,
            semiconv=SEMIANGLE * 1e-3,
            semiconv_pix=radius(case.detector),
            cy=case.detector // 2,
            cx=case.detector // 2,
        )
        context.run_udf(dataset=context.load("hdf5", path=str(file), ds_path="data"), udf=udf)
    return "ptychography40, inline executor"


METHODS = {
    "airpi": airpi,
    "airpi_lazy": airpi_lazy,
    "SSB": ssb,
    "DPC": dpc,
    "parallax": parallax,
    "single-slice": single_slice,
    "LiberTEM SSB": libertem_ssb,
}


def image_bytes(case: Case) -> float:
    """Sum (complex64) and weight (float32) of the part of AIRPI's image that was reached.

    Of stitched features, the phase of that part, and the error of all, which is infinite where nothing was measured.
    """
    shape = (case.rows, case.columns, case.detector, case.detector)
    data = np.broadcast_to(np.uint16(0), shape)
    plan = Plan.of(acquisition(case.detector), Model(case.model, "cpu").contract, data)
    pixels = math.prod(plan.image_shape)
    reached = pixels * case.positions / (case.rows * case.columns)
    return 4 * (reached + pixels) if plan.contract.features else 12 * reached
