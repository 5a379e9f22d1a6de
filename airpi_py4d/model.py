"""An ONNX file, its contract (metadata) and the session that runs it."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airpi_py4d import devices
from airpi_py4d.feature_stitching import EXTRA_CHANNELS
from airpi_py4d.models import GRIDS, IMAGE_NETWORK, SCHEMA, find, read

DEFAULT_MODEL = "airpi-3-fast"
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
        Side of the patches [px], of size 1 / (grid_pixels * k-pixel).
    domain : dict of str to (float, float)
        What the model was trained on: `energy` [eV], `semiangle` [mrad], `relative_scan_step` [1 / k0],
        `electrons_per_pattern`, `defocus_phase` [rad at the aperture's edge].
    features : int
        0 for a model that sees kernels of 3x3 patterns and gives patches of the object. Otherwise the model sees each
        pattern alone and gives a patch of so many features; its second network makes the phase image of the stitched
        features.
    margin : int
        Half width of that network's receptive field [px of the image].
    smallest_pixel : float
        Detector pixels that are smaller are spread over tents as wide when they are resampled [px of the grid].
    """

    name: str
    version: str
    grid_pixels: int
    aperture_pixels: float | None
    object_pixels: int
    domain: dict[str, tuple[float, float]]
    features: int = 0
    margin: int = 0
    smallest_pixel: float = 0.0

    @property
    def kernel_side(self) -> int:
        """Patterns along the side of what the model sees at once."""
        return 1 if self.features else 3

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
        stitched = kinds == ("aperture", "stitched_features")
        if stitched or (kinds[0] in GRIDS and kinds[1] == "object_patch"):
            return Contract(
                name=metadata["name"],
                version=metadata["version"],
                grid_pixels=int(grid["pixels"]),
                aperture_pixels=float(grid["aperture_radius"]) if kinds[0] == "aperture" else None,
                object_pixels=int(output["pixels"]),
                domain={name: (float(low), float(high)) for name, (low, high) in domain.items()},
                features=_positive(output, "features") if stitched else 0,
                margin=_positive(output, "margin") if stitched else 0,
                smallest_pixel=_not_negative(grid, "smallest_pixel"),
            )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"model {origin} has incomplete airpi metadata: {error!r}; export it again.") from error
    raise ValueError(
        f"model {origin} takes patterns on a {kinds[0]!r} grid and gives {kinds[1]!r}; this engine serves "
        f"{' and '.join(map(repr, GRIDS))} grids and 'object_patch' outputs, or "
        "'aperture' grids and 'stitched_features' outputs."
    )


def _positive(entry: dict[str, Any], name: str) -> int:
    value = int(entry[name])
    if value < 1:
        raise ValueError(f"{name} is {value}")
    return value


