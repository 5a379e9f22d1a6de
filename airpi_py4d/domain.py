"""Whether an acquisition lies in the domain that a model was trained on, and what to expect where it doesn't."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from airpi_py4d import optics
from airpi_py4d.acquisition import Acquisition
from airpi_py4d.checks import warn_user
from airpi_py4d.kernels import kernel_spacing
from airpi_py4d.model import Contract
from airpi_py4d.patterns import detector_to_scan

#: Domain of a model whose metadata say nothing.
_DEFAULTS = {"coverage": (1.05, math.inf)}
#: Of the scan: from there on the number of electrons can be judged.
_EARLY_PART = 1 / 8


@dataclass(frozen=True)
class _Parameter:
    """One parameter of the domain.

    Attributes
    ----------
    unit : str
    below, above : str
        What to expect of values smaller and larger than those of the training.
    far : (float, float)
        Far outside begins at the smallest trained value over the first factor, at the largest times the second.
    margin : float
        Added beyond that, in the parameter's unit, for parameters whose range goes through zero.
    """

    unit: str
    below: str
    above: str
    far: tuple[float, float] = (1.0, 1.0)
    margin: float = 0.0


_OTHER_PROBE = (
    "The probe is unlike any in training: expect blur, rings and false atoms. Focus the probe, and give its true "
    "aberrations."
)
_PARAMETERS = {
    "energy": _Parameter(
        " eV",
        "Slow electrons are scattered more strongly than any in training: expect a wrong phase scale, and images that "
        "fold where the phase passes pi.",
        "Fast electrons are scattered more weakly than any in training: expect a wrong phase scale, and weak objects "
        "to fade.",
        far=(2, 2),
    ),
    "semiangle": _Parameter(
        " mrad",
        "The probe is wide and spans many atoms: expect merged and false atoms and a wrong phase scale.",
        "The depth of focus is small, and the specimen's thickness shows: expect blur and a wrong phase scale.",
        far=(2, 2),
    ),
    "relative_scan_step": _Parameter(
        " lambda / alpha",
        "Neighbouring patterns hardly differ but by their noise: expect a noisier image than the dose allows. Take "
        "every second position with stride=2, and sum with sum_neighbours=3.",
        "Neighbouring probes hardly overlap: expect gaps and false atoms between the positions (Friedrich et al. 2023, "
        "figure 6). Scan with a smaller step.",
        far=(4, 2),
    ),
    "coverage": _Parameter(
        " radii",
        "The detector cuts the bright-field disk: expect false phase gradients and a wrong phase scale. Check the "
        "centre and the k-pixel, or record with a shorter camera length.",
        "The detector reaches further than any in training: expect noise from its rim.",
        far=(1.25, 4),
    ),
    "electrons_per_pattern": _Parameter(
        "",
        "Expect a phase that is too small, fading atoms, and noise that looks like atoms. Sum neighbouring patterns "
        "with sum_neighbours=3. Data that are not counts, normalised simulations for instance, must be scaled: give "
        "gain, the detector's units for one electron.",
        "Data that are not counts must be scaled: give gain, the detector's units for one electron. Expect noise to "
        "be taken for structure.",
        far=(2, 10),
    ),
    "defocus_phase": _Parameter(" rad", _OTHER_PROBE, _OTHER_PROBE, margin=math.pi),
    "spherical_phase": _Parameter(" rad", _OTHER_PROBE, _OTHER_PROBE, margin=math.pi),
}


def coverage(detector_shape: tuple[int, int], acquisition: Acquisition) -> float:
    r"""How far the detector reaches from the optical axis, towards its nearest edge [radii of the bright-field disk].

    With k = M (d - c) of `airpi_py4d.patterns.detector_to_scan`, the edge where row or column d_i is e lies at the
    distance :math:`|e - c_i| / |(M^{-1})_i|`, (M^-1)_i row i of the inverse. Descan moves c.

    Parameters
    ----------
    detector_shape : (int, int)
        Rows and columns [px].
    acquisition : Acquisition
        With a centre.

    Returns
    -------
    float
        Below 1 the disk is cut; negative if the axis lies beside the detector.

    Examples
    --------
    >>> k0 = optics.aperture_radius(300e3, 20.0)
    >>> round(coverage((64, 48), Acquisition(300e3, 20.0, 0.2, (k0 / 12, k0 / 12), center=(31.5, 23.5))), 6)
    2.0
    """
    if acquisition.center is None:
        raise ValueError("center is None; give it, or measure it with airpi_py4d.calibrate.")
    descan = np.zeros((1, 2)) if acquisition.descan is None else acquisition.descan.reshape(-1, 2)
    center = np.array(acquisition.center)
    before = center + descan.min(axis=0) + 0.5
    behind = np.array(detector_shape) - 0.5 - center - descan.max(axis=0)
    pixels_per_k = np.linalg.norm(np.linalg.inv(detector_to_scan(acquisition)), axis=1)
    return float((np.minimum(before, behind) / pixels_per_k).min() / acquisition.aperture_radius)


def check_acquisition(
    contract: Contract, detector_shape: tuple[int, int], acquisition: Acquisition, *, strict: bool = True
) -> list[str]:
    """Compare an acquisition's geometry with the model's training domain.

    Parameters
    ----------
    contract : Contract
        Its `domain` may have `energy` [eV], `semiangle` [mrad], `relative_scan_step` [lambda / alpha], `coverage`
        [radii of the bright-field disk, see `coverage`], `defocus_phase` and `spherical_phase` [rad at the aperture's
        edge].
        A coverage of at least 1.05 is wanted of every model that says nothing of it.
    detector_shape : (int, int)
        Rows and columns [px].
    acquisition : Acquisition
        With a centre, and the scan step of what is reconstructed.
    strict : bool
        Whether to raise for values far outside: beyond twice the range for energy and semi-angle; a scan step smaller
        than a quarter of, or larger than twice the range; a coverage smaller by a factor of 1.25; aberrations larger by
        pi at the aperture's edge.

    Returns
    -------
    list of str
        The warnings.

    Raises
    ------
    ValueError
        If `strict` and a value is far outside.

    Examples
    --------
    >>> contract = Contract("example", "1", 64, 12.0, 16, {"energy": (30e3, 80e3)})
    >>> check_acquisition(contract, (64, 64), Acquisition(300e3, 20.0, 0.2, (0.08, 0.08), center=(32, 32)))
    Traceback (most recent call last):
        ...
    ValueError: energy is 3e+05 eV, far outside of 3e+04 to 8e+04 eV, the range that model example was trained on. \
