"""The result: the stitched object and how it was made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Reconstruction:
    """A stitched phase object.

    Attributes
    ----------
    object : ndarray of complex64, shape (rows, columns)
        Weighted mean of the patches' unit phasors (eq. 8 over the sum of its weights). Pixel (0, 0) is the first
        scan position.
    pixel_size : float
        [A], the scan step divided by a whole number.
    provenance : dict
        JSON-like: the package's version, the acquisition's parameters with units and sources, the model's name,
        version and SHA-256, the execution provider that ran, positions per second.

    Examples
    --------
    >>> result = Reconstruction(np.full((2, 3), 0.5j, np.complex64), pixel_size=0.2, provenance={})
    >>> result.phase.shape, float(result.confidence[0, 0])
    ((2, 3), 0.5)
    """

    object: NDArray[np.complex64]
    pixel_size: float
    provenance: dict[str, Any]

    @property
    def phase(self) -> NDArray[np.float32]:
        """Phase of the object [rad], shape (rows, columns), in (-pi, pi]."""
        return np.angle(self.object).astype(np.float32)

    @property
    def confidence(self) -> NDArray[np.float32]:
        """|sum w exp(i phi)| / sum w, shape (rows, columns): 1 where overlapping patches agree, 0 where they cancel."""
        return np.abs(self.object).astype(np.float32)

    def summary(self) -> str:
        """What was resolved, a line a parameter, for people."""
        lines = []
        for name, entry in self.provenance.get("acquisition", {}).items():
            value = entry["value"]
            shown = ", ".join(f"{v:.5g}" for v in value) if isinstance(value, list) else value
            shown = f"{shown:.5g}" if isinstance(shown, float) else shown
            lines.append(f"{name:>20}: {shown} {entry['unit']} ({entry['source']})")
        model = self.provenance.get("model", {})
        digest = model.get("sha256", "")[:12]
        lines.append(f"{'model':>20}: {model.get('name')} {model.get('version')} (SHA-256 {digest})")
        lines.append(f"{'provider':>20}: {self.provenance.get('provider')}")
        speed = self.provenance.get("positions_per_second", 0.0)
        rows, columns = self.object.shape
        lines.append(f"{'image':>20}: {rows} x {columns} px of {self.pixel_size:.5g} A, {speed:.0f} positions/s")
        return "\n".join(lines)
