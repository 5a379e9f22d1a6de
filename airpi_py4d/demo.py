"""The demo: AIRPI beside DPC and SSB of py4DSTEM, on a simulated scan that is shipped with its ground truth."""

from __future__ import annotations

import contextlib
import io
import math
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from airpi_py4d.acquisition import Acquisition

if TYPE_CHECKING:
    from py4DSTEM import DataCube

#: Scan positions at each edge that are left out of the comparison with the ground truth.
MARGIN = 4
_SHARED_CALIBRATION = ("energy", "semiangle", "scan_step", "k_pixel", "center", "rotation", "transpose")
_INSTALL = 'The demo needs {}. Install it: pip install "airpi_py4d[demo]".'


def demo_path() -> Path:
    """Path of the shipped scan, a py4DSTEM .h5 file.

    A simulated WS2 monolayer with vacancies and the edge of a second layer, 80 kV, 25 mrad, 1e4 electrons / A^2.
    HyperSpy reads it as well: ``hs.load(demo_path(), file_format="HSPY")``.

    Examples
    --------
    >>> demo_path().name
    'ws2_simulated.h5'
    """
    return Path(__file__).parent / "demo_data" / "ws2_simulated.h5"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep py4DSTEM's prints, progress bars and warnings from the user; leave `warnings` as it was."""
    hidden = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
        warnings.simplefilter("ignore")
        yield


def _import_py4dstem() -> Any:
    try:
        with _quiet():
            import py4DSTEM
            import py4DSTEM.process.phase
    except ImportError as error:
        raise ImportError(_INSTALL.format("py4DSTEM")) from error
    return py4DSTEM


def _calibrated(patterns: NDArray[Any], acquisition: Acquisition) -> DataCube:
    """A datacube of float32, so that py4DSTEM works on a copy, with the acquisition's calibration."""
    rows, columns = acquisition.k_pixel
    if not math.isclose(rows, columns, rel_tol=1e-3):
        raise ValueError(f"k_pixel is {acquisition.k_pixel} 1/A; py4DSTEM expects the same along rows and columns.")
    datacube = _import_py4dstem().DataCube(np.array(patterns, dtype=np.float32))
    step, other_step = acquisition.scan_step
    if not math.isclose(step, other_step, rel_tol=1e-3):
        raise ValueError(f"scan_step is {acquisition.scan_step} A; py4DSTEM expects the same along rows and columns.")
    datacube.calibration.set_R_pixel_size(step)
    datacube.calibration.set_R_pixel_units("A")
    datacube.calibration.set_Q_pixel_size(rows)
    datacube.calibration.set_Q_pixel_units("A^-1")
    return datacube


def _preprocessing(patterns: NDArray[Any], acquisition: Acquisition) -> dict[str, Any]:
    """Arguments of py4DSTEM's preprocess: the known geometry, nothing measured that is known, nothing plotted."""
    shifts = None
    if acquisition.center is not None:
        shifts = tuple(np.full(patterns.shape[:2], value) for value in acquisition.center)
    return {
        "force_com_rotation": acquisition.rotation,
        "force_com_transpose": acquisition.transpose,
        "force_com_shifts": shifts,
        "plot_center_of_mass": None,
        "plot_rotation": False,
    }


def dpc_phase(patterns: NDArray[Any], acquisition: Acquisition) -> NDArray[np.float64]:
    """Phase by differential phase contrast, py4DSTEM's iterative integration of the centre of mass.

    Parameters
    ----------
    patterns : ndarray, shape (scan rows, scan columns, detector rows, detector columns)
        Electron counts; never written to.
    acquisition : Acquisition
        A centre of None lets py4DSTEM fit a plane to the centres of mass.

    Returns
    -------
    ndarray, shape (scan rows, scan columns)
        Phase [rad] at the scan positions, positive for positive projected potential, up to a constant.
    """
    datacube = _calibrated(patterns, acquisition)
    from py4DSTEM.process.phase import DPC

    with _quiet():
        dpc = DPC(datacube, energy=acquisition.energy, verbose=False)
        dpc.preprocess(**_preprocessing(patterns, acquisition))
        dpc.reconstruct(progress_bar=False)
    return 2 * np.pi * np.asarray(dpc.object_phase, dtype=np.float64)


def ssb_phase(patterns: NDArray[Any], acquisition: Acquisition) -> NDArray[np.float64]:
    """Phase by single-sideband ptychography of py4DSTEM, with the known aberrations compensated.

    Parameters
    ----------
    patterns : ndarray, shape (scan rows, scan columns, detector rows, detector columns)
        Electron counts; never written to.
    acquisition : Acquisition
        A centre of None lets py4DSTEM fit a plane to the centres of mass.

    Returns
    -------
    ndarray, shape (scan rows, scan columns)
        Phase [rad] at the scan positions, positive for positive projected potential.
    """
    datacube = _calibrated(patterns, acquisition)
    from py4DSTEM.process.phase import SSB

    with _quiet():
        ssb = SSB(
            energy=acquisition.energy,
            datacube=datacube,
            semiangle_cutoff=acquisition.semiangle,
            rolloff=0.0,
            polar_parameters={"C10": -acquisition.defocus, "C30": acquisition.spherical_aberration},
            verbose=False,
        )
        ssb.preprocess(plot_overlap_trotters=False, **_preprocessing(patterns, acquisition))
        ssb.reconstruct(num_jobs=1, progress_bar=False)
    return np.angle(ssb.object).astype(np.float64)


