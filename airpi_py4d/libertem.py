"""LiberTEM: `AirpiUDF`, a user-defined function (UDF) that reconstructs a scan partition by partition, also live.

A partition's positions are inferred where it lies, as far as it holds all patterns of their kernels. The patterns of
its outermost rows go to the main process, which infers the positions on the seams as soon as the partitions on both
sides are there. The image is a sum, so the order doesn't matter. A model that stitches features sees each
pattern alone: only scan rows that end in another partition go to the main process, which makes the phase image.
"""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airpi_py4d.acquisition import Acquisition
from airpi_py4d.checks import _EMPTY, _GOOD, _NEGATIVE, _NEVER_EMPTY, BadPositions
from airpi_py4d.domain import ElectronCheck, check_acquisition
from airpi_py4d.engine import _BATCH, image_network, stitch_features
from airpi_py4d.feature_stitching import FeatureStitcher
from airpi_py4d.kernels import Row, kernel_batches, sum_of_rows
from airpi_py4d.model import Model
from airpi_py4d.patterns import Resampling
from airpi_py4d.plan import Plan
from airpi_py4d.result import Reconstruction
from airpi_py4d.stitching import Stitcher

try:
    from libertem.udf import UDF
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'airpi_py4d.libertem needs LiberTEM: {error}. Install it: pip install "airpi_py4d[libertem]".'
    ) from error


@lru_cache(maxsize=4)
def _loaded(model: str | None, device: str, threads: int | None) -> Model:
    """The model, loaded once a process."""
    return Model(model, device, threads)


@lru_cache(maxsize=4)
def _resampling(plan: bytes) -> Resampling:
    """The resampling, built once a process from its pickled plan."""
    resampling: Resampling = pickle.loads(plan).resampling()
    return resampling


def _summed(plan: Plan, row: int) -> range:
    """The scan rows that go into a reconstructed row's sums."""
    centre, half = row * plan.stride, plan.sum_neighbours // 2
    return range(max(centre - half, 0), min(centre + half + 1, plan.data_shape[0]))


def _kernel_rows(plan: Plan, centre: int) -> list[range]:
    """The scan rows of the kernels around a reconstructed row: those above, in and below it, or in it alone."""
    if plan.contract.kernel_side == 1:
        return [_summed(plan, centre)]
    above = plan.spacing[0]
    three = max(centre - above, 0), centre, min(centre + above, plan.scan_shape[0] - 1)
    return [_summed(plan, row) for row in three]


