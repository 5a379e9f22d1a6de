"""A microscope's detector in front of a simulated scan: pixels, centre, rotation, distortion, defects, counting.

The inverse of what the package corrects, written directly: every detector pixel is looked up in the simulated
patterns, nothing of `airpi_py4d.patterns` is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from training.reference import ReferenceScan


@dataclass(frozen=True)
class Detector:
    """One detector and how it is mounted.

    Attributes
    ----------
    shape : (int, int)
        Rows and columns [px].
    radius : float
        Of the bright-field disk [px].
    offset : (float, float)
        From the detector's middle, pixel n // 2, to the optical axis [px].
    rotation : float
        From the detector to the scan [degrees], as in py4DSTEM (`airpi_py4d.Acquisition`).
    transpose : bool
        Rows and columns are swapped before the rotation.
    ellipse : (float, float, float) or None
        Semi-axes and angle [degrees] of what a circle looks like; the first semi-axis keeps its size.
    descan : (float, float, float, float)
        What the optical axis moves by from the scan's first to its last row (rows, columns), and from its first to
        its last column (rows, columns) [px].
    hot, dead : float
        Share of the pixels that report 50 times the brightest pixel's expected counts, or nothing.
    gap : int
        Width of a cross of missing pixels between four modules [px].
    stop : int
        Width of a beam stop that reaches from the detector's edge just into the bright-field disk [px].
    column_step : int
        Only every so many scan columns are recorded.
    dead_positions : float
        Share of the scan positions whose pattern is lost: zeros.
    gain : float
        What the detector reports for one electron.
    background : float
        What it reports without electrons, on average; it differs from pixel to pixel.
    """

    shape: tuple[int, int] = (96, 96)
    radius: float = 18.0
    offset: tuple[float, float] = (0.0, 0.0)
    rotation: float = 0.0
    transpose: bool = False
    ellipse: tuple[float, float, float] | None = None
    descan: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    hot: float = 0.0
    dead: float = 0.0
    gap: int = 0
    stop: int = 0
    column_step: int = 1
    dead_positions: float = 0.0
    gain: float = 1.0
    background: float = 0.0

    @property
    def center(self) -> tuple[float, float]:
        """Row and column of the optical axis at the scan's middle [px]."""
        return self.shape[0] // 2 + self.offset[0], self.shape[1] // 2 + self.offset[1]

    def places(self) -> NDArray[np.float64]:
        """Where each pixel lies, (2, rows, columns), along scan rows and columns in units of k0.

        What `airpi_py4d.Acquisition` documents: off the centre, the ellipse made a circle, transposed, rotated.
        """
        pixels = np.indices(self.shape).astype(float)
        vector = pixels - np.array(self.center)[:, None, None]
        if self.ellipse is not None:
            first, second, angle = self.ellipse
            along = np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))])[:, None, None]
            parallel = (vector * along).sum(0) * along
            vector = parallel + first / second * (vector - parallel)
        if self.transpose:
            vector = vector[::-1]
        c, s = np.cos(np.deg2rad(self.rotation)), np.sin(np.deg2rad(self.rotation))
        return np.stack([c * vector[0] - s * vector[1], s * vector[0] + c * vector[1]]) / self.radius

    def stopped(self) -> NDArray[np.bool_]:
        """Pixels behind the beam stop and in the gaps, shape of the detector."""
        hidden = np.zeros(self.shape, bool)
        if self.gap:
            rows, columns = (slice(n // 2 - self.gap // 2, n // 2 - self.gap // 2 + self.gap) for n in self.shape)
            hidden[rows] = True
            hidden[:, columns] = True
        if self.stop:
            row, column = (round(c) for c in self.center)
            half = self.stop // 2
            hidden[row - half : row - half + self.stop, column + round(0.8 * self.radius) :] = True
        return hidden

    def dark_image(self, seed: int) -> NDArray[np.float64]:
        """What each pixel reports without electrons, shape of the detector; `seed` as for `record`."""
        return self.background * np.random.default_rng([seed, 1]).uniform(0.5, 1.5, self.shape)

    def record(self, scan: ReferenceScan, dose: float, seed: int) -> NDArray[np.float32]:
        """What the detector reports of the scan, shape (scan rows, scan columns, detector rows, detector columns).

        Parameters
        ----------
        scan : ReferenceScan
        dose : float
            [electrons / A^2]
        seed : int
            Of the counts and the defects.
        """
        rng = np.random.default_rng(seed)
        calibration = scan.acquisition
        assert calibration.center is not None
        patterns = scan.patterns[:, :: self.column_step]
        rows, columns = patterns.shape[:2]
        density = calibration.k_pixel[0] * calibration.k_pixel[1]
        pixel_area = (calibration.aperture_radius / self.radius) ** 2
        if self.ellipse is not None:
            pixel_area *= self.ellipse[0] / self.ellipse[1]
        electrons = dose * float(np.prod(calibration.scan_step)) * pixel_area / density
        places = self.places() * calibration.aperture_radius
        sampled = [
            places[axis] / calibration.k_pixel[axis] + calibration.center[axis] for axis in (0, 1)
        ]  # pixels of the simulated patterns
        out = np.empty((rows, columns, *self.shape), np.float32)
        hidden = self.stopped() | (rng.uniform(size=self.shape) < self.dead)
        hot = rng.uniform(size=self.shape) < self.hot
        brightest = 50 * electrons * float(scan.patterns.max())
        dark = self.dark_image(seed)
        per_pixel = np.stack([np.gradient(sampled[axis], axis=(0, 1)) for axis in (0, 1)])
        for place in np.ndindex(rows, columns):
            down, right = place[0] / max(rows - 1, 1) - 0.5, place[1] / max(columns - 1, 1) - 0.5
            shift = np.array(self.descan[:2]) * down + np.array(self.descan[2:]) * right
            moved = [s - (per_pixel[axis] * shift[:, None, None]).sum(0) for axis, s in enumerate(sampled)]
            mean = map_coordinates(patterns[place], moved, order=1, mode="constant") * electrons
            mean[hot], mean[hidden] = brightest, 0
            out[place] = rng.poisson(mean) * self.gain + dark
        out[np.random.default_rng([seed, 2]).uniform(size=(rows, columns)) < self.dead_positions] = 0
        return out
