"""What an acquisition's calibration lacks, measured from the patterns themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from airpi_py4d import optics
from airpi_py4d.acquisition import Acquisition
from airpi_py4d.bad_pixels import find_bad_pixels
from airpi_py4d.checks import check_data, read, warn_user
from airpi_py4d.disk import Disk, measure_descan, measure_disk
from airpi_py4d.patterns import detector_to_scan, repair_matrix
from airpi_py4d.rotation import measure_rotation

#: Detector pixels to read, at most, unless the fewest rows hold more.
_READ_PIXELS = 1e9
_BANDS, _FEWEST_ROWS = 3, 12
_BAND_BYTES = 32e6
_TILES = 6
#: Of the bright-field disk's radius: the centre of mass is taken within the first, the annular signal beyond the other.
_INNER, _OUTER = 1.25, 1.15
_RADIUS_TOLERANCE = 0.03
#: What a disk that was sampled, not averaged, over the pixels adds to the uncertainty of its radius [px].
_RADIUS_FLOOR = 0.15
#: A given centre may be a whole pixel's, rounded [px].
_CENTER_FLOOR = 0.75


class _Sample:
    """Some row bands of a scan, spread over it, background subtracted."""

    def __init__(self, data: Any, background: float | NDArray[Any] | None) -> None:
        self._data, self.scan_shape, self.detector_shape = data, data.shape[:2], tuple(data.shape[2:])
        self._background = None if background is None else np.asarray(background, np.float32)
        rows, columns = self.scan_shape
        pixels = columns * math.prod(self.detector_shape)
        #: First and last row + 1 of each band.
        self.bands = [(0, rows)]
        if rows * pixels > _READ_PIXELS:
            height = max(_FEWEST_ROWS, int(_READ_PIXELS / pixels / _BANDS))
            if _BANDS * height < rows:
                starts = np.linspace(0, rows - height, _BANDS).astype(int)
                self.bands = [(int(start), int(start) + height) for start in starts]

    def rows(self) -> Iterator[tuple[int, int, NDArray[np.float32], NDArray[np.bool_]]]:
        """Number of band, scan row, patterns (n, pixels) and which are finite; others are zero."""
        pixels = math.prod(self.detector_shape)
        at_once = max(1, int(_BAND_BYTES / (pixels * self.scan_shape[1] * np.dtype(self._data.dtype).itemsize)))
        for number, (first, last) in enumerate(self.bands):
            for top in range(first, last, at_once):
                block = read(self._data, slice(top, min(top + at_once, last)))
                for row, patterns in enumerate(block, top):
                    flat = patterns.reshape(-1, pixels).astype(np.float32)
                    good = np.ones(len(flat), bool)
                    if patterns.dtype.kind == "f":
                        good = np.isfinite(flat.sum(axis=1))
                        flat[~good] = 0
                    if self._background is not None:
                        flat[good] -= np.broadcast_to(self._background, self.detector_shape).reshape(-1)
                    yield number, row, flat, good


@dataclass(frozen=True)
class _Means:
    """Mean patterns of the sample and of the tiles of the scan that it falls into."""

    scan_shape: tuple[int, int]
    mean: NDArray[np.float64]
    fano: float
    patterns: int
    tiles: NDArray[np.float64]  # (tiles, detector rows, detector columns)
    places: NDArray[np.float64]  # (tiles, 2): mean scan row and column


def _means(sample: _Sample) -> _Means:
    """One pass over the sample."""
    pixels = math.prod(sample.detector_shape)
    rows, columns = sample.scan_shape
    tile_columns = min(_TILES, max(1, columns // 2))
    edges = np.linspace(0, columns, tile_columns + 1).astype(int)
    tile_rows = len(sample.bands) if len(sample.bands) > 1 else min(_TILES, max(1, rows // 2))
    sums = np.zeros((tile_rows, tile_columns, pixels), np.float64)
    count = np.zeros((tile_rows, tile_columns))
    place = np.zeros((tile_rows, tile_columns, 2))
    some, squares, some_count = np.zeros(pixels), np.zeros(pixels), 0
    for band, row, flat, good in sample.rows():
        tile_row = band if len(sample.bands) > 1 else row * tile_rows // rows
        for n, (first, last) in enumerate(itertools.pairwise(edges)):
            part = flat[first:last]
            sums[tile_row, n] += part.sum(axis=0, dtype=np.float64)
            number = good[first:last].sum()
            count[tile_row, n] += number
            place[tile_row, n] += row * number, np.flatnonzero(good[first:last]).sum() + first * number
        if row % 4 == 0:  # enough for the noise
            some += flat.sum(axis=0, dtype=np.float64)
            squares += np.einsum("ij,ij->j", flat, flat)
            some_count += int(good.sum())
    total = count.sum()
    if total == 0:
        raise ValueError("data holds NaN or infinity in every pattern that was read; check the file.")
    fano = 1.0
    if some_count > 1:
        mean = some / some_count
        lit = mean > 0.1 * mean.max()
        if lit.any():
            fano = float(np.median((squares[lit] / some_count - mean[lit] ** 2) / mean[lit]))
    used = count > 0
    mean_pattern = sums.sum(axis=(0, 1)).reshape(sample.detector_shape) / total
    return _Means(
        sample.scan_shape,
        mean_pattern,
        max(fano, 1e-6 * float(mean_pattern.max()), 1e-30),
        int(total),
        (sums[used] / count[used][:, None]).reshape(-1, *sample.detector_shape),
        place[used] / count[used][:, None],
    )


@dataclass(frozen=True)
class _Fields:
    """Signals over one row band."""

    deflection: NDArray[np.float64]  # (rows, columns, 2): centre of mass in units of the disk's radius
    bright: NDArray[np.float64]
    annular: NDArray[np.float64]


def _fields(sample: _Sample, acquisition: Acquisition) -> list[_Fields]:
    """Centre of mass around the bright-field disk, and the signals in it and outside, over the sample."""
    assert acquisition.center is not None
    place = np.indices(sample.detector_shape).reshape(2, -1).T - np.array(acquisition.center)
    k = acquisition.k_pixel[0] / acquisition.aperture_radius * (_to_circle(acquisition) @ place.T)
    r = np.hypot(*k)
    moved = 0.0
    if acquisition.descan is not None:
        moved = float(np.abs(acquisition.descan).max()) * acquisition.k_pixel[0] / acquisition.aperture_radius
    inner, outer = r <= _INNER + moved, r > _OUTER + moved
    weights = np.stack([inner * k[0], inner * k[1], inner, r <= 1 + moved, outer], axis=1)
    if acquisition.bad_pixels is not None and acquisition.bad_pixels.any():
        weights = repair_matrix(acquisition.bad_pixels).T @ weights
    weights = weights.astype(np.float32)
    rows: list[list[NDArray[np.float64]]] = [[] for _ in sample.bands]
    for band, _, flat, _ in sample.rows():
        rows[band].append((flat @ weights).astype(np.float64))
    fields = []
    for signals in rows:
        signal = np.array(signals)
        total = signal[..., 2]
        lit = total > 0
        deflection = signal[..., :2] / np.where(lit, total, 1)[..., None]
        deflection[~lit] = np.median(deflection[lit], axis=0) if lit.any() else 0
        deflection = deflection.round(6)  # what single precision knows
        fields.append(_Fields(deflection, signal[..., 3], signal[..., 4]))
    return fields


def calibrate(
    data: Any,
    *,
    energy: float,
    scan_step: float | tuple[float, float],
    semiangle: float | None = None,
    k_pixel: float | tuple[float, float] | None = None,
    center: tuple[float, float] | None = None,
    rotation: float | None = None,
    transpose: bool | None = None,
    ellipse: tuple[float, float, float] | None = None,
    bad_pixels: NDArray[np.bool_] | None = None,
    descan: NDArray[np.float64] | None = None,
    gain: float = 1.0,
    background: float | NDArray[np.float64] | None = None,
    defocus: float = 0.0,
    spherical_aberration: float = 0.0,
    sources: Mapping[str, str] | None = None,
    argument_names: Mapping[str, str] | None = None,
) -> Acquisition:
    """Calibration of a scan: what is given, and what isn't given measured from the patterns.

    Measured are bad pixels (`find_bad_pixels`), centre and radius of the bright-field disk (`measure_disk`), which
    gives `k_pixel` from `semiangle` or the other way round, the disk's motion during the scan (`measure_descan`), and
    rotation and transposition of the detector (`measure_rotation`). Of large scans a few bands of rows are read.

    Parameters
    ----------
    data : array_like, shape (scan rows, scan columns, detector rows, detector columns)
        See `airpi_py4d.reconstruct`. Never written to.
    energy, scan_step : float
        See `Acquisition`; they can't be measured.
    semiangle, k_pixel : optional
        See `Acquisition`; one of them is enough. A single number for `k_pixel` holds along rows and columns.
    center, rotation, transpose, descan : optional
        See `Acquisition`; measured if None. Zeros for `descan` say that there is none.
    bad_pixels : ndarray of bool, optional
        See `Acquisition`. A beam stop has to be given; hot and dead pixels and gaps are found only if this is None.
    ellipse, gain, background, defocus, spherical_aberration : optional
        See `Acquisition`; they aren't measured.
    sources : mapping of str to str, optional
        Where what is given came from; "argument" where nothing is said.
    argument_names : mapping of str to str, optional
        See `Acquisition`.

    Returns
    -------
    Acquisition
        `sources` says of everything how it was measured, or why it couldn't be and a default stands in.

    Raises
    ------
    ValueError
        If neither `semiangle` nor `k_pixel` is given, a value is implausible, or the bright-field disk can't be found.

    Warns
    -----
    UserWarning
        If rotation and transposition can't be measured, or the measured bright-field disk contradicts what is given:
        its radius by more than 3 % what `semiangle` and `k_pixel` say, its centre by more than 3 % of the radius and
        0.75 px `center`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> disk = np.clip(10.5 - np.hypot(*np.ogrid[-24:24, -22:26]), 0, 1)
    >>> data = rng.poisson(disk, (12, 14, 48, 48))
    >>> acquisition = calibrate(data, energy=300e3, semiangle=20.0, scan_step=0.2, rotation=0.0, transpose=False)
    >>> [round(value, 1) for value in acquisition.center], round(acquisition.k_pixel[0], 2)
    ([24.0, 22.0], 0.1)
    >>> acquisition.sources["k_pixel"].rpartition(",")[0]
    'measured from the radius of the bright-field disk'
    """
    check_data(data)
    names = dict(argument_names or {})
    if semiangle is None and k_pixel is None:
        called = names.get("semiangle", "semiangle"), names.get("k_pixel", "k_pixel")
        raise ValueError(
            f"{called[0]} and {called[1]} are both unknown. Give {called[0]} [mrad] or {called[1]} [1/A]; the other "
            "one is measured from the bright-field disk."
        )
    pair = None if k_pixel is None else (k_pixel, k_pixel) if np.ndim(k_pixel) == 0 else k_pixel
    values: dict[str, Any] = {
        "energy": energy,
        "semiangle": 1.0 if semiangle is None else semiangle,
        "scan_step": scan_step,
        "k_pixel": (1.0, 1.0) if pair is None else pair,
        "center": center,
        "rotation": 0.0 if rotation is None else rotation,
        "transpose": bool(transpose),
        "ellipse": ellipse,
        "bad_pixels": bad_pixels,
        "descan": descan,
        "gain": gain,
        "background": background,
        "defocus": defocus,
        "spherical_aberration": spherical_aberration,
        "argument_names": names,
    }
    given = Acquisition(**values)  # raises for what is implausible before anything is read
    _check_shapes(given, data)
    known = dict(sources or {})
    for name, default in (("defocus", 0.0), ("spherical_aberration", 0.0), ("gain", 1.0)):
        if values[name] == default:
            known.setdefault(name, "default")
    for name in ("ellipse", "background"):
        if values[name] is None:
            known.setdefault(name, "default")
    missing = {
        name
        for name, value in {
            "semiangle": semiangle,
            "k_pixel": pair,
            "center": center,
            "rotation": rotation,
            "transpose": transpose,
            "bad_pixels": bad_pixels,
            "descan": descan,
        }.items()
        if value is None
    }
    if not missing:
        return replace(given, sources=known)
    sample = _Sample(data, given.background)
    means = _means(sample)
    if bad_pixels is None:
        bad_pixels = find_bad_pixels(means.mean, means.fano, means.patterns)
        given = replace(given, bad_pixels=bad_pixels if bad_pixels.any() else None)
        known["bad_pixels"] = "measured from the mean pattern"
    given = _with_disk(given, known, missing, means)
    if missing & {"rotation", "transpose"}:
        given = _with_rotation(given, known, missing, sample)
    return replace(given, sources=known)


def with_center(data: Any, acquisition: Acquisition) -> Acquisition:
    """The acquisition with its centre measured, all else as it is.

    Parameters
    ----------
    data : array_like, shape (scan rows, scan columns, detector rows, detector columns)
    acquisition : Acquisition

    Raises
    ------
    ValueError
        If the bright-field disk can't be found.
    """
    _check_shapes(acquisition, data)
    sources = dict(acquisition.sources)
    means = _means(_Sample(data, acquisition.background))
    return replace(_with_disk(acquisition, sources, {"center"}, means), sources=sources)


def _check_shapes(given: Acquisition, data: Any) -> None:
    """Raise where a map isn't of the detector's or the scan's shape."""
    detector, scan = tuple(data.shape[2:]), tuple(data.shape[:2])
    for name, expected in (("bad_pixels", detector), ("background", detector), ("descan", (*scan, 2))):
        shape = np.shape(getattr(given, name))
        if shape not in ((), expected):
            raise ValueError(
                f"{given.argument_names.get(name, name)} has the shape {shape}, expected {expected}, that of the "
                f"{'scan' if name == 'descan' else 'detector'}."
            )


