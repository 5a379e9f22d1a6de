"""What the benchmark measures of an image; every function takes arrays, none knows a method."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d, map_coordinates, maximum_filter
from scipy.spatial import cKDTree
from scipy.stats import spearmanr

from training.reference import cross_correlation

#: From an atom's column [A]: a peak within is that column's.
REACH = 0.7
#: A dip between two atoms that counts, as a part of the lower one's height.
DIP = 0.1


def scores(image: NDArray, truth: NDArray) -> dict[str, float]:
    """xc (eq. 14), slope of the image against the truth, and its mean [rad]; the first two are NaN without a truth."""
    image, truth = np.ravel(image), np.ravel(truth)
    mean = float(image.mean())
    if not np.ptp(truth):
        return {"xc": np.nan, "slope": np.nan, "mean": mean}
    slope = float(np.polyfit(truth, image, 1)[0])
    xc = cross_correlation(image, truth) if np.ptp(image) else 0.0
    return {"xc": xc, "slope": slope, "mean": mean}


def spectrum(image: NDArray) -> NDArray[np.complex128]:
    """Fourier transform of an image without its mean, under a Hann window, so that its edges don't count."""
    window = np.outer(*(np.hanning(n + 2)[1:-1] for n in image.shape))
    return np.fft.fft2(window * (image - np.average(image, weights=window)))


def _frequency(shape: tuple[int, ...], pixel_size: float) -> NDArray[np.float64]:
    """Spatial frequency [1/A] of the pixels of a spectrum."""
    rows, columns = (np.fft.fftfreq(n, pixel_size) for n in shape)
    return np.hypot(rows[:, None], columns[None])


