"""Rotation and transposition from the detector to the scan, measured from the centre of mass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Logarithm of the likelihood ratio from which on a rotation, a transposition or a sign counts as measured.
_EVIDENCE = 6.0
#: Part of the field that fades out at each end.
_FADED = 0.15


@dataclass(frozen=True)
class Rotation:
    """How the detector lies to the scan.

    Attributes
    ----------
    degrees : float
        As `Acquisition.rotation`, in (-180, 180], or in (-90, 90] if `sign_known` is False.
    transpose : bool
        As `Acquisition.transpose`.
    error : float
        Standard deviation of `degrees`.
    rotational : float
        Part of the field's power that is rotational (curl), 0 to 0.5.
    sign_known : bool
        Whether the 180 degrees ambiguity is resolved.
    """

    degrees: float
    transpose: bool
    error: float
    rotational: float
    sign_known: bool


@dataclass(frozen=True)
class _Alignment:
    """How far the deflections' Fourier coefficients lie along their wave vectors, for one transposition."""

    transpose: bool
    degrees: float
    error: float
    part: float  # of the power that is aligned: 1 for a gradient, 0 for noise
    potential: NDArray[np.complex128]


def measure_rotation(
    deflections: list[NDArray[np.float64]],
    signals: list[list[NDArray[np.float64]]],
    scan_step: tuple[float, float],
    *,
    band_limit: float = math.inf,
    rotation: float | None = None,
    transpose: bool | None = None,
) -> Rotation | None:
    r"""Rotation and transposition from the detector to the scan, from the centre of mass.

    The deflection is the gradient of the specimen's phase, blurred by the probe: without curl, so that each of its
    Fourier coefficients V(q) is parallel to q. With F = V_row + i V_column and its counterpart F' = V_row - i V_column,
    Fourier transformed, the curl of the field turned by the angle theta,

    .. math:: \sum_q |V \times \hat q|^2
        = \tfrac12 \sum_q |V|^2 - \tfrac12 \mathrm{Re}\, e^{2 i \theta} \sum_q F F'^* e^{-2 i \varphi_q}

    with the direction phi_q of q, is smallest at theta = -arg(sum) / 2: py4DSTEM's search for the least curl in closed
    form. Only coefficients above the noise's count. The transposition with less curl is taken. What remains unknown are
    180 degrees; there the deflection's potential must be high where more electrons are scattered far.

    Parameters
    ----------
    deflections : list of ndarray, each of shape (rows, columns, 2)
        Centre of mass along detector rows and columns, any unit, for some row bands of the scan.
    signals : list of list of ndarray, each of shape (rows, columns)
        For every band, the images that are high at atoms; the one that agrees best with the potential decides.
    scan_step : (float, float)
        [A]
    band_limit : float
        Spatial frequency beyond which there is only noise, twice the aperture's radius [1/A].
    rotation, transpose : optional
        What is known, of rotation [degrees] and transposition.

    Returns
    -------
    Rotation or None
        None where it can't be told: too few electrons, vacuum, or a specimen that looks the same either way.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> from scipy import ndimage
    >>> phase = ndimage.gaussian_filter(rng.normal(size=(40, 48)), 2, mode="wrap")
    >>> along_rows, along_columns = np.gradient(phase)
    >>> found = measure_rotation([np.stack([along_columns, -along_rows], axis=-1)], [[phase]], (0.2, 0.2))
    >>> round(found.degrees), found.transpose, found.sign_known
    (90, False, True)
    """
    bands = [_coefficients(*band, scan_step, band_limit) for band in zip(deflections, signals, strict=True)]
    if not bands:
        return None
    forward, backward, direction = (np.concatenate([band[n] for band in bands]) for n in range(3))
    images = np.concatenate([band[3] for band in bands], axis=1)
    power = (np.abs(forward) ** 2 + np.abs(backward) ** 2) / 2
    if len(power) < 4 or not power.max() > 0:
        return None
    strong = power > 2 * np.median(power)
    if strong.sum() < 3:
        return None
    forward, backward, direction, power = (values[strong] for values in (forward, backward, direction, power))
    bandwidth = math.prod(_bandwidth(size) for size in deflections[0].shape[:2])
    number = power.sum() ** 2 / (power**2).sum() / bandwidth
    found = [
        _alignment(forward, backward, direction, power, flipped, rotation)
        for flipped in ((False, True) if transpose is None else (bool(transpose),))
    ]
    best = max(found, key=lambda alignment: alignment.part)
    if rotation is None and number * _information(best.part) < _EVIDENCE:
        return None
    if len(found) == 2:
        other = min(found, key=lambda alignment: alignment.part)
        if number * (_information(best.part) - _information(other.part)) < _EVIDENCE:
            return None
    if rotation is not None:
        return Rotation(rotation, best.transpose, 0.0, (1 - best.part) / 2, True)
    agreement = 0.0
    for image in images[:, strong]:
        norm = math.sqrt((np.abs(best.potential) ** 2).sum() * (np.abs(image) ** 2).sum())
        value = float((best.potential * image.conj()).real.sum()) / norm if norm > 0 else 0.0
        agreement = max(agreement, value, key=abs)
    degrees = best.degrees
    if agreement < 0:
        degrees += 180 if degrees <= 0 else -180
    sign_known = number * _information(agreement) > _EVIDENCE
    if not sign_known:
        degrees = best.degrees
    return Rotation(degrees, best.transpose, math.sqrt(bandwidth) * best.error, (1 - best.part) / 2, sign_known)