Fast electrons are scattered more weakly than any in training: expect a wrong phase scale, and weak objects to fade. \
strict=False reconstructs all the same.
    """
    k0 = acquisition.aperture_radius
    defocus = float(optics.aberration_phase(k0**2, acquisition.energy, defocus=acquisition.defocus))
    spherical = optics.aberration_phase(
        k0**2, acquisition.energy, spherical_aberration=acquisition.spherical_aberration
    )
    called = {name: acquisition.argument_names.get(name, name) for name in acquisition.__dataclass_fields__}
    row_step, column_step = acquisition.scan_step
    spacing = (1, 1) if contract.kernel_side == 1 else kernel_spacing(acquisition.scan_step)
    step_subject = f"{called['scan_step']} is {row_step:.4g} A,"
    if row_step != column_step:
        within = "in the kernels up to" if contract.kernel_side > 1 else "up to"
        step_subject = f"{called['scan_step']} is ({row_step:.4g}, {column_step:.4g}) A, {within}"
    steps = np.multiply(acquisition.scan_step, spacing) * k0
    values = [
        ("energy", f"{called['energy']} is", acquisition.energy),
        ("semiangle", f"{called['semiangle']} is", acquisition.semiangle),
        ("relative_scan_step", step_subject, float(steps.max())),
        ("coverage", "The detector reaches from the optical axis to", coverage(detector_shape, acquisition)),
        ("defocus_phase", f"{called['defocus']} is {acquisition.defocus:.4g} A, at the aperture's edge", defocus),
        (
            "spherical_phase",
            f"{called['spherical_aberration']} is {acquisition.spherical_aberration:.4g} A, at the aperture's edge",
            float(spherical),
        ),
    ]
    judged = [_judge(contract, name, subject, value) for name, subject, value in values]
    return _tell(judged, strict)


class ElectronCheck:
    """Collects the electrons of every pattern and compares their median with the model's training domain.

    Parameters
    ----------
    contract : Contract
        Its `domain` may have `electrons_per_pattern`.
    scan_shape : (int, int)
    summed : int
        Patterns that are summed to one before the model sees it.
    strict : bool
        Whether to raise for a median of less than half the smallest or more than ten times the largest of the domain.

    Examples
    --------
    >>> contract = Contract("example", "1", 64, 12.0, 16, {"electrons_per_pattern": (2, 1e7)})
    >>> check = ElectronCheck(contract, (3, 3))
    >>> for _ in range(3):
    ...     check.add(np.array([9.0, 10.0, 0.0]), np.array([False, False, True]))
    >>> check.finish(), check.median
    ([], 9.5)
    """

    def __init__(
        self, contract: Contract, scan_shape: tuple[int, int], summed: int = 1, *, strict: bool = True
    ) -> None:
        self._contract, self._summed, self._strict = contract, summed, strict
        # of the positions that aren't missing, as they come; memory that isn't there before it is written to
        self._electrons = np.empty(math.prod(scan_shape), np.float32)
        self._added = self._counted = 0
        self._early = _EARLY_PART * self._electrons.size

    @property
    def median(self) -> float:
        """Electrons in the pattern that the model sees, median over the positions that aren't missing; NaN without."""
        counted = self._electrons[: self._counted]
        return float(np.median(counted)) * self._summed if counted.size else math.nan

    def _judgement(self) -> tuple[str, bool]:
        return _judge(self._contract, "electrons_per_pattern", "The electrons per pattern are", self.median)

    def add(self, electrons: NDArray[np.floating], missing: NDArray[np.bool_] | None = None) -> None:
        """Add patterns; raises as soon as an eighth of the scan is far outside.

        Parameters
        ----------
        electrons : ndarray, shape (n,)
            In each pattern on the model's grid.
        missing : ndarray of bool, shape (n,), optional
            Patterns that don't count.
        """
        counted = electrons if missing is None else electrons[~missing]
        self._electrons[self._counted : self._counted + len(counted)] = counted
        self._counted += len(counted)
        before, self._added = self._added, self._added + len(electrons)
        if before < self._early <= self._added and self._strict:
            message, far = self._judgement()
            if far:
                _tell([(message, far)], self._strict)

    def finish(self) -> list[str]:
        """Judge the whole scan: warns or raises, returns the warnings."""
        return _tell([self._judgement()], self._strict)


