"""py4DSTEM: ``DataCube.airpi_reconstruct``, datacube in, phase image out and into the datacube's tree.

Reads the datacube's calibration, calls the engine and wraps its image. Imports py4DSTEM and emdfile only when called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from airpi_py4d import optics
from airpi_py4d.acquisition import Acquisition
from airpi_py4d.calibration import calibrate
from airpi_py4d.hosts import add_method
from airpi_py4d.units import length_in_angstrom, reciprocal_in_inverse_angstrom

if TYPE_CHECKING:
    from emdfile import Array
    from py4DSTEM import DataCube
    from py4DSTEM.data import Calibration

    from airpi_py4d.model import Model

_METHOD = "airpi_reconstruct"
_ARGUMENT_NAMES = {
    "semiangle": "semiangle_cutoff",
    "scan_step": "force_scan_sampling",
    "k_pixel": "force_reciprocal_sampling",
    "center": "calibration.get_origin_mean()",
    "descan": "calibration.get_origin()",
    "ellipse": "calibration.get_ellipse()",
    "rotation": "force_com_rotation",
    "transpose": "force_com_transpose",
    "bad_pixels": "mask",
}


def attach(module: ModuleType) -> None:
    """Make `airpi_reconstruct` a method of `module.DataCube`, py4DSTEM's."""
    add_method(module.DataCube, airpi_reconstruct)


