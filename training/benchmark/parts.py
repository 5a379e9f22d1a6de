"""The paper's figures as rows of a table, one function a part; each says what it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from textwrap import fill
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from airpi_py4d import optics
from training.benchmark.cases import DOSES, NOISE_FREE
from training.benchmark.methods import MIDPLANE, PUBLISHED, SUMMED
from training.benchmark.metrics import (
    REACH,
    atom_phases,
    closest_resolved,
    columns_of,
    false_peaks,
    fourier_ring_correlation,
    power_beyond,
    rank_and_slope,
    resolved_frequency,
    resolved_pairs,
    sampled,
    scores,
    smooth_profile,
)
from training.benchmark.scans import SimulatedScan
from training.reference import BAND, projected_phase

TRUTH = "truth"
#: Nearest atoms of graphene's layers, for pairs that can be resolved at all [A].
LONGEST_PAIR = 1.5
#: Along a wedge: standard deviation of the Gaussian that leaves the thickness [A].
SMOOTHING = 1.5
#: No image is magnified more than by the inverse of it, before its peaks are counted.
SMALLEST_SLOPE = 0.2
#: Dreaming cases whose scale is measured on another one, of the same beam; and whose lightest atom isn't C.
SCALE_OF = {"amorphous carbon": "graphene with vacancies", "vacuum": "graphene with vacancies"}
LIGHTEST = {"WS2 with vacancies": "S"}


_XC = "xc with the truth:"
_SCALE = """
Slope against the truth (1 is right) / mean phase [rad], nothing normalised; SSB and DPC know no mean. The truth's
means: {means}.
"""
_DOSE = """
Figure 10: the image against the number of electrons: how early it fades, and whether the phase keeps its scale. Beams
and steps: {beams}.
"""
_SUPER_RESOLUTION = """
Figure 4: what lies beyond 2 alpha, the limit of the bright field, and agrees with the truth. Up to which frequency the
Fourier ring correlation (FRC) stays above 0.5; the correlation of all that lies between 2 alpha and the scan's Nyquist
frequency; the power of the part along the truth over the truth's; and the distance from which on nine of ten
neighbouring columns are parted by a dip of a tenth. SSB and DPC end at the scan's Nyquist frequency, the others at
2.67 alpha, where the truth ends.
"""
_STEP = """
Figure 6: MgO at larger and larger steps, compared at the scan positions. From 0.4 A on the positions sample the object
no longer up to 2 alpha.
"""
_Z_CONTRAST = """
Figure 7: {count} single atoms of Z = {first} to {last}, 5 A apart, 300 kV, 20 mrad, 0.2 A. Phase at the atom, mean of
3x3 and of 5x5 positions, counted from the median of what is further than 2 A from any atom; Spearman's rank
correlation with the truth, and slope through the origin.
"""
_THICKNESS = """
Figure 8: SrTiO3 [001] of one to twenty unit cells. Mean phase of each kind of column [rad], counted from the points
between O and Sr; O is visible where it is higher than there, the order is right where it is the truth's.
"""
_WEDGE = """
Figure 9: Au wedge with vacuum beside it. Phase along the slope, mean over the rows and smoothed by a Gaussian of
{smoothing:g} A, counted from the vacuum, against the truth's; and the highest phase above the vacuum: an image that
ends at 2 pi or less while the truth goes on is folded.
"""
_REPETITION = """
Figure 5: sums of 5 x 5 patterns at every second position, 25 times the electrons a pattern at twice the step, beside
the plain image; both compared at the positions of the sums.
"""
_DREAMING = """
At {dose:g} e/A^2: atom-like peaks in 100 A^2 of what lies further than {reach:g} A from every atom's column. A peak is
a scan position that is the highest of its 3 x 3 and higher than half of what a single C atom (S in WS2) has in the
truth. In brackets the part of the real atoms with such a peak within {reach:g} A: few false peaks are worth nothing if
the atoms are lost as well. The same for all methods: no smoothing; every image is divided by its method's slope
without noise on the same specimen (vacuum and amorphous carbon: on graphene with vacancies, of the same beam; at least
{slope:g}) and shifted to the truth's mean.
"""
_CEILING = """
The true exit waves through the same stitching, referred to the mid-plane and as published (exit plane over entrance
plane): the ceiling of a network that predicts that label. And how far below it the networks are, in xc, without noise:
a negative distance is a network above the ceiling of another label than its own. The oracle's phase is an angle, so it
folds beyond pi.
"""


def prose(text: str) -> str:
    """A paragraph, filled."""
    return fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def pictures(*names: str) -> str:
    """Links to the figures of a part."""
    return "\n\n".join(f"![{name.replace('_', ' ')}]({name}.png)" for name in names)


@dataclass
class Results:
    """All images, and what was measured of them.

    Attributes
    ----------
    scans : dict
        By name of the case.
    images : dict
        By name of the case and dose [electrons / A^2], images [rad] by method.
    rows : dict
        Figures by specimen, dose and method: what becomes benchmark.csv.
    """

    scans: dict[str, SimulatedScan]
    images: dict[tuple[str, float], dict[str, NDArray]]
    rows: dict[tuple[str, float, str], dict[str, float]] = field(default_factory=dict)

    def note(self, specimen: str, dose: float, method: str, figures: dict[str, float]) -> None:
        """Write figures into the row of a specimen, dose and method."""
        self.rows.setdefault((specimen, dose, method), {}).update(figures)

    def of(self, part: str) -> list[SimulatedScan]:
        """The scans of a part."""
        return [scan for scan in self.scans.values() if part in scan.case.parts]

    def methods(self, names: Iterable[str]) -> list[str]:
        """All methods of some cases, in the order in which they were made, without those of the repetition."""
        found = [method for name in names for dose in DOSES for method in self.images.get((name, dose), {})]
        return [method for method in dict.fromkeys(found) if not method.endswith(SUMMED)]

    def value(self, specimen: str, dose: float, method: str, figure: str) -> float:
        """A figure, NaN if it wasn't measured."""
        return self.rows.get((specimen, dose, method), {}).get(figure, float("nan"))


