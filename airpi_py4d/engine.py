"""The reconstruction: row bands -> patterns or 3x3 kernels of them -> patches -> stitched object, or phase image."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from airpi_py4d import devices
from airpi_py4d.acquisition import Acquisition
from airpi_py4d.calibration import with_center
from airpi_py4d.checks import BadPositions, check_data, read
from airpi_py4d.device_path import DevicePath, Measured
from airpi_py4d.domain import ElectronCheck, check_acquisition
from airpi_py4d.feature_stitching import FeatureStitcher
from airpi_py4d.kernels import Row, kernel_batches, pattern_batches, summed_rows
from airpi_py4d.model import Model
from airpi_py4d.patterns import check_disk
from airpi_py4d.phase_image import Network
from airpi_py4d.plan import Plan
from airpi_py4d.result import Reconstruction

#: Few enough that patterns are still in the processor's cache when they are checked and resampled.
_BAND_BYTES = 4e6
_LARGEST_BAND_BYTES = 256e6
#: Kernels, or single patterns, that the model sees at once.
_BATCH = 128

T = TypeVar("T")


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


def _read_rows(data: Any) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """All patterns once: scan row, first scan column, and patterns (n, detector rows, detector columns)."""
    rows, columns = data.shape[:2]
    pattern_bytes = math.prod(data.shape[2:]) * np.dtype(data.dtype).itemsize
    if columns * pattern_bytes > _LARGEST_BAND_BYTES:
        count = max(1, int(_BAND_BYTES // pattern_bytes))
        for row in range(rows):
            for first in range(0, columns, count):
                yield row, first, read(data, slice(row, row + 1), slice(first, min(first + count, columns)))[0]
        return
    band = _rows_per_band(data)
    for top in range(0, rows, band):
        for row, patterns in enumerate(read(data, slice(top, min(top + band, rows))), top):
            yield row, 0, patterns


def _prefetched(items: Iterator[T], ahead: int) -> Generator[T, None, None]:
    """The same items in the same order, of which another thread makes the next few while the last one is used."""
    reader = ThreadPoolExecutor(1, "airpi_py4d reader")
    try:
        coming = deque(reader.submit(next, items, None) for _ in range(ahead))
        while (item := coming.popleft().result()) is not None:
            coming.append(reader.submit(next, items, None))
            yield item
    finally:
        reader.shutdown(cancel_futures=True)


def stitch_features(
    model: Model, plan: Plan, stitcher: FeatureStitcher, rows: Iterable[Row], first_row: int = 0
) -> Iterator[int]:
    """Add rows of patterns to the feature image, the first of which is its scan row `first_row`.

    Yields
    ------
    int
        The number of the next row, each time that one is complete.
    """
    geometry = plan.geometry(_BATCH)
    for patterns, pieces in pattern_batches(rows, _BATCH, first_row):
        patches = model(patterns, geometry[: len(patterns)])
        electrons = np.maximum(patterns.reshape(len(patterns), -1).sum(axis=1), 0)
        for row, first, here, measured in pieces:
            stitcher.add_row(row, first, patches[here], measured, electrons[here])
            if first + len(measured) == plan.scan_shape[1]:
                yield row + 1


def image_network(model: Model, plan: Plan) -> Network:
    """The second network of a model of features, with the scan's geometry."""
    geometry = plan.image_geometry
    return lambda features: model.image(features, geometry)


def _stitched(model: Model, plan: Plan, rows: Iterable[Row]) -> Callable[[dict[str, Any]], Reconstruction]:
    """The image of rows of patterns, still without its provenance."""
    if plan.contract.features:
        image = plan.phase_image()
        features = plan.feature_stitcher(plan.scan_shape[0], image.band)
        network = image_network(model, plan)
        for count in stitch_features(model, plan, features, rows):
            image.advance(network, features, features.complete(count))
        return lambda provenance: Reconstruction.of_phase(image, features.pixel_size, provenance)
    stitcher, geometry = plan.stitcher(plan.scan_shape[0]), plan.geometry(_BATCH)
    for row, first, kernels, measured in kernel_batches(rows, plan.spacing, _BATCH):
        stitcher.add_row(row, first, model(kernels, geometry[: len(kernels)]), measured)
    return lambda provenance: Reconstruction(stitcher.result(), stitcher.pixel_size, provenance)