def airpi_reconstruct(
    self: DataCube,
    energy: float,
    semiangle_cutoff: float | None = None,
    *,
    force_scan_sampling: float | None = None,
    force_angular_sampling: float | None = None,
    force_reciprocal_sampling: float | None = None,
    force_com_rotation: float | None = None,
    force_com_transpose: bool | None = None,
    defocus: float | None = None,
    mask: NDArray[np.bool_] | None = None,
    gain: float | None = None,
    background: float | NDArray[Any] | None = None,
    model: str | Path | Model | None = None,
    device: str = "auto",
    oversample: int | None = None,
    sum_neighbours: int = 1,
    stride: int = 1,
    strict: bool = True,
    name: str = "airpi_phase",
    verbose: bool = True,
    returncalc: bool = True,
) -> Array | None:
    """Reconstruct the phase of the specimen from a datacube with a neural network.

    For every scan position a network sees the 3x3 kernel of adjacent diffraction patterns and predicts the exit wave,
    which is divided by the probe and added to the image, weighted by the probe's intensity [1]_.

    What isn't given is read from ``datacube.calibration``, its origin and ellipse included. What that doesn't say is
    measured from the patterns by `airpi_py4d.calibrate`, never assumed. Beam energy and scan step can't be measured,
    nor semi-angle and size of a detector pixel both. Patterns are read a few scan rows at a time. The datacube's data
    and calibration stay as they are.

    Parameters
    ----------
    energy : float
        Energy of the beam electrons [eV]. py4DSTEM doesn't store it.
    semiangle_cutoff : float, optional
        Convergence semi-angle [mrad]. Default: the calibration's convergence_semiangle_mrad, or else its
        probe_semiangle [px] times the size of a detector pixel, or else measured.
    force_scan_sampling : float, optional
        Distance of neighbouring scan positions, along rows and columns alike [A]. Default: the calibration's
        R_pixel_size and R_pixel_units (A, nm, pm, um, ...).
    force_angular_sampling : float, optional
        Size of a detector pixel [mrad].
    force_reciprocal_sampling : float, optional
        Size of a detector pixel in cycles [1/A]. Default: `force_angular_sampling` over the wavelength, or else the
        calibration's Q_pixel_size and Q_pixel_units (A^-1, 1/nm, mrad, ...), or else measured.
    force_com_rotation : float, optional
        Rotation from the detector to the scan [degrees], as in py4DSTEM's phase classes. Default: the calibration's
        QR_rotation, or else measured.
    force_com_transpose : bool, optional
        Whether detector rows and columns are swapped before the rotation, as in py4DSTEM's phase classes. Default: the
        calibration's QR_flip if it is set or QR_rotation is known, or else measured.
    defocus : float, optional
        [A], positive for underfocus. Default: 0.
    mask : ndarray of bool, optional, shape (detector rows, detector columns)
        True for pixels that are not to be used: hot, dead, in a gap, behind a beam stop. Default: measured; a beam stop
        has to be given.
    gain : float, optional
        What the detector reports for one electron. Default: 1.
    background : float or ndarray, optional
        What the detector reports without electrons; a number or one a pixel. Default: 0.
    model : str, Path or Model, optional
        Name of a shipped model, path of an ONNX file, or a loaded model.
    device : str
        Where the network runs: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"tensorrt"``.
    oversample : int, optional
        Image pixels per scan step. Default: the fewest that make the pixel no larger than the model's.
    sum_neighbours, stride : int
        For few electrons: sum the patterns of `sum_neighbours` x `sum_neighbours` (odd) positions, and reconstruct
        every `stride`-th position.
    strict : bool
        Raise where the data lie far outside of what the model was trained on; False warns instead.
    name : str
        Name of the phase in the datacube's tree. An earlier result of this method of that name is replaced.
    verbose : bool
        Show a progress bar, and print every parameter with its source, the model and the device.
    returncalc : bool
        Return the phase, besides attaching it.

    Returns
    -------
    emdfile.Array of float32 or None
        Phase [rad], shape (rows, columns), dims in A from the first scan position, at pixel (0, 0). In the datacube's
        tree under `name`, and next to it, with the same shape, `name` + "_confidence": the agreement of overlapping
        patches, 0 to 1; of a model that judges its own error also `name` + "_error": the phase's standard deviation
        [rad], infinite where nothing was measured. ``metadata["gen_params"]`` of each says how it was made: every
        parameter with its unit and source, model, software, device. All survive ``py4DSTEM.save`` and need no
        airpi_py4d to be read.

    Raises
    ------
    ValueError
        If a parameter is unknown and can't be measured, given twice or implausible, the data aren't 4D, or something
        else in the datacube's tree has the result's name.

    Warns
    -----
    UserWarning
        If rotation and transposition can't be measured, or the measured bright-field disk contradicts what is given.

    References
    ----------
    .. [1] T. Friedrich, C.-P. Yu, J. Verbeeck, S. Van Aert, Phase object reconstruction for 4D-STEM using deep
       learning, Microsc. Microanal. 29 (2023) 395. https://doi.org/10.1093/micmic/ozac002

    Examples
    --------
    >>> import py4DSTEM  # doctest: +SKIP
    >>> datacube = py4DSTEM.read("scan.h5")  # doctest: +SKIP
    >>> phase = datacube.airpi_reconstruct(300e3, 20, force_scan_sampling=0.2)  # doctest: +SKIP
    >>> print(phase.metadata["gen_params"]["acquisition"])  # what was measured  # doctest: +SKIP
    >>> py4DSTEM.show(phase)  # doctest: +SKIP
    >>> py4DSTEM.show(datacube.tree("airpi_phase_confidence"))  # doctest: +SKIP
    >>> py4DSTEM.show(datacube.tree("airpi_phase_error"))  # of model="airpi-3-fast"  # doctest: +SKIP
    """
    from emdfile import Array, Metadata

    from airpi_py4d import engine

    confidence_name, error_name = f"{name}_confidence", f"{name}_error"
    _check_names(self, name, confidence_name, error_name)
    acquisition = _acquisition(
        self,
        energy=energy,
        semiangle_cutoff=semiangle_cutoff,
        force_scan_sampling=force_scan_sampling,
        force_angular_sampling=force_angular_sampling,
        force_reciprocal_sampling=force_reciprocal_sampling,
        force_com_rotation=force_com_rotation,
        force_com_transpose=force_com_transpose,
        defocus=defocus,
        mask=mask,
        gain=gain,
        background=background,
    )
    result = engine.reconstruct(
        self.data,
        acquisition,
        model=model,
        device=device,
        oversample=oversample,
        sum_neighbours=sum_neighbours,
        stride=stride,
        strict=strict,
        show_progress=verbose,
    )
    provenance = {"_calling_method": _METHOD, "_calling_class": "DataCube", **result.provenance}

    def attached(data: NDArray[np.float32], name: str, units: str) -> Array:
        array = Array(
            data,
            name=name,
            units=units,
            # In full: from two elements emdfile extrapolates with np.arange, which may yield one too many.
            dims=[np.arange(n) * size for n, size in zip(data.shape, result.pixel_size, strict=True)],
            dim_units=["A", "A"],
            dim_names=["Rx", "Ry"],
        )
        array.metadata = Metadata("gen_params", provenance)
        self.attach(array)
        return array

    phase = attached(result.phase, name, "radians")
    attached(result.confidence, confidence_name, "")
    if result.phase_error is not None:
        attached(result.phase_error, error_name, "radians")
    elif error_name in self.treekeys:
        self.tree(error_name).cut()  # of an earlier result
    if verbose:
        print(result.summary())
    return phase if returncalc else None


def _check_names(datacube: DataCube, *names: str) -> None:
    """Refuse names that emdfile can't save, or that would replace something else than an earlier result."""
    for name in names:
        if "/" in name:
            raise ValueError(f"name is {name!r}, expected one without '/', which separates nodes of the tree.")
        if name in datacube.treekeys:
            made = datacube.tree(name).metadata.get("gen_params")
            if made is None or "_calling_method" not in made.keys or made["_calling_method"] != _METHOD:
                raise ValueError(
                    f"The datacube's tree already has {name!r}, which {_METHOD} didn't make. Give another name=..."
                )


