"""Patterns to sums of features on the model's device: the patterns cross the bus once, the sums once for many rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from airpi_py4d.feature_stitching import EXTRA_CHANNELS, PatchWindows
from airpi_py4d.model import Model
from airpi_py4d.plan import Plan

#: Neighbouring patterns of a scan row, as they are measured: row, first column, patterns, which are measured.
Measured = tuple[int, int, NDArray[Any], NDArray[np.bool_]]

_GRAPHS = Path(__file__).parent / "graphs"
#: Types in which patterns cross the bus; all others as float32.
_COUNTS = ("uint8", "uint16", "float32")
#: Patterns at once, and bytes of what is gathered to resample them.
_BATCH, _GATHERED_BYTES = 1024, 512e6
#: Of the sums that stay on the device; and the image rows they are of.
_SUM_BYTES, _SUM_ROWS = 64e6, 256


def gathering(matrix: sparse.csr_matrix) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Columns and values of a sparse matrix's rows, shape (most entries of a row, rows) each.

    Shorter rows are filled with zeros, which stand at a column that the matrix has: what lies in one that it hasn't
    may be NaN.

    Examples
    --------
    >>> places, weights = gathering(sparse.csr_matrix([[0.0, 2.0, 3.0], [0.0, 0.0, 4.0]]))
    >>> places.tolist(), weights.tolist()
    ([[1, 2], [2, 1]], [[2.0, 4.0], [3.0, 0.0]])
    """
    entries = np.diff(matrix.indptr)
    row = np.repeat(np.arange(len(entries)), entries)
    number = np.arange(matrix.nnz) - matrix.indptr[row]
    places = np.full((entries.max(), len(entries)), matrix.indices[0], np.int32)
    weights = np.zeros(places.shape, np.float32)
    places[number, row], weights[number, row] = matrix.indices, matrix.data
    return places, weights


