"""Devices that the network runs on: what to ask ONNX Runtime for, and why what was asked for doesn't run.

Asked for a provider that it can't load, ONNX Runtime prints an error and takes the next one: TensorRT falls back to
CUDA, CUDA to the CPU. Here that is an error, with its reasons.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
from collections.abc import Iterable
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
_NAMES = {"cuda": "CUDA", "tensorrt": "TensorRT"}
_GPU = 'pip install "airpi_py4d[gpu]"'
_DRIVER = "https://www.nvidia.com/drivers, on Ubuntu: sudo ubuntu-drivers install"
_CUDA = "13"  # major version that the newest onnxruntime-gpu is built for
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def _parsed(device: str) -> tuple[str, int]:
    """Kind and number of a device."""
    kind, separator, number = device.partition(":")
    numbered = kind in _NAMES and number.isascii() and number.isdigit()
    if kind not in ("auto", *_PROVIDERS) or (separator and not numbered):
        raise ValueError(
            f"device is {device!r}, expected 'auto', 'cpu', 'cuda' or 'tensorrt', the last two also with the number of "
            "a GPU: 'cuda:1'."
        )
    return kind, int(number or 0)


def provider(device: str) -> str | None:
    """Execution provider that must run; None for "auto", which takes any.

    Raises
    ------
    ValueError
        If there is no such device.

    Examples
    --------
    >>> provider("cuda:1"), provider("auto")
    ('CUDAExecutionProvider', None)
    """
    return _PROVIDERS.get(_parsed(device)[0])


def providers(runtime: Any, device: str) -> list[Any]:
    """Execution providers to ask ONNX Runtime for, the wanted one first; loads the libraries they need.

    Parameters
    ----------
    runtime : module
        onnxruntime.
    device : {"auto", "cpu", "cuda", "cuda:N", "tensorrt", "tensorrt:N"}

    Raises
    ------
    ValueError
        If there is no such device.
    RuntimeError
        If this ONNX Runtime has no such provider; says why and what mends it.
    """
    kind, number = _parsed(device)
    available = runtime.get_available_providers()
    if kind == "cpu" or (kind == "auto" and _PROVIDERS["cuda"] not in available):
        return [_PROVIDERS["cpu"]]
    if kind != "auto" and _PROVIDERS[kind] not in available:
        raise _refusal(runtime, device, "this ONNX Runtime can't use it")
    preload(runtime)
    # products of float32 in TF32, CUDA's default, have the precision of float16
    cuda = _PROVIDERS["cuda"], {"device_id": number, "use_tf32": 0}
    tensorrt = [(_PROVIDERS["tensorrt"], {"device_id": number})] if kind == "tensorrt" else []
    return [*tensorrt, cuda, _PROVIDERS["cpu"]]


def memory(running: str, device: str) -> tuple[str, int]:
    """Kind and number of the device whose memory a provider works in, as ONNX Runtime names them.

    Parameters
    ----------
    running : str
        The provider.
    device : str
        That was asked for.

    Examples
    --------
    >>> memory("TensorrtExecutionProvider", "tensorrt:1"), memory("CPUExecutionProvider", "auto")
    (('cuda', 1), ('cpu', 0))
    """
    return ("cpu", 0) if running == _PROVIDERS["cpu"] else ("cuda", _parsed(device)[1])


def check_running(runtime: Any, device: str, running: list[str]) -> None:
    """Raise if a session runs on another provider than the one that was asked for.

    Parameters
    ----------
    runtime : module
        onnxruntime.
    device : str
        That was asked for.
    running : list of str
        Providers of the session, the preferred one first.

    Raises
    ------
    RuntimeError
        Says why and what mends it.
    """
    if provider(device) not in (None, running[0]):
        raise _refusal(runtime, device, f"ONNX Runtime fell back to {running[0]}")


def _refusal(runtime: Any, device: str, what: str) -> RuntimeError:
    found = problems(runtime, device) or [
        "No reason was found; ONNX Runtime has printed its own to stderr, and airpi_py4d.diagnose() shows more."
    ]
    return RuntimeError(f"device={device!r} was asked for, but {what}. {' '.join(found)}")


def problems(runtime: Any, device: str) -> list[str]:
    """Why a device doesn't run, each a sentence with what mends it; empty if nothing was found.

    Parameters
    ----------
    runtime : module
        onnxruntime.
    device : str
        "cuda" or "tensorrt", with the GPU's number or without.
    """
    kind, number = _parsed(device)
    if sys.platform == "darwin":
        return [f'There is no {_NAMES[kind]} for macOS: take device="cpu".']
    found = []
    packages = runtimes()
    available = _PROVIDERS[kind] in runtime.get_available_providers()
    if not available or len(packages) > 1:
        names = [package.split()[0] for package in packages]
        state = (
            f"{' and '.join(packages)} are installed, of which one overwrites the other"
            if len(packages) > 1
            else f"The installed {packages[0] if packages else 'ONNX Runtime'} has no {_NAMES[kind]} provider"
        )
        found.append(f"{state}: pip uninstall -y {' '.join(names) or 'onnxruntime'}, then {_GPU}.")
    found += _driver_problems(number, cuda_version(runtime))
    if available:
        preload(runtime)
        found += _library_problems(kind, cuda_version(runtime))
    return found


def _driver_problems(number: int, cuda: str) -> list[str]:
    try:
        version, gpus = driver()
    except OSError as error:
        return [f"The NVIDIA driver isn't there ({error}): install it ({_DRIVER}), then see that nvidia-smi runs."]
    found = []
    if int(version.split(".")[0]) < int(cuda):
        found.append(f"The NVIDIA driver is for CUDA up to {version}, CUDA {cuda} is needed: update it ({_DRIVER}).")
    if number >= len(gpus):
        listed = ", ".join(f"{n} ({name})" for n, name in enumerate(gpus)) or "none"
        found.append(
            f"There is no GPU {number}; the driver sees: {listed}. See nvidia-smi, and the environment variable "
            "CUDA_VISIBLE_DEVICES."
        )
    return found


def _library_problems(kind: str, cuda: str) -> list[str]:
    commands = {"CUDA": _GPU, "cuDNN": _GPU, "TensorRT": f'pip install "tensorrt-cu{cuda}==10.*"'}
    found = []
    for name, files in libraries(cuda).items():
        missing = [problem for file in files if (problem := load_problem(file))]
        if missing and (kind == "tensorrt" or name != "TensorRT"):
            found.append(f"{name} isn't there ({'; '.join(missing)}): {commands[name]}.")
    return found


def runtimes() -> list[str]:
    """Installed packages that provide ONNX Runtime, with their versions: one, unless the environment is broken."""
    names = {"onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"}
    found = ((str(entry.metadata["Name"]).lower().replace("_", "-"), entry.version) for entry in distributions())
    return sorted({f"{name} {version}" for name, version in found if name in names})


def cuda_version(runtime: Any) -> str:
    """Major version of CUDA that this ONNX Runtime is built for; the newest one's if it isn't for CUDA."""
    return str(getattr(runtime, "cuda_version", "") or _CUDA).split(".")[0]


def libraries(cuda: str) -> dict[str, tuple[str, ...]]:
    """File names of the libraries that ONNX Runtime's providers load, by what they belong to.

    Parameters
    ----------
    cuda : str
        Major version of CUDA.

    Examples
    --------
    >>> libraries("13")["cuDNN"] in (("libcudnn.so.9",), ("cudnn64_9.dll",))
    True
    """
    if sys.platform == "win32":
        return {
            "CUDA": (f"cudart64_{cuda}.dll", f"cublasLt64_{cuda}.dll", f"cublas64_{cuda}.dll"),
            "cuDNN": ("cudnn64_9.dll",),
            "TensorRT": ("nvinfer_10.dll", "nvonnxparser_10.dll"),
        }
    return {
        "CUDA": (f"libcudart.so.{cuda}", f"libcublasLt.so.{cuda}", f"libcublas.so.{cuda}", "libcurand.so.10"),
        "cuDNN": ("libcudnn.so.9",),
        "TensorRT": ("libnvinfer.so.10", "libnvonnxparser.so.10"),
    }


def load_problem(file: str) -> str:
    """Why a library can't be loaded; empty if it can."""
    try:
        ctypes.CDLL(file)
    except OSError as error:
        return str(error) or f"{file} can't be loaded"
    return ""


