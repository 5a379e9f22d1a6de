"""Devices: what ONNX Runtime is asked for, and the reasons where something asked for doesn't run."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import onnxruntime
import pytest

import airpi_py4d
from airpi_py4d import __main__, devices, diagnosis

PROVIDERS = {
    "onnxruntime": ["CPUExecutionProvider"],
    "onnxruntime-gpu": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}
LIBRARIES = [file for files in devices.libraries("13").values() for file in files]


class Driver:
    """libcuda of a machine with some GPUs."""

    def __init__(self, version=13010, gpus=("H100",), status=0):
        self.version, self.gpus, self.status = version, gpus, status

    def cuInit(self, flags):
        return self.status

    def cuDriverGetVersion(self, pointer):
        pointer._obj.value = self.version

    def cuDeviceGetCount(self, pointer):
        pointer._obj.value = len(self.gpus)

    def cuDeviceGet(self, pointer, number):
        pointer._obj.value = number

    def cuDeviceGetName(self, buffer, size, handle):
        buffer.value = self.gpus[handle.value].encode()


@pytest.fixture
def machine(monkeypatch):
    """A function that pretends a machine: its ONNX Runtime, driver and libraries; returns the runtime."""

    def pretend(package="onnxruntime-gpu", driver=None, libraries=LIBRARIES, others=(), platform="linux"):
        def load(file):
            if file == "libcuda.so.1" and driver is not None:
                return driver
            if file not in libraries:
                raise OSError(f"{file}: cannot open shared object file: No such file or directory")

        packages = [SimpleNamespace(metadata={"Name": name}, version="1.31.1") for name in (package, *others, "numpy")]
        monkeypatch.setattr(devices, "distributions", lambda: packages)
        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(sys, "platform", platform)
        return SimpleNamespace(
            __version__="1.31.1",
            cuda_version="13.0" if package == "onnxruntime-gpu" else "",
            get_available_providers=lambda: PROVIDERS[package],
        )

    return pretend


class TestNames:
    @pytest.mark.parametrize(
        "device", ["gpu", "", "CPU", "cpu:0", "auto:1", "cuda:one", "cuda:-1", "cuda:0:1", "cuda:", "cuda:\u00b2"]
    )
    def test_unknown(self, device):
        with pytest.raises(ValueError, match=f"device is '{device}', expected 'auto', 'cpu', 'cuda' or 'tensorrt'"):
            devices.provider(device)

    def test_known(self):
        names = {device: devices.provider(device) for device in ("auto", "cpu", "cuda:1", "tensorrt", "tensorrt:0")}
        assert list(names.values()) == [
            *(None, "CPUExecutionProvider", "CUDAExecutionProvider"),
            *["TensorrtExecutionProvider"] * 2,
        ]


class TestReasons:
    def test_all_there(self, machine):
        runtime = machine(driver=Driver())
        assert devices.problems(runtime, "cuda") == devices.problems(runtime, "tensorrt") == []

    @pytest.mark.parametrize(("device", "name"), [("cuda", "CUDA"), ("cuda:1", "CUDA"), ("tensorrt", "TensorRT")])
    def test_package_for_the_cpu(self, machine, device, name):
        message = (
            f"device='{device}' was asked for, but this ONNX Runtime can't use it. The installed onnxruntime 1.31.1 "
            rf'has no {name} provider: pip uninstall -y onnxruntime, then pip install "airpi_py4d\[gpu\]"\. '
            r"The NVIDIA driver isn't there \(libcuda.so.1: cannot open.*nvidia-smi"
        )
        with pytest.raises(RuntimeError, match=message):
            devices.providers(machine("onnxruntime"), device)

    def test_both_packages(self, machine):
        runtime = machine("onnxruntime", driver=Driver(), others=["onnxruntime-gpu"])
        assert devices.problems(runtime, "cuda") == [
            "onnxruntime 1.31.1 and onnxruntime-gpu 1.31.1 are installed, of which one overwrites the other: pip "
            'uninstall -y onnxruntime onnxruntime-gpu, then pip install "airpi_py4d[gpu]".'
        ]

    def test_no_driver(self, machine):
        (problem,) = devices.problems(machine(), "cuda")
        assert "The NVIDIA driver isn't there (libcuda.so.1: cannot open shared object file" in problem

    def test_driver_does_not_start(self, machine):
        (problem,) = devices.problems(machine(driver=Driver(status=803)), "cuda")
        assert "isn't there (it is installed but doesn't start, CUDA error 803)" in problem

    def test_old_driver(self, machine):
        (problem,) = devices.problems(machine(driver=Driver(version=12040)), "cuda")
        assert problem.startswith("The NVIDIA driver is for CUDA up to 12.4, CUDA 13 is needed: update it (")

    @pytest.mark.parametrize(
        ("gpus", "device", "shown"),
        [((), "cuda", "There is no GPU 0; the driver sees: none."), (("A", "B"), "cuda:2", "sees: 0 (A), 1 (B).")],
    )
    def test_no_such_gpu(self, machine, gpus, device, shown):
        (problem,) = devices.problems(machine(driver=Driver(gpus=gpus, status=0 if gpus else 100)), device)
        assert shown in problem

    @pytest.mark.parametrize(
        ("missing", "device", "problem"),
        [
            ("libcublasLt.so.13", "cuda", 'CUDA isn\'t there (libcublasLt.so.13: .*): pip install "airpi_py4d[gpu]".'),
            ("libcudnn.so.9", "cuda", 'cuDNN isn\'t there (libcudnn.so.9: .*): pip install "airpi_py4d[gpu]".'),
            ("libnvinfer.so.10", "tensorrt", 'TensorRT isn\'t there (.*): pip install "tensorrt-cu13==10.*".'),
        ],
    )
    def test_missing_library(self, machine, missing, device, problem):
        runtime = machine(driver=Driver(), libraries=[file for file in LIBRARIES if file != missing])
        start, end = problem.split(".*", 1)
        (found,) = devices.problems(runtime, device)
        assert found.startswith(start)
        assert found.endswith(end)
        with pytest.raises(
            RuntimeError, match=f"device='{device}' was asked for, but ONNX Runtime fell back to CPUExec"
        ):
            devices.check_running(runtime, device, ["CPUExecutionProvider"])

    def test_tensorrt_is_not_needed_for_cuda(self, machine):
        runtime = machine(driver=Driver(), libraries=[file for file in LIBRARIES if "nv" not in file])
        assert devices.problems(runtime, "cuda") == []

    def test_macos(self, machine):
        (problem,) = devices.problems(machine("onnxruntime", platform="darwin"), "cuda")
        assert problem == 'There is no CUDA for macOS: take device="cpu".'

    def test_unknown_reason(self, machine):
        runtime = machine(driver=Driver())
        with pytest.raises(RuntimeError, match=r"fell back to CUDAExec.*No reason was found.*airpi_py4d\.diagnose\(\)"):
            devices.check_running(runtime, "tensorrt", ["CUDAExecutionProvider", "CPUExecutionProvider"])

    def test_runs(self, machine):
        runtime = machine(driver=Driver())
        devices.check_running(runtime, "auto", ["CPUExecutionProvider"])
        devices.check_running(runtime, "cuda:1", ["CUDAExecutionProvider", "CPUExecutionProvider"])


class TestPreload:
    def test_says_nothing(self, capsys):
        devices.preload(SimpleNamespace(preload_dlls=lambda: print("Failed to load libcublasLt.so.13")))
        assert capsys.readouterr().out == ""

    def test_tensorrt_of_pip(self, monkeypatch, tmp_path):
        (tmp_path / "libnvinfer.so.10").touch()
        loaded = []
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(ctypes, "CDLL", loaded.append)
        spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
        monkeypatch.setattr(devices, "find_spec", lambda name: spec if name == "tensorrt_libs" else None)
        devices.preload(SimpleNamespace())
        assert loaded == [str(tmp_path / "libnvinfer.so.10")]


class TestDiagnose:
    def test_this_machine(self, capsys):
        airpi_py4d.diagnose()
        shown = capsys.readouterr().out
        assert f"airpi_py4d    {airpi_py4d.diagnosis.version('airpi_py4d')}, Python" in shown
        assert f"ONNX Runtime  {onnxruntime.__version__}, providers " in shown
        assert "airpi-2, version 1, " in shown
        for title in ("packages", "runtime", "environment", "cores", "NumPy", "driver", "CUDA", "cuDNN", "TensorRT"):
            assert f"\n{title.ljust(14)}" in shown
        assert '\n"auto"        runs on ' in shown

    @pytest.mark.parametrize("package", ["onnxruntime", "onnxruntime-gpu"])
    def test_says_what_is_missing(self, machine, monkeypatch, capsys, package):
        runtime = machine(package, libraries=())
        for name in ("get_available_providers", "cuda_version"):
            monkeypatch.setattr(onnxruntime, name, getattr(runtime, name), raising=False)
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
        asked = []

        def refused(device):
            asked.append(device)
            raise RuntimeError(f"device={device!r} was asked for, but. Reasons follow.")

        monkeypatch.setattr(diagnosis, "Model", refused)
        airpi_py4d.diagnose()
        shown = capsys.readouterr().out
        assert asked == ["auto", "cuda", "tensorrt"]
        assert f"runtime       {package} 1.31.1\n" in shown
        assert "driver        not found: libcuda.so.1: cannot open" in shown
        assert "cuDNN         libcudnn.so.9: cannot open" in shown
        assert "does not run: device='cuda' was asked for, but.\n" in shown
        assert 'pip install "airpi_py4d[gpu]"' in shown
        assert ("tensorrt-cu13==10.*" in shown) == (package == "onnxruntime-gpu")

    def test_with_a_gpu(self, machine, monkeypatch, capsys):
        machine(driver=Driver(gpus=("H100", "A100")))
        monkeypatch.setattr(diagnosis, "Model", lambda device: SimpleNamespace(provider="CUDAExecutionProvider"))
        airpi_py4d.diagnose()
        shown = capsys.readouterr().out
        assert "driver        for CUDA up to 13.1; GPUs: H100, A100\n" in shown
        assert "libcudnn.so.9: found" in shown
        assert '"auto"        runs on CUDAExecutionProvider\n' in shown

    def test_broken_models_folder(self, monkeypatch, capsys):
        monkeypatch.setenv("AIRPI_MODELS", "/nowhere")
        airpi_py4d.diagnose()
        assert "AIRPI_MODELS is '/nowhere', which is no folder" in capsys.readouterr().out

    def test_no_runtime(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        monkeypatch.setitem(sys.modules, "threadpoolctl", None)
        monkeypatch.setattr(devices, "distributions", list)
        airpi_py4d.diagnose()
        shown = capsys.readouterr().out
        assert "runtime       no package of ONNX Runtime is installed\n" in shown
        assert "ONNX Runtime  can't be imported: " in shown
        assert "pip install threadpoolctl" in shown

    def test_command(self, capsys):
        __main__.main(["diagnose"])
        assert capsys.readouterr().out.startswith("airpi_py4d    ")

    def test_command_line(self):
        shown = subprocess.run([sys.executable, "-m", "airpi_py4d", "diagnose"], capture_output=True, text=True)
        assert shown.returncode == 0
        assert "models        airpi-2" in shown.stdout