def _acquisition(
    datacube: DataCube,
    *,
    energy: float,
    semiangle_cutoff: float | None,
    force_scan_sampling: float | None,
    force_angular_sampling: float | None,
    force_reciprocal_sampling: float | None,
    force_com_rotation: float | None,
    force_com_transpose: bool | None,
    defocus: float | None,
    mask: NDArray[np.bool_] | None,
    gain: float | None,
    background: float | NDArray[Any] | None,
) -> Acquisition:
    """Calibration from arguments, or else the datacube's, or else the patterns."""
    calibration = datacube.calibration
    wavelength = _wavelength(energy)
    argument_names, sources = dict(_ARGUMENT_NAMES), {"energy": "argument"}

    def known(name: str, argument: Any, calibrated: Any) -> Any:
        if argument is not None or calibrated is not None:
            sources[name] = "calibration" if argument is None else "argument"
        return calibrated if argument is None else argument

    def in_inverse_angstrom(value: float, unit: str | None) -> float | None:
        return reciprocal_in_inverse_angstrom(value, unit, wavelength)

    scan_step = force_scan_sampling
    if scan_step is None:
        scan_step = _pixel_size(calibration, "R", length_in_angstrom, "force_scan_sampling [A]")
        if scan_step is None:
            raise ValueError(_unknown_size(calibration, "R", "force_scan_sampling [A]", "which is uncalibrated"))
    known("scan_step", force_scan_sampling, scan_step)

    k_pixel = force_reciprocal_sampling
    if force_angular_sampling is not None:
        if k_pixel is not None:
            raise ValueError("force_angular_sampling and force_reciprocal_sampling are both given, expected one.")
        k_pixel = force_angular_sampling * 1e-3 / wavelength
        argument_names["k_pixel"] = "force_angular_sampling / wavelength"
    calibrated = None
    if k_pixel is None:
        parameter = "force_reciprocal_sampling [1/A] or force_angular_sampling [mrad]"
        calibrated = _pixel_size(calibration, "Q", in_inverse_angstrom, parameter)
    k_pixel = known("k_pixel", k_pixel, calibrated)

    calibrated, radius = calibration.get_convergence_semiangle_mrad(), calibration.get_probe_semiangle()
    if calibrated is None and radius is not None and k_pixel is not None:
        calibrated = radius * k_pixel * wavelength * 1e3

    rotation, flip = calibration.get_QR_rotation(), calibration.get_QR_flip()
    transpose = bool(flip) if flip or rotation is not None else None  # a QR_flip of False alone is py4DSTEM's default
    center, origin = calibration.get_origin_mean(), calibration.get_origin()
    center = None if None in center else center
    return calibrate(
        datacube.data,
        energy=energy,
        semiangle=known("semiangle", semiangle_cutoff, calibrated),
        scan_step=(scan_step, scan_step),
        k_pixel=k_pixel,
        center=known("center", None, center),
        rotation=known("rotation", force_com_rotation, None if rotation is None else math.degrees(rotation)),
        transpose=known("transpose", force_com_transpose, transpose),
        ellipse=known("ellipse", None, _ellipse(calibration)),
        bad_pixels=mask,
        descan=known("descan", None, _descan(origin, center)),
        gain=1.0 if gain is None else gain,
        background=background,
        defocus=0.0 if defocus is None else defocus,
        sources=sources,
        argument_names=argument_names,
    )


def _ellipse(calibration: Calibration) -> tuple[float, float, float] | None:
    """The calibration's elliptical distortion.

    py4DSTEM's Bragg vectors, and so its Q_pixel_size, keep lengths along the second axis, b, and shorten those along
    the first, a, by b / a. `Acquisition` keeps those along the axis that comes first: here b, 90 degrees from a.
    """
    ellipse = calibration.get_ellipse()
    if ellipse is None:
        return None
    a, b, theta = ellipse
    return b, a, math.degrees(theta) + 90


def _descan(origin: Any, center: tuple[float, float] | None) -> NDArray[np.float64] | None:
    """Origin of every position minus the mean; None where the calibration has one for all."""
    if origin is None or center is None or np.ndim(origin[0]) != 2:
        return None
    return np.stack([np.asarray(q, np.float64) - c for q, c in zip(origin, center, strict=True)], axis=-1)


def _wavelength(energy: Any) -> float:
    """Wavelength [A]; NaN for an energy that isn't one, which Acquisition then refuses."""
    try:
        return optics.wavelength(energy) if 0 < energy < math.inf else math.nan
    except TypeError:
        return math.nan


def _pixel_size(
    calibration: Calibration, space: str, convert: Callable[[float, str | None], float | None], parameter: str
) -> float | None:
    """Pixel size of space "R" or "Q" in the parameter's unit; None where it is uncalibrated."""
    size = getattr(calibration, f"get_{space}_pixel_size")()
    units = getattr(calibration, f"get_{space}_pixel_units")()
    try:
        return convert(size, units)
    except ValueError as error:
        problem = f"but {error}".removesuffix(".")
    raise ValueError(_unknown_size(calibration, space, parameter, problem))


def _unknown_size(calibration: Calibration, space: str, parameter: str, problem: str) -> str:
    size = getattr(calibration, f"get_{space}_pixel_size")()
    units = getattr(calibration, f"get_{space}_pixel_units")()
    example = {"R": "A", "Q": "A^-1"}[space]
    return (
        f"{parameter.split()[0]} is unknown, the calibration has {space}_pixel_size {size!r} and "
        f"{space}_pixel_units {units!r}, {problem}. Give {parameter}, or call "
        f"datacube.calibration.set_{space}_pixel_size(...) and set_{space}_pixel_units({example!r})."
    )
