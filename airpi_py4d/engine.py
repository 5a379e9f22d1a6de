"""The reconstruction: row bands -> 3x3 kernels -> batches -> patches -> stitched object."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from tqdm import tqdm

from airpi_py4d import optics
from airpi_py4d.acquisition import Acquisition
from airpi_py4d.model import Contract, Model
from airpi_py4d.patterns import check_disk, check_finite, measure_center, resample, resampling_matrix
from airpi_py4d.result import Reconstruction
from airpi_py4d.stitching import Stitcher

CITATION = "Friedrich, Yu, Verbeeck, Van Aert, Microsc. Microanal. 29 (2023) 395, doi 10.1093/micmic/ozac002"
_HINTS = {"electrons_per_pattern": " Data that are not counts, noise-free simulations for instance, must be scaled."}
_BAND_BYTES = 32e6
_LARGEST_BAND_BYTES = 256e6
_BATCH = 128


def _check_data(data: Any) -> None:
    """4D, real numbers, at least 3x3 positions."""
    shape = tuple(getattr(data, "shape", ()))
    if len(shape) != 4:
        raise ValueError(
            f"data has the shape {shape}, expected 4 dimensions: scan rows and columns, detector rows and columns."
        )
    if shape[0] < 3 or shape[1] < 3:
        raise ValueError(f"data has {shape[0]} x {shape[1]} scan positions; the 3x3 kernels need at least 3 x 3.")
    if min(shape[2:]) < 2:
        raise ValueError(f"data has a detector of {shape[2]} x {shape[3]} px, expected at least 2 x 2.")
    if np.dtype(data.dtype).kind not in "iufb":
        raise ValueError(f"data has the type {data.dtype}, expected counts: integers or real floats.")


def _check_domain(contract: Contract, called: Mapping[str, str], **values: float) -> list[str]:
    """Warn of every value outside the model's training domain; returns the warnings."""
    messages = []
    for name, value in values.items():
        low, high = contract.domain.get(name, (-math.inf, math.inf))
        if not low - 1e-3 * abs(low) <= value <= high + 1e-3 * abs(high):
            messages.append(
                f"{called.get(name, name)} is {value:.4g}, outside of {low:.4g} to {high:.4g}, the range that model "
                f"{contract.name} was trained on: expect gaps, false atoms or a wrong phase scale."
                + _HINTS.get(name, "")
            )
            warnings.warn(messages[-1], UserWarning, stacklevel=4)
    return messages


def relative_geometry(acquisition: Acquisition) -> tuple[float, float, float]:
    r"""Scan step and aberrations in the model's scale-free units.

    Returns
    -------
    step : float
        scan_step k0, with k0 = alpha / lambda.
    defocus_phase : float
        -pi lambda k0^2 defocus [rad], the first-order term of eq. 3 at the aperture's edge.
    spherical_phase : float
        pi C_s lambda^3 k0^4 / 2 [rad], the third-order term.

    Examples
    --------
    >>> step, _, _ = relative_geometry(Acquisition(300e3, 20.0, 0.2, (0.05, 0.05)))
    >>> round(step, 3)
    0.203
    """
    k0 = acquisition.aperture_radius
    defocus = optics.aberration_phase(k0**2, acquisition.energy, defocus=acquisition.defocus)
    spherical = optics.aberration_phase(
        k0**2, acquisition.energy, spherical_aberration=acquisition.spherical_aberration
    )
    return acquisition.scan_step * k0, float(defocus), float(spherical)


