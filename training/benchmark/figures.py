"""The benchmark's pictures: the truth beside every method, with the same grey scale in a row or column."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airpi_py4d import optics
from training.benchmark.cases import NOISE_FREE
from training.benchmark.methods import MIDPLANE, NOT_TOLD, PUBLISHED, SUMMED
from training.benchmark.metrics import atom_peaks, fourier_ring_correlation, line_profile, spectrum
from training.benchmark.parts import (
    LIGHTEST,
    TRUTH,
    Results,
    atom_height,
    column_places,
    dose_name,
    scaled_image,
    wedge_profile,
    z_contrast_phases,
)
from training.benchmark.scans import SimulatedScan
from training.reference import BAND

_LIMIT_BYTES = 300_000
_MOLYBDENUM, _SULPHUR = 42, 16


def _pictured(methods: list[str]) -> list[str]:
    """Without the oracles and the variants, for which there is no room."""
    return [method for method in methods if method not in (MIDPLANE, PUBLISHED) and not method.endswith(NOT_TOLD)]


def _save(figure: Any, path: Path) -> None:
    """As a PNG of less than 300 kB: the resolution falls until it fits."""
    for dpi in (110, 90, 75, 60, 50, 40):
        figure.savefig(path, dpi=dpi, pil_kwargs={"optimize": True})
        if path.stat().st_size < _LIMIT_BYTES:
            return


def _grid(rows: int, columns: int, size: float = 1.5) -> tuple[Any, NDArray[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size * columns + 0.6, size * rows + 0.3), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _show(axes: Any, image: NDArray, truth: NDArray, title: str = "", label: str = "") -> None:
    """An image at the truth's grey scale, its mean shifted to the truth's (SSB and DPC know none)."""
    low, high = np.percentile(truth, [0.5, 99.5]) if np.ptp(truth) else (-0.1, 0.1)
    axes.imshow(image - image.mean() + truth.mean(), cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=7)
    axes.set_ylabel(label, fontsize=7)


def _panels(results: Results, scans: list[SimulatedScan], doses: tuple[float, ...], label: Callable[..., str]) -> Any:
    """A row a scan and dose: the truth, then every method, with its xc."""
    methods = _pictured(results.methods(scan.case.name for scan in scans))
    lines = [(scan, amount) for scan in scans for amount in doses if amount in scan.case.doses]
    figure, axes = _grid(len(lines), len(methods) + 1)
    for first, row, (scan, amount) in zip([True, *[False] * (len(lines) - 1)], axes, lines, strict=True):
        _, _, inner = scan.on_grid_of(scan.truth)
        _show(row[0], scan.truth[inner], scan.truth[inner], TRUTH if first else "", label(scan, amount))
        for one, method in zip(row[1:], methods, strict=True):
            image = results.images[scan.case.name, amount].get(method)
            if image is None:
                one.set_axis_off()
                continue
            truth, _, there = scan.on_grid_of(image)
            xc = results.value(scan.case.name, amount, method, "xc")
            _show(one, image[there], truth[there], f"{method}\n{xc:.3f}" if first else f"{xc:.3f}")
    return figure


def _curves(results: Results, name: str, axes: Any) -> None:
    """xc against dose."""
    doses = results.scans[name].case.doses
    for method in _pictured(results.methods([name])):
        axes.plot([results.value(name, amount, method, "xc") for amount in doses], "o-", ms=3, label=method)
    axes.set_xticks(range(len(doses)), [dose_name(amount) for amount in doses], fontsize=7)
    axes.set_xlabel("dose [e/$\\mathrm{\\AA}^2$]", fontsize=7)
    axes.set_title(f"xc, {name}", fontsize=7)
    axes.grid(alpha=0.3)


def sulphur_pair(scan: SimulatedScan) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """A molybdenum column and a pair of sulphur columns beside it [A], the ones with least of the other layer near;
    None if the scan holds none."""
    places, elements = column_places(scan)
    metals = [n for n, one in enumerate(elements) if one == (_MOLYBDENUM,)]
    ligands = [n for n, one in enumerate(elements) if one == (_SULPHUR,)]
    best: tuple[float, int, int] | None = None
    for i in metals:
        for j in ligands:
            if 1.5 < np.linalg.norm(places[i] - places[j]) < 2.1:
                others = np.delete(places, [i, j], axis=0)
                along = np.linspace(places[i], places[j], 5)[:, None]
                free = float(np.linalg.norm(others - along, axis=-1).min(initial=np.inf))
                if best is None or free > best[0]:
                    best = free, i, j
    return None if best is None else (places[best[1]], places[best[2]])


def dose(results: Results, folder: Path) -> None:
    """Images and a line profile of MoS2, and xc of all specimens."""
    scan = results.of("dose")[0]
    doses = tuple(amount for amount in scan.case.doses if amount not in (1e6,))
    _save(_panels(results, [scan], doses, lambda _, amount: dose_name(amount)), folder / "dose.png")
    figure, axes = _grid(1, len(results.of("dose")), 2.4)
    for one, other in zip(axes[0], results.of("dose"), strict=True):
        _curves(results, other.case.name, one)
    axes[0, 0].legend(fontsize=6)
    _save(figure, folder / "dose_xc.png")
    ends = sulphur_pair(scan)
    if ends is None:
        return
    figure, axes = _grid(1, len(doses), 2.4)
    for one, amount in zip(axes[0], doses, strict=True):
        for method, image in ({TRUTH: scan.truth} | results.images[scan.case.name, amount]).items():
            if method == TRUTH or (_pictured([method]) and not method.endswith(SUMMED)):
                truth, pixel, inner = scan.on_grid_of(image)
                shifted = image - image[inner].mean() + truth[inner].mean()
                along, phase = line_profile(shifted, *ends, pixel, 0.6)
                one.plot(along, phase, "k--" if method == TRUTH else "-", lw=1, label=method)
        one.set_title(dose_name(amount), fontsize=7)
        one.set_xlabel("from Mo towards S$_2$ [$\\mathrm{\\AA}$]", fontsize=7)
        one.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=6)
    axes[0, 0].set_ylabel("phase [rad], mean as the truth's", fontsize=7)
    _save(figure, folder / "dose_profile.png")


def super_resolution(results: Results, folder: Path) -> None:
    """Noise-free images, their Fourier transforms with 2 alpha, and the ring correlation."""
    scan = results.of("super-resolution")[0]
    images = {TRUTH: scan.truth} | results.images[scan.case.name, NOISE_FREE]
    methods = [TRUTH, *_pictured([method for method in images if method != TRUTH and not method.endswith(SUMMED)])]
    k0 = optics.aperture_radius(scan.case.energy, scan.case.semiangle)
    figure, axes = _grid(3, len(methods))
    for column, method in zip(axes.T, methods, strict=True):
        truth, pixel, inner = scan.on_grid_of(images[method])
        image, truth = images[method][inner], truth[inner]
        _show(column[0], image, truth, method)
        power = np.log10(np.abs(np.fft.fftshift(spectrum(image))) + 1e-6)
        reach = 0.5 / pixel
        column[1].imshow(power, cmap="gray", extent=(-reach, reach, reach, -reach), vmin=power.max() - 3)
        angle = np.linspace(0, 2 * np.pi, 200)
        column[1].plot(2 * k0 * np.cos(angle), 2 * k0 * np.sin(angle), "r:", lw=0.8)
        limit = min(reach, BAND * k0)
        column[1].set(xticks=[], yticks=[], xlim=(-limit, limit), ylim=(-limit, limit))
        frequencies, correlation = fourier_ring_correlation(image, truth, pixel)
        column[2].plot(frequencies, correlation, lw=1)
        column[2].axvline(2 * k0, color="r", ls=":", lw=0.8)
        column[2].axhline(0.5, color="0.6", lw=0.8)
        column[2].set(xlim=(0, BAND * k0), ylim=(-0.2, 1.05))
        column[2].tick_params(labelsize=6)
        column[2].set_xlabel("1/$\\mathrm{\\AA}$", fontsize=6)
    for row, text in zip(axes, ("phase", "Fourier transform,\n2$\\alpha$ in red", "ring correlation"), strict=True):
        row[0].set_ylabel(text, fontsize=7)
    _save(figure, folder / "super_resolution.png")


def step(results: Results, folder: Path) -> None:
    """Every step at both doses; AIRPI, ptychography and the truth have finer pixels than the scan."""
    scans = results.of("step")
    doses = scans[0].case.doses
    figure = _panels(results, scans, doses, lambda scan, amount: f"{scan.case.step:g} $\\AA$, {dose_name(amount)}")
    _save(figure, folder / "step.png")


def z_contrast(results: Results, folder: Path) -> None:
    """Peak, 3x3 and 5x5 mean against the atomic number, without noise."""
    numbers, phases = z_contrast_phases(results, NOISE_FREE)
    figure, axes = _grid(1, 3, 3.0)
    for one, kind in zip(axes[0], ("peak", "3x3", "5x5"), strict=True):
        for method in [TRUTH, *_pictured([method for method in phases if method != TRUTH])]:
            one.plot(numbers, phases[method][kind], "k--" if method == TRUTH else "o-", lw=0.8, ms=2.5, label=method)
        one.set_title(kind, fontsize=8)
        one.set_xlabel("Z", fontsize=8)
        one.grid(alpha=0.3)
    axes[0, 0].set_ylabel("phase [rad]", fontsize=8)
    axes[0, 0].legend(fontsize=6)
    _save(figure, folder / "z_contrast.png")


def thickness(results: Results, folder: Path) -> None:
    """SrTiO3 by thickness, and the wedge with its long-range profile."""
    scans = sorted(results.of("thickness"), key=lambda scan: np.ptp(scan.places[:, 2]))
    slabs = [scan for scan in scans if "wedge" not in scan.case.name]
    figure = _panels(results, slabs, (NOISE_FREE,), lambda scan, _: scan.case.name.removeprefix("SrTiO3 [001] "))
    _save(figure, folder / "thickness.png")
    for scan in scans:
        if scan in slabs:
            continue
        images = {TRUTH: scan.truth} | results.images[scan.case.name, NOISE_FREE]
        methods = [TRUTH, *_pictured([method for method in images if method != TRUTH])]
        figure, axes = _grid(len(methods) + 1, 1, 1.0)
        figure.set_size_inches(6, 1.1 * len(methods) + 2.4)
        for one, method in zip(axes[:-1, 0], methods, strict=True):
            truth, pixel, inner = scan.on_grid_of(images[method])
            start = images[method][inner[0], : 2 * inner[0].start]
            vacuum = float(np.median(start))
            one.imshow(images[method][inner] - vacuum, cmap="gray", vmin=0, vmax=np.percentile(truth[inner], 99))
            one.set(xticks=[], yticks=[])
            one.set_title(method, fontsize=7)
            profile = wedge_profile(images[method], pixel, scan)
            along = np.arange(len(profile)) * scan.case.step
            axes[-1, 0].plot(along, profile, "k--" if method == TRUTH else "-", lw=1, label=method)
        axes[-1, 0].set_xlabel("$\\mathrm{\\AA}$", fontsize=7)
        axes[-1, 0].set_ylabel("long-range phase [rad]", fontsize=7)
        axes[-1, 0].legend(fontsize=6)
        axes[-1, 0].grid(alpha=0.3)
        _save(figure, folder / "wedge.png")


def repetition(results: Results, folder: Path) -> None:
    """Plain and summed images at the lowest doses."""
    scans = results.of("repetition")
    models = [m for m in results.methods(scan.case.name for scan in scans) if m.startswith("AIRPI")]
    models = _pictured(models)
    lines = [(scan, amount) for scan in scans for amount in scan.case.doses if amount <= 1e3]
    figure, axes = _grid(len(lines), 1 + 2 * len(models))
    for first, row, (scan, amount) in zip([True, *[False] * (len(lines) - 1)], axes, lines, strict=True):
        truth, _, inner = scan.on_grid_of(scan.truth)
        label = f"{scan.case.name.split()[0]}, {dose_name(amount)}"
        _show(row[0], truth[inner], truth[inner], TRUTH if first else "", label)
        images = results.images[scan.case.name, amount]
        for n, model in enumerate(models):
            for one, name in zip(row[1 + 2 * n :], (model, model + SUMMED), strict=False):
                xc = results.value(scan.case.name, amount, name, "xc")
                _show(one, images[name][inner], truth[inner], f"{name}\n{xc:.3f}" if first else f"{xc:.3f}")
    _save(figure, folder / "repetition.png")


def dreaming(results: Results, folder: Path) -> None:
    """Images at 1e3 e/A^2 with atom-like peaks marked in red; the truth with the columns in green."""
    amount, scans = 1e3, results.of("dreaming")
    methods = _pictured(results.methods(scan.case.name for scan in scans))
    figure, axes = _grid(len(scans), len(methods) + 1)
    for first, row, scan in zip([True, *[False] * (len(scans) - 1)], axes, scans, strict=True):
        truth = scan.at_positions(scan.truth)
        _, pixel, inner = scan.on_grid_of(truth)
        truth, height = truth[inner], atom_height(LIGHTEST.get(scan.case.name, "C"), scan)
        _show(row[0], truth, truth, TRUTH if first else "", scan.case.name)
        atoms = scan.places[:, :2] / pixel - inner[0].start
        shown = atoms[((atoms >= 0) & (atoms <= np.array(truth.shape) - 1)).all(1)]
        row[0].plot(shown[:, 1], shown[:, 0], "g.", ms=1)
        for one, method in zip(row[1:], methods, strict=True):
            image = scaled_image(results, scan, amount, method)
            _show(one, image, truth, method if first else "")
            peaks = atom_peaks(image, height, pixel) / pixel
            one.plot(peaks[:, 1], peaks[:, 0], "r.", ms=1)
    _save(figure, folder / "dreaming.png")


#: By part.
FIGURES: dict[str, Callable[[Results, Path], None]] = {
    "dose": dose,
    "super-resolution": super_resolution,
    "step": step,
    "z-contrast": z_contrast,
    "thickness": thickness,
    "repetition": repetition,
    "dreaming": dreaming,
}