def _to_circle(acquisition: Acquisition) -> NDArray[np.float64]:
    """Linear map that makes a circle of the bright-field disk, in units of detector rows."""
    return detector_to_scan(replace(acquisition, rotation=0.0, transpose=False)) / acquisition.k_pixel[0]


def _with_disk(given: Acquisition, sources: dict[str, str], missing: set[str], means: _Means) -> Acquisition:
    """Centre, descan, and semi-angle or k-pixel, as far as they are missing, from the bright-field disk."""
    expected = None if missing & {"k_pixel", "semiangle"} else given.aperture_radius / given.k_pixel[0]
    to_circle = _to_circle(given)
    try:
        disk = measure_disk(means.mean, given.bad_pixels, to_circle=to_circle, radius=expected, center=given.center)
    except ValueError as error:
        wanted = [name for name in ("center", "k_pixel", "semiangle") if name in missing]
        if not wanted:
            if "descan" in missing:
                sources["descan"] = f"default, not measured: {error}"
            return given
        called = " and ".join(given.argument_names.get(name, name) for name in wanted)
        raise ValueError(f"{called} can't be measured: {error} Give {called}, or check the data.") from None
    if "center" in missing:
        given = replace(given, center=disk.center)
        sources["center"] = "measured from the bright-field disk's edge"
    else:
        _compare_center(given, disk)
    if "descan" in missing:
        descan = measure_descan(
            means.tiles, means.places, disk, means.scan_shape, given.bad_pixels, to_circle=to_circle
        )
        sources["descan"] = "measured from the bright-field disk's edge in parts of the scan"
        if descan is not None:
            given = replace(given, descan=descan)
    if given.descan is not None:
        disk = measure_disk(_descan_undone(means, given), to_circle=to_circle, radius=disk.radius, center=disk.center)
    source = f"measured from the radius of the bright-field disk, {disk.radius:.4g} px"
    if "semiangle" in missing:
        k0 = disk.radius * given.k_pixel[0]
        sources["semiangle"] = source
        return replace(given, semiangle=k0 * optics.wavelength(given.energy) * 1e3)
    if "k_pixel" in missing:
        size = given.aperture_radius / disk.radius
        sources["k_pixel"] = source
        return replace(given, k_pixel=(size, size))
    assert expected is not None
    _compare(given, disk, expected)
    return given