def _on_device(model: Model) -> bool:
    """Whether arrays stay in the memory of the model's device, which isn't the host's."""
    return model.memory[0] != "cpu"


def _stitched_on_device(
    model: Model, plan: Plan, parts: Iterable[Measured], dtype: np.dtype, electrons: ElectronCheck
) -> Callable[[dict[str, Any]], Reconstruction]:
    """As `_stitched`, with the arrays on the model's device; electrons of patterns that are resampled there count."""
    path, image, network = DevicePath(model, plan, dtype), plan.phase_image(), image_network(model, plan)
    rows, columns = plan.scan_shape
    features = plan.feature_stitcher(rows, image.band, path.layout.summed_rows)
    with closing(_prefetched(path.batches(parts), 2)) as batches:
        for batch in batches:
            sums = path(batch)
            if plan.resamples_alike:
                width = min(path.layout.columns, columns - batch.first)
                for row, found in enumerate(sums.electrons[: rows - batch.row, :width], batch.row):
                    electrons.add(found, ~batch.measured[row - batch.row, :width])
            if sums.features is not None:
                features.add_sums(sums.features, sums.row)
                image.advance(network, features, features.complete(min(sums.row + path.layout.summed_rows, rows)))
    return lambda provenance: Reconstruction.of_phase(image, features.pixel_size, provenance)