@dataclass(frozen=True)
class Layout:
    """How a scan is cut into batches, all of the same shape, and sums of several.

    Attributes
    ----------
    rows, columns : int
        Scan rows and columns of a batch: several whole rows, or a part of one. Columns are whole blocks of the windows;
        those beyond the scan count as missing.
    summed_rows : int
        Scan rows that are summed on the device.
    sums_shape : (int, int, int)
        Channels, image rows and image columns of the sums.
    """

    rows: int
    columns: int
    summed_rows: int
    sums_shape: tuple[int, int, int]

    @classmethod
    def of(
        cls, scan_shape: tuple[int, int], oversample: tuple[int, int], windows: PatchWindows, channels: int, batch: int
    ) -> Layout:
        """For batches of about `batch` patterns."""
        (scan_rows, scan_columns), (down, right) = scan_shape, oversample
        blocks = -(-scan_columns // windows.block)
        at_once = min(blocks, max(batch // windows.block, 1))
        columns = at_once * windows.block
        rows = min(max(batch // columns, 1), scan_rows) if at_once == blocks else 1
        width = (-(-scan_columns // columns) * columns + windows.block) * right
        image_rows = min(_SUM_BYTES / (4 * channels * width), _SUM_ROWS)
        batches = min(max(int(image_rows / down / rows), 1), -(-scan_rows // rows))
        height = (batches * rows - 1) * down + windows.size[0]
        return cls(rows, columns, batches * rows, (channels, height, width))


class Batch(NamedTuple):
    """Patterns of some neighbouring positions, in memory of the host's or of the device's.

    Attributes
    ----------
    row, first : int
        Scan row and column of the first one.
    patterns : ndarray or OrtValue, shape (rows * columns, pixels)
        Zeros where there are none.
    measured : ndarray of bool, shape (rows, columns)
    """

    row: int
    first: int
    patterns: Any
    measured: NDArray[np.bool_]


class Sums(NamedTuple):
    """What a batch gives.

    Attributes
    ----------
    electrons : ndarray of float32, shape (rows, columns)
        Of each pattern on the model's grid.
    row : int
        First scan row of the sums.
    features : ndarray of float32, shape (features + 2, image rows, image columns), or None
        For `FeatureStitcher.add_sums`, once all their scan rows are complete.
    """

    electrons: NDArray[np.float32]
    row: int
    features: NDArray[np.float32] | None


class DevicePath:
    """Resampling, encoder and stitching, one after the other, with arrays that stay on the model's device.

    Three graphs share the arrays: `export.device_graphs` describes the first and the last. Matrices are copied there
    once. The sums of a batch are added to those of the last one, in turns between two arrays.

    Parameters
    ----------
    model : Model
        Of the kind that stitches features.
    plan : Plan
    dtype : dtype
        Of the patterns.
    """

    def __init__(self, model: Model, plan: Plan, dtype: np.dtype) -> None:
        import onnxruntime

        self._plan, self._values, self._memory = plan, onnxruntime.OrtValue, model.memory
        self._windows = windows = plan.patch_windows
        contract = model.contract
        if plan.resamples_alike:
            factors, matrix, background = plan.resampling().sums_and_matrix()
            detector_shape = plan.data_shape[2:]
            self.dtype = np.dtype(dtype.name if dtype.name in _COUNTS else np.float32)
        else:  # the patterns come as the model sees them
            matrix = sparse.identity(contract.grid_pixels**2, np.float32, "csr")
            factors, detector_shape = (1, 1), (contract.grid_pixels,) * 2
            background, self.dtype = np.zeros(matrix.shape[0], np.float32), np.dtype(np.float32)
        places, weights = gathering(matrix)
        batch = min(_BATCH, max(int(_GATHERED_BYTES / weights.nbytes), 1))
        channels = contract.features + EXTRA_CHANNELS
        self.layout = layout = Layout.of(plan.scan_shape, plan.oversample, windows, channels, batch)
        squares = [length for m, f in zip(detector_shape, factors, strict=True) for length in (-(-m // f), f)]
        #: Of a pattern as it crosses the bus: whole squares of pixels that are summed.
        self._pattern_shape = squares[0] * squares[1], squares[2] * squares[3]
        n, side, patch = layout.rows * layout.columns, contract.grid_pixels, contract.object_pixels
        blocks = layout.columns // windows.block
        down, rows, height = plan.oversample[0], layout.rows, windows.size[0]

        resampled, electrons = self._empty(n, side, side), self._empty(n)
        patches = self._empty(n, contract.features, patch, patch)
        self._electrons = electrons
        # what a batch is added to where it's the first, and the sums before and after it
        zeros, *turns = (self._on_device(np.zeros(layout.sums_shape, np.float32)) for _ in range(3))
        self._sums = zeros, turns[0], turns[1]

        spans = 2 * windows.block * plan.oversample[1]
        row_matrix = np.zeros(((rows - 1) * down + height, rows, patch), np.float32)
        row_window = np.zeros(row_matrix.shape[:2], np.float32)
        for row in range(rows):
            row_matrix[row * down : row * down + height, row] = windows.rows
            row_window[row * down : row * down + height, row] = windows.row_window

        def wide(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
            return np.pad(matrix, [(0, 0), (0, spans - matrix.shape[1])])

        self._resampling = _Bound(
            model.session_beside((_GRAPHS / f"resampling_{self.dtype}.onnx").read_bytes()),
            {
                "places": self._on_device(places),
                "weights": self._on_device(weights),
                "background": self._on_device(background),
                "squares": self._on_host([n, *squares]),
                "shape": self._on_host([n, side, side]),
            },
            {"resampled": resampled, "electrons": electrons},
        )
        self._encoder = _Bound(
            model.session,
            {"patterns": resampled, "geometry": self._on_device(plan.geometry(n))},
            {"feature_patch": patches},
        )
        self._stitching = _Bound(
            model.session_beside((_GRAPHS / "stitching.onnx").read_bytes()),
            {
                "patches": patches,
                "electrons": electrons,
                "columns": self._on_device(wide(windows.columns)),
                "column_window": self._on_device(wide(windows.column_window)),
                "rows": self._on_device(row_matrix.reshape(-1, rows * patch)),
                "row_window": self._on_device(row_window),
                "blocks": self._on_host([rows, blocks, windows.block, contract.features, patch, patch]),
                "strip": self._on_host([contract.features, rows * patch, -1]),
                "block_weights": self._on_host([2, rows, blocks, windows.block]),
            },
            {},
        )

    def _on_device(self, array: NDArray[Any]) -> Any:
        return self._values.ortvalue_from_numpy(np.ascontiguousarray(array), *self._memory)

    def _on_host(self, lengths: list[int]) -> Any:
        return self._values.ortvalue_from_numpy(np.array(lengths, np.int64))

    def _empty(self, *shape: int) -> Any:
        return self._values.ortvalue_from_shape_and_type(shape, np.float32, *self._memory)

    def batches(self, parts: Iterable[Measured]) -> Iterator[Batch]:
        """Batches of all patterns, on the device; their order is that of the scan."""
        layout, scan_shape = self.layout, self._plan.scan_shape
        batch: Batch | None = None
        for row, first, patterns, measured in parts:
            done = 0
            while done < len(patterns):
                if batch is None:
                    left = first + done
                    empty = np.zeros((layout.rows, layout.columns, *self._pattern_shape), self.dtype)
                    batch = Batch(row, left, empty, np.zeros(empty.shape[:2], bool))
                column = first + done - batch.first
                count = min(len(patterns) - done, layout.columns - column)
                place, here = (row - batch.row, slice(column, column + count)), slice(done, done + count)
                batch.patterns[place][:, : patterns.shape[1], : patterns.shape[2]] = patterns[here]
                batch.measured[place] = measured[here]
                done += count
                end = min(batch.first + layout.columns, scan_shape[1])
                if first + done == end and row == min(batch.row + layout.rows, scan_shape[0]) - 1:
                    pixels = batch.patterns.reshape(layout.rows * layout.columns, -1)
                    yield batch._replace(patterns=self._on_device(pixels))
                    batch = None

    def __call__(self, batch: Batch) -> Sums:
        """Add a batch to the sums; they come in the order of the scan."""
        layout, (scan_rows, scan_columns) = self.layout, self._plan.scan_shape
        (down, right), size = self._plan.oversample, self._windows.size
        _, height, width = layout.sums_shape
        measured = self._on_device(batch.measured.reshape(-1))
        self._resampling.run({"patterns": batch.patterns, "measured": measured}, {})
        self._encoder.run({}, {})
        top = batch.row - batch.row % layout.summed_rows
        above, left = (batch.row - top) * down, batch.first * right
        below = height - above - (layout.rows - 1) * down - size[0]
        beside = width - left - (layout.columns + self._windows.block) * right
        zeros, before, after = self._sums
        started = above > 0 or left > 0
        self._stitching.run(
            {
                "measured": measured,
                "sums": before if started else zeros,
                "place": self._on_host([0, above, left, 0, below, beside]),
            },
            {"sums_after": after},
        )
        self._sums = zeros, after, before
        electrons = self._electrons.numpy().reshape(batch.measured.shape)
        end = min(batch.row + layout.rows, scan_rows)
        if batch.first + layout.columns < scan_columns or end not in (scan_rows, top + layout.summed_rows):
            return Sums(electrons, top, None)
        rows, columns = (end - top - 1) * down + size[0], (scan_columns - 1) * right + size[1]
        return Sums(electrons, top, after.numpy()[:, :rows, :columns])


class _Bound:
    """A session, and the arrays that are bound to its inputs and outputs for good."""

    def __init__(self, session: Any, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        self._session, self._binding = session, session.io_binding()
        self._bind(inputs, outputs)

    def _bind(self, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def run(self, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        """Run with these arrays beside the others."""
        self._bind(inputs, outputs)
        self._session.run_with_iobinding(self._binding)
