"""What users install."""

import importlib.metadata
import importlib.resources
import re
from pathlib import Path

import pytest

import airpi_py4d
from airpi_py4d.model import DEFAULT_MODEL

tomllib = pytest.importorskip("tomllib")

ROOT = Path(airpi_py4d.__file__).parents[1]


@pytest.fixture(scope="module")
def project():
    path = ROOT / "pyproject.toml"
    if not path.is_file():
        pytest.skip("not the source tree")
    return tomllib.loads(path.read_text())["project"]


def names(requirements):
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def test_name_and_version(project):
    metadata = importlib.metadata.metadata("airpi_py4d")
    assert metadata["Name"] == project["name"] == "airpi_py4d"
    assert metadata["Version"] == project["version"]


def test_core_is_light(project):
    assert names(project["dependencies"]) == {"numpy", "scipy", "tqdm"}


def test_extras(project):
    extras = project["optional-dependencies"]
    assert set(extras) >= {"cpu", "gpu", "py4dstem", "hyperspy", "libertem", "train", "docs", "test", "all"}
    assert names(extras["cpu"]) == {"onnxruntime"}
    assert names(extras["gpu"]) == {"onnxruntime-gpu"}
    assert "numpy<2" in extras["py4dstem"]
    assert names(extras["hyperspy"]) >= {"hyperspy", "pyxem"}
    together = " ".join(extras["all"])
    assert "gpu" not in together  # the two ONNX Runtimes can't be installed together
    for extra in ("cpu", "py4dstem", "hyperspy", "libertem", "train"):
        assert extra in together


def test_no_hyperspy_entry_point():
    """A wrong one breaks `import hyperspy`; the method is attached without."""
    assert not [
        entry for entry in importlib.metadata.distribution("airpi_py4d").entry_points if "hyperspy" in entry.group
    ]


def test_package_data():
    files = importlib.resources.files("airpi_py4d")
    assert files.joinpath("py.typed").is_file()
    assert files.joinpath("models", f"{DEFAULT_MODEL}.onnx").is_file()


def test_public_names():
    assert set(airpi_py4d.__all__) >= {"Acquisition", "Reconstruction", "reconstruct"}
    for name in airpi_py4d.__all__:
        assert getattr(airpi_py4d, name).__doc__