def dose_name(dose: float) -> str:
    """How a dose is written in tables."""
    if dose == NOISE_FREE:
        return "no noise"
    power = round(np.log10(dose))
    return f"1e{power}" if dose == 10.0**power else f"{dose:g}"


def shown(value: float, digits: int = 3) -> str:
    """A figure in a table, empty if there is none."""
    return "" if np.isnan(value) else f"{value:.{digits}f}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines))


def measure(results: Results) -> None:
    """xc, slope and mean of every image against the truth, without the margin."""
    for (name, dose), images in results.images.items():
        scan = results.scans[name]
        truth = scan.at_positions(scan.truth)
        _, _, inner = scan.on_grid_of(truth)
        for method, image in images.items():
            if method.endswith(SUMMED):
                continue
            found = scores(scan.at_positions(image)[inner], truth[inner])
            results.note(name, dose, method, found | {"mean of the truth": float(truth[inner].mean())})


def _by_method(scans: list[SimulatedScan], cell: Callable[[str, float, str], str], methods: list[str]) -> str:
    """A line a specimen and dose, a column a method."""
    lines = [
        [scan.case.name, dose_name(dose), *(cell(scan.case.name, dose, method) for method in methods)]
        for scan in scans
        for dose in scan.case.doses
    ]
    return markdown(["specimen", "dose [e/A^2]", *methods], lines)


def image_tables(results: Results, scans: list[SimulatedScan]) -> str:
    """xc, and slope and mean, of every method but the oracle."""
    methods = [m for m in results.methods(scan.case.name for scan in scans) if m not in (MIDPLANE, PUBLISHED)]

    def scale(name: str, dose: float, method: str) -> str:
        slope, mean = (results.value(name, dose, method, figure) for figure in ("slope", "mean"))
        return "" if np.isnan(mean) else f"{shown(slope, 2)} / {mean:.3f}"

    means = ", ".join(f"{scan.case.name} {mean_of_truth(scan):.3f}" for scan in scans)
    xc = _by_method(scans, lambda name, dose, method: shown(results.value(name, dose, method, "xc")), methods)
    scales = _by_method(scans, scale, methods)
    return f"{prose(_XC)}\n\n{xc}\n\n{prose(_SCALE.format(means=means))}\n\n{scales}"


def mean_of_truth(scan: SimulatedScan) -> float:
    """Mean of the truth [rad] at the scan positions without the margin."""
    truth = scan.at_positions(scan.truth)
    return float(truth[scan.on_grid_of(truth)[2]].mean())


