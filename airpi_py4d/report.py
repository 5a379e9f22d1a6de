"""The report of a reconstruction, as text and as HTML: how it was made, and how far to trust it."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from airpi_py4d.result import Reconstruction

#: Confidence is near 1 almost everywhere: the intervals grow finer towards it.
_EDGES = (0.0, 0.5, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)
_TEXT_WIDTH = 40
_SVG_BAR, _SVG_HEIGHT = 36, 100
_DOMAIN_UNITS = {
    "energy": "eV",
    "semiangle": "mrad",
    "relative_scan_step": "lambda / alpha",
    "coverage": "radii of the bright-field disk",
    "electrons_per_pattern": "",
    "defocus_phase": "rad",
    "spherical_phase": "rad",
}
#: Part of pi: phases beyond it may have been folded.
_FOLDING = 0.9


def shown(value: Any, unit: str = "") -> str:
    """A provenance value with its unit, for people.

    Examples
    --------
    >>> shown([0.2, 0.123456789], "A"), shown(True), shown(None), shown(12, "px")
    ('0.2, 0.12346 A', 'yes', 'none', '12 px')
    """
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        text = ", ".join(shown(part) for part in value)
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    else:
        text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return f"{text} {unit}".rstrip()


def confidence_histogram(confidence: NDArray[np.float32]) -> list[tuple[float, float, float]]:
    """Lower and upper edge of each interval, and the part of the measured pixels in it.

    Examples
    --------
    >>> confidence_histogram(np.float32([[0.0, 0.3], [0.992, 1.0]]))[0]
    (0.0, 0.5, 0.3333333333333333)
    """
    measured = confidence[confidence > 0]
    counts = np.histogram(np.minimum(measured, 1), _EDGES)[0] / max(measured.size, 1)
    return list(zip(_EDGES[:-1], _EDGES[1:], counts.tolist(), strict=True))


class Report:
    """What `Reconstruction.report` returns: ``print(report)``, or the last line of a notebook's cell.

    Parameters
    ----------
    reconstruction : Reconstruction

    Examples
    --------
    >>> from airpi_py4d import Reconstruction
    >>> image = np.exp(1j * np.linspace(0, 0.5, 6, dtype=np.float32)).reshape(2, 3)
    >>> report = Reconstruction(image, (0.2, 0.2), {"provider": "CPUExecutionProvider"}).report()
    >>> print(str(report).splitlines()[0])
    AIRPI phase image, 2 x 3 px of 0.2 x 0.2 A
    """

    def __init__(self, reconstruction: Reconstruction) -> None:
        self._reconstruction = reconstruction
        self._provenance = reconstruction.provenance

    def _title(self) -> str:
        rows, columns = self._reconstruction.object.shape
        row_size, column_size = self._reconstruction.pixel_size
        return f"AIRPI phase image, {rows} x {columns} px of {row_size:.5g} x {column_size:.5g} A"

    def _acquisition(self) -> list[tuple[str, str, str]]:
        return [
            (name, shown(entry["value"], entry["unit"]), entry["source"])
            for name, entry in self._provenance.get("acquisition", {}).items()
            if entry["value"] is not None
        ]

    def _model(self) -> list[tuple[str, str]]:
        model = self._provenance.get("model", {})
        rows = [(name, str(model[name])) for name in ("name", "version", "sha256") if name in model]
        return rows + [
            (f"trained on {name}", f"{low:.4g} to {high:.4g} {_DOMAIN_UNITS.get(name, '')}".rstrip())
            for name, (low, high) in model.get("domain", {}).items()
        ]

    def _run(self) -> list[tuple[str, str]]:
        provenance = self._provenance
        rows = []
        if "version" in provenance:
            rows.append(("software", f"{provenance.get('software', '')} {provenance['version']}".strip()))
        if "provider" in provenance:
            rows.append(("provider", str(provenance["provider"])))
        if "positions_per_second" in provenance:
            speed, seconds = provenance["positions_per_second"], provenance.get("seconds", np.nan)
            rows.append(("speed", f"{speed:.0f} positions/s, {seconds:.1f} s in all"))
        if "scan_shape" in provenance:
            rows.append(("scan", " x ".join(map(str, provenance["scan_shape"])) + " positions"))
        if "electrons_per_pattern" in provenance:
            rows.append(("electrons", f"{provenance['electrons_per_pattern']:.4g} a pattern"))
        return rows

    def _warnings(self) -> list[str]:
        return [*self._provenance.get("outside_training_domain", []), *self._provenance.get("data_checks", [])]

    def _phase(self) -> str:
        phase = self._reconstruction.phase[self._reconstruction.confidence > 0]
        if not phase.size:
            return "nothing was measured"
        low, high = float(phase.min()), float(phase.max())
        line = f"{low:.4g} to {high:.4g} rad, median {float(np.median(phase)):.4g} rad"
        if self._reconstruction.projected_phase is None and max(-low, high) > _FOLDING * np.pi:
            line += "; near pi phases fold"
        return line

    def _quality(self) -> list[tuple[str, str]]:
        rows = [("phase", self._phase()), ("confidence", self._reconstruction.confidence_summary())]
        error = self._reconstruction.phase_error
        if error is not None and np.isfinite(error).any():
            estimated = f"median {float(np.median(error[np.isfinite(error)])):.2g} rad, the model's own estimate"
            rows.insert(1, ("error of the phase", estimated))
        return rows

    def __str__(self) -> str:
        def listed(rows: list[tuple[str, str]]) -> list[str]:
            width = max((len(name) for name, _ in rows), default=0)
            return [f"  {name:<{width}}  {text}" for name, text in rows]

        bars = [
            f"  {low:<5} to {high:<5} |{'#' * round(part * _TEXT_WIDTH):<{_TEXT_WIDTH}}| {100 * part:5.1f} %"
            for low, high, part in confidence_histogram(self._reconstruction.confidence)
        ]
        acquisition = [(name, f"{value} ({source})") for name, value, source in self._acquisition()]
        sections = [
            ("Acquisition", listed(acquisition)),
            ("Model", listed(self._model())),
            ("Warnings", [f"  - {message}" for message in self._warnings()] or ["  none"]),
            ("Run", listed(self._run())),
            ("Image", listed(self._quality())),
            ("Confidence, part of the measured image", bars),
        ]
        return "\n".join([self._title(), *(line for title, lines in sections if lines for line in ("", title, *lines))])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def table(title: str, rows: list[tuple[str, ...]]) -> str:
            if not rows:
                return ""
            cells = "".join(
                f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
                for name, *values in rows
            )
            return f"<h4>{escape(title)}</h4><table>{cells}</table>"

        messages = "".join(f"<li>{escape(message)}</li>" for message in self._warnings())
        return "".join(
            [
                f'<div class="airpi-report"><h3>{escape(self._title())}</h3>',
                table("Image", [*self._quality()]),
                self._svg(),
                f"<h4>Warnings</h4><ul>{messages}</ul>" if messages else "<h4>Warnings</h4><p>none</p>",
                table("Acquisition", [*self._acquisition()]),
                table("Model", [*self._model()]),
                table("Run", [*self._run()]),
                "</div>",
            ]
        )

    def _svg(self) -> str:
        """The confidence map's histogram."""
        histogram = confidence_histogram(self._reconstruction.confidence)
        tallest = max(part for _, _, part in histogram) or 1.0
        width = len(histogram) * _SVG_BAR
        bars = "".join(
            f'<rect x="{n * _SVG_BAR}" y="{_SVG_HEIGHT * (1 - part / tallest):.1f}" width="{_SVG_BAR - 1}" '
            f'height="{_SVG_HEIGHT * part / tallest:.1f}"><title>{low} to {high}: '
            f"{100 * part:.1f} %</title></rect>"
            for n, (low, high, part) in enumerate(histogram)
        )
        labels = "".join(
            f'<text x="{n * _SVG_BAR}" y="{_SVG_HEIGHT + 14}" text-anchor="middle" font-size="10">{edge:g}</text>'
            for n, edge in enumerate(_EDGES[1:-1], 1)
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_SVG_HEIGHT + 22}" role="img" '
            f'aria-label="Histogram of the confidence map" fill="currentColor" font-size="12">'
            f'{bars}<line x1="0" y1="{_SVG_HEIGHT}" x2="{width}" y2="{_SVG_HEIGHT}" stroke="currentColor"/>'
            f"{labels}</svg>"
        )