def _descan_undone(means: _Means, given: Acquisition) -> NDArray[np.float64]:
    """Mean pattern that stands still, of the tiles' shifted back."""
    assert given.descan is not None
    total = np.zeros(means.mean.shape)
    repair = None if given.bad_pixels is None else repair_matrix(given.bad_pixels)
    for tile, place in zip(means.tiles, means.places.round().astype(int), strict=True):
        good = tile if repair is None else (repair @ tile.ravel()).reshape(tile.shape)
        total += ndimage.shift(good, -given.descan[tuple(place)], order=1, mode="nearest")
    return total / len(means.tiles)


def _compare(given: Acquisition, disk: Disk, expected: float) -> None:
    """Warn if the measured radius contradicts the given semi-angle and k-pixel."""
    difference = disk.radius / expected - 1
    uncertainty = math.hypot(disk.radius_error, _RADIUS_FLOOR)
    if abs(difference) <= _RADIUS_TOLERANCE or abs(disk.radius - expected) <= 2 * uncertainty:
        return
    semiangle, k_pixel = (given.argument_names.get(name, name) for name in ("semiangle", "k_pixel"))
    warn_user(
        f"{semiangle} {given.semiangle:.4g} mrad and {k_pixel} {given.k_pixel[0]:.4g} 1/A make the radius of the "
        f"bright-field disk {expected:.4g} px, but {disk.radius:.4g} px were measured, {abs(difference):.0%} "
        f"{'more' if difference > 0 else 'less'}. One of the two is wrong; given one alone, the other is measured."
    )