def dose(results: Results) -> str:
    """Figure 10."""
    beams = "; ".join(
        f"{scan.case.name} {scan.case.energy / 1e3:g} kV, {scan.case.semiangle:g} mrad, {scan.case.step:g} A"
        for scan in results.of("dose")
    )
    tables = image_tables(results, results.of("dose"))
    return f"{prose(_DOSE.format(beams=beams))}\n\n{pictures('dose', 'dose_xc', 'dose_profile')}\n\n{tables}"


def column_places(scan: SimulatedScan) -> tuple[NDArray[np.float64], list[tuple[int, ...]]]:
    """Rows and columns [A] of the atoms' columns within the scan without its margin, and their elements."""
    groups = columns_of(scan.places)
    places = np.array([scan.places[group, :2].mean(0) for group in groups]).reshape(-1, 2)
    low = scan.case.margin * scan.case.step
    high = (np.array(scan.shape) - 1) * scan.case.step - low
    inside = ((places >= low) & (places <= high)).all(1)
    elements = [tuple(sorted(set(scan.numbers[group].tolist()))) for group in groups]
    return places[inside], [one for one, there in zip(elements, inside, strict=True) if there]


def super_resolution(results: Results) -> str:
    """Figure 4."""
    lines = []
    for scan in results.of("super-resolution"):
        name, case = scan.case.name, scan.case
        k0 = optics.aperture_radius(case.energy, case.semiangle)
        high = min(BAND * k0, 0.5 / case.step)
        places, _ = column_places(scan)
        for amount in case.doses:
            images = results.images[name, amount]
            for method, image in (images | ({TRUTH: scan.truth} if amount == NOISE_FREE else {})).items():
                if method.endswith(SUMMED):
                    continue
                truth, pixel, inner = scan.on_grid_of(image)
                frequencies, frc = fourier_ring_correlation(image[inner], truth[inner], pixel)
                within = frequencies <= BAND * k0
                beyond = power_beyond(image[inner], truth[inner], pixel, 2 * k0, high)
                origin = inner[0].start * pixel
                pairs = resolved_pairs(image[inner], places - origin, pixel, LONGEST_PAIR)
                found = {
                    "FRC above 0.5 up to [1/A]": resolved_frequency(frequencies[within], frc[within]),
                    "correlation beyond 2 alpha": beyond["correlation"],
                    "power beyond 2 alpha": beyond["power"],
                    "closest pair resolved [A]": closest_resolved(*pairs),
                }
                results.note(name, amount, method, found)
                values = [shown(value, 2) for value in found.values()]
                lines.append([name, dose_name(amount), method, *values])
    header = ["specimen", "dose [e/A^2]", "method", "FRC > 0.5 up to [1/A]", "FRC beyond 2 alpha"]
    table = markdown([*header, "power beyond 2 alpha", "closest pair [A]"], lines)
    return f"{prose(_SUPER_RESOLUTION)}\n\n{pictures('super_resolution')}\n\n{table}"


def step(results: Results) -> str:
    """Figure 6."""
    return f"{prose(_STEP)}\n\n{pictures('step')}\n\n{image_tables(results, results.of('step'))}"


def atom_pixels(scan: SimulatedScan) -> tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.bool_]]:
    """Scan positions (n, 2) nearest to the atoms that lie 3 positions or more inside, their elements, and a mask of
    the background: what is further than 2 A from any atom."""
    rows, columns = (np.arange(n) * scan.case.step for n in scan.shape)
    distance = np.hypot(rows[:, None, None] - scan.places[:, 0], columns[None, :, None] - scan.places[:, 1]).min(-1)
    pixels = np.rint(scan.places[:, :2] / scan.case.step).astype(int)
    inside = ((pixels >= 3) & (pixels < np.array(scan.shape) - 3)).all(1)
    return pixels[inside], scan.numbers[inside], distance > 2.0


def z_contrast_phases(results: Results, amount: float) -> tuple[NDArray[np.int64], dict[str, dict[str, NDArray]]]:
    """Atomic numbers, sorted, and by method (and for the truth) peak, 3x3 and 5x5 mean phase [rad] of each atom."""
    numbers, phases = [], []
    for scan in results.of("z-contrast"):
        pixels, elements, background = atom_pixels(scan)
        images = {TRUTH: scan.truth} | results.images[scan.case.name, amount]
        phases.append({m: atom_phases(scan.at_positions(image), pixels, background) for m, image in images.items()})
        numbers.append(elements)
    order = np.argsort(np.concatenate(numbers))
    joined = {
        method: {kind: np.concatenate([one[method][kind] for one in phases])[order] for kind in ("peak", "3x3", "5x5")}
        for method in phases[0]
    }
    return np.concatenate(numbers)[order], joined


