"""Every spelling of a unit that users' files hold."""

import pytest

from airpi_py4d.units import length_in_angstrom, reciprocal_in_inverse_angstrom

LENGTHS = {
    1.0: [
        "A", "Å", "\u00c5", "\u212b", "A\u030a", "\\AA", "$\\AA$", " A ", "Angstrom", "angstroms", "Ångström",
        "ångström", "ANGSTROM", "ang",
    ],
    10.0: ["nm", " nm", "nanometer", "Nanometres"],
    1e-2: ["pm", "picometre"],
    1e4: ["um", "\u00b5m", "\u03bcm", "micron", "microns", "micrometer"],
    1e7: ["mm"],
    1e10: ["m", "meters"],
}  # fmt: skip
RECIPROCALS = {
    1.0: [
        "1/A", "1/Å", "1/\u00c5", "1/\u212b", "1 / A", "1 / Å", "A^-1", "Å^-1", "A^{-1}", "Å⁻¹", "A⁻¹", "\u212b⁻¹",
        "A-1", "A**-1", "A^\u22121", "A$^{-1}$", "Å$^{-1}$", "$A^{-1}$", "$\\AA^{-1}$", "$\\mathrm{\\AA}^{-1}$",
        "$\\mathrm{Å^{-1}}$", "1/Angstrom", "1 / angstrom", "Angstrom^-1", "angstroms^-1",
    ],
    0.1: ["1/nm", "1 / nm", "nm^-1", "nm⁻¹", "nm-1", "nm$^{-1}$", "$nm^{-1}$", "1/nanometer", "1 / nanometer"],
    100.0: ["1/pm", "pm^-1", "1 / pm"],
    1e-4: ["1/um", "1/\u00b5m", "\u03bcm^-1"],
    0.05: ["mrad", " mrad", "milliradians"],
    50.0: ["rad", "radian"],
    5e-5: ["urad", "\u00b5rad", "\u03bcrad"],
}  # fmt: skip
UNCALIBRATED = [None, "", "  ", "px", "pixel", "pixels", "Pixels", "PX", "<undefined>", "Undefined", "undefined"]
UNKNOWN = ["V", "nM", "Am", "mA", "e", "counts", "1/", "^-1", "A^-2", "1/A^-1", "1/nm^2", "rad/A", "1/mrad", "deg"]


@pytest.mark.parametrize(("unit", "expected"), [(u, value) for value, units in LENGTHS.items() for u in units])
def test_length(unit, expected):
    assert length_in_angstrom(2.0, unit) == pytest.approx(2 * expected, rel=1e-12)


@pytest.mark.parametrize(("unit", "expected"), [(u, value) for value, units in RECIPROCALS.items() for u in units])
def test_reciprocal(unit, expected):
    assert reciprocal_in_inverse_angstrom(2.0, unit, wavelength=0.02) == pytest.approx(2 * expected, rel=1e-12)


@pytest.mark.parametrize("unit", UNCALIBRATED)
def test_uncalibrated(unit):
    assert length_in_angstrom(1.0, unit) is None
    assert reciprocal_in_inverse_angstrom(1.0, unit, wavelength=0.02) is None


def test_traits_undefined():
    undefined = pytest.importorskip("traits.api").Undefined
    assert length_in_angstrom(1.0, undefined) is None
    assert reciprocal_in_inverse_angstrom(1.0, undefined, wavelength=0.02) is None


@pytest.mark.parametrize("unit", [*UNKNOWN, *(unit for units in RECIPROCALS.values() for unit in units)])
def test_no_length(unit):
    with pytest.raises(ValueError, match="no known unit of length, expected one of m, mm, um, nm, A, pm") as error:
        length_in_angstrom(1.0, unit)
    assert repr(unit) in str(error.value)


@pytest.mark.parametrize("unit", [*UNKNOWN, *(unit for units in LENGTHS.values() for unit in units)])
def test_no_reciprocal(unit):
    expected = "no known reciprocal unit or angle, expected one of .*1/nm, 1/A, 1/pm, rad, mrad, urad"
    with pytest.raises(ValueError, match=expected) as error:
        reciprocal_in_inverse_angstrom(1.0, unit, wavelength=0.02)
    assert repr(unit) in str(error.value)