def _rows_per_band(data: Any) -> int:
    """Scan rows to read at once: _BAND_BYTES, in whole chunks of the source's, that no chunk is read twice."""
    row_bytes = math.prod(data.shape[1:]) * np.dtype(data.dtype).itemsize
    rows = max(1, int(_BAND_BYTES // row_bytes))
    chunks = getattr(data, "chunks", None)
    if chunks:
        # h5py and zarr give a chunk's length, dask those of all chunks
        chunk = int(np.max(chunks[0]))
        whole = max(1, rows // chunk) * chunk
        if whole * row_bytes <= _LARGEST_BAND_BYTES:
            return whole
    return rows


def _read_rows(data: Any, band: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """Every scan row with its number, read `band` rows at a time."""
    for first in range(0, data.shape[0], band):
        rows = np.asarray(data[first : min(first + band, data.shape[0])])
        check_finite(rows, first)
        yield from enumerate(rows, first)


def _kernel_rows(rows: Iterator[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """Three neighbouring rows (3, columns + 2, grid, grid) around each row, the scan's edges replicated."""
    padded = (np.concatenate([row[:1], row, row[-1:]]) for row in rows)
    above = here = next(padded)
    for below in padded:
        yield np.stack([above, here, below])
        above, here = here, below
    yield np.stack([above, here, here])


def reconstruct(
    data: Any,
    acquisition: Acquisition,
    *,
    model: str | Path | Model | None = None,
    device: str = "auto",
    oversample: int | None = None,
    show_progress: bool = False,
) -> Reconstruction:
    """Reconstruct the phase object of a 4D-STEM scan [1]_.

    The scan is streamed in bands of rows: besides the image, memory holds a few rows of patterns.

    Parameters
    ----------
    data : array_like, shape (scan rows, scan columns, detector rows, detector columns)
        Electron counts. Anything that slices along its first axis and converts to NumPy: ndarray, memmap, h5py.Dataset,
        zarr or dask array. Never written to.
    acquisition : Acquisition
        The calibration; a centre of None is measured from the mean pattern.
    model : str, Path or Model, optional
        Name of a shipped model, path of an ONNX file, or a loaded model.
    device : {"auto", "cpu", "cuda", "cuda:N"}
        See `airpi_py4d.model.Model`. A loaded model stays where it is.
    oversample : int, optional
        Image pixels per scan step. By default the smallest number that makes the pixel no larger than the model's.
    show_progress : bool
        Show a progress bar over scan rows.

    Returns
    -------
    Reconstruction

    Raises
    ------
    ValueError
        For data that aren't 4D, real, finite or at least 3x3 positions, calibration that doesn't fit the detector, or
        a model that can't be used.
    RuntimeError
        If CUDA was asked for and doesn't run.

    References
    ----------
    .. [1] Friedrich, Yu, Verbeeck, Van Aert, Microsc. Microanal. 29 (2023) 395, doi 10.1093/micmic/ozac002

    Examples
    --------
    An empty specimen has no phase:

    >>> k = np.arange(48) - 24
    >>> disk = k[:, None] ** 2 + k[None] ** 2 <= 9**2
    >>> data = np.broadcast_to(np.uint16(100) * disk, (3, 4, 48, 48))
    >>> k_pixel = optics.aperture_radius(300e3, 20.0) / 9
    >>> result = reconstruct(data, Acquisition(300e3, 20.0, 0.2, (k_pixel, k_pixel)), device="cpu")
    >>> result.phase.shape, bool(abs(result.phase).max() < 0.05)
    ((5, 7), True)
    """
    started = time.perf_counter()
    _check_data(data)
    if not isinstance(model, Model):
        model = Model(model, device)
    elif device.startswith("cuda") and model.provider != "CUDAExecutionProvider":
        raise RuntimeError(
            f"device={device!r} was asked for, but the loaded model runs on {model.provider}; load it there."
        )
    contract = model.contract
    if oversample is not None and not (isinstance(oversample, (int, np.integer)) and oversample >= 1):
        raise ValueError(f"oversample is {oversample!r}, expected a whole number of at least 1.")
    check_disk(data.shape[2:], acquisition)
    if acquisition.center is None:
        sources = {**acquisition.sources, "center": "measured from the mean pattern"}
        acquisition = replace(acquisition, center=measure_center(data, acquisition), sources=sources)
    relative_step, defocus_phase, spherical_phase = relative_geometry(acquisition)
    outside = _check_domain(
        contract,
        acquisition.argument_names,
        energy=acquisition.energy,
        semiangle=acquisition.semiangle,
        relative_scan_step=relative_step,
        defocus_phase=defocus_phase,
    )
    grid_k_pixel = acquisition.aperture_radius / contract.aperture_pixels
    patch_pixel_size = 1 / (contract.grid_pixels * grid_k_pixel)
    if oversample is None:
        oversample = max(1, math.ceil(acquisition.scan_step / patch_pixel_size - 1e-6))
    matrix = resampling_matrix(data.shape[2:], acquisition, contract.grid_pixels, grid_k_pixel)
    stitcher = Stitcher(data.shape[:2], acquisition, contract.object_pixels, patch_pixel_size, int(oversample))
    electrons = 0.0

    def resampled_rows() -> Iterator[NDArray[np.float32]]:
        nonlocal electrons
        for _, row in _read_rows(data, _rows_per_band(data)):
            patterns = resample(row, matrix)
            electrons += float(patterns.sum(dtype=np.float64))
            yield patterns

    geometry = np.tile(np.array([relative_step, defocus_phase, spherical_phase], np.float32), (_BATCH, 1))
    rows = tqdm(_kernel_rows(resampled_rows()), "AIRPI", data.shape[0], unit="row", disable=not show_progress)
    for number, neighbours in enumerate(rows):
        kernels = sliding_window_view(neighbours, 3, axis=1).transpose(1, 0, 4, 2, 3)
        for first in range(0, len(kernels), _BATCH):
            batch = np.ascontiguousarray(kernels[first : first + _BATCH])
            stitcher.add_row(number, first, model(batch, geometry[: len(batch)]))
    electrons /= data.shape[0] * data.shape[1]
    outside += _check_domain(contract, acquisition.argument_names, electrons_per_pattern=electrons)
    seconds = time.perf_counter() - started
    return Reconstruction(
        object=stitcher.result(),
        pixel_size=stitcher.pixel_size,
        provenance={
            "software": "airpi_py4d",
            "version": version("airpi_py4d"),
            "method": f"AIRPI: {CITATION}",
            "acquisition": acquisition.describe(),
            "scan_shape": list(data.shape[:2]),
            "detector_shape": list(data.shape[2:]),
            "electrons_per_pattern": electrons,
            "oversample": int(oversample),
            "pixel_size": stitcher.pixel_size,
            "model": {"name": contract.name, "version": contract.version, "sha256": model.sha256},
            "outside_training_domain": outside,
            "provider": model.provider,
            "seconds": seconds,
            "positions_per_second": data.shape[0] * data.shape[1] / seconds,
        },
    )