def _compare_center(given: Acquisition, disk: Disk) -> None:
    """Warn if the measured centre contradicts the given one."""
    assert given.center is not None
    away = math.dist(disk.center, given.center)
    if away <= max(_RADIUS_TOLERANCE * disk.radius, _CENTER_FLOOR, 3 * disk.center_error):
        return
    shown, measured = (f"({row:.2f}, {column:.2f})" for row, column in (given.center, disk.center))
    warn_user(
        f"{given.argument_names.get('center', 'center')} is {shown} px, but the bright-field disk's centre was "
        f"measured at {measured} px, {away:.2g} px away. Leave it out, and the measured one is used."
    )


def _with_rotation(given: Acquisition, sources: dict[str, str], missing: set[str], sample: _Sample) -> Acquisition:
    """Rotation and transposition from the centre of mass, or why they stay at their defaults."""
    assert given.center is not None
    fields = _fields(sample, given)
    found = measure_rotation(
        [field.deflection for field in fields],
        [[field.annular, -field.bright] for field in fields],
        given.scan_step,
        band_limit=2 * given.aperture_radius,
        rotation=None if "rotation" in missing else given.rotation,
        transpose=None if "transpose" in missing else given.transpose,
    )
    wanted = [name for name in ("rotation", "transpose") if name in missing]
    called = " and ".join(given.argument_names.get(name, name) for name in wanted)
    if found is None:
        reason = "the centre of mass shows no significant minimum of the curl"
        sources |= dict.fromkeys(wanted, f"default, not measured: {reason}")
        values = " and ".join(f"{getattr(given, name):g}" if name == "rotation" else "False" for name in wanted)
        warn_user(
            f"{called} can't be measured and default to {values}: {reason} (too few electrons, vacuum, or a specimen "
            f"that looks alike either way). Give {called}; a wrong one gives a wrong image."
        )
        return given
    text = f"measured from the centre of mass, {found.rotational:.0%} of which is curl"
    sources |= dict.fromkeys(wanted, text)
    if "rotation" in missing:
        sources["rotation"] = f"{text}; +- {found.error:.1g} degrees"
        if not found.sign_known:
            sources["rotation"] += "; 180 degrees more or less fit as well"
            warn_user(
                f"{given.argument_names.get('rotation', 'rotation')} was measured as {found.degrees:.1f} degrees, but "
                "180 degrees more or less fit as well: the signal outside the bright-field disk is too weak to tell. "
                f"If atoms come out dark, give {found.degrees + 180:.1f} degrees."
            )
    return replace(given, rotation=found.degrees, transpose=found.transpose)
