"""Bad input: data that can't be reconstructed raise, single bad patterns are found, counted and left out."""

from __future__ import annotations

import math
import os
import sys
import warnings
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import sasum

from airpi_py4d.acquisition import Acquisition

_PACKAGE = str(Path(__file__).parent) + os.sep
_GOOD, _NOT_FINITE, _EMPTY, _CONSTANT, _NEGATIVE = range(5)
_KINDS = {
    _NOT_FINITE: "with NaN or infinity",
    _EMPTY: "empty",
    _CONSTANT: "the same in every pixel",
    _NEGATIVE: "more negative than positive",
}
#: The network takes float32.
_LARGEST = np.finfo(np.float32).max
#: Mean electrons a pattern of the row from which on an empty one can't be chance: exp(-20) is 2e-9.
_NEVER_EMPTY = 20.0
#: Of the positive counts: negative ones up to the first are noise around zero, beyond the second a wrong zero.
_NEGATIVE_NOISE, _NEGATIVE_LIMIT = 0.01, 0.5
#: Of the bright-field disk's pixels, and in number: so many at the largest value of the data are a plateau.
_PLATEAU_PART, _PLATEAU_PIXELS = 0.25, 4
#: 2^n - 1 is the largest value of an n-bit counter; from 6 bits on, noise doesn't put a plateau there.
_SMALLEST_FULL_SCALE = 63
#: Of the mean plateau: a noise-free simulation of an empty specimen has plateaus too, of equal size everywhere.
_PLATEAU_SPREAD = 0.05
_SHOWN = 5


def warn_user(message: str) -> None:
    """UserWarning that points at the line outside of this package that called into it."""
    frame, level, user = sys._getframe(), 1, 1
    while (outer := frame.f_back) is not None:
        level += 1
        if frame.f_code.co_filename.startswith(_PACKAGE):
            user = level
        frame = outer
    warnings.warn(message, UserWarning, stacklevel=user)


def check_data(data: Any) -> None:
    """Raise unless data are 4D, real numbers and at least 3x3 positions.

    Examples
    --------
    >>> check_data(np.ones((2, 5, 24, 20)))
    Traceback (most recent call last):
        ...
    ValueError: data has 2 x 5 scan positions; the 3x3 kernels need at least 3 x 3.
    """
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


def read(data: Any, rows: slice, columns: slice | None = None) -> NDArray[Any]:
    """Patterns of some scan rows, and of all their columns or some.

    Parameters
    ----------
    data : array_like, shape (scan rows, scan columns, detector rows, detector columns)
    rows, columns : slice
        With a start and a stop.

    Raises
    ------
    OSError
        If the source can't be read or gives fewer patterns than its shape promises; names the scan row.

    Examples
    --------
    >>> read(np.zeros((4, 5, 8, 8)), slice(1, 3)).shape
    (2, 5, 8, 8)
    """
    where = rows if columns is None else (rows, columns)
    try:
        patterns = np.asarray(data[where])
    except (OSError, EOFError, ValueError) as error:
        row = next((n for n in range(rows.start, rows.stop) if not _readable(data, n, columns)), rows.start)
        raise OSError(
            f"data can't be read at scan row {row} of {data.shape[0]}: {error}. {_what_comes_before(row)}"
        ) from error
    width = data.shape[1] if columns is None else columns.stop - columns.start
    expected = (rows.stop - rows.start, width, *data.shape[2:])
    if patterns.shape == expected:
        return patterns
    if patterns.shape[1:] == expected[1:] and len(patterns) < expected[0]:
        row = rows.start + len(patterns)
        raise OSError(
            f"data ends before scan row {row} of {data.shape[0]}: reading rows {rows.start} to {rows.stop - 1} gave "
            f"{len(patterns)}. {_what_comes_before(row)}"
        )
    raise OSError(
        f"data gave patterns of shape {patterns.shape} from scan row {rows.start} of {data.shape[0]} on, expected "
        f"{expected}. {_what_comes_before(rows.start)}"
    )


def _what_comes_before(row: int) -> str:
    hint = "The file may be cut off or still being written"
    return f"{hint}; reconstruct what comes before, data[:{row}]." if row >= 3 else f"{hint}."