def z_contrast(results: Results) -> str:
    """Figure 7."""
    lines = []
    for amount in results.of("z-contrast")[0].case.doses:
        _, phases = z_contrast_phases(results, amount)
        for method in [method for method in phases if method != TRUTH]:
            cells = []
            for kind, values in phases[method].items():
                rank, slope = rank_and_slope(values, phases[TRUTH][kind])
                found = {f"rank correlation, {kind}": rank, f"slope through 0, {kind}": slope}
                results.note("single atoms", amount, method, found)
                cells += [shown(rank), shown(slope, 2)]
            lines.append([dose_name(amount), method, *cells])
    numbers, _ = z_contrast_phases(results, NOISE_FREE)
    header = ["dose [e/A^2]", "method"] + [
        f"{kind}, {what}" for kind in ("peak", "3x3", "5x5") for what in ("rank", "slope")
    ]
    text = _Z_CONTRAST.format(count=len(numbers), first=numbers[0], last=numbers[-1])
    return f"{prose(text)}\n\n{pictures('z_contrast')}\n\n{markdown(header, lines)}"


def perovskite_columns(image: NDArray, pixel: float, scan: SimulatedScan) -> dict[str, float]:
    """Mean phase [rad] of the columns of a perovskite ABO3 along [001], counted from the points between O and A.

    Returns
    -------
    dict
        By `A`, `B-O` and `O`. O is visible where it is positive. NaN in scans too small to hold them.
    """
    places, elements = column_places(scan)
    heaviest = max(max(one) for one in elements)
    kinds = {
        "A": [one == (heaviest,) for one in elements],
        "B-O": [len(one) == 2 for one in elements],
        "O": [one == (8,) for one in elements],
    }
    cations, oxygens = places[kinds["A"]], places[kinds["O"]]
    if not len(cations) or not len(oxygens):
        return dict.fromkeys(kinds, float("nan"))
    distance = np.linalg.norm(cations[:, None] - oxygens, axis=-1)
    pairs = np.argwhere(distance < 1.2 * distance.min())
    between = sampled(image, (cations[pairs[:, 0]] + oxygens[pairs[:, 1]]) / 2, pixel).mean()
    return {kind: float(sampled(image, places[kept], pixel).mean() - between) for kind, kept in kinds.items()}


def wedge_profile(image: NDArray, pixel: float, scan: SimulatedScan) -> NDArray[np.float64]:
    """Long-range phase [rad] along a wedge, counted from the vacuum at its start; a value a scan position."""
    margin = round(scan.case.margin * scan.case.step / pixel)
    profile = smooth_profile(image[margin:-margin], SMOOTHING / pixel)
    profile = profile[:: round(scan.case.step / pixel)]
    return profile - profile[: scan.case.margin].mean()


def wedge_figures(image: NDArray, pixel: float, scan: SimulatedScan, truth: NDArray) -> dict[str, float]:
    """How well an image keeps the thickness: of the long-range profile slope and root mean square error [rad] against
    the truth's, and the highest phase of the image above the vacuum [rad]."""
    profile, true = wedge_profile(image, pixel, scan), wedge_profile(truth, pixel, scan)
    inner = slice(scan.case.margin, -scan.case.margin)
    margin = round(scan.case.margin * scan.case.step / pixel)
    vacuum = float(np.median(image[margin:-margin, : 2 * margin]))
    return {
        "slope of the profile": float(np.polyfit(true[inner], profile[inner], 1)[0]),
        "error of the profile [rad]": float(np.sqrt(((profile - true)[inner] ** 2).mean())),
        "highest phase [rad]": float(image[margin:-margin, margin:-margin].max()) - vacuum,
    }


def _answer(value: float) -> str:
    """Yes, no, or nothing."""
    return "" if np.isnan(value) else "yes" if value else "no"