def _centres(plan: Plan, row: int) -> list[int]:
    """The reconstructed rows whose kernels need a scan row."""
    reach = plan.spacing[0] + -(-(plan.sum_neighbours // 2) // plan.stride)
    nearest = row // plan.stride
    near = range(max(nearest - reach, 0), min(nearest + reach + 2, plan.scan_shape[0]))
    return [centre for centre in near if any(row in rows for rows in _kernel_rows(plan, centre))]


def _reconstructed(plan: Plan, rows: range) -> range:
    """The reconstructed rows whose positions lie in neighbouring scan rows."""
    return range(-(-rows.start // plan.stride), -(-rows.stop // plan.stride))


@dataclass
class _Band:
    """Image of some neighbouring scan rows, as far as their patterns are there.

    Attributes
    ----------
    first : int
        The first scan row.
    rows : range
        The reconstructed rows.
    stitcher : Stitcher or FeatureStitcher
    bad : BadPositions
    electrons : ndarray, shape (rows, columns)
        In each pattern on the model's grid.
    done : set of int
        Reconstructed rows whose positions are in the image.
    held : dict of int to Row
        Complete scan rows that positions which aren't done need.
    """

    first: int
    rows: range
    stitcher: Stitcher | FeatureStitcher
    bad: BadPositions
    electrons: NDArray[np.float32]
    done: set[int] = field(default_factory=set)
    held: dict[int, Row] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, rows: range) -> _Band:
        shape = len(rows), plan.data_shape[1]
        bad, reconstructed = BadPositions(shape, plan.acquisition), _reconstructed(plan, rows)
        # a band between two reconstructed rows has no image; its stitcher is never used
        stitched = max(len(reconstructed), 1)
        stitcher = plan.feature_stitcher(stitched) if plan.contract.features else plan.stitcher(stitched)
        return cls(rows.start, reconstructed, stitcher, bad, np.zeros(shape, np.float32))

    def add(self, plan: Plan, model: Model, number: int, row: Row) -> None:
        """Add a complete scan row's patterns, and to the image the positions whose kernels they complete."""
        self.held[number] = row
        for centre in _centres(plan, number):
            needed = _kernel_rows(plan, centre)
            here = centre in self.rows and centre not in self.done
            if here and all(n in self.held for rows in needed for n in rows):
                self._infer(plan, model, centre)
        self.drop(plan)

    def drop(self, plan: Plan) -> None:
        """Let go of patterns that nothing needs any more."""
        self.held = {n: row for n, row in self.held.items() if not self.done.issuperset(_centres(plan, n))}

    def _infer(self, plan: Plan, model: Model, centre: int) -> None:
        summed = [
            sum_of_rows([self.held[n] for n in rows], plan.sum_neighbours, plan.stride)
            for rows in _kernel_rows(plan, centre)
        ]
        row = centre - self.rows.start
        if isinstance(self.stitcher, FeatureStitcher):
            for _ in stitch_features(model, plan, self.stitcher, summed, row):
                self.done.add(centre)
            return
        geometry = plan.geometry(_BATCH)
        for place, first, kernels, measured in kernel_batches(summed, (1, plan.spacing[1]), _BATCH):
            if place == 1:
                self.stitcher.add_row(row, first, model(kernels, geometry[: len(kernels)]), measured)
        self.done.add(centre)


@dataclass
class _Part:
    """A partition's result.

    Attributes
    ----------
    positions : range
    band : _Band
    fragments : list of (int, int, ndarray of float32)
        Scan row, first scan column and patterns on the model's grid where a scan row isn't complete.
    """

    positions: range
    band: _Band
    fragments: list[tuple[int, int, NDArray[np.float32]]]


class _Partition:
    """What a worker makes of the patterns of a partition, which may begin and end within a scan row.

    Parameters
    ----------
    plan : Plan
    model : Model
    positions : range
        Of the scan, row by row.
    dtype : dtype
        Of the patterns.
    """

    def __init__(self, plan: Plan, model: Model, positions: range, dtype: Any) -> None:
        self._plan, self._model, self._resampling = plan, model, _resampling(pickle.dumps(plan))
        self._positions, self._dtype = positions, np.dtype(dtype)
        columns = plan.data_shape[1]
        self._band = _Band.of(plan, range(positions.start // columns, (positions.stop - 1) // columns + 1))
        self._fragments: list[tuple[int, int, NDArray[np.float32]]] = []
        self._begin(positions.start)

    def _begin(self, start: int) -> None:
        """Begin a scan row, or what the partition has of it; patterns that never come stay empty."""
        columns = self._plan.data_shape[1]
        stop = min((start // columns + 1) * columns, self._positions.stop)
        self._row = range(start, stop)
        self._patterns = np.zeros((len(self._row), *self._plan.data_shape[2:]), self._dtype)

    def add(self, position: int, pattern: NDArray[Any]) -> None:
        """Add a pattern as the detector reports it; positions come in their order."""
        while position >= self._row.stop:
            self._end()
            self._begin(self._row.stop)
        self._patterns[position - self._row.start] = pattern

    def _end(self) -> None:
        row, first = divmod(self._row.start, self._plan.data_shape[1])
        here = slice(first, first + len(self._row))
        bad, number = self._band.bad, row - self._band.first
        whole = len(self._row) == self._plan.data_shape[1]
        if whole:
            bad.add(number, 0, self._patterns)
        else:  # which empty patterns are missing shows when the row is complete
            for n in range(len(self._row)):
                bad.add(number, first + n, self._patterns[n : n + 1])
        missing = bad.missing_of(number)[here]
        descan = self._plan.acquisition.descan
        patterns = self._resampling(self._patterns, None if descan is None else descan[row, here])
        patterns[missing if whole else ~np.isfinite(patterns).all(axis=(1, 2))] = 0
        self._band.electrons[number, here] = patterns.sum(axis=(1, 2))
        if whole:
            self._band.add(self._plan, self._model, row, (patterns, ~missing))
        else:
            self._fragments.append((row, first, patterns))

    def finish(self) -> _Part:
        """The partition's part of the image, and what its neighbours need."""
        self._end()
        while self._row.stop < self._positions.stop:
            self._begin(self._row.stop)
            self._end()
        return _Part(self._positions, self._band, self._fragments)


class _Scan:
    """The image of the whole scan, put together from the partitions' parts in any order.

    Parameters
    ----------
    plan : Plan
    strict : bool
    """

    def __init__(self, plan: Plan, strict: bool) -> None:
        self._started = time.perf_counter()
        self._seconds = 0.0
        self._plan = plan
        self._outside = check_acquisition(plan.contract, plan.data_shape[2:], plan.reconstructed, strict=strict)
        self._checks: list[str] = []
        self._band = _Band.of(plan, range(plan.data_shape[0]))
        self._image = plan.phase_image() if plan.contract.features else None
        scan_shape = plan.data_shape[:2]
        self._electrons = ElectronCheck(plan.contract, scan_shape, plan.sum_neighbours**2, strict=strict)
        self._arrived = np.zeros(scan_shape, bool)
        self._fragments: dict[int, NDArray[np.float32]] = {}

    def merge(self, part: _Part, model: Model) -> None:
        """Add a part, and the seams that it completes; after the last one, judge the whole scan's patterns."""
        plan, band, columns = self._plan, self._band, self._plan.data_shape[1]
        positions = slice(part.positions.start, part.positions.stop)
        offset = part.positions.start - part.band.first * columns
        band.bad.merge(part.band.bad, part.band.first)
        sums = part.band.electrons.ravel()[offset : offset + len(part.positions)]
        band.electrons.ravel()[positions] = sums
        self._arrived.ravel()[positions] = True
        if part.band.done:
            # both are of the one kind that the plan makes, which their union doesn't tell
            band.stitcher.merge(part.band.stitcher, part.band.rows.start)  # type: ignore[arg-type]
        band.done |= part.band.done
        for row in range(part.band.first, part.band.first + len(part.band.electrons)):
            if row not in (fragment[0] for fragment in part.fragments):
                self._add_electrons(row)
        for number, row_of_patterns in part.band.held.items():
            band.add(plan, model, number, row_of_patterns)
        for row, first, patterns in part.fragments:
            if row not in self._fragments:
                self._fragments[row] = np.zeros((columns, *patterns.shape[1:]), np.float32)
            self._fragments[row][first : first + len(patterns)] = patterns
            if self._arrived[row].all():
                band.add(plan, model, row, self._assembled(row))
                self._add_electrons(row)
        band.drop(plan)
        self._seconds = time.perf_counter() - self._started
        if self._arrived.all():
            self._checks = band.bad.finish()
            self._outside += self._electrons.finish()

    def _add_electrons(self, row: int) -> None:
        self._electrons.add(self._band.electrons[row], self._band.bad.missing_of(row))

    def _assembled(self, row: int) -> Row:
        """A scan row from several partitions; empty patterns aren't missing where chance explains them.

        As `BadPositions` judges whole rows, but with the electrons on the model's grid.
        """
        kind, electrons = self._band.bad._kind[row], self._band.electrons[row]
        empty = kind == _EMPTY
        others = (kind == _GOOD) | (kind == _NEGATIVE)
        if others.any() and electrons[others].mean() <= _NEVER_EMPTY:
            kind[empty & (electrons > -0.5)] = _GOOD
        patterns = self._fragments.pop(row)
        patterns[kind != _GOOD] = 0
        return patterns, kind == _GOOD

    def reconstruction(self, model: Model) -> Reconstruction:
        """The image as far as it goes, and how it was made."""
        arrived = int(self._arrived.sum())
        checks = list(self._checks)
        if arrived < self._arrived.size:
            checks.append(f"{arrived} of {self._arrived.size} patterns have arrived.")
        seconds = max(self._seconds, 1e-9)
        provenance = self._plan.provenance(model, self._electrons.median, list(self._outside), checks, seconds, arrived)
        stitcher = self._band.stitcher
        if isinstance(stitcher, Stitcher):
            return Reconstruction(stitcher.result(), stitcher.pixel_size, provenance)
        assert self._image is not None
        self._image.update(image_network(model, self._plan), stitcher)
        return Reconstruction.of_phase(self._image, stitcher.pixel_size, provenance)


class AirpiUDF(UDF):
    """Phase object of a 4D-STEM scan, by `airpi_py4d.reconstruct`'s method [1]_, as a LiberTEM UDF.

    Gives the image of `airpi_py4d.reconstruct` for every partitioning and executor. Result buffers, of the kind
    "single" and the shape of the image: `object` (complex64), `phase` [rad] and `confidence` (float32), masked where
    nothing was measured yet. Patterns that a data set lacks count as empty.

    Parameters
    ----------
    acquisition : Acquisition
        The calibration, with a centre. What LiberTEM corrects itself (dark frame, excluded pixels) is not to be given
        here again.
    model : str or Path, optional
        Name of a shipped model or path of an ONNX file that every worker can read; each loads it once.
    device : {"auto", "cpu", "cuda", "cuda:N", "tensorrt", "tensorrt:N"}
        See `airpi_py4d.model.Model`.
    oversample : int, optional
        Image pixels per scan step. By default the smallest number that makes the pixel no larger than the model's,
        along rows and columns each.
    sum_neighbours, stride : int
        Data repetition, see `airpi_py4d.reconstruct`.
    strict : bool
        Raise where the acquisition or the data lie far outside of what the model was trained on; False warns instead.

    Raises
    ------
    ValueError
        If the centre is missing or the model is a loaded one. When run: for a region of interest, for data or a
        calibration that `airpi_py4d.reconstruct` refuses.

    Warns
    -----
    UserWarning
        As `airpi_py4d.reconstruct` does, once the last partition is there.

    References
    ----------
    .. [1] Friedrich, Yu, Verbeeck, Van Aert, Microsc. Microanal. 29 (2023) 395, doi 10.1093/micmic/ozac002

    Examples
    --------
    An empty specimen has no phase:

    >>> from libertem.api import Context
    >>> from airpi_py4d import optics
    >>> k = np.arange(48) - 24
    >>> disk = k[:, None] ** 2 + k[None] ** 2 <= 9**2
    >>> data = np.uint16(100) * disk * np.ones((3, 4, 1, 1), np.uint16)
    >>> k_pixel = optics.aperture_radius(300e3, 20.0) / 9
    >>> acquisition = Acquisition(300e3, 20.0, 0.2, (k_pixel, k_pixel), center=(24, 24))
    >>> context = Context.make_with("inline")
    >>> dataset = context.load("memory", data=data, sig_dims=2, num_partitions=1)
    >>> udf = AirpiUDF(acquisition, device="cpu")
    >>> results = context.run_udf(dataset=dataset, udf=udf)
    >>> phase = results["phase"].data
    >>> phase.shape, bool(abs(phase).max() < 0.05), udf.reconstruction().provenance["scan_shape"]
    ((5, 7), True, [3, 4])
    """

    def __init__(
        self,
        acquisition: Acquisition,
        model: str | Path | None = None,
        device: str = "auto",
        oversample: int | None = None,
        sum_neighbours: int = 1,
        stride: int = 1,
        strict: bool = True,
    ) -> None:
        if acquisition.center is None:
            raise ValueError(
                "acquisition has no center, and LiberTEM reads every pattern once only: give it, or measure it first "
                "with airpi_py4d.calibration.with_center or airpi_py4d.calibrate."
            )
        if isinstance(model, Model):
            raise ValueError("model is a loaded model, which can't be sent to workers; give its name or path.")
        if model is not None and Path(model).is_file():
            model = Path(model).resolve()
        model = None if model is None else str(model)
        super().__init__(
            acquisition=acquisition,
            model=model,
            device=device,
            oversample=oversample,
            sum_neighbours=sum_neighbours,
            stride=stride,
            strict=strict,
        )

    def _model(self) -> Model:
        return _loaded(self.params.model, self.params.device, self.meta.threads_per_worker)

    def _plan(self) -> Plan:
        if self.meta.dataset_shape.sig.dims != 2:
            raise ValueError(f"data has the shape {self.meta.dataset_shape}, expected two signal dimensions.")
        data = SimpleNamespace(shape=tuple(self.meta.dataset_shape), dtype=self.meta.input_dtype)
        repetition = self.params.sum_neighbours, self.params.stride
        return Plan.of(self.params.acquisition, self._model().contract, data, self.params.oversample, *repetition)

    def get_preferred_input_dtype(self) -> Any:
        """The data's own: counts stay integers."""
        return self.USE_NATIVE_DTYPE

    def get_result_buffers(self) -> dict[str, Any]:
        """Image, and the private `part`: a `_Part` on workers, the `_Scan` on the main process."""
        shape = self._plan().image_shape
        return {
            "object": self.buffer("single", shape, np.complex64, use="result_only"),
            "phase": self.buffer("single", shape, np.float32, use="result_only"),
            "confidence": self.buffer("single", shape, np.float32, use="result_only"),
            "part": self.buffer("single", dtype=object, use="private"),
        }

    def preprocess(self) -> None:
        """On the main process, begin the image."""
        if self.meta.roi is not None:
            raise ValueError(
                "roi was given, but kernels of neighbouring patterns need the whole scan: run without roi, and cut "
                "out the region of the image."
            )
        if self.meta.slice is None:
            self.results.part[0] = _Scan(self._plan(), self.params.strict)

    def get_task_data(self) -> dict[str, Any]:
        """On a worker, begin a partition."""
        start = self.meta.slice.origin[0]
        positions = range(start, start + self.meta.slice.shape.nav.size)
        return {"partition": _Partition(self._plan(), self._model(), positions, self.meta.input_dtype)}

    def process_frame(self, frame: NDArray[Any]) -> None:
        """Add a pattern to the partition."""
        self.task_data.partition.add(self.meta.slice.origin[0], frame)

    def postprocess(self) -> None:
        """End the partition."""
        self.results.part[0] = self.task_data.partition.finish()

    def merge(self, dest: Any, src: Any) -> None:
        """Add a partition to the image."""
        dest.part[0].merge(src.part[0], self._model())

    def get_results(self) -> dict[str, Any]:
        """The image so far."""
        result = self.reconstruction()
        measured = result.confidence > 0
        images = {"object": result.object, "phase": result.phase, "confidence": result.confidence}
        return {name: self.with_mask(image, measured) for name, image in images.items()}

    def reconstruction(self) -> Reconstruction:
        """Image and provenance of the last run, or of a running one as far as it goes.

        Raises
        ------
        ValueError
            If this UDF wasn't run.
        """
        if "part" not in self.results:
            raise ValueError("this UDF wasn't run; run it with Context.run_udf(dataset=..., udf=...).")
        return self.results.part[0].reconstruction(self._model())