def _coefficients(
    deflection: NDArray[np.float64],
    signals: list[NDArray[np.float64]],
    scan_step: tuple[float, float],
    band_limit: float,
) -> tuple[NDArray[Any], ...]:
    """F, F', direction of q, and the images' coefficients, over half of the Fourier plane."""
    rows, columns = deflection.shape[:2]
    along_rows, along_columns = _detrended(deflection[..., 0]), _detrended(deflection[..., 1])
    index = np.stack(np.meshgrid(np.fft.fftfreq(rows, 1 / rows), np.fft.fftfreq(columns, 1 / columns), indexing="ij"))
    # half of the plane, without the coefficients that the plane and the window touch and without the Nyquist frequency
    half = (index[0] > 0) | ((index[0] == 0) & (index[1] > 0))
    half &= (np.abs(index) > 1).any(axis=0)
    half &= (np.abs(index[0]) < rows / 2) & (np.abs(index[1]) < columns / 2)
    q = index / (np.array([rows, columns]) * np.array(scan_step))[:, None, None]
    half &= np.hypot(*q) <= band_limit
    q = q[:, half]
    images = np.array([_detrended(image)[half] for image in signals])
    along_rows, along_columns = along_rows[half], along_columns[half]
    return (
        along_rows + 1j * along_columns,
        along_rows - 1j * along_columns,
        np.arctan2(q[1], q[0]),
        images,
    )


def _information(correlation: float) -> float:
    """Log-likelihood, per sample, of two complex Gaussian variables being correlated over their not being so."""
    return -math.log(max(1 - correlation**2, 1e-12))


def _alignment(
    forward: NDArray[np.complex128],
    backward: NDArray[np.complex128],
    direction: NDArray[np.float64],
    power: NDArray[np.float64],
    transpose: bool,
    rotation: float | None,
) -> _Alignment:
    if transpose:  # row + i column becomes column + i row
        forward, backward = 1j * backward, -1j * forward
    aligned = forward * backward.conj() * np.exp(-2j * direction)
    total = aligned.sum()
    angle = -np.angle(total) / 2 if rotation is None else np.deg2rad(rotation)
    turned = aligned * np.exp(2j * angle)
    part = float(turned.real.sum() / power.sum())
    error = math.sqrt((turned.imag**2).sum()) / max(abs(total), 1e-300) / 2
    # along q: (e^(i angle) F e^(-i phi) + e^(-i angle) F' e^(i phi)) / 2
    turn = np.exp(1j * (angle - direction))
    longitudinal = (turn * forward + turn.conj() * backward) / 2
    return _Alignment(transpose, float(np.rad2deg(angle)), float(np.rad2deg(error)), part, -1j * longitudinal)


def _detrended(field: NDArray[np.float64]) -> NDArray[np.complex128]:
    """Fourier transform of a field without its plane, faded out at the edges."""
    rows, columns = field.shape
    y, x = (np.linspace(-1, 1, n) for n in field.shape)
    design = np.stack(np.broadcast_arrays(np.ones(field.shape), y[:, None], x[None]), axis=-1).reshape(-1, 3)
    flat = field - (design @ np.linalg.lstsq(design, field.ravel(), rcond=None)[0]).reshape(field.shape)
    return np.fft.fft2(flat * _window(rows)[:, None] * _window(columns))


def _window(size: int) -> NDArray[np.float64]:
    """Tukey's window: 1 inside, a cosine's fall to both ends."""
    distance = (np.minimum(np.arange(size), np.arange(size)[::-1]) + 1) / (_FADED * size)
    return np.sin(np.pi / 2 * np.minimum(distance, 1)) ** 2


def _bandwidth(size: int) -> float:
    """Fourier coefficients along one axis that hold the same noise because of the window."""
    window = _window(size)
    return float(size * (window**4).sum() / (window**2).sum() ** 2)