def thickness(results: Results) -> str:
    """Figures 8 and 9."""
    columns, wedges = [], []
    for scan in sorted(results.of("thickness"), key=lambda scan: np.ptp(scan.places[:, 2])):
        name = scan.case.name
        for amount in (amount for amount in scan.case.doses if amount in (NOISE_FREE, 1e4)):
            images = results.images[name, amount]
            true_order: list[str] = []
            for method, image in ({TRUTH: scan.truth} | images).items():
                if method.endswith(SUMMED):
                    continue
                truth, pixel, _ = scan.on_grid_of(image)
                if "wedge" in name:
                    found = wedge_figures(image, pixel, scan, truth)
                    if method == TRUTH and amount != NOISE_FREE:
                        continue
                    wedges.append([dose_name(amount), method, *(shown(value, 2) for value in found.values())])
                else:
                    phases = perovskite_columns(image, pixel, scan)
                    order = sorted(phases, key=lambda kind: -phases[kind])
                    true_order = true_order or order
                    found = {f"{kind} column [rad]": value for kind, value in phases.items()}
                    missing = np.isnan(phases["O"])
                    found |= {"O visible": np.nan if missing else float(phases["O"] > 0)}
                    found |= {"right order": np.nan if missing else float(order == true_order)}
                    yes = [_answer(found[what]) for what in ("O visible", "right order")]
                    values = [shown(value, 2) for value in phases.values()]
                    xc = shown(results.value(name, amount, method, "xc"))
                    if method != TRUTH or amount == NOISE_FREE:
                        columns.append([name, dose_name(amount), method, *values, *yes, xc])
                results.note(name, amount, method, found)
    column_header = ["specimen", "dose [e/A^2]", "method", "Sr", "Ti-O", "O", "O visible", "right order", "xc"]
    wedge_header = ["dose [e/A^2]", "method", "slope of the profile", "rms error [rad]", "highest phase [rad]"]
    slabs = f"{prose(_THICKNESS)}\n\n{pictures('thickness')}\n\n{markdown(column_header, columns)}"
    wedge = f"{prose(_WEDGE.format(smoothing=SMOOTHING))}\n\n{pictures('wedge')}\n\n{markdown(wedge_header, wedges)}"
    return f"{slabs}\n\n{wedge}"