def preload(runtime: Any) -> None:
    """Load the libraries that came with pip, which ONNX Runtime doesn't find by itself."""
    if hasattr(runtime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # prints what is missing, which `problems` says better
            runtime.preload_dlls()
    spec = find_spec("tensorrt_libs")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        _load_existing(Path(folder) / file for file in libraries(cuda_version(runtime))["TensorRT"])


def _load_existing(files: Iterable[Path]) -> None:
    for file in files:
        if file.is_file():
            load_problem(str(file))


def driver() -> tuple[str, list[str]]:
    """Newest version of CUDA that the driver is for, and the names of the GPUs.

    Raises
    ------
    OSError
        If there is no driver, or if it doesn't start.
    """
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    status = library.cuInit(0)
    if status not in (0, _NO_DEVICE):
        raise OSError(f"it is installed but doesn't start, CUDA error {status}")
    version, count, handle = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    library.cuDeviceGetCount(ctypes.byref(count))
    names = []
    for number in range(count.value):
        name = ctypes.create_string_buffer(256)
        library.cuDeviceGet(ctypes.byref(handle), number)
        library.cuDeviceGetName(name, len(name), handle)
        names.append(name.value.decode(errors="replace"))
    return f"{version.value // 1000}.{version.value % 1000 // 10}", names
