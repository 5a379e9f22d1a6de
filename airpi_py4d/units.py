"""Calibration units, as microscopists write them, in A and 1/A.

A table of aliases rather than pint, which reads "1/A" as 1/ampere.
"""

from __future__ import annotations

import unicodedata

#: Length units in A.
_LENGTHS = {"m": 1e10, "mm": 1e7, "um": 1e4, "nm": 10.0, "A": 1.0, "pm": 1e-2}
#: Angle units in rad.
_ANGLES = {"rad": 1.0, "mrad": 1e-3, "urad": 1e-6}
_NAMES = {
    "A": ("angstrom", "angström", "ångström", "ang"),
    "nm": ("nanometer", "nanometre"),
    "pm": ("picometer", "picometre"),
    "um": ("micrometer", "micrometre", "micron"),
    "mm": ("millimeter", "millimetre"),
    "m": ("meter", "metre"),
    "rad": ("radian",),
    "mrad": ("milliradian",),
    "urad": ("microradian",),
}
_SYMBOLS = {name + plural: symbol for symbol, names in _NAMES.items() for name in names for plural in ("", "s")}
_UNCALIBRATED = {"", "none", "undefined", "<undefined>", "px", "pix", "pixel", "pixels"}
#: What TeX, Python and typography add to a unit, and what is left of it. "\u2212" is the minus sign.
_SPELLINGS = {"\\AA": "A", "Å": "A", "μ": "u", "\u2212": "-", "**": "^", "$": "", "{": "", "}": "", "\\mathrm": ""}


def _plain(unit: object) -> str | None:
    """`unit` in plain ASCII with its symbol, as ``A`` or ``1/nm``; None where it says uncalibrated."""
    text = "".join(unicodedata.normalize("NFKC", str(unit)).split())
    if text.lower() in _UNCALIBRATED:
        return None
    for spelling, plain in _SPELLINGS.items():
        text = text.replace(spelling, plain)
    base = text.removeprefix("1/").removesuffix("-1").removesuffix("^")
    symbol = _SYMBOLS.get(base.lower(), base)
    if text == base:
        return symbol
    return f"1/{symbol}" if text in (f"1/{base}", f"{base}^-1", f"{base}-1") else text


def length_in_angstrom(value: float, unit: str | None) -> float | None:
    """Convert a length to A.

    Parameters
    ----------
    value : float
        Length in `unit`.
    unit : str or None
        Unit of length, for instance ``"nm"``, ``"Å"`` or ``"Angstrom"``.

    Returns
    -------
    float or None
        Length [A]; None if the unit says that nothing is calibrated: None, empty, undefined or pixels.

    Raises
    ------
    ValueError
        If the unit is no known unit of length.

    Examples
    --------
    >>> length_in_angstrom(0.5, "nm")
    5.0
    >>> length_in_angstrom(1.0, "px") is None
    True
    """
    symbol = _plain(unit)
    if symbol is None:
        return None
    if symbol not in _LENGTHS:
        raise ValueError(f"{unit!r} is no known unit of length, expected one of {', '.join(_LENGTHS)}.")
    return value * _LENGTHS[symbol]


def reciprocal_in_inverse_angstrom(value: float, unit: str | None, wavelength: float) -> float | None:
    """Convert a spatial frequency or a scattering angle to cycles per A.

    Parameters
    ----------
    value : float
        Spatial frequency k in cycles, or scattering angle theta = k lambda, in `unit`.
    unit : str or None
        Reciprocal unit or angle, for instance ``"1/nm"``, ``"Å⁻¹"``, ``"A^-1"`` or ``"mrad"``.
    wavelength : float
        Wavelength lambda of the beam electrons [A]. Only angles need it.

    Returns
    -------
    float or None
        Spatial frequency [1/A]; None if the unit says that nothing is calibrated: None, empty, undefined or pixels.

    Raises
    ------
    ValueError
        If the unit is no known reciprocal unit or angle.

    Examples
    --------
    >>> reciprocal_in_inverse_angstrom(0.5, "1/nm", wavelength=0.02)
    0.05
    >>> reciprocal_in_inverse_angstrom(1.0, "mrad", wavelength=0.02)
    0.05
    """
    symbol = _plain(unit)
    if symbol is None:
        return None
    if symbol in _ANGLES:
        return value * _ANGLES[symbol] / wavelength
    length = symbol.removeprefix("1/")
    if length == symbol or length not in _LENGTHS:
        accepted = ", ".join([*(f"1/{known}" for known in _LENGTHS), *_ANGLES])
        raise ValueError(f"{unit!r} is no known reciprocal unit or angle, expected one of {accepted}.")
    return value / _LENGTHS[length]