def _readable(data: Any, row: int, columns: slice | None) -> bool:
    one = slice(row, row + 1)
    try:
        np.asarray(data[one if columns is None else (one, columns)])
    except (OSError, EOFError, ValueError):
        return False
    return True


class BadPositions:
    """Finds the patterns that can't be used, in one pass over the scan, and says so once at its end.

    A pattern is missing if it holds NaN or infinity, is empty, has the same value in every pixel, or more negative than
    positive counts. An empty pattern isn't missing where chance explains it: where the other patterns of its row have
    20 electrons or fewer. Pixels known as bad don't count.

    Parameters
    ----------
    scan_shape : (int, int)
    acquisition : Acquisition

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> data = rng.poisson(5.0, (4, 3, 16, 16))
    >>> data[2, 1] = 0
    >>> bad = BadPositions((4, 3), Acquisition(300e3, 20.0, 0.2, (0.25, 0.25)))
    >>> [bad.add(row, 0, patterns).tolist() for row, patterns in enumerate(data)][2]
    [False, True, False]
    """

    def __init__(self, scan_shape: tuple[int, int], acquisition: Acquisition) -> None:
        self._called = acquisition.argument_names
        self._gain = acquisition.gain
        self._background = acquisition.background
        self._mean_background = 0.0 if acquisition.background is None else float(np.mean(acquisition.background))
        self._bad: NDArray[np.int64] | None = None
        if acquisition.bad_pixels is not None and acquisition.bad_pixels.any():
            self._bad = np.flatnonzero(acquisition.bad_pixels)
            self._reference = int(np.flatnonzero(~acquisition.bad_pixels)[0])
        area = np.pi * acquisition.aperture_radius**2 / np.prod(acquisition.k_pixel)
        self._plateau_pixels: float = max(_PLATEAU_PIXELS, _PLATEAU_PART * float(area))
        self._full_scale: float = np.inf
        self._integers = False
        self._kind = np.zeros(scan_shape, np.uint8)  # _GOOD, in memory that isn't there before it is written to
        self._counts, self._plateau = _Counts(), _Plateau()

    def add(self, row: int, first: int, patterns: NDArray[Any]) -> NDArray[np.bool_]:
        """Which of some neighbouring patterns of a scan row are missing, shape (n,).

        Parameters
        ----------
        row, first : int
            Scan row, and scan column of the first pattern.
        patterns : ndarray, shape (n, detector rows, detector columns)
            As the detector reports them. They stay as they are.
        """
        flat = patterns.reshape(len(patterns), -1)
        if self._bad is not None:
            flat = flat.copy()
            flat[:, self._bad] = flat[:, self._reference, None]
        here = row, slice(first, first + len(flat))
        with np.errstate(invalid="ignore"):
            high = flat.max(axis=1)
            if flat.dtype.kind == "u":  # the lowest count matters where all may be the same
                low = flat[:, 0].copy()
                low[low == high] = flat[low == high].min(axis=1)
            else:
                low = flat.min(axis=1)
        kind = self._kind[here]
        kind[:] = _GOOD
        if flat.dtype.kind == "f":
            kind[~((high <= _LARGEST) & (low >= -_LARGEST))] = _NOT_FINITE
        constant = (high == low) & (kind == _GOOD)
        kind[constant] = _CONSTANT
        self._add_empty(kind, flat, constant & ((high == 0) | (high == self._mean_background)))
        if flat.dtype.kind in "if" or self._background is not None:
            self._add_negative(row, first, kind, flat, low)
        self._add_maximum(row, first, kind, flat, high)
        return kind != _GOOD

    def merge(self, part: BadPositions, row: int) -> None:
        """Take over what was found apart of other positions of some scan rows, the first of which is `row`."""
        here = slice(row, row + len(part._kind))
        self._kind[here] = np.maximum(self._kind[here], part._kind)
        self._counts.merge(part._counts, row)
        self._plateau.merge(part._plateau, row)
        self._full_scale, self._integers = part._full_scale, part._integers

    def _add_empty(self, kind: NDArray[np.uint8], flat: NDArray[Any], empty: NDArray[np.bool_]) -> None:
        if not empty.any():
            return
        kind[empty] = _EMPTY
        others = flat[kind == _GOOD]
        if len(others):
            counts = others.sum(axis=1, dtype=np.float64).mean() - self._mean_background * flat.shape[1]
            if counts <= _NEVER_EMPTY * self._gain:
                kind[empty] = _GOOD

    def _add_negative(
        self, row: int, first: int, kind: NDArray[np.uint8], flat: NDArray[Any], low: NDArray[Any]
    ) -> None:
        self._integers = flat.dtype.kind in "iu"
        background = None if self._background is None else np.ravel(np.asarray(self._background, np.float32))
        found = _Counts()
        for n in np.flatnonzero((kind == _GOOD) & ((low < 0) | (background is not None))).tolist():
            counts = flat[n].astype(np.float32, copy=False) if background is None else flat[n] - background
            if self._bad is not None:
                counts = np.delete(counts, self._bad)
            total, magnitude = float(counts.sum()), float(sasum(counts))
            positive, negative = (magnitude + total) / 2, (magnitude - total) / 2
            if negative > positive:
                kind[n] = _NEGATIVE
            elif positive > 0:
                found.add((row, first + n), positive, negative)
        self._counts.merge(found, 0)

    def _add_maximum(
        self, row: int, first: int, kind: NDArray[np.uint8], flat: NDArray[Any], high: NDArray[Any]
    ) -> None:
        if flat.dtype.kind in "iu":
            self._full_scale = float(np.iinfo(flat.dtype).max)
        good = kind == _GOOD
        if not good.any():
            return
        largest = float(high[good].max())
        if largest < self._plateau.value:
            return
        chosen = np.flatnonzero(good & (high == largest))
        pixels = np.count_nonzero(flat[chosen] == high[chosen, None], axis=1)
        many = first + chosen[pixels >= self._plateau_pixels]
        places = _Places(len(many), [(row, column) for column in many[:_SHOWN].tolist()])
        self._plateau.merge(_Plateau(largest, int(pixels.sum()), int((pixels**2).sum()), places), 0)

    @property
    def missing(self) -> NDArray[np.bool_]:
        """Positions known to be missing, shape (scan rows, scan columns)."""
        return self._kind != _GOOD

    def missing_of(self, row: int) -> NDArray[np.bool_]:
        """Those of a scan row, shape (scan columns,)."""
        return self._kind[row] != _GOOD

    def finish(self) -> list[str]:
        """Warn of what was found, a warning for the whole scan each; returns the messages.

        Raises
        ------
        ValueError
            If no pattern can be used, or the negative counts are more than half of the positive ones.
        """
        messages = [
            text for text in (self._missing_message(), self._negative_message(), self._saturated_message()) if text
        ]
        for message in messages:
            warn_user(message)
        return messages

    def _missing_message(self) -> str:
        missing = self.missing
        number = int(missing.sum())
        if number == 0:
            return ""
        counts = {name: int((self._kind == kind).sum()) for kind, name in _KINDS.items()}
        kinds = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        if number == missing.size and not counts[_KINDS[_NEGATIVE]]:
            raise ValueError(
                f"data has no pattern that can be used ({kinds}): check the file, and the order of its dimensions."
            )
        if number == missing.size:
            raise ValueError(f"data has no pattern that can be used ({kinds}). {self._negative_hint()}")
        message = (
            f"{number} of {missing.size} patterns are missing ({kinds}), {_Places.of(missing)}. Their neighbours stand "
            "in for them; the confidence map is 0 where nothing else was measured."
        )
        used_rows = np.flatnonzero(~missing.all(axis=1))
        if used_rows[-1] < len(missing) - 1:
            message += (
                f" Nothing comes after scan row {used_rows[-1]}: the scan may have been stopped or the file cut off."
            )
        return message

    def _negative_hint(self) -> str:
        background = self._called.get("background", "background")
        hint = f"Give {background}= what the detector reports without electrons."
        if self._background is not None:
            hint = f"{background} may be too large."
        elif self._integers:
            hint += " Where large unsigned counts were stored as signed integers, view them as unsigned."
        return f"{hint} Or set what is below the detector's noise to 0."

    def _negative_message(self) -> str:
        counts, good = self._counts, int((self._kind == _GOOD).sum())
        if not counts.number:
            return ""
        share = counts.negative / counts.positive
        # patterns without negative counts weren't summed, and have about as many electrons as the others
        of_all = share * counts.number / good
        if of_all <= _NEGATIVE_NOISE:
            return ""
        message = (
            f"{counts.affected.number} of {self._kind.size} patterns have negative counts of {share:.0%} of the "
            f"positive ones, {counts.affected}"
        )
        if of_all > _NEGATIVE_LIMIT:
            raise ValueError(f"{message}: their zero is wrong. {self._negative_hint()}")
        return f"{message}: expect noise and a wrong phase scale. {self._negative_hint()}"

    def _saturated_message(self) -> str:
        plateau, largest = self._plateau, self._plateau.value
        if not plateau.places.number:
            return ""
        good = int((self._kind == _GOOD).sum())
        full = largest == self._full_scale or (largest >= _SMALLEST_FULL_SCALE and np.log2(largest + 1).is_integer())
        if not full and plateau.spread(good) <= _PLATEAU_SPREAD:
            return ""
        return (
            f"{plateau.places.number} of {self._kind.size} patterns are saturated, {plateau.places}: they reach "
            f"{largest:.5g}, the largest value in the data, in at least a quarter as many pixels as the "
            "bright-field disk has. Contrast is lost there: expect a wrong phase. Record with less current or "
            "exposure."
        )


