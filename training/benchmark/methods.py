"""Images of a scan by every method: AIRPI, py4DSTEM's SSB, DPC and single-slice ptychography, and the oracle.

All of them get the same counts, calibration and aberrations. An image holds the phase [rad] at the scan positions, or
at the pixels of `SimulatedScan.truth`, `oversample` a scan step.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from airpi_py4d.acquisition import Acquisition
from airpi_py4d.demo import _calibrated, _preprocessing, _quiet, dpc_phase, ssb_phase
from airpi_py4d.engine import reconstruct
from airpi_py4d.model import Model
from airpi_py4d.stitching import Stitcher
from training.benchmark.cases import NOISE_FREE, SEED, Case
from training.benchmark.scans import load
from training.reference import BAND

SSB, DPC, PTYCHOGRAPHY = "SSB", "DPC", "ptychography"
MIDPLANE, PUBLISHED = "oracle, mid-plane", "oracle, published"
NOT_TOLD, SUMMED = ", aberrations not given", ", 5x5 sums"
#: Of ptychography: passes over the scan, patterns an update, size of an update (of 0.03, 0.1 and 0.5 the best on MoS2).
ITERATIONS, BATCH, UPDATE = 30, 128, 0.03
#: Least radius of the bright-field disk [px] after binning for ptychography.
SMALLEST_RADIUS = 10.0


@dataclass(frozen=True)
class Request:
    """Which images to make.

    Attributes
    ----------
    models : tuple of str or None
        ONNX files or names of shipped models; None is the default model.
    folder : Path
        Of the scans and of the slow images.
    positions : int
        See `Case.scaled`.
    ptychography, untold, sums : bool
        Whether to make images by ptychography; by AIRPI without the aberrations; by AIRPI of 5 x 5 sums of patterns at
        twice the step.
    seed : int
        Of the electrons.
    """

    models: tuple[str | None, ...]
    folder: Path
    positions: int
    ptychography: bool = True
    untold: bool = False
    sums: bool = True
    seed: int = SEED


@cache
def _model(path: str | None) -> Model:
    return Model(path, "cpu", threads=int(os.environ.get("OMP_NUM_THREADS", "0")) or None)


@cache
def model_names(paths: tuple[str | None, ...]) -> tuple[str, ...]:
    """What the models are called in tables: AIRPI if there is one, else with name, version and perhaps digest."""
    if len(paths) == 1:
        return ("AIRPI",)
    models = [_model(path) for path in paths]
    names = [f"AIRPI {model.contract.name} {model.contract.version}" for model in models]
    digests = [
        f" ({model.sha256[:7]})" if names.count(name) > 1 else "" for name, model in zip(names, models, strict=True)
    ]
    return tuple(name + digest for name, digest in zip(names, digests, strict=True))


def oracle_phase(patches: NDArray[np.complex64], acquisition: Acquisition, oversample: int = 1) -> NDArray[np.float64]:
    """Phase [rad] of true patches (rows, columns, 16, 16) by the engine's stitching, `oversample` pixels a step."""
    pixel_size = 1 / (2 * BAND * acquisition.aperture_radius)
    shape = patches.shape[:2]
    stitcher = Stitcher((shape[0], shape[1]), acquisition, patches.shape[-1], pixel_size, (oversample, oversample))
    for row, of_row in enumerate(patches):
        stitcher.add_row(row, 0, of_row)
    return np.angle(stitcher.result())