def _not_negative(entry: dict[str, Any], name: str) -> float:
    value = float(entry.get(name, 0.0))
    if not 0 <= value < np.inf:
        raise ValueError(f"{name} is {value}")
    return value


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
    memory : (str, int)
        Kind and number of the device whose memory that provider works in, as ONNX Runtime names them.

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
        self._runtime, self._device = onnxruntime, device
        path = find(DEFAULT_MODEL if model is None else model)
        content, self.sha256 = read(path)
        self._options = onnxruntime.SessionOptions()
        if threads is not None:
            self._options.intra_op_num_threads = threads
        # threads that wait for work in a loop take the cores from NumPy between the batches (docs/speed.md)
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = self._loaded(content, f"model {path}", device)
        self.provider: str = self._session.get_providers()[0]
        self.memory = devices.memory(self.provider, device)
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.contract = contract = read_contract(metadata, str(path))
        n, side, values = contract.grid_pixels, contract.kernel_side, contract.geometry_values
        kernel = [n, n] if side == 1 else [side, side, n, n]
        _check_inputs(
            self._session,
            {"patterns": [None, *kernel], "geometry": [None, values]},
            f"model {path}",
            f"float32 patterns (n, {', '.join(map(str, kernel))}) and geometry (n, {values}), for any batch size n",
        )
        if contract.features:
            what = f"the image network of model {path}"
            try:
                second = base64.b64decode(metadata[IMAGE_NETWORK], validate=True)
            except (KeyError, binascii.Error, ValueError) as error:
                raise ValueError(
                    f"model {path} has incomplete airpi metadata: {error!r}; join its parts with export.two_parts."
                ) from error
            self._image_session = self._loaded(second, what, device)
            channels = contract.features + EXTRA_CHANNELS
            lengths = {entry.name: entry.shape[-1] for entry in self._image_session.get_inputs()}
            self._image_values = 4 if lengths.get("image_geometry") == 4 else 5  # the fifth is k0
            _check_inputs(
                self._image_session,
                {"image_features": [1, channels, None, None], "image_geometry": [1, self._image_values]},
                what,
                f"float32 image_features (1, {channels}, h, w), for any h and w, and image_geometry (1, 4) or (1, 5)",
            )
            outputs = [entry.name for entry in self._image_session.get_outputs()]
            if not {"phase", "phase_error"}.issubset(outputs):
                raise ValueError(f"{what} has the outputs {outputs}, expected 'phase' and 'phase_error'.")

    @property
    def session(self) -> Any:
        """ONNX Runtime's, of the network that sees patterns."""
        return self._session

    def session_beside(self, content: bytes) -> Any:
        """A session of another graph in the same memory: by CUDA also where the networks run by TensorRT."""
        return self._loaded(content, "a graph of this package's", self._device.replace("tensorrt", "cuda"))

    def _loaded(self, content: bytes, what: str, device: str) -> Any:
        providers = devices.providers(self._runtime, device)
        try:
            session = self._runtime.InferenceSession(content, self._options, providers=providers)
        except Exception as error:  # ONNX Runtime raises a class of its own for every kind of broken file
            raise ValueError(f"{what} can't be loaded by ONNX Runtime: {error}") from error
        devices.check_running(self._runtime, device, session.get_providers())
        session.disable_fallback()  # an error on the GPU is one, not a reason to go on elsewhere
        return session

    def __call__(self, patterns: NDArray[np.float32], geometry: NDArray[np.float32]) -> NDArray[Any]:
        """What the model makes of kernels, of which it sees each alone.

        Parameters
        ----------
        patterns : ndarray of float32, shape (n, 3, 3, grid, grid), or (n, grid, grid) for a model of features
            [electrons]
        geometry : ndarray of float32, shape (n, 3 or 5)

        Returns
        -------
        ndarray of complex64, shape (n, p, p), or of float32, shape (n, features, p, p)
            Patches of the object, or of features.
        """
        parts = self._session.run(None, {"patterns": patterns, "geometry": geometry})[0]
        p, features = self.contract.object_pixels, self.contract.features
        shape = (features, p, p) if features else (p, p, 2)
        if parts.shape != (len(patterns), *shape):
            promised = ", ".join(map(str, shape))
            raise ValueError(f"the model gave an output of shape {parts.shape}, its metadata promise (n, {promised}).")
        patches = np.ascontiguousarray(parts, dtype=np.float32)
        return patches if features else patches.view(np.complex64)[..., 0]

    def image(
        self, features: NDArray[np.float32], geometry: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Phase and its error [rad], shape (h, w) each, of a feature image.

        Parameters
        ----------
        features : ndarray of float32, shape (1, features + 2, h, w)
            h and w are multiples of 4.
        geometry : ndarray of float32, shape (1, 5)
            As `Plan.image_geometry` gives it; a network that takes four numbers gets the first four.
        """
        names, values = ["phase", "phase_error"], geometry[:, : self._image_values]
        outputs = self._image_session.run(names, {"image_features": features, "image_geometry": values})
        for name, output in zip(names, outputs, strict=True):
            if output.shape != (1, 1, *features.shape[2:]):
                raise ValueError(
                    f"the image network gave a {name} of shape {output.shape} for features of shape {features.shape}, "
                    f"expected {(1, 1, *features.shape[2:])}."
                )
        phase, error = (np.asarray(output[0, 0], np.float32) for output in outputs)
        return phase, error


def _check_inputs(session: Any, expected: dict[str, list[int | None]], what: str, promised: str) -> None:
    """Raise unless a session's inputs have these shapes, in which None stands for any length."""
    inputs = {entry.name: (entry.type, entry.shape) for entry in session.get_inputs()}
    shapes = {
        name: [None if isinstance(length, str) else length for length in shape] for name, (_, shape) in inputs.items()
    }
    if shapes != expected or any(kind != "tensor(float)" for kind, _ in inputs.values()):
        raise ValueError(f"{what} has the inputs {inputs}; its metadata promise {promised}.")