def _correlation(image: NDArray[Any], truth: NDArray[Any]) -> float:
    """Pearson's correlation without the MARGIN at the edges."""
    inner = (slice(MARGIN, -MARGIN),) * 2
    return float(np.corrcoef(np.ravel(image[inner]), np.ravel(truth[inner]))[0, 1])


def _plot(path: Path, datacube: DataCube, pixel_size: float, scores: dict[str, dict[str, float]]) -> None:
    """Images of the comparison, with scale bars and colour bars."""
    from matplotlib import patheffects
    from matplotlib.figure import Figure

    step, k_pixel = datacube.calibration.get_R_pixel_size(), datacube.calibration.get_Q_pixel_size()
    images = {name: datacube.tree(name).data for name in datacube.treekeys}
    mean = np.log10(1e-3 + np.mean(datacube.data, axis=(0, 1)))
    angstrom, inverse = (4.0, "\u00c5"), (0.5, "\u00c5$^{-1}$")
    panels = (
        (f"AIRPI, xc {scores['AIRPI']['xc']:.3f}", images["airpi_phase"], pixel_size, angstrom, "phase [rad]"),
        ("AIRPI's estimate of its error", images["airpi_phase_error"], pixel_size, angstrom, "error [rad]"),
        ("ground truth", images["phase_truth"], step, angstrom, "phase [rad]"),
        (f"DPC, xc {scores['DPC']['xc']:.3f}", images["dpc_phase"], step, angstrom, "phase [rad]"),
        (f"SSB, xc {scores['SSB']['xc']:.3f}", images["ssb_phase"], step, angstrom, "phase [rad]"),
        ("mean diffraction pattern", mean, k_pixel, inverse, "log$_{10}$ electrons"),
    )
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    outline = [patheffects.withStroke(linewidth=4, foreground="black")]
    for axes, (title, image, pixel, (length, unit), label) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        height, width = (n * pixel for n in image.shape)
        shown = axes.imshow(image, cmap="magma", extent=(0, width, height, 0))
        left, bottom = 0.05 * width, 0.95 * height
        axes.plot([left, left + length], [bottom] * 2, "w", lw=3, solid_capstyle="butt", path_effects=outline)
        axes.text(
            left + length / 2,
            bottom - 0.03 * height,
            f"{length:g} {unit}",
            color="white",
            ha="center",
            path_effects=outline,
        )
        axes.set_title(title)
        axes.set_axis_off()
        figure.colorbar(shown, ax=axes, label=label, shrink=0.8)
    figure.suptitle("Simulated WS$_2$ with vacancies and the edge of a second layer; the same counts for every method")
    figure.savefig(path, dpi=120)


def run(output: Path, device: str) -> dict[str, dict[str, float]]:
    """Reconstruct the shipped scan, print the comparison and write ``airpi_demo.png`` and ``airpi_demo.h5``.

    Parameters
    ----------
    output : Path
        Folder, made if it isn't there. Of the files in it only those two are replaced.
    device : str
        See `airpi_py4d.model.Model`.

    Returns
    -------
    dict of str to dict
        For AIRPI, DPC and SSB: `xc`, Pearson's correlation with the ground truth without MARGIN, and `seconds`.

    Raises
    ------
    ImportError
        If py4DSTEM, matplotlib or ONNX Runtime is missing; says what to install.
    """
    py4dstem = _import_py4dstem()
    from emdfile import Array

    if find_spec("matplotlib") is None:
        raise ImportError(_INSTALL.format("matplotlib"))
    output.mkdir(parents=True, exist_ok=True)
    with _quiet():
        datacube = py4dstem.read(str(demo_path()))
    simulation, truth = datacube.metadata["simulation"], datacube.tree("phase_truth")
    print(
        f"{simulation['specimen']}; simulated, {simulation['dose_electrons_per_A2']:g} electrons / A^2\n{demo_path()}"
    )

    started = time.perf_counter()
    airpi = datacube.airpi_reconstruct(simulation["energy_eV"], device=device)
    seconds = {"AIRPI": time.perf_counter() - started}
    made = airpi.metadata["gen_params"]
    acquisition = Acquisition(**{name: made["acquisition"][name]["value"] for name in _SHARED_CALIBRATION})
    down, right = made["oversample"]
    images = {"AIRPI": airpi.data[::down, ::right]}
    for name, method in (("DPC", dpc_phase), ("SSB", ssb_phase)):
        started = time.perf_counter()
        images[name] = method(datacube.data, acquisition)
        seconds[name] = time.perf_counter() - started
        phase = Array(
            images[name].astype(np.float32),
            name=f"{name.lower()}_phase",
            units="radians",
            dims=truth.dims,
            dim_units=truth.dim_units,
            dim_names=truth.dim_names,
        )
        datacube.attach(phase)

    scores = {name: {"xc": _correlation(image, truth.data), "seconds": seconds[name]} for name, image in images.items()}
    print(f"\nxc: correlation with the ground truth, without {MARGIN} positions at each edge")
    print(f"{'':8}{'xc':>8}{'seconds':>10}{'positions/s':>14}")
    for name, score in scores.items():
        print(f"{name:8}{score['xc']:8.3f}{score['seconds']:10.2f}{truth.data.size / score['seconds']:14.0f}")
    files = {suffix: output / f"airpi_demo.{suffix}" for suffix in ("png", "h5")}
    _plot(files["png"], datacube, made["pixel_size"][0], scores)
    with _quiet():
        py4dstem.save(str(files["h5"]), datacube, mode="o", tree=None)
    print("\nWritten:", *files.values(), sep="\n")
    return scores
