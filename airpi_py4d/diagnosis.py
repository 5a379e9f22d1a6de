"""What a bug report or a question about speed needs: versions, devices, threads, models."""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from airpi_py4d import devices, models
from airpi_py4d.model import Model

_PACKAGES = ("numpy", "scipy", "tqdm", "py4DSTEM", "hyperspy", "pyxem", "libertem", "threadpoolctl")
_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", models.VARIABLE)
_WIDTH, _INDENT = 110, 14


def diagnose() -> None:
    """Print what this installation consists of and what it runs on; also ``python -m airpi_py4d diagnose``.

    Versions of the packages, which ONNX Runtime is installed and its execution providers, whether the NVIDIA driver,
    CUDA, cuDNN and TensorRT are found and why not, cores and threads, the models, and which provider "auto" takes.

    Examples
    --------
    >>> diagnose()  # doctest: +ELLIPSIS
    airpi_py4d    ...
    """
    for title, lines in _sections():
        margin = " " * _INDENT
        wrapper = textwrap.TextWrapper(
            _WIDTH, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False, break_long_words=False
        )
        text = "\n".join(map(wrapper.fill, lines))
        print(f"{title:{_INDENT}}{text.lstrip()}")


def _sections() -> Iterator[tuple[str, list[str]]]:
    """Titles and lines of text."""
    yield "airpi_py4d", [f"{version('airpi_py4d')}, Python {platform.python_version()}, {platform.platform()}"]
    yield "packages", [", ".join(f"{name} {_version(name)}" for name in _PACKAGES)]
    yield "runtime", [" and ".join(devices.runtimes()) or "no package of ONNX Runtime is installed"]
    yield "environment", [", ".join(f"{name} {os.environ.get(name, 'not set')}" for name in _VARIABLES)]
    yield "cores", [_cores()]
    yield "NumPy", [_blas_threads()]
    yield "models", list(_models())
    try:
        import onnxruntime
    except ImportError as error:
        yield "ONNX Runtime", [f"can't be imported: {error}"]
    else:
        yield from _device_sections(onnxruntime)


def _device_sections(runtime: ModuleType) -> Iterator[tuple[str, list[str]]]:
    cuda = devices.cuda_version(runtime)
    yield "ONNX Runtime", [f"{runtime.__version__}, providers {', '.join(runtime.get_available_providers())}"]
    try:
        newest, gpus = devices.driver()
        yield "driver", [f"for CUDA up to {newest}; GPUs: {', '.join(gpus) or 'none'}"]
    except OSError as error:
        yield "driver", [f"not found: {error}"]
    devices.preload(runtime)
    for name, files in devices.libraries(cuda).items():
        yield name, [devices.load_problem(file) or f"{file}: found" for file in files]
    yield '"auto"', [_running("auto")]
    for device in ("cuda", "tensorrt"):
        yield f'"{device}"', [_running(device), *devices.problems(runtime, device)]


def _running(device: str) -> str:
    try:
        return f"runs on {Model(device=device).provider}"
    except (OSError, RuntimeError, ValueError) as error:
        return f"does not run: {str(error).partition('. ')[0]}."


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{os.cpu_count()}, {usable} of them for this process; ONNX Runtime takes a thread for each unless told"


def _blas_threads() -> str:
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return "threads unknown, pip install threadpoolctl shows them"
    pools = (f"{pool['internal_api']} {pool['version']}: {pool['num_threads']} threads" for pool in threadpool_info())
    return ", ".join(pools) or "no threads of its own"


def _models() -> Iterator[str]:
    try:
        for entry in models.list():
            problem = f"; can't be used: {entry.problem}" if entry.problem else ""
            yield f"{entry.name}, version {entry.version or 'not stated'}, {entry.path}{problem}"
    except ValueError as error:
        yield str(error)
