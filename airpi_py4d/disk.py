"""The bright-field disk of a pattern, and how it moves during a scan."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, optimize, special

from airpi_py4d.patterns import repair_matrix

_COARSE_RADIUS = 60  # [px], larger disks are binned
#: Part of the disk's brightness down to which dark pixels are trusted the more.
_FAINTEST = 0.02
_FEWEST_TILES = 6
_SMALLEST_DESCAN = 0.25  # [px] corner to corner


@dataclass(frozen=True)
class Disk:
    """The bright-field disk of a pattern.

    Attributes
    ----------
    center : (float, float)
        Row and column [px].
    radius : float
        [px]
    center_error, radius_error : float
        Standard deviations [px].
    blur : float
        Standard deviation of the edge's width [px].
    """

    center: tuple[float, float]
    radius: float
    center_error: float
    radius_error: float
    blur: float


def _binned(image: NDArray[np.float64], factor: int) -> NDArray[np.float64]:
    """Mean of factor x factor pixels, not counting NaN; a rest at the far edges is left out."""
    rows, columns = (n // factor for n in image.shape)
    blocks = image[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor)
    good = np.isfinite(blocks)
    count = good.sum(axis=(1, 3))
    total = np.where(good, blocks, 0).sum(axis=(1, 3))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _rough_disks(
    image: NDArray[np.float64], metric: NDArray[np.float64]
) -> Iterator[tuple[NDArray[np.float64], float]]:
    """Centres and radii to start from: the bright area above several levels, the steepest fall around its centre."""
    bad = ~np.isfinite(image)
    filled = np.where(bad, 0, image)
    if bad.any():
        filled = (repair_matrix(bad) @ filled.ravel()).reshape(image.shape)
    smooth = ndimage.gaussian_filter(filled, 0.7).clip(0)
    values = np.sort(smooth, axis=None)[::-1]
    total = values.sum()
    if not total > 0:
        return
    level = values[np.searchsorted(np.cumsum(values), total / 4)]
    for part in (0.7, 0.5, 0.3, 0.15):
        labels, count = ndimage.label(smooth > part * level)
        if count == 0:
            continue
        sums = ndimage.sum_labels(smooth, labels, np.arange(1, count + 1))
        area = ndimage.binary_fill_holes(labels == 1 + np.argmax(sums))
        center = np.argwhere(area).mean(axis=0)
        yield center, math.sqrt(np.linalg.det(metric) * area.sum() / math.pi)
        yield center, _steepest(image, metric, center)


def _steepest(image: NDArray[np.float64], metric: NDArray[np.float64], center: NDArray[np.float64]) -> float:
    """Radius [px] where the median over the angle falls most within two pixels."""
    places = np.argwhere(np.isfinite(image))
    ring = np.rint(np.hypot(*(metric @ (places - center).T))).astype(int)
    rings = np.arange(1, ring.max())
    profile = np.append(0.0, ndimage.median(image[np.isfinite(image)], ring, rings))
    profile[0] = profile[1:2].sum()
    fall = np.nan_to_num(profile[:-2] - profile[2:])
    return float(np.argmax(fall) + 1) if len(fall) else 1.0


class _EdgeFit:
    """Fit of a disk's edge: smooth inside, smooth outside, and a step of some width between them."""

    def __init__(self, image: NDArray[np.float64], metric: NDArray[np.float64]) -> None:
        self._image, self._metric = image, metric
        self._places = np.argwhere(np.isfinite(image))
        self._values = image[np.isfinite(image)]

    def _parts(self, parameters: NDArray[np.float64], places: NDArray[Any]) -> NDArray[np.float64]:
        """Functions of place that the pattern is a sum of, shape (pixels, terms)."""
        row, column, radius, blur = parameters
        x, y = self._metric @ (places - (row, column)).T / radius
        r = np.hypot(x, y) + 1e-9
        inside = special.ndtr((1 - r) * radius / blur)
        one = np.ones_like(r)
        outer = np.minimum(1 / r, 1.5)
        within = np.stack([one, x, y, x * x, x * y, y * y])
        beyond = np.stack([one, outer**2, outer**4, x * outer**2, y * outer**2])
        return np.concatenate([within * inside, beyond * (1 - inside)]).T

    def _residuals(
        self,
        moving: NDArray[np.float64],
        fixed: NDArray[np.float64],
        places: NDArray[Any],
        values: NDArray[np.float64],
        weight: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        parts = self._parts(np.concatenate([moving, fixed[len(moving) :]]), places)
        return weight * (values - parts @ self._amplitudes(parts, values, weight))

    @staticmethod
    def _amplitudes(
        parts: NDArray[np.float64], values: NDArray[np.float64], weight: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        weighted = parts * weight[:, None]
        normal = weighted.T @ weighted
        normal[np.diag_indices(len(normal))] += 1e-9 * np.trace(normal)
        return np.linalg.solve(normal, weighted.T @ (values * weight))

    def fit(
        self, center: ArrayLike, radius: float, blur: float = 0.5, only_center: bool = False
    ) -> tuple[Disk, float] | None:
        """Disk, and how steep and long its edge is; None where there is none."""
        parameters = np.array([*np.asarray(center, float), radius, blur])
        free = slice(0, 2) if only_center else slice(0, 4)
        extent = math.hypot(*self._image.shape)
        for _ in range(4):
            radius, blur = parameters[2:]
            d = np.hypot(*(self._metric @ (self._places - parameters[:2]).T))
            reach = max(0.45 * radius, 2.5 + blur)
            near = (d > radius - 1.4 * reach) & (d < radius + reach + 1)
            places, values = self._places[near], self._values[near]
            if len(values) < 24:
                return None
            level = max(np.quantile(values, 0.9), 1e-30)
            expected = level * np.clip(special.ndtr((radius - d[near]) / blur), _FAINTEST, 1)
            parts = self._parts(parameters, places)
            for _ in range(2):  # counts have a variance like their mean
                weight = np.sqrt(level / expected)
                fitted = parts @ self._amplitudes(parts, values, weight)
                expected = np.clip(fitted, _FAINTEST * level, None)
            rest = weight * (values - fitted)
            inside = d[near] < radius
            spread = max(1.4826 * np.median(np.abs(part)) for part in (rest[inside], rest[~inside]) if part.size)
            spread += 1e-12 * level
            weight = weight * np.sqrt(1 / (1 + (rest / (3 * spread)) ** 2))

            residuals = functools.partial(
                self._residuals, fixed=parameters.copy(), places=places, values=values, weight=weight / level
            )
            low = np.array([-np.inf, -np.inf, 1.0, 0.2])[free]
            high = np.array([np.inf, np.inf, extent, max(1.5, 0.2 * radius)])[free]
            start = np.clip(parameters[free], low + 1e-6, high - 1e-6)
            found = optimize.least_squares(residuals, start, bounds=(low, high), x_scale=1.0, xtol=1e-4, ftol=1e-6)
            moved = np.abs(found.x - parameters[free])[:3].max()
            parameters[free] = found.x
            if moved < 0.02:
                break
        return self._judged(parameters, found, places, values, weight)

    def _judged(
        self,
        parameters: NDArray[np.float64],
        found: Any,
        places: NDArray[Any],
        values: NDArray[np.float64],
        weight: NDArray[np.float64],
    ) -> tuple[Disk, float] | None:
        row, column, radius, blur = parameters
        d = np.hypot(*(self._metric @ (places - parameters[:2]).T)) - radius
        inside, outside = np.abs(d + 1.2) <= 0.7, np.abs(d - 1.2) <= 0.7
        if not (inside.any() and outside.any()):
            return None
        step = float(np.median(values[inside]) - np.median(values[outside]))
        # the noise differs from pixel to pixel, so the residuals themselves say how large it is
        inverse = np.linalg.pinv(found.jac.T @ found.jac)
        scores = found.jac * found.fun[:, None]
        covariance = inverse @ (scores.T @ scores) @ inverse
        errors = np.sqrt(np.diag(covariance))
        if not (step > 0 and np.isfinite(errors).all()):
            return None
        disk = Disk(
            (float(row), float(column)),
            float(radius),
            float(np.hypot(*errors[:2]) / math.sqrt(2)),
            float(errors[2]) if len(errors) > 2 else math.nan,
            float(blur),
        )
        return disk, step * math.sqrt(radius)


def measure_disk(
    mean: NDArray[Any],
    bad_pixels: NDArray[np.bool_] | None = None,
    *,
    to_circle: NDArray[np.float64] | None = None,
    radius: float | None = None,
    center: tuple[float, float] | None = None,
) -> Disk:
    """Centre and radius of the bright-field disk from the place of its edge.

    Around the edge the pattern is fitted by a second-order polynomial inside, a decay outside and a step of free width
    between them, robustly, so that neither a disk that isn't flat nor hot pixels or diffracted disks move the centre.

    Parameters
    ----------
    mean : ndarray, shape (detector rows, detector columns)
        Mean pattern, background subtracted.
    bad_pixels : ndarray of bool, optional, shape (detector rows, detector columns)
        Pixels to leave out.
    to_circle : ndarray, optional, shape (2, 2)
        Linear map that makes a circle of an elliptical disk. The radius is that of the circle.
    radius, center : optional
        Where to look for the edge, besides where the pattern suggests it [px].

    Raises
    ------
    ValueError
        If the pattern is empty or has no disk with an edge.

    Examples
    --------
    >>> k = np.hypot(*np.ogrid[-30:34, -33:31])
    >>> disk = measure_disk(100 * np.clip(12.5 - k, 0, 1))
    >>> [round(float(value), 1) for value in (*disk.center, disk.radius)]
    [30.0, 33.0, 12.0]
    """
    image = np.array(mean, np.float64)
    if bad_pixels is not None:
        image[bad_pixels] = np.nan
    metric = np.eye(2) if to_circle is None else to_circle
    starts = list(_rough_disks(image, metric))
    if not starts:
        raise ValueError("the mean pattern is empty.")
    if radius is not None:
        starts += [(place, radius) for place, _ in starts[::2]]
        if center is not None:
            starts.append((np.array(center), radius))
    best: tuple[Disk, float] | None = None
    tried: list[float] = []
    for place, start in starts:
        if any(abs(start - other) < 0.03 * other for other in tried) and radius != start:
            continue
        tried.append(start)
        factor = max(1, int(start // (_COARSE_RADIUS / 2)))
        if start <= _COARSE_RADIUS:
            factor = 1
        fit = _EdgeFit(_binned(image, factor) if factor > 1 else image, metric)
        found = fit.fit((place - (factor - 1) / 2) / factor, max(start / factor, 1.5))
        if found is not None:
            disk, strength = _scaled(found[0], factor), found[1] * math.sqrt(factor)
            if _plausible(disk, image.shape) and (best is None or strength > best[1]):
                best = disk, strength
    if best is None:
        raise ValueError("the mean pattern shows no bright-field disk with an edge on the detector.")
    return best[0]


def _scaled(disk: Disk, factor: int) -> Disk:
    row, column = (factor * c + (factor - 1) / 2 for c in disk.center)
    sizes = (factor * size for size in (disk.radius, disk.center_error, disk.radius_error, disk.blur))
    return Disk((row, column), *sizes)


def _plausible(disk: Disk, shape: tuple[int, ...]) -> bool:
    inside = all(-0.5 <= c <= n - 0.5 for c, n in zip(disk.center, shape, strict=True))
    return inside and disk.radius_error < 0.25 * disk.radius and disk.radius < 0.75 * max(shape)


def measure_descan(
    tiles: NDArray[Any],
    places: NDArray[np.float64],
    disk: Disk,
    scan_shape: tuple[int, int],
    bad_pixels: NDArray[np.bool_] | None = None,
    *,
    to_circle: NDArray[np.float64] | None = None,
) -> NDArray[np.float64] | None:
    """How the bright-field disk moves over the detector during the scan: a plane.

    The edge of the disk is fitted to the mean pattern of every tile of the scan, as `measure_disk` does, which the
    specimen shifts far less than the centre of mass; a plane is fitted robustly to the centres.

    Parameters
    ----------
    tiles : ndarray, shape (tiles, detector rows, detector columns)
        Mean patterns of parts of the scan.
    places : ndarray, shape (tiles, 2)
        Mean scan row and column of each.
    disk : Disk
        That of the mean over the scan.
    scan_shape : (int, int)
    bad_pixels, to_circle : optional
        See `measure_disk`.

    Returns
    -------
    ndarray, shape (scan rows, scan columns, 2), or None
        Row and column of the disk's centre minus their mean over the scan [px]. None where the disk moves by less than
        0.25 px from corner to corner, or by less than 4 standard deviations.

    Examples
    --------
    >>> places = np.argwhere(np.ones((4, 4))) * 10.0 + 5
    >>> k = np.arange(32.0) - 16
    >>> tiles = [np.clip(9.5 - np.hypot(k[:, None] - row / 20, k), 0, 1) for row, _ in places]
    >>> plane = measure_descan(np.array(tiles), places, measure_disk(tiles[0]), (41, 41))
    >>> np.ptp(plane, axis=(0, 1)).round(1).tolist()
    [2.0, 0.0]
    """
    factor = max(1, int(disk.radius // (_COARSE_RADIUS / 2))) if disk.radius > _COARSE_RADIUS else 1
    metric = np.eye(2) if to_circle is None else to_circle
    centers, where, errors = [], [], []
    start = (np.array(disk.center) - (factor - 1) / 2) / factor
    for tile, place in zip(tiles, places, strict=True):
        image = np.array(tile, np.float64)
        if bad_pixels is not None:
            image[bad_pixels] = np.nan
        edge = _EdgeFit(_binned(image, factor) if factor > 1 else image, metric)
        found = edge.fit(start, disk.radius / factor, disk.blur / factor, only_center=True)
        if found is not None and found[0].center_error * factor < 0.5 * disk.radius:
            centers.append(_scaled(found[0], factor).center)
            where.append(place)
            errors.append(max(found[0].center_error * factor, 0.02))
    if len(centers) < _FEWEST_TILES or np.linalg.matrix_rank(np.array(where) - where[0]) < 2:
        return None
    middle = (np.array(scan_shape) - 1) / 2
    extent = np.maximum(scan_shape, 2) - 1.0
    design = np.column_stack([np.ones(len(where)), (np.array(where) - middle) / extent])
    slopes = np.zeros((2, 2))  # detector axis, scan axis: [px] over the whole scan
    variances = np.zeros((2, 2))
    for axis, values in enumerate(np.array(centers).T):
        weight = 1 / np.array(errors)
        for _ in range(10):
            weighted = design * weight[:, None]
            plane = np.linalg.lstsq(weighted, values * weight, rcond=None)[0]
            rest = np.abs(values - design @ plane)
            spread = 1.4826 * np.median(rest) + 1e-3
            weight = 1 / np.array(errors) / np.sqrt(1 + (rest / (2 * spread)) ** 2)
        weighted = design * weight[:, None]
        scatter = (((values - design @ plane) * weight) ** 2).sum() / (len(values) - 3)
        covariance = np.linalg.inv(weighted.T @ weighted) * max(scatter, 1)
        slopes[axis], variances[axis] = plane[1:], np.diag(covariance)[1:]
    # between opposite corners, whichever are farther apart
    moved = max(np.hypot(*(slopes @ (1, sign))) for sign in (1, -1))
    if moved <= max(_SMALLEST_DESCAN, 4 * math.sqrt(variances.sum())):
        return None
    rows, columns = np.indices(scan_shape)
    position = np.stack([(rows - middle[0]) / extent[0], (columns - middle[1]) / extent[1]], axis=-1)
    return position @ slopes.T