@dataclass
class _Places:
    """Scan positions, of which the number and the first few are kept."""

    number: int = 0
    first: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, chosen: NDArray[np.bool_]) -> _Places:
        """Those that are True, shape (scan rows, scan columns)."""
        places = (
            (int(row), int(column)) for row in np.flatnonzero(chosen.any(1)) for column in np.flatnonzero(chosen[row])
        )
        return cls(int(chosen.sum()), list(islice(places, _SHOWN)))

    def merge(self, others: _Places, row: int) -> None:
        """Add others, that were counted from a scan row on."""
        self.number += others.number
        moved = ((r + row, column) for r, column in others.first)
        self.first = sorted([*self.first, *moved])[:_SHOWN]

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.first))
        if self.number == 1:
            return f"at scan position {shown}"
        return f"{'the first ' if self.number > _SHOWN else ''}at scan positions {shown}"


@dataclass
class _Counts:
    """Sums over the positions that were looked at for negative counts.

    Attributes
    ----------
    number : int
    positive, negative : float
        Sums of the counts on either side of 0, as positive numbers.
    affected : _Places
        Whose negative counts are more than noise.
    """

    number: int = 0
    positive: float = 0.0
    negative: float = 0.0
    affected: _Places = field(default_factory=_Places)

    def add(self, place: tuple[int, int], positive: float, negative: float) -> None:
        places = _Places(1, [place]) if negative > _NEGATIVE_NOISE * positive else _Places()
        self.merge(_Counts(1, positive, negative, places), 0)

    def merge(self, others: _Counts, row: int) -> None:
        self.number += others.number
        self.positive += others.positive
        self.negative += others.negative
        self.affected.merge(others.affected, row)


@dataclass
class _Plateau:
    """The positions whose largest value is the largest of all.

    Attributes
    ----------
    value : float
    pixels, squares : int
        Sums of the number of pixels that have the value, and of its square, over the positions where it was the largest
        so far.
    places : _Places
        Where it's many pixels.
    """

    value: float = -np.inf
    pixels: int = 0
    squares: int = 0
    places: _Places = field(default_factory=_Places)

    def merge(self, others: _Plateau, row: int) -> None:
        self.pixels += others.pixels
        self.squares += others.squares
        if others.value > self.value:
            self.value, self.places = others.value, _Places()
        if others.value == self.value:
            self.places.merge(others.places, row)

    def spread(self, positions: int) -> float:
        """Standard deviation of the number of pixels over its mean, of all positions: so many; others have none."""
        mean = self.pixels / positions
        return math.sqrt(max(self.squares / positions - mean**2, 0.0)) / mean
