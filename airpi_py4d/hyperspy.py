"""HyperSpy and pyxem: ``Signal2D.airpi``, 4D-STEM signal in, phase image out.

Reads the calibration off metadata and axes, calls the engine and wraps its image. Imports HyperSpy only when called.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from airpi_py4d import engine, optics
from airpi_py4d.acquisition import Acquisition
from airpi_py4d.calibration import calibrate
from airpi_py4d.hosts import add_method
from airpi_py4d.result import Reconstruction
from airpi_py4d.units import length_in_angstrom, reciprocal_in_inverse_angstrom

if TYPE_CHECKING:
    from hyperspy.signals import ComplexSignal2D, Signal2D

    from airpi_py4d.model import Model

_TEM = "Acquisition_instrument.TEM"
_ARGUMENT_NAMES = {
    "energy": "beam_energy",
    "semiangle": "convergence_angle",
    "k_pixel": "k_step",
    "transpose": "flip",
    "bad_pixels": "mask",
}


def attach(module: ModuleType) -> None:
    """Make `airpi` a method of `module.Signal2D`, HyperSpy's, and so of every class that derives from it."""
    add_method(module.Signal2D, airpi)


def airpi(
    self: Signal2D,
    *,
    beam_energy: float | None = None,
    convergence_angle: float | None = None,
    scan_step: float | tuple[float, float] | None = None,
    k_step: float | tuple[float, float] | None = None,
    center: tuple[float, float] | None = None,
    rotation: float | None = None,
    flip: bool | None = None,
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
    return_complex: bool = False,
    show_progressbar: bool | None = None,
) -> Signal2D | ComplexSignal2D:
    """Reconstruct the phase of the specimen from a 4D-STEM signal with a neural network.

    For every scan position a network sees the 3x3 kernel of adjacent diffraction patterns and predicts the exit wave,
    which is divided by the probe and added to the image, weighted by the probe's intensity [1]_.

    The signal has two navigation axes (x, y) and two signal axes (kx, ky). What isn't given is read off the signal.
    What that doesn't say is measured from the patterns by `airpi_py4d.calibrate`, never assumed. Beam energy and scan
    step can't be measured, nor semi-angle and size of a detector pixel both. A lazy signal is read a few scan rows at a
    time. The signal itself stays as it is.

    Parameters
    ----------
    beam_energy : float, optional
        Energy of the beam electrons [keV]. Default: ``metadata.Acquisition_instrument.TEM.beam_energy``.
    convergence_angle : float, optional
        Convergence semi-angle [mrad]. Default: ``metadata.Acquisition_instrument.TEM.convergence_angle``, or else
        measured.
    scan_step : float or (float, float), optional
        Distance of neighbouring scan positions, from row to row (y) and from column to column (x) if they differ [A].
        Default: scale and units of the navigation axes.
    k_step : float or (float, float), optional
        Size of a detector pixel, of its rows (ky) and columns (kx) if they differ, in cycles [1/A]. Default: scale and
        units (1/A, 1/nm, mrad, ...) of the signal axes, or else measured. The camera length is not used.
    center : (float, float), optional
        Row and column of the optical axis on the detector [px], the first pixel's centre being (0, 0). Default: where
        calibrated signal axes with an offset are zero, if that lies on the detector; otherwise it is measured from
        the bright-field disk.
    rotation : float, optional
        Rotation from the detector to the scan [degrees]. Default: measured.
    flip : bool, optional
        Whether detector rows and columns are swapped before the rotation. Default: measured.
    defocus : float, optional
        [A], positive for underfocus. Default: 0.
    mask : ndarray of bool, optional, shape (ky, kx)
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
    return_complex : bool, optional
        Return the complex object instead of its phase.
    show_progressbar : bool, optional
        Default: ``hyperspy.api.preferences.General.show_progressbar``.

    Returns
    -------
    Signal2D of float32, or ComplexSignal2D of complex64 if `return_complex`
        Phase [rad] or object (its modulus is the agreement of overlapping patches, 0 to 1), shape (y, x), axes in Å.
        Pixel (0, 0) is the first scan position. ``metadata.AiRPI`` says how it was made: every parameter with its unit
        and source, model, software, and the image's median confidence as ``confidence_median``. Of a model that judges
        its own error, ``get_noise_variance()`` of the phase is its square [rad^2], an image too, infinite where nothing
        was measured, and ``metadata.AiRPI.phase_error_median`` its median [rad].

    Raises
    ------
    ValueError
        If the signal hasn't two navigation and two signal axes, an axis isn't uniform and ascending, or a parameter is
        unknown and can't be measured, or implausible.

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
    >>> import hyperspy.api as hs  # doctest: +SKIP
    >>> s = hs.load("scan.hspy", lazy=True)  # doctest: +SKIP
    >>> phase = s.airpi(beam_energy=300, convergence_angle=20, scan_step=0.2)  # doctest: +SKIP
    >>> phase.plot()  # doctest: +SKIP
    >>> (phase.get_noise_variance() ** 0.5).plot()  # its error, of model="airpi-3-fast"  # doctest: +SKIP
    """
    import hyperspy.api as hs

    axes = _scan_and_detector_axes(self)
    data = self.data.transpose(tuple(axis.index_in_array for axis in axes))
    acquisition = _acquisition(
        self,
        data,
        axes,
        beam_energy=beam_energy,
        convergence_angle=convergence_angle,
        scan_step=scan_step,
        k_step=k_step,
        center=center,
        rotation=rotation,
        flip=flip,
        defocus=defocus,
        mask=mask,
        gain=gain,
        background=background,
    )
    result = engine.reconstruct(
        data,
        acquisition,
        model=model,
        device=device,
        oversample=oversample,
        sum_neighbours=sum_neighbours,
        stride=stride,
        strict=strict,
        show_progress=hs.preferences.General.show_progressbar if show_progressbar is None else show_progressbar,
    )
    return _image(self, axes, result, acquisition.scan_step, return_complex)