def repetition(results: Results) -> str:
    """Figure 5."""
    lines = []
    for scan in results.of("repetition"):
        truth = scan.at_positions(scan.truth)[::2, ::2]
        margin = -(-scan.case.margin // 2)
        inner = (slice(margin, -margin),) * 2
        for amount in scan.case.doses:
            images = results.images[scan.case.name, amount]
            for method in [method.removesuffix(SUMMED) for method in images if method.endswith(SUMMED)]:
                s = 2 * scan.oversample
                plain = scores(scan.at_positions(images[method])[::2, ::2][inner], truth[inner])
                summed = scores(images[method + SUMMED][::s, ::s][inner], truth[inner])
                results.note(scan.case.name, amount, method + SUMMED, summed)
                cells = [shown(one[figure], 3) for figure in ("xc", "slope") for one in (plain, summed)]
                lines.append([scan.case.name, dose_name(amount), method, *cells])
    header = ["specimen", "dose [e/A^2]", "method", "xc, plain", "xc, sums", "slope, plain", "slope, sums"]
    return f"{prose(_REPETITION)}\n\n{pictures('repetition')}\n\n{markdown(header, lines)}"


def atom_height(symbol: str, scan: SimulatedScan) -> float:
    """Half the phase [rad] of one atom at its centre, in the truth's band and with its thermal smearing."""
    side, case = 12.0, scan.case
    atom = Atoms(symbol, positions=[(side / 2, side / 2, 1.0)], cell=[side, side, 2.0], pbc=True)
    middle = np.array([side / 2])
    return float(projected_phase(atom, case.energy, case.semiangle, middle, middle, phonon_configurations=64)[0, 0]) / 2


def scaled_image(results: Results, scan: SimulatedScan, amount: float, method: str) -> NDArray[np.float64]:
    """An image at the scan positions without the margin, over its method's slope without noise, with the truth's mean.

    The slope is that on the specimen itself, on the one of SCALE_OF if that has none, and at least SMALLEST_SLOPE.
    """
    name = scan.case.name
    slope = results.value(SCALE_OF.get(name, name), NOISE_FREE, method, "slope")
    truth = scan.at_positions(scan.truth)
    _, _, inner = scan.on_grid_of(truth)
    image = scan.at_positions(results.images[name, amount][method])[inner] / np.fmax(slope, SMALLEST_SLOPE)
    return image - image.mean() + truth[inner].mean()


def dreaming(results: Results) -> str:
    """Atoms where there are none."""
    amount, lines = 1e3, []
    scans = results.of("dreaming")
    methods = [m for m in results.methods(scan.case.name for scan in scans) if m not in (MIDPLANE, PUBLISHED)]
    for scan in scans:
        height = atom_height(LIGHTEST.get(scan.case.name, "C"), scan)
        atoms = scan.places[:, :2] - scan.case.margin * scan.case.step
        cells = []
        for method in methods:
            image = scaled_image(results, scan, amount, method)
            found = false_peaks(image, atoms, height, scan.case.step)
            results.note(
                scan.case.name,
                amount,
                method,
                {"false peaks in 100 A^2": found["false"], "atoms with a peak": found["found"]},
            )
            atoms_found = "" if np.isnan(found["found"]) else f" ({found['found']:.0%})"
            cells.append(f"{found['false']:.1f}{atoms_found}")
        lines.append([scan.case.name, f"{height:.3f}", *cells])
    table = markdown(["specimen", "height [rad]", *methods], lines)
    text = _DREAMING.format(dose=amount, reach=REACH, slope=SMALLEST_SLOPE)
    return f"{prose(text)}\n\n{pictures('dreaming')}\n\n{table}"


def ceiling(results: Results) -> str:
    """How far the networks are from the oracle, without noise."""
    lines = []
    names = [name for name in results.scans if (name, NOISE_FREE) in results.images and name != "vacuum"]
    found = results.methods(names)
    models = [method for method in found if method.startswith("AIRPI")]
    for name in names:
        figures = {m: [results.value(name, NOISE_FREE, m, what) for what in ("xc", "slope", "mean")] for m in found}
        cells = [
            " / ".join([shown(xc), shown(slope, 2), shown(mean)])
            for xc, slope, mean in (figures[oracle] for oracle in (MIDPLANE, PUBLISHED))
        ]
        cells.append(shown(results.value(name, NOISE_FREE, MIDPLANE, "mean of the truth")))
        for model in models:
            cells += [f"{figures[oracle][0] - figures[model][0]:+.3f}" for oracle in (MIDPLANE, PUBLISHED)]
        lines.append([name, *cells])
    header = ["specimen", f"{MIDPLANE}: xc / slope / mean", f"{PUBLISHED}: xc / slope / mean", "truth's mean"]
    for model in models:
        header += [f"{model} below mid-plane", f"{model} below published"]
    return f"{prose(_CEILING)}\n\n{markdown(header, lines)}"


def validation(results: Results) -> str:
    """What to choose a model by."""
    scans = list(results.scans.values())
    methods = [m for m in results.methods(results.scans) if m not in (MIDPLANE, PUBLISHED)]
    lines = []
    for amount in DOSES:
        means = [np.mean([results.value(scan.case.name, amount, m, "xc") for scan in scans]) for m in methods]
        lines.append([dose_name(amount), *(shown(float(mean)) for mean in means)])
    mean_table = markdown(["dose [e/A^2]", *methods], lines)
    return f"Mean xc of {len(scans)} specimens:\n\n{mean_table}\n\n{image_tables(results, scans)}"


#: Title and function of every part of the report.
SECTIONS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "dose": ("Dose", dose),
    "super-resolution": ("Super-resolution", super_resolution),
    "step": ("Step size", step),
    "z-contrast": ("Z contrast", z_contrast),
    "thickness": ("Thickness", thickness),
    "repetition": ("Data repetition", repetition),
    "dreaming": ("Not dreaming", dreaming),
}


def table_rows(results: Results) -> list[dict[str, Any]]:
    """The rows of benchmark.csv, all with the same columns."""
    columns = dict.fromkeys(figure for row in results.rows.values() for figure in row)
    rows = []
    for (specimen, amount, method), row in results.rows.items():
        values = {figure: row.get(figure, float("nan")) for figure in columns}
        cells = {figure: "" if np.isnan(value) else value for figure, value in values.items()}
        rows.append({"specimen": specimen, "dose": amount, "method": method} | cells)
    return rows
