"""The result: the stitched object and how it was made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airpi_py4d.phase_image import PhaseImage
from airpi_py4d.report import Report, shown

#: Confidence from which on overlapping patches are said to agree.
AGREEMENT = 0.9


@dataclass(frozen=True)
class Reconstruction:
    """A stitched phase object.

    Attributes
    ----------
    object : ndarray of complex64, shape (rows, columns)
        Weighted mean of the patches' unit phasors (eq. 8 over the sum of its weights); of a model that stitches
        features, confidence times exp(i phase). Pixel (0, 0) is the first scan position.
    pixel_size : (float, float)
        Along rows and columns [A]: the scan step divided by a whole number.
    provenance : dict
        JSON-like: the package's version, the acquisition's parameters with units and sources, the model's name,
        version and SHA-256, the execution provider that ran, positions per second.
    projected_phase : ndarray of float32, shape (rows, columns), optional
        sigma v_z [rad], unwrapped, from a model that stitches features; 0 where nothing was measured.
    phase_error : ndarray of float32, shape (rows, columns), optional
        That model's own estimate of the phase's standard deviation [rad]; infinite where nothing was measured.

    Examples
    --------
    >>> result = Reconstruction(np.full((2, 3), 0.5j, np.complex64), pixel_size=(0.2, 0.2), provenance={})
    >>> result.phase.shape, float(result.confidence[0, 0])
    ((2, 3), 0.5)
    >>> print(result.confidence_summary())
    median 0.500, above 0.9 in 0.0 % of the image
    """

    object: NDArray[np.complex64]
    pixel_size: tuple[float, float]
    provenance: dict[str, Any]
    projected_phase: NDArray[np.float32] | None = None
    phase_error: NDArray[np.float32] | None = None

    @classmethod
    def of_phase(cls, image: PhaseImage, pixel_size: tuple[float, float], provenance: dict[str, Any]) -> Reconstruction:
        """From the phase image of stitched features, which may change later."""
        wave = (image.confidence * np.exp(1j * image.phase)).astype(np.complex64)
        return cls(wave, pixel_size, provenance, image.phase.copy(), image.error.copy())

    @property
    def phase(self) -> NDArray[np.float32]:
        """Phase of the object [rad], shape (rows, columns): in (-pi, pi], or the projected phase where there is one."""
        if self.projected_phase is not None:
            return self.projected_phase
        return np.angle(self.object).astype(np.float32)

    @property
    def confidence(self) -> NDArray[np.float32]:
        """|sum w exp(i phi)| / sum w, shape (rows, columns): 1 where overlapping patches agree, 0 where they cancel.

        Of a model that stitches features exp(-error^2 / 2), the expected modulus of the mean of exp(i error). 0 also
        where nothing was measured.
        """
        return np.abs(self.object).astype(np.float32)

    def confidence_summary(self) -> str:
        """The confidence map in a line: median and part above 0.9 of what was measured, and part that wasn't."""
        confidence = self.confidence
        measured = confidence[confidence > 0]
        if not measured.size:
            return "nothing was measured"
        line = (
            f"median {np.median(measured):.3f}, above {AGREEMENT} in {np.mean(measured > AGREEMENT):.1%} of the image"
        )
        holes = 1 - measured.size / confidence.size
        return (f"{line}, {holes:.2%} of it not measured" if holes else line).replace("%", " %")

    def report(self) -> Report:
        """How the image was made and how far to trust it; shows in a notebook and prints as text."""
        return Report(self)

    def summary(self) -> str:
        """What was resolved, a line a parameter, for people."""
        provenance = self.provenance
        lines = [
            (name, f"{shown(entry['value'], entry['unit'])} ({entry['source']})")
            for name, entry in provenance.get("acquisition", {}).items()
            if entry["value"] is not None
        ]
        model = provenance.get("model", {})
        lines.append(("model", f"{model.get('name')} {model.get('version')} (SHA-256 {model.get('sha256', '')[:12]})"))
        lines.append(("provider", str(provenance.get("provider"))))
        (rows, columns), (row_size, column_size) = self.object.shape, self.pixel_size
        speed = provenance.get("positions_per_second", 0.0)
        size = f"{row_size:.5g}" if row_size == column_size else f"{row_size:.5g} x {column_size:.5g}"
        lines.append(("image", f"{rows} x {columns} px of {size} A, {speed:.0f} positions/s"))
        lines.append(("confidence", self.confidence_summary()))
        return "\n".join(f"{name:>20}: {text}" for name, text in lines)
