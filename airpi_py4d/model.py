"""An ONNX file, its contract (metadata) and the session that runs it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from airpi_py4d import devices
from airpi_py4d.models import GRIDS, SCHEMA, find, read

DEFAULT_MODEL = "airpi-2"
_INSTALL = 'Install one of them: pip install "airpi_py4d[cpu]" (any machine) or pip install "airpi_py4d[gpu]" (NVIDIA).'


@dataclass(frozen=True)
class Contract:
    """What a model takes and gives, from its file's metadata (schema version 1).

    Attributes
    ----------
    name, version : str
    grid_pixels : int
        Side of the patterns [px].
    aperture_pixels : float or None
        Radius of the bright-field disk on that grid [px]: the k-pixel is k0 / aperture_pixels. None for a model that
        takes the whole detector on its grid: the k-pixel is the detector's longer side / grid_pixels.
    object_pixels : int
        Side of the object patches [px], of size 1 / (grid_pixels * k-pixel).
    domain : dict of str to (float, float)
        What the model was trained on: `energy` [eV], `semiangle` [mrad], `relative_scan_step` [1 / k0],
        `electrons_per_pattern`, `defocus_phase` [rad at the aperture's edge].
    """

    name: str
    version: str
    grid_pixels: int
    aperture_pixels: float | None
    object_pixels: int
    domain: dict[str, tuple[float, float]]

    @property
    def geometry_values(self) -> int:
        """Numbers in the `geometry` of a kernel."""
        return 3 if self.aperture_pixels is not None else 5


def read_contract(metadata: dict[str, str], origin: str) -> Contract:
    """Contract from a model's `metadata_props`.

    Raises
    ------
    ValueError
        If the metadata are missing, of another schema version, or describe a grid that this engine doesn't serve.
    """
    if "airpi_schema" not in metadata:
        raise ValueError(f"model {origin} has no airpi metadata; export it with export.to_onnx, which writes them.")
    if metadata["airpi_schema"] != SCHEMA:
        raise ValueError(
            f"model {origin} has metadata of schema {metadata['airpi_schema']!r}; this version of airpi_py4d reads "
            f"schema {SCHEMA!r}: update airpi_py4d or export the model again."
        )
    try:
        grid, output, domain = (json.loads(metadata[key]) for key in ("grid", "output", "domain"))
        kinds = grid["kind"], output["kind"]
        if kinds[0] in GRIDS and kinds[1] == "object_patch":
            return Contract(
                name=metadata["name"],
                version=metadata["version"],
                grid_pixels=int(grid["pixels"]),
                aperture_pixels=float(grid["aperture_radius"]) if kinds[0] == "aperture" else None,
                object_pixels=int(output["pixels"]),
                domain={name: (float(low), float(high)) for name, (low, high) in domain.items()},
            )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"model {origin} has incomplete airpi metadata: {error!r}; export it again.") from error
    raise ValueError(
        f"model {origin} takes patterns on a {kinds[0]!r} grid and gives {kinds[1]!r}; this engine serves "
        f"{' and '.join(map(repr, GRIDS))} grids and 'object_patch' outputs."
    )


class Model:
    """A loaded model.

    Parameters
    ----------
    model : str or Path, optional
        Name of a shipped model or of one in the folder that AIRPI_MODELS names, or path of an ONNX file; the default
        model if not given.
    device : {"auto", "cpu", "cuda", "cuda:N", "tensorrt", "tensorrt:N"}
        "auto" takes CUDA where it runs, else the CPU; "cuda" and "tensorrt" raise where they don't run.
    threads : int, optional
        Threads on the CPU. By default as many as there are cores.

    Attributes
    ----------
    contract : Contract
    sha256 : str
        Of the file.
    provider : str
        Execution provider that really runs.

    Raises
    ------
    ImportError
        If no ONNX Runtime is installed; says what to install.
    ValueError
        If the file isn't an ONNX model, or its metadata don't tell how to use it.
    RuntimeError
        If CUDA or TensorRT was asked for and doesn't run; says why and what mends it.
    """

    def __init__(self, model: str | Path | None = None, device: str = "auto", threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(f"airpi_py4d needs ONNX Runtime, and none is installed. {_INSTALL}") from error
        providers = devices.providers(onnxruntime, device)
        path = find(DEFAULT_MODEL if model is None else model)
        content = read(path)
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        # threads that wait for work in a loop take the cores from NumPy between the batches (docs/speed.md)
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=providers)
        except Exception as error:  # ONNX Runtime raises a class of its own for every kind of broken file
            raise ValueError(f"model {path} can't be loaded by ONNX Runtime: {error}") from error
        devices.check_running(onnxruntime, device, self._session.get_providers())
        self._session.disable_fallback()  # an error on the GPU is one, not a reason to go on elsewhere
        self.provider: str = self._session.get_providers()[0]
        self.contract = read_contract(self._session.get_modelmeta().custom_metadata_map, str(path))
        self.sha256 = hashlib.sha256(content).hexdigest()
        n, values = self.contract.grid_pixels, self.contract.geometry_values
        inputs = {entry.name: (entry.type, entry.shape) for entry in self._session.get_inputs()}
        shapes = {name: shape[1:] for name, (_, shape) in inputs.items()}
        if (
            shapes != {"patterns": [3, 3, n, n], "geometry": [values]}
            or any(kind != "tensor(float)" for kind, _ in inputs.values())
            or any(isinstance(shape[0], int) for _, shape in inputs.values())
        ):
            raise ValueError(
                f"model {path} has the inputs {inputs}; its metadata promise float32 patterns (n, 3, 3, {n}, {n}) and "
                f"geometry (n, {values}), for any batch size n."
            )

    def __call__(self, patterns: NDArray[np.float32], geometry: NDArray[np.float32]) -> NDArray[np.complex64]:
        """Object patches, shape (n, p, p), of kernels (n, 3, 3, grid, grid) [electrons] and geometry (n, 3 or 5)."""
        parts = self._session.run(None, {"patterns": patterns, "geometry": geometry})[0]
        p = self.contract.object_pixels
        if parts.shape != (len(patterns), p, p, 2):
            raise ValueError(f"the model gave an output of shape {parts.shape}, its metadata promise (n, {p}, {p}, 2).")
        return np.ascontiguousarray(parts, dtype=np.float32).view(np.complex64)[..., 0]
