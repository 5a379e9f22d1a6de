"""What was measured: the calibrated geometry of one 4D-STEM scan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airpi_py4d import optics

#: Parameter: unit, smallest and largest plausible value.
_LIMITS = {
    "energy": ("eV", 1e4, 1e6),
    "semiangle": ("mrad", 0.5, 200.0),
    "scan_step": ("A", 1e-3, 1e3),
    "k_pixel": ("1/A", 1e-5, 10.0),
    "defocus": ("A", -1e5, 1e5),
    "spherical_aberration": ("A", -1e9, 1e9),
    "rotation": ("degrees", -360.0, 360.0),
    "gain": ("detector units", 1e-9, 1e9),
}
_PAIRS = ("scan_step", "k_pixel", "center")


@dataclass(frozen=True)
class Acquisition:
    """Calibration of a 4D-STEM scan, with where every value came from.

    Detector and scan are related as in py4DSTEM: a vector (row, column) on the detector is first freed of elliptical
    distortion, then transposed (rows and columns swapped, if `transpose`) and then rotated by `rotation` to become a
    vector (row, column) of the scan, v_row = cos(rotation) d_row - sin(rotation) d_column,
    v_column = sin(rotation) d_row + cos(rotation) d_column.

    Parameters
    ----------
    energy : float
        Energy of the beam electrons [eV].
    semiangle : float
        Convergence semi-angle [mrad].
    scan_step : float or (float, float)
        Distance of neighbouring scan positions [A], from row to row and from column to column; kept as a pair.
    k_pixel : (float, float)
        Size of a detector pixel along detector rows and columns, in cycles [1/A].
    center : (float, float) or None
        Row and column of the optical axis on the detector [px], the first pixel's centre being (0, 0). None lets the
        engine measure it from the bright-field disk of the mean pattern.
    rotation : float
        Rotation from the detector to the scan [degrees].
    transpose : bool
        Whether detector rows and columns are swapped before the rotation.
    ellipse : (float, float, float) or None
        What elliptical distortion makes of a circle on the detector: two semi-axes, of which only the ratio counts,
        and the angle of the first from the rows' axis towards the columns' [degrees]. The `k_pixel` holds along the
        first. py4DSTEM's (a, b, theta), whose pixel size holds along b, is (b, a, theta + 90 degrees).
    bad_pixels : ndarray of bool or None, shape (detector rows, detector columns)
        True for pixels whose counts are not to be used: hot, dead, in a gap, behind a beam stop.
    descan : ndarray of float or None, shape (scan rows, scan columns, 2)
        Row and column of the optical axis at each position, minus `center` [px].
    gain : float
        What the detector reports for one electron.
    background : float or ndarray or None
        Subtracted from every pattern first [detector units]; a number or one a pixel.
    defocus : float
        [A], positive for underfocus.
    spherical_aberration : float
        Third-order spherical aberration C_s [A].
    sources : mapping of str to str
        Where each parameter came from, for instance ``{"scan_step": "metadata"}``; "argument" where nothing is said.
    argument_names : mapping of str to str
        What the caller names each parameter, for error messages.

    Raises
    ------
    ValueError
        If a value is missing, not finite or implausible.

    Examples
    --------
    >>> acquisition = Acquisition(energy=300e3, semiangle=20.0, scan_step=0.2, k_pixel=(0.05, 0.05))
    >>> round(acquisition.aperture_radius, 3)
    1.016
    >>> Acquisition(energy=300, semiangle=20.0, scan_step=0.2, k_pixel=(0.05, 0.05))
    Traceback (most recent call last):
        ...
    ValueError: energy is 300 eV, expected 10000 to 1e+06 eV. For 300 kV give energy=300e3.
    """

    energy: float
    semiangle: float
    scan_step: tuple[float, float]
    k_pixel: tuple[float, float]
    center: tuple[float, float] | None = None
    rotation: float = 0.0
    transpose: bool = False
    ellipse: tuple[float, float, float] | None = None
    bad_pixels: NDArray[np.bool_] | None = field(default=None, compare=False)
    descan: NDArray[np.float64] | None = field(default=None, compare=False)
    gain: float = 1.0
    background: float | NDArray[np.float64] | None = field(default=None, compare=False)
    defocus: float = 0.0
    spherical_aberration: float = 0.0
    sources: Mapping[str, str] = field(default_factory=dict)
    argument_names: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if np.ndim(self.scan_step) == 0:
            object.__setattr__(self, "scan_step", (self.scan_step, self.scan_step))
        for name in _LIMITS:
            if name not in _PAIRS:
                object.__setattr__(self, name, self._checked(name, getattr(self, name)))
        for name in _PAIRS:
            pair = getattr(self, name)
            if pair is None and name == "center":
                continue
            if np.shape(pair) != (2,):
                raise ValueError(f"{self._called(name)} is {pair!r}, expected two numbers (row, column).")
            object.__setattr__(self, name, (self._checked(name, pair[0]), self._checked(name, pair[1])))
        object.__setattr__(self, "transpose", bool(self.transpose))
        self._check_ellipse()
        self._check_array("bad_pixels", (2,))
        self._check_array("descan", (3,))
        self._check_array("background", (0, 2))
        if self.bad_pixels is not None:
            if self.bad_pixels.dtype != bool:
                raise ValueError(
                    f"{self._called('bad_pixels')} has the type {self.bad_pixels.dtype}, expected bool: True for bad "
                    "pixels."
                )
            if self.bad_pixels.all():
                raise ValueError(f"{self._called('bad_pixels')} marks every pixel as bad.")
        if self.descan is not None and self.descan.shape[2] != 2:
            raise ValueError(
                f"{self._called('descan')} has the shape {self.descan.shape}, expected (scan rows, scan columns, 2)."
            )

    def _check_ellipse(self) -> None:
        if self.ellipse is None:
            return
        called = self._called("ellipse")
        if np.shape(self.ellipse) != (3,):
            raise ValueError(f"{called} is {self.ellipse!r}, expected two semi-axes and an angle [degrees].")
        a, b, angle = (float(value) for value in self.ellipse)
        if not (a > 0 and b > 0 and np.isfinite(angle) and 0.5 <= a / b <= 2):
            raise ValueError(f"{called} is {self.ellipse!r}, expected two semi-axes of similar size and an angle.")
        object.__setattr__(self, "ellipse", (a, b, angle))

    def _check_array(self, name: str, dimensions: tuple[int, ...]) -> None:
        value = getattr(self, name)
        if value is None:
            return
        array = np.array(value)
        if array.ndim not in dimensions:
            raise ValueError(
                f"{self._called(name)} has {array.ndim} dimensions, expected {' or '.join(map(str, dimensions))}."
            )
        if array.dtype.kind not in "iufb" or not np.isfinite(array).all():
            raise ValueError(f"{self._called(name)} must hold finite numbers.")
        array.setflags(write=False)
        object.__setattr__(self, name, float(array) if array.ndim == 0 else array)

    def _called(self, name: str) -> str:
        return self.argument_names.get(name, name)

    def _checked(self, name: str, value: Any) -> float:
        unit, low, high = _LIMITS.get(name, ("px", -np.inf, np.inf))
        called = self._called(name)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{called} is {value!r}, expected a number in {unit}.") from None
        if not np.isfinite(number):
            raise ValueError(f"{called} is {number}, expected a finite number in {unit}.")
        if not low <= number <= high:
            hint = ""
            if name == "energy" and low <= number * 1e3 <= high:
                hint = f" For {number:g} kV give {called}={number:g}e3."
            elif name == "semiangle" and 0 < number < low:
                hint = f" For {number:g} rad give {called}={number * 1e3:g}."
            raise ValueError(f"{called} is {number:g} {unit}, expected {low:g} to {high:g} {unit}.{hint}")
        return number

    @property
    def aperture_radius(self) -> float:
        """Radius of the bright-field disk, k0 = alpha / lambda [1/A]."""
        return optics.aperture_radius(self.energy, self.semiangle)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Every parameter with its value, unit and source, for provenance.

        Examples
        --------
        >>> acquisition = Acquisition(300e3, 20.0, 0.2, (0.05, 0.05), sources={"scan_step": "metadata"})
        >>> acquisition.describe()["scan_step"]
        {'value': [0.2, 0.2], 'unit': 'A', 'source': 'metadata'}
        """
        values = {name: (getattr(self, name), unit) for name, (unit, _, _) in _LIMITS.items()}
        values |= {"center": (self.center, "px"), "transpose": (self.transpose, "")}
        values |= {"ellipse": (self.ellipse, "a, b, degrees")}
        if self.bad_pixels is not None:
            values["bad_pixels"] = (int(self.bad_pixels.sum()), "px")
        if self.descan is not None:
            reach = np.ptp(self.descan, axis=(0, 1)).tolist()
            values["descan"] = (tuple(reach), "px from the smallest to the largest")
        if self.background is not None:
            values["background"] = (float(np.mean(self.background)), "detector units, mean")
        return {
            name: {
                "value": list(value) if isinstance(value, tuple) else value,
                "unit": unit,
                "source": self.sources.get(name, "argument"),
            }
            for name, (value, unit) in values.items()
        }