def _scan_and_detector_axes(signal: Signal2D) -> tuple[Any, Any, Any, Any]:
    """Axes of scan rows, scan columns, detector rows and detector columns (y, x, ky, kx)."""
    navigation, detector = signal.axes_manager.navigation_axes, signal.axes_manager.signal_axes
    if len(navigation) != 2 or len(detector) != 2:
        shown = " | ".join(", ".join(f"{axis}: {axis.size}" for axis in axes) for axes in (navigation, detector))
        raise ValueError(f"airpi needs two navigation and two signal axes (x, y | kx, ky), got ({shown}).")
    for axis in (*navigation, *detector):
        if not axis.is_uniform:
            raise ValueError(f"{axis} is not uniform, airpi needs axes with a scale. Use s.interpolate_on_axis.")
        if not axis.scale > 0:
            raise ValueError(
                f"{axis} has scale {axis.scale:g}, airpi needs ascending axes. Reverse the data or the sign."
            )
    return navigation[1], navigation[0], detector[1], detector[0]


def _acquisition(
    signal: Signal2D,
    data: Any,
    axes: tuple[Any, Any, Any, Any],
    *,
    beam_energy: float | None,
    convergence_angle: float | None,
    scan_step: float | tuple[float, float] | None,
    k_step: float | tuple[float, float] | None,
    center: tuple[float, float] | None,
    rotation: float | None,
    flip: bool | None,
    defocus: float | None,
    mask: NDArray[np.bool_] | None,
    gain: float | None,
    background: float | NDArray[Any] | None,
) -> Acquisition:
    """Calibration from arguments, or else metadata and axes, or else the patterns."""
    y, x, ky, kx = axes
    sources = {}
    if beam_energy is None:
        beam_energy, sources["energy"] = _from_metadata(signal, "beam_energy"), "metadata"
    if beam_energy is None:
        raise ValueError(
            f"beam_energy is unknown, the signal has no metadata.{_TEM}.beam_energy. "
            f'Give beam_energy [keV] or call s.metadata.set_item("{_TEM}.beam_energy", beam_energy).'
        )
    energy = _energy(beam_energy, sources.setdefault("energy", "argument"))
    in_inverse_angstrom = functools.partial(reciprocal_in_inverse_angstrom, wavelength=optics.wavelength(energy))

    if convergence_angle is None:
        convergence_angle, sources["semiangle"] = _from_metadata(signal, "convergence_angle"), "metadata"
    if scan_step is None:
        sources["scan_step"] = "axes"
        scan_step = _scan_step(y), _scan_step(x)
    if k_step is None:
        rows, columns = (_scale(axis, "k_step [1/A]", in_inverse_angstrom) for axis in (ky, kx))
        if rows is not None and columns is not None:
            k_step, sources["k_pixel"] = (rows, columns), "axes"
    if center is None:
        center, sources["center"] = _zero(ky, kx, in_inverse_angstrom), "axes"
    return calibrate(
        data,
        energy=energy,
        semiangle=convergence_angle,
        scan_step=scan_step,
        k_pixel=k_step,
        center=center,
        rotation=rotation,
        transpose=flip,
        bad_pixels=mask,
        gain=1.0 if gain is None else gain,
        background=background,
        defocus=0.0 if defocus is None else defocus,
        sources=sources,
        argument_names=_ARGUMENT_NAMES,
    )