def _binned(counts: NDArray[Any], acquisition: Acquisition) -> tuple[NDArray[np.float32], Acquisition]:
    """Patterns centred in their middle, at half the detector's resolution if the disk stays above SMALLEST_RADIUS.

    The bins are centred at the optical axis; every second pixel lies on the border of two bins and is shared by them.
    """
    assert acquisition.center is not None
    reach = [int(min(center, n - 1 - center)) for center, n in zip(acquisition.center, counts.shape[2:], strict=True)]
    half = acquisition.aperture_radius / acquisition.k_pixel[0] >= 2 * SMALLEST_RADIUS
    reach = [r - (r + 1) % 2 if half else r for r in reach]
    rows, columns = (slice(int(c) - r, int(c) + r + 1) for c, r in zip(acquisition.center, reach, strict=True))
    data = counts[:, :, rows, columns].astype(np.float32)
    if half:
        data = data[:, :, 1::2] + (data[:, :, :-2:2] + data[:, :, 2::2]) / 2
        data = data[..., 1::2] + (data[..., :-2:2] + data[..., 2::2]) / 2
        acquisition = replace(acquisition, k_pixel=(2 * acquisition.k_pixel[0], 2 * acquisition.k_pixel[1]))
    return data, replace(acquisition, center=(data.shape[2] // 2, data.shape[3] // 2))


def ptychography_phase(
    counts: NDArray[Any], acquisition: Acquisition, oversample: int, iterations: int
) -> NDArray[np.float64]:
    """Phase by py4DSTEM's single-slice ptychography with the known probe: gradient descent, a positive potential.

    Parameters
    ----------
    counts : ndarray, shape (scan rows, scan columns, detector rows, detector columns)
        Electron counts.
    acquisition : Acquisition
        Without rotation and flip; a centre on a pixel.
    oversample : int
        Pixels of the image a scan step.
    iterations : int
        Passes over all patterns.

    Returns
    -------
    ndarray, shape ((rows - 1) s + 1, (columns - 1) s + 1)
        [rad], up to a constant; the object, a pixel half the inverse of the detector's reach, interpolated by cubic
        splines.
    """
    data, binned = _binned(counts, acquisition)
    datacube = _calibrated(data, binned)
    from py4DSTEM.process.phase import SingleslicePtychography

    with _quiet():
        ptychography = SingleslicePtychography(
            energy=binned.energy,
            datacube=datacube,
            semiangle_cutoff=binned.semiangle,
            rolloff=0.0,
            polar_parameters={"C10": -binned.defocus, "C30": binned.spherical_aberration},
            object_type="potential",
            verbose=False,
        )
        ptychography.preprocess(plot_probe_overlaps=False, **_preprocessing(data, binned))
        ptychography.reconstruct(
            num_iter=iterations,
            max_batch_size=BATCH,
            seed_random=SEED,
            fix_probe=True,
            step_size=UPDATE,
            progress_bar=False,
        )
    potential = np.asarray(ptychography._object, dtype=np.float64)
    first = np.asarray(ptychography._positions_px)[0]
    step = [length / pixel for length, pixel in zip(binned.scan_step, ptychography.sampling, strict=True)]
    rows, columns = (
        start + np.arange((n - 1) * oversample + 1) * length / oversample
        for start, n, length in zip(first, counts.shape[:2], step, strict=True)
    )
    return map_coordinates(potential, np.meshgrid(rows, columns, indexing="ij"), order=3, mode="nearest")


def _kept(file: Path, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """An image from its file, or made and kept; the file appears when it is complete."""
    if file.exists():
        return np.load(file)
    image = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.part")
    with open(temporary, "wb") as out:
        np.save(out, image.astype(np.float32))
    temporary.replace(file)
    return image


def airpi_phase(
    counts: NDArray[Any], acquisition: Acquisition, model: Model, oversample: int, **options: Any
) -> NDArray[np.float64]:
    """Phase [rad] by AIRPI, `oversample` pixels a reconstructed step; outside of the training domain as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = reconstruct(counts, acquisition, model=model, oversample=oversample, strict=False, **options)
    return np.asarray(result.phase, dtype=np.float64)


def images(task: tuple[Case, float], request: Request) -> dict[str, NDArray[Any]]:
    """Images of one case at one dose [electrons / A^2], by method; the oracle's are made where there is no noise."""
    case, dose = task
    shape = case.scaled(request.positions)
    scan = load(case, shape, request.folder)
    reference, s = scan.reference(), scan.oversample
    acquisition, counts = reference.acquisition, reference.counts(dose, request.seed)
    kept = request.folder / "images" / scan.file.stem
    at = "no_noise" if dose == NOISE_FREE else f"{dose:g}"
    if request.seed != SEED:
        at += f"_seed_{request.seed}"
    made: dict[str, NDArray[Any]] = {}
    for path, name in zip(request.models, model_names(request.models), strict=True):
        model = _model(path)
        made[name] = airpi_phase(counts, acquisition, model, s)
        if request.untold:
            untold = replace(acquisition, defocus=0.0, spherical_aberration=0.0)
            made[name + NOT_TOLD] = airpi_phase(counts, untold, model, s)
        if request.sums and "repetition" in case.parts and dose <= 1e4:
            made[name + SUMMED] = airpi_phase(counts, acquisition, model, 2 * s, sum_neighbours=5, stride=2)
    made[SSB] = _kept(kept / f"ssb_{at}.npy", lambda: ssb_phase(counts, acquisition))
    made[DPC] = _kept(kept / f"dpc_{at}.npy", lambda: dpc_phase(counts, acquisition))
    if request.ptychography:
        file = kept / f"ptychography_{ITERATIONS}_{at}.npy"
        made[PTYCHOGRAPHY] = _kept(file, lambda: ptychography_phase(counts, acquisition, s, ITERATIONS))
    if dose == NOISE_FREE:
        made[MIDPLANE] = oracle_phase(reference.midplane_patches, acquisition, s)
        made[PUBLISHED] = oracle_phase(reference.exit_patches, acquisition, s)
    return made