def fourier_ring_correlation(
    image: NDArray, truth: NDArray, pixel_size: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Correlation of the Fourier coefficients of two images, ring by ring.

    .. math:: FRC(k) = \frac{\mathrm{Re} \sum F_1 F_2^*}{\sqrt{\sum |F_1|^2 \sum |F_2|^2}}

    The rings are as wide as the inverse of the shorter side, from half of that on, up to the Nyquist frequency.

    Parameters
    ----------
    image, truth : ndarray, shape (rows, columns)
    pixel_size : float
        [A]

    Returns
    -------
    frequencies, correlations : ndarray, shape (rings,)
        [1/A], the middle of each ring; 0 where one of the images has nothing.
    """
    first, second = spectrum(image), spectrum(truth)
    width = 1 / (min(image.shape) * pixel_size)
    ring = np.floor(_frequency(image.shape, pixel_size) / width + 0.5).astype(int).ravel()
    count = int(0.5 / pixel_size / width)

    def rings(values: NDArray) -> NDArray:
        return np.bincount(ring, values.real.ravel(), ring.max() + 1)[1 : count + 1]

    power = np.sqrt(rings(np.abs(first) ** 2) * rings(np.abs(second) ** 2))
    common = rings(first * second.conj())
    return width * np.arange(1, count + 1), np.divide(common, power, out=np.zeros(count), where=power > 0)


def resolved_frequency(frequencies: NDArray, correlations: NDArray, threshold: float = 0.5) -> float:
    """Frequency up to which the ring correlation stays above the threshold, linear between rings; 0 if it never is."""
    below = np.flatnonzero(correlations < threshold)
    if not len(below):
        return float(frequencies[-1])
    first = below[0]
    if first == 0:
        return 0.0
    high, low = correlations[first - 1], correlations[first]
    part = (high - threshold) / (high - low)
    return float(frequencies[first - 1] + part * (frequencies[first] - frequencies[first - 1]))


def power_beyond(image: NDArray, truth: NDArray, pixel_size: float, low: float, high: float) -> dict[str, float]:
    r"""What of an image between two frequencies [1/A] agrees with the truth.

    Returns
    -------
    dict
        `correlation` of the Fourier coefficients in the annulus, and `power`: that of the image's part along the truth
        over the truth's, (Re sum F_1 F_2^* / sum |F_2|^2)^2, 0 where the correlation is negative.
    """
    first, second = spectrum(image), spectrum(truth)
    frequency = _frequency(image.shape, pixel_size)
    there = (frequency > low) & (frequency <= high)
    common = float((first * second.conj()).real[there].sum())
    powers = [float((np.abs(one[there]) ** 2).sum()) for one in (first, second)]
    if not all(powers):
        return {"correlation": 0.0, "power": 0.0}
    return {"correlation": common / np.sqrt(powers[0] * powers[1]), "power": (max(0.0, common) / powers[1]) ** 2}


def columns_of(places: NDArray, closest: float = 0.3) -> list[NDArray[np.intp]]:
    """Which atoms form a column: rows and columns [A] within `closest` of each other, straight or by further atoms."""
    found = cKDTree(places[:, :2]).query_pairs(closest)
    group = np.arange(len(places))
    for i, j in sorted(found):
        old, new = max(group[i], group[j]), min(group[i], group[j])
        group[group == old] = new
    return [np.flatnonzero(group == label) for label in np.unique(group)]


def sampled(image: NDArray, places: NDArray, pixel_size: float) -> NDArray[np.float64]:
    """The image at places (..., 2) [A] from its first pixel, by cubic splines."""
    return map_coordinates(image, np.moveaxis(np.asarray(places) / pixel_size, -1, 0), order=3, mode="nearest")


def line_profile(
    image: NDArray, first: NDArray, second: NDArray, pixel_size: float, beyond: float, count: int = 101
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance from the first of two places [A], and the image along their line, `beyond` [A] further at both ends."""
    length = float(np.linalg.norm(second - first))
    along = np.linspace(-beyond, length + beyond, count)
    return along, sampled(image, first + along[:, None] * (second - first) / length, pixel_size)


def resolved_pairs(
    image: NDArray, places: NDArray, pixel_size: float, longest: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Distance of neighbouring columns, and whether the image parts them.

    Pairs count that no third column comes closer to than half their distance, seen from their middle. A pair is parted
    if the lowest value between them lies DIP or more below the lower of the two, both counted from the image's median.

    Parameters
    ----------
    image : ndarray
        [rad]
    places : ndarray, shape (n, 2)
        Rows and columns of the columns [A], all within the image.
    pixel_size, longest : float
        [A]; pairs further apart don't count.
    """
    tree = cKDTree(places)
    pairs = np.array(sorted(tree.query_pairs(longest)), int).reshape(-1, 2)
    middles = places[pairs].mean(1)
    distances = np.linalg.norm(places[pairs[:, 0]] - places[pairs[:, 1]], axis=1)
    alone = [len(tree.query_ball_point(m, 0.5 * d - 1e-6)) == 0 for m, d in zip(middles, distances, strict=True)]
    pairs, distances = pairs[alone], distances[alone]
    part = np.linspace(0, 1, 21)[:, None]
    height = image - np.median(image)
    lines = [sampled(height, places[i] + part * (places[j] - places[i]), pixel_size) for i, j in pairs]
    ends = [min(line[0], line[-1]) for line in lines]
    parted = [end > 0 and line.min() < (1 - DIP) * end for line, end in zip(lines, ends, strict=True)]
    return distances, np.array(parted, bool)


def closest_resolved(distances: NDArray, parted: NDArray, share: float = 0.9, least: int = 5) -> float:
    """Smallest distance so that of the pairs at least that far apart `share` are resolved; NaN if there is none, or if
    fewer than `least` pairs are."""
    order = np.argsort(distances)[::-1]
    enough = np.cumsum(parted[order]) >= share * np.arange(1, len(order) + 1)
    reached = np.flatnonzero(enough & parted[order] & (np.arange(len(order)) >= least - 1))
    return float(distances[order][reached[-1]]) if len(reached) else float("nan")


def atom_phases(image: NDArray, pixels: NDArray, background: NDArray) -> dict[str, NDArray[np.float64]]:
    """Peak, 3 x 3 and 5 x 5 mean [rad] around pixels (n, 2), counted from the median of `background` (a mask)."""
    level = float(np.median(image[background]))
    sizes = {"peak": 0, "3x3": 1, "5x5": 2}
    return {
        name: np.array([image[i - r : i + r + 1, j - r : j + r + 1].mean() - level for i, j in pixels])
        for name, r in sizes.items()
    }


def rank_and_slope(values: NDArray, truth: NDArray) -> tuple[float, float]:
    """Spearman's rank correlation, and the slope of the line through the origin."""
    return float(spearmanr(values, truth).statistic), float(np.dot(values, truth) / np.dot(truth, truth))


def atom_peaks(image: NDArray, height: float, pixel_size: float) -> NDArray[np.float64]:
    """Rows and columns [A] of the pixels that are the highest of their 3 x 3 and higher than `height`; the image's rim
    has none."""
    peaks = (image == maximum_filter(image, 3)) & (image > height)
    peaks[[0, -1]] = False
    peaks[:, [0, -1]] = False
    return np.argwhere(peaks) * float(pixel_size)


def false_peaks(image: NDArray, atoms: NDArray, height: float, pixel_size: float) -> dict[str, float]:
    """Atom-like peaks where no atom is, and atoms that have one.

    An atom-like peak is a pixel that is the highest of its 3 x 3 and higher than `height`; it is false if no atom's
    column is within REACH of it.

    Parameters
    ----------
    image : ndarray, shape (rows, columns)
        Phase [rad], 0 without atoms; not smoothed.
    atoms : ndarray, shape (n, 2)
        Rows and columns of all atoms [A] from the first pixel; they may lie outside of the image.
    height : float
        [rad]
    pixel_size : float
        [A]

    Returns
    -------
    dict
        `false`: false peaks in 100 A^2 of the image that lie further than REACH from any atom; `found`: part of the
        atoms within the image with a peak within REACH, NaN without atoms.
    """
    peaks = atom_peaks(image, height, pixel_size)
    rows, columns = ((n - 1) * pixel_size for n in image.shape)
    grid = np.stack(np.meshgrid(np.arange(0, rows, 0.1), np.arange(0, columns, 0.1), indexing="ij"), -1).reshape(-1, 2)
    if not len(atoms):
        return {"false": 100 * len(peaks) / (rows * columns), "found": float("nan")}
    tree = cKDTree(atoms)
    open_part = float((tree.query(grid)[0] > REACH).mean())
    wrong = int((tree.query(peaks)[0] > REACH).sum()) if len(peaks) else 0
    rate = 100 * wrong / (rows * columns * open_part) if open_part else float("nan")
    within = atoms[((atoms >= 0) & (atoms <= [rows, columns])).all(1)]
    if not len(within) or not len(peaks):
        return {"false": rate, "found": 0.0 if len(within) else float("nan")}
    return {"false": rate, "found": float((cKDTree(peaks).query(within)[0] <= REACH).mean())}


def smooth_profile(image: NDArray, sigma: float) -> NDArray[np.float64]:
    """Mean over the rows, and along the columns a Gaussian of `sigma` [px]: the long-range part, of any height."""
    return gaussian_filter1d(image.mean(0), sigma, mode="nearest")