def _judge(contract: Contract, name: str, subject: str, value: float) -> tuple[str, bool]:
    """Message, empty inside the domain, and whether the value is far outside."""
    low, high = contract.domain.get(name, _DEFAULTS.get(name, (-math.inf, math.inf)))
    if math.isnan(value) or low - 1e-3 * abs(low) <= value <= high + 1e-3 * abs(high):
        return "", False
    parameter = _PARAMETERS[name]
    smallest = low / parameter.far[0] - parameter.margin
    largest = high * parameter.far[1] + parameter.margin
    far = not smallest - 1e-3 * abs(smallest) <= value <= largest + 1e-3 * abs(largest)
    trained = f"{low:.4g} to {high:.4g}{parameter.unit}, the range that model {contract.name} was trained on"
    if name not in contract.domain:
        trained = f"{low:.4g}{parameter.unit} and more"
    return (
        f"{subject} {value:.4g}{parameter.unit}, {'far ' if far else ''}outside of {trained}. "
        f"{parameter.below if value < low else parameter.above}",
        far,
    )


def _tell(judged: list[tuple[str, bool]], strict: bool) -> list[str]:
    """Raise what is far outside if `strict`, warn of the rest."""
    refused = [message for message, far in judged if far and strict]
    if refused:
        raise ValueError(" ".join([*refused, "strict=False reconstructs all the same."]))
    messages = [message for message, _ in judged if message]
    for message in messages:
        warn_user(message)
    return messages
