"""What acquisition, scan and model make of each other: grid, kernels, image, and the record of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airpi_py4d import optics
from airpi_py4d.acquisition import Acquisition
from airpi_py4d.checks import check_data
from airpi_py4d.feature_stitching import EXTRA_CHANNELS, FeatureStitcher, PatchWindows
from airpi_py4d.kernels import kernel_spacing
from airpi_py4d.model import Contract, Model
from airpi_py4d.patterns import Resampling, check_disk
from airpi_py4d.phase_image import ALIGNMENT, PhaseImage, halo
from airpi_py4d.stitching import Stitcher

CITATION = "Friedrich, Yu, Verbeeck, Van Aert, Microsc. Microanal. 29 (2023) 395, doi 10.1093/micmic/ozac002"


def relative_geometry(acquisition: Acquisition, spacing: tuple[int, int] | None = None) -> tuple[float, float, float]:
    r"""Scan step and aberrations in the model's scale-free units.

    Parameters
    ----------
    acquisition : Acquisition
    spacing : (int, int), optional
        Rows and columns between the positions whose steps count; by default those of the kernels.

    Returns
    -------
    step : float
        scan_step k0, with k0 = alpha / lambda; the geometric mean of the steps along rows and columns.
    defocus_phase : float
        -pi lambda k0^2 defocus [rad], the first-order term of eq. 3 at the aperture's edge.
    spherical_phase : float
        pi C_s lambda^3 k0^4 / 2 [rad], the third-order term.

    Examples
    --------
    >>> step, _, _ = relative_geometry(Acquisition(300e3, 20.0, 0.2, (0.05, 0.05)))
    >>> round(step, 3)
    0.203
    """
    k0 = acquisition.aperture_radius
    defocus = optics.aberration_phase(k0**2, acquisition.energy, defocus=acquisition.defocus)
    spherical = optics.aberration_phase(
        k0**2, acquisition.energy, spherical_aberration=acquisition.spherical_aberration
    )
    spacing = kernel_spacing(acquisition.scan_step) if spacing is None else spacing
    step = math.sqrt(math.prod(np.multiply(acquisition.scan_step, spacing)))
    return step * k0, float(defocus), float(spherical)


def grid_k_pixel(contract: Contract, acquisition: Acquisition, detector_shape: tuple[int, int]) -> float:
    """Pixel size of the model's grid [1/A].

    Examples
    --------
    >>> acquisition = Acquisition(300e3, 20.0, 0.2, (0.05, 0.05))
    >>> aperture = Contract("example", "1", 64, 12.0, 16, {})
    >>> whole_detector = Contract("example", "1", 64, None, 64, {})
    >>> [round(grid_k_pixel(contract, acquisition, (96, 128)), 4) for contract in (aperture, whole_detector)]
    [0.0847, 0.1]
    """
    if contract.aperture_pixels is not None:
        return acquisition.aperture_radius / contract.aperture_pixels
    return float(np.multiply(acquisition.k_pixel, detector_shape).max()) / contract.grid_pixels


def _whole(name: str, value: Any, odd: bool = False) -> int:
    """A whole number of at least 1."""
    if isinstance(value, (int, np.integer)) and value >= 1 and not (odd and value % 2 == 0):
        return int(value)
    raise ValueError(f"{name} is {value!r}, expected {'an odd' if odd else 'a whole'} number of at least 1.")


@dataclass(frozen=True)
class Plan:
    """What acquisition, scan and model make of each other.

    Attributes
    ----------
    acquisition : Acquisition
        With a centre.
    contract : Contract
    data_shape : (int, int, int, int)
        Scan rows and columns, detector rows and columns.
    sum_neighbours, stride : int
        Data repetition, see `airpi_py4d.reconstruct`.
    oversample : (int, int)
        Image pixels a reconstructed step, along rows and columns.
    """

    acquisition: Acquisition
    contract: Contract
    data_shape: tuple[int, int, int, int]
    sum_neighbours: int
    stride: int
    oversample: tuple[int, int]

    @classmethod
    def of(
        cls,
        acquisition: Acquisition,
        contract: Contract,
        data: Any,
        oversample: int | None = None,
        sum_neighbours: int = 1,
        stride: int = 1,
    ) -> Plan:
        """Plan for data, of which only `shape` and `dtype` count. See `airpi_py4d.reconstruct` for the rest.

        Raises
        ------
        ValueError
            If the parameters, the data and the acquisition don't fit each other.
        """
        check_data(data)
        rows, columns, *detector = data.shape
        sum_neighbours, stride = _whole("sum_neighbours", sum_neighbours, odd=True), _whole("stride", stride)
        check_disk((detector[0], detector[1]), acquisition)
        if acquisition.descan is not None and acquisition.descan.shape[:2] != (rows, columns):
            raise ValueError(
                f"{acquisition.argument_names.get('descan', 'descan')} has the shape {acquisition.descan.shape}, "
                f"expected {(rows, columns, 2)}, that of the scan."
            )
        if oversample is not None:
            down = right = _whole("oversample", oversample)
        else:
            size = 1 / (contract.grid_pixels * grid_k_pixel(contract, acquisition, (detector[0], detector[1])))
            down, right = (max(1, math.ceil(step * stride / size - 1e-6)) for step in acquisition.scan_step)
        shape = (rows, columns, detector[0], detector[1])
        return cls(acquisition, contract, shape, sum_neighbours, stride, (down, right))

    @property
    def scan_shape(self) -> tuple[int, int]:
        """Rows and columns of the positions that are reconstructed."""
        return -(-self.data_shape[0] // self.stride), -(-self.data_shape[1] // self.stride)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Rows and columns of the image [px]."""
        rows, columns = ((n - 1) * count + 1 for n, count in zip(self.scan_shape, self.oversample, strict=True))
        return rows, columns

    @property
    def reconstructed(self) -> Acquisition:
        """The acquisition with the steps between reconstructed positions."""
        row, column = self.acquisition.scan_step
        return replace(self.acquisition, scan_step=(row * self.stride, column * self.stride))

    @property
    def grid_k_pixel(self) -> float:
        """Pixel size of the model's grid [1/A]."""
        return grid_k_pixel(self.contract, self.acquisition, self.data_shape[2:])

    @property
    def spacing(self) -> tuple[int, int]:
        """Rows and columns from a position to its neighbours in a kernel; (1, 1) where a pattern stands alone."""
        return (1, 1) if self.contract.kernel_side == 1 else kernel_spacing(self.reconstructed.scan_step)

    def geometry(self, batch: int) -> NDArray[np.float32]:
        """The model's `geometry` input, shape (batch, 3); (batch, 5) for one that takes the whole detector."""
        values: tuple[float, ...] = relative_geometry(self.reconstructed, self.spacing)
        if self.contract.aperture_pixels is None:
            radius = self.acquisition.aperture_radius
            values = (*values, radius / self.grid_k_pixel, values[0] / radius)
        return np.tile(np.array(values, np.float32), (batch, 1))

    @property
    def image_geometry(self) -> NDArray[np.float32]:
        """The image network's `image_geometry` input, shape (1, 5): pixel size [1 / k0], a pattern's geometry and the
        aperture's radius k0 [1/A], which says how long an angstrom is in the image."""
        steps = zip(self.reconstructed.scan_step, self.oversample, strict=True)
        k0 = self.acquisition.aperture_radius
        pixel = math.sqrt(math.prod(step / count for step, count in steps)) * k0
        return np.array([[pixel, *relative_geometry(self.reconstructed, self.spacing), k0]], np.float32)

    def resampling(self) -> Resampling:
        """Raw patterns to the model's grid."""
        contract = self.contract
        grid = contract.grid_pixels, self.grid_k_pixel, contract.smallest_pixel
        return Resampling(self.data_shape[2:], self.acquisition, *grid)

    @property
    def resamples_alike(self) -> bool:
        """Whether every pattern goes to the model's grid by the same map, alone, and none is left out."""
        return self.acquisition.descan is None and self.sum_neighbours == self.stride == 1

    @property
    def _patch_pixel_size(self) -> float:
        return 1 / (self.contract.grid_pixels * self.grid_k_pixel)

    def stitcher(self, rows: int) -> Stitcher:
        """For the image of that many reconstructed scan rows, of a model that gives patches of the object."""
        shape = rows, self.scan_shape[1]
        return Stitcher(shape, self.reconstructed, self.contract.object_pixels, self._patch_pixel_size, self.oversample)

    @property
    def patch_windows(self) -> PatchWindows:
        """From patches of features to the image."""
        patch = self.contract.object_pixels, self._patch_pixel_size
        return PatchWindows.of(self.reconstructed, *patch, self.oversample)

    def feature_stitcher(self, rows: int, band: int | None = None, at_once: int = 1) -> FeatureStitcher:
        """The same of a model that gives patches of features.

        Parameters
        ----------
        rows : int
        band : int, optional
            `PhaseImage.band` where scan rows come in order, so that memory is kept for no more of the image.
        at_once : int
            Scan rows that come at once.
        """
        contract, down = self.contract, self.oversample[0]
        # a band with the halos of its tiles, and what alignment and new scan rows add
        held = None if band is None else band + 2 * halo(contract.margin) + 2 * ALIGNMENT + at_once * down
        shape = rows, self.scan_shape[1]
        patch = contract.object_pixels, self._patch_pixel_size
        return FeatureStitcher(shape, self.reconstructed, *patch, self.oversample, contract.features, held)

    def phase_image(self) -> PhaseImage:
        """The image that the model's second network makes of stitched features."""
        return PhaseImage(self.image_shape, self.contract.margin, self.contract.features + EXTRA_CHANNELS)

    def provenance(
        self,
        model: Model,
        electrons_per_pattern: float,
        outside_training_domain: list[str],
        data_checks: list[str],
        seconds: float,
        positions: int,
    ) -> dict[str, Any]:
        """How the image was made, JSON-like; `positions` were reconstructed in `seconds`."""
        steps = zip(self.reconstructed.scan_step, self.oversample, strict=True)
        return {
            "software": "airpi_py4d",
            "version": version("airpi_py4d"),
            "method": f"AIRPI: {CITATION}",
            "acquisition": self.acquisition.describe(),
            "scan_shape": list(self.data_shape[:2]),
            "detector_shape": list(self.data_shape[2:]),
            "electrons_per_pattern": electrons_per_pattern,
            "sum_neighbours": self.sum_neighbours,
            "stride": self.stride,
            "oversample": list(self.oversample),
            "pixel_size": [step / count for step, count in steps],
            "model": {
                "name": self.contract.name,
                "version": self.contract.version,
                "sha256": model.sha256,
                "domain": {name: list(limits) for name, limits in self.contract.domain.items()},
            },
            "outside_training_domain": outside_training_domain,
            "data_checks": data_checks,
            "provider": model.provider,
            "seconds": seconds,
            "positions_per_second": positions / seconds,
        }