def _from_metadata(signal: Signal2D, name: str) -> Any:
    """Item of the microscope's metadata, or None."""
    return signal.metadata.get_item(f"{_TEM}.{name}")


def _energy(beam_energy: Any, source: str) -> float:
    """Energy [eV] from [keV]."""
    try:
        value = float(beam_energy)
    except (TypeError, ValueError):
        raise ValueError(f"beam_energy is {beam_energy!r} ({source}), expected a number in keV.") from None
    if not 10 <= value <= 1000:
        hint = f" For {value:g} eV give beam_energy={value / 1e3:g}." if 1e4 <= value <= 1e6 else ""
        raise ValueError(f"beam_energy is {value:g} keV ({source}), expected 10 to 1000 keV.{hint}")
    return value * 1e3


def _scale(axis: Any, parameter: str, convert: Callable[[float, str | None], float | None]) -> float | None:
    """Scale of an axis in the parameter's unit; None where it is uncalibrated."""
    try:
        return convert(axis.scale, axis.units)
    except ValueError as error:
        problem = f"but {error}".removesuffix(".")
    raise ValueError(_unknown(axis, parameter, problem))


def _scan_step(axis: Any) -> float:
    """Scale of a navigation axis [A]."""
    step = _scale(axis, "scan_step [A]", length_in_angstrom)
    if step is None:
        raise ValueError(_unknown(axis, "scan_step [A]", "which is uncalibrated"))
    return step


def _unknown(axis: Any, parameter: str, problem: str) -> str:
    kind = "navigation" if axis.navigate else "signal"
    return (
        f"{parameter.split()[0]} is unknown, {kind} axis {axis} has scale {axis.scale:g} and units {axis.units!r}, "
        f"{problem}. Give {parameter} or set scale and units of s.axes_manager.{kind}_axes."
    )


def _zero(ky: Any, kx: Any, convert: Callable[[float, str | None], float | None]) -> tuple[float, float] | None:
    """Row and column [px] where the signal axes are zero; None where they don't say."""
    for axis in (ky, kx):
        try:
            calibrated = convert(axis.scale, axis.units) is not None
        except ValueError:
            calibrated = False
        if not calibrated or axis.offset == 0 or not -0.5 <= -axis.offset / axis.scale <= axis.size - 0.5:
            return None
    return -ky.offset / ky.scale, -kx.offset / kx.scale


def _image(
    signal: Signal2D,
    axes: tuple[Any, Any, Any, Any],
    result: Reconstruction,
    scan_step: tuple[float, float],
    return_complex: bool,
) -> Signal2D | ComplexSignal2D:
    """HyperSpy's signal of the result, with the original's metadata and place in the scan."""
    import hyperspy.api as hs

    data = result.object if return_complex else result.phase
    image_axes = [
        {
            "name": name,
            "size": size,
            "units": "Å",
            "scale": pixel,
            # In steps first, so that the images of slices and of the whole scan share their coordinates.
            "offset": axis.offset / axis.scale * step,
        }
        for name, size, axis, pixel, step in zip("yx", data.shape, axes[:2], result.pixel_size, scan_step, strict=True)
    ]
    image = (hs.signals.ComplexSignal2D if return_complex else hs.signals.Signal2D)(data, axes=image_axes)
    for node in ("General", "Sample", "Acquisition_instrument"):
        if signal.metadata.has_item(node):
            image.metadata.set_item(node, copy.deepcopy(signal.metadata.get_item(node).as_dictionary()))
    title = signal.metadata.get_item("General.title", default="")
    image.metadata.set_item("General.title", f"{title} AIRPI {'object' if return_complex else 'phase'}".strip())
    image.metadata.set_item("Signal.quantity", "Object" if return_complex else "Phase (rad)")
    image.metadata.set_item("AiRPI", {**result.provenance, "confidence_median": float(np.median(result.confidence))})
    if result.phase_error is not None:
        image.metadata.set_item("AiRPI.phase_error_median", float(np.median(result.phase_error)))
        if not return_complex:
            image.set_noise_variance(hs.signals.Signal2D(result.phase_error**2, axes=image_axes))
    return image