def reconstruct(
    data: Any,
    acquisition: Acquisition,
    *,
    model: str | Path | Model | None = None,
    device: str = "auto",
    oversample: int | None = None,
    sum_neighbours: int = 1,
    stride: int = 1,
    strict: bool = True,
    show_progress: bool = False,
) -> Reconstruction:
    """Reconstruct the phase object of a 4D-STEM scan [1]_.

    The scan is streamed in bands of rows, which a thread reads while the model works: besides the image, memory holds a
    few rows of patterns, and for a model that stitches features a band of the image's features.

    Parameters
    ----------
    data : array_like, shape (scan rows, scan columns, detector rows, detector columns)
        Electron counts. Anything that slices along its first axis and converts to NumPy: ndarray, memmap, h5py.Dataset,
        zarr or dask array. Never written to.
    acquisition : Acquisition
        The calibration; a centre of None is measured from the mean pattern.
    model : str, Path or Model, optional
        Name of a shipped model, path of an ONNX file, or a loaded model.
    device : {"auto", "cpu", "cuda", "cuda:N", "tensorrt", "tensorrt:N"}
        See `airpi_py4d.model.Model`. A loaded model stays where it is.
    oversample : int, optional
        Image pixels per scan step. By default the smallest number that makes the pixel no larger than the model's,
        along rows and columns each.
    sum_neighbours, stride : int
        Data repetition for few electrons [1]_: each pattern becomes the sum of `sum_neighbours` x `sum_neighbours`
        (odd) positions around it, and every `stride`-th position along rows and columns is reconstructed.
    strict : bool
        Raise where the acquisition or the data lie far outside of what the model was trained on; False warns instead.
    show_progress : bool
        Show a progress bar over scan rows.

    Returns
    -------
    Reconstruction

    Raises
    ------
    ValueError
        For data that aren't 4D, real or at least 3x3 positions or that hold no electrons, calibration that doesn't fit
        the detector or is far outside the model's training domain, or a model that can't be used.
    OSError
        If the data can't be read to their end.
    RuntimeError
        If CUDA or TensorRT was asked for and doesn't run, or a loaded model runs elsewhere.

    Warns
    -----
    UserWarning
        Once for all missing positions (empty, NaN), which are left out of the image and have a confidence of 0 where
        nothing else contributes; for saturated patterns; for values outside the model's training domain.

    References
    ----------
    .. [1] Friedrich, Yu, Verbeeck, Van Aert, Microsc. Microanal. 29 (2023) 395, doi 10.1093/micmic/ozac002

    Examples
    --------
    An empty specimen has no phase:

    >>> k = np.arange(48) - 24
    >>> disk = k[:, None] ** 2 + k[None] ** 2 <= 9**2
    >>> data = np.broadcast_to(np.uint16(100) * disk, (3, 4, 48, 48))
    >>> k_pixel = Acquisition(300e3, 20.0, 0.2, (1, 1)).aperture_radius / 9
    >>> result = reconstruct(data, Acquisition(300e3, 20.0, 0.2, (k_pixel, k_pixel)), device="cpu")
    >>> result.phase.shape, bool(abs(result.phase).max() < 0.05)
    ((5, 7), True)
    """
    started = time.perf_counter()
    if not isinstance(model, Model):
        model = Model(model, device)
    elif devices.provider(device) not in (None, model.provider):
        raise RuntimeError(
            f"device={device!r} was asked for, but the loaded model runs on {model.provider}; load it there."
        )
    check_data(data)
    check_disk(data.shape[2:], acquisition)
    if acquisition.center is None:
        acquisition = with_center(data, acquisition)
    plan = Plan.of(acquisition, model.contract, data, oversample, sum_neighbours, stride)
    outside = check_acquisition(plan.contract, data.shape[2:], plan.reconstructed, strict=strict)
    resampling = plan.resampling()
    bad = BadPositions(data.shape[:2], acquisition)
    electrons = ElectronCheck(plan.contract, data.shape[:2], plan.sum_neighbours**2, strict=strict)

    def measured_patterns() -> Iterator[Measured]:
        for row, first, patterns in _read_rows(data):
            missing = bad.add(row, first, patterns)
            yield row, first, patterns, ~missing
            if first + len(patterns) == data.shape[1]:
                progress.update()

    def resampled_rows() -> Iterator[Row]:
        columns, n = data.shape[1], plan.contract.grid_pixels
        for row, first, patterns, measured in measured_patterns():
            if first == 0:
                whole = np.empty((columns, n, n), np.float32)
            here = slice(first, first + len(patterns))
            descan = None if acquisition.descan is None else acquisition.descan[row, here]
            resampling(patterns, descan, out=whole[here])
            whole[here][~measured] = 0
            electrons.add(whole[here].reshape(len(patterns), -1).sum(axis=1), ~measured)
            if here.stop == columns:
                yield whole, ~bad.missing_of(row)

    def summed_patterns() -> Iterator[Measured]:
        for row, (patterns, measured) in enumerate(summed_rows(resampled_rows(), plan.sum_neighbours, plan.stride)):
            yield row, 0, patterns, measured

    with tqdm(desc="AIRPI", total=data.shape[0], unit="row", disable=not show_progress) as progress:
        if plan.contract.features and _on_device(model):
            parts = measured_patterns() if plan.resamples_alike else summed_patterns()
            stitched = _stitched_on_device(model, plan, parts, data.dtype, electrons)
        else:
            # as many rows as the model takes at once
            ahead = -(-_BATCH // data.shape[1]) if plan.contract.kernel_side == 1 else 1
            with closing(_prefetched(resampled_rows(), ahead)) as made:
                stitched = _stitched(model, plan, summed_rows(made, plan.sum_neighbours, plan.stride))
    checks = bad.finish()
    outside += electrons.finish()
    seconds = time.perf_counter() - started
    return stitched(plan.provenance(model, electrons.median, outside, checks, seconds, math.prod(data.shape[:2])))
