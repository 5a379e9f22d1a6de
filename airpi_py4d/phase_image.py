"""Feature image to phase image: the model's image network, over tiles that together give the whole image's result."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from airpi_py4d.feature_stitching import FeatureStitcher

#: From features (1, channels, rows, columns) to phase and its error (rows, columns) [rad].
Network = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]

#: The image network's poolings: its tiles begin and end at multiples of this many pixels.
ALIGNMENT = 4
#: Largest side of a tile without its halo [px].
LARGEST_TILE = 256
#: Of the features of a band that is computed at once, with its halo; and rows of the smallest band.
_BAND_BYTES = 100e6
_SMALLEST_BAND = 32


def halo(margin: int) -> int:
    """Pixels beyond a tile that the network sees for a receptive field of this half width."""
    return _aligned(margin)


def _aligned(pixels: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-pixels // ALIGNMENT) * ALIGNMENT


def _tiles(start: int, stop: int) -> Iterator[range]:
    """Aligned parts of about the same length, none longer than LARGEST_TILE."""
    count = -(-(stop - start) // LARGEST_TILE)
    length = _aligned(-(-(stop - start) // max(count, 1)))
    for first in range(start, stop, max(length, ALIGNMENT)):
        yield range(first, min(first + length, stop))


class PhaseImage:
    """Phase of the object and the image network's own estimate of its error, as far as they are computed.

    The network sees each tile with a halo that its receptive field ends in, so that the image is that of the whole
    feature image at once, padded with zeros below and on the right to whole multiples of 4 pixels.

    Parameters
    ----------
    shape : (int, int)
        Rows and columns [px].
    margin : int
        Half width of the network's receptive field [px].
    channels : int
        Of the feature image.

    Attributes
    ----------
    band : int
        Rows that are computed at once where they come in order.
    phase, error : ndarray of float32, shape (rows, columns)
        [rad]; where nothing was measured, the phase is 0 and the error infinite.
    """

    def __init__(self, shape: tuple[int, int], margin: int, channels: int) -> None:
        self.phase = np.zeros(shape, np.float32)
        self.error = np.full(shape, np.inf, np.float32)
        self._halo = halo(margin)
        rows = int(_BAND_BYTES / (4 * channels * shape[1])) - 2 * self._halo
        self.band = min(max(rows, _SMALLEST_BAND), LARGEST_TILE)
        self._done = 0

    @property
    def confidence(self) -> NDArray[np.float32]:
        """exp(-error^2 / 2), the expected |<exp(i error)>|; 0 where nothing was measured and nowhere else."""
        confidence = np.exp(-(self.error**2) / 2)
        smallest = np.finfo(np.float32).tiny
        return np.where(np.isfinite(self.error), np.maximum(confidence, smallest), 0).astype(np.float32)

    def advance(self, network: Network, stitcher: FeatureStitcher, complete: int) -> None:
        """Compute rows that come in order, and let the stitcher go of what isn't needed any more.

        Parameters
        ----------
        network : Network
        stitcher : FeatureStitcher
        complete : int
            Image rows, from the first one on, that nothing is added to any more.
        """
        rows = self.phase.shape[0]
        ready = rows if complete == rows else (complete - self._halo) // ALIGNMENT * ALIGNMENT
        if ready - self._done >= self.band or complete == rows:
            self._compute(network, stitcher, range(self._done, ready))
            self._done = ready
            stitcher.release(max(ready - self._halo, 0))

    def update(self, network: Network, stitcher: FeatureStitcher) -> None:
        """Compute again what has changed since the last call."""
        changed = stitcher.changes()
        if changed:
            start = max(changed.start - self._halo, 0) // ALIGNMENT * ALIGNMENT
            self._compute(network, stitcher, range(start, min(changed.stop + self._halo, self.phase.shape[0])))

    def _compute(self, network: Network, stitcher: FeatureStitcher, rows: range) -> None:
        """Rows of the image, the first of which is aligned."""
        height, width = self.phase.shape
        for band in _tiles(rows.start, rows.stop):
            above, below = max(band.start - self._halo, 0), min(_aligned(band.stop) + self._halo, height)
            for columns in _tiles(0, width):
                measured = stitcher.measured(band, columns)
                if not measured.any():
                    continue
                left, right = max(columns.start - self._halo, 0), min(_aligned(columns.stop) + self._halo, width)
                features = stitcher.feature_image(range(above, below), range(left, right))
                beyond = [(0, _aligned(n) - n) for n in features.shape[1:]]
                phase, error = network(np.pad(features, [(0, 0), *beyond])[None])
                here = slice(band.start, band.stop), slice(columns.start, columns.stop)
                place = (
                    slice(band.start - above, band.stop - above),
                    slice(columns.start - left, columns.stop - left),
                )
                self.phase[here] = np.where(measured, phase[place], 0)
                self.error[here] = np.where(measured, np.abs(error[place]), np.inf)
