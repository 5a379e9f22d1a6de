"""The bioimage.io package, checked by bioimageio.core itself, which finds no network."""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import matplotlib.image
import numpy as np
import onnx
import pytest
import yaml
from oracle import KERNEL_MODEL, write_oracle

from airpi_py4d import models
from export import self_contained

ROOT = Path(self_contained.__file__).parents[1]
KERAS = ROOT / "training" / "weights" / f"{KERNEL_MODEL}.keras"


def run(*command, folder):
    """Run Python where every connection is refused and nothing is cached."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = os.environ | nowhere | {"BIOIMAGEIO_CACHE_PATH": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, env=environment)


def bioimageio_test(package, folder):
    """Status and details that `bioimageio test` reports."""
    summary = folder / "summary.json"
    done = run("-m", "bioimageio.core", "test", str(package), f"--summary={summary}", folder=folder)
    report = json.loads(summary.read_text())
    assert done.returncode == (0 if report["status"] == "passed" else 1), done.stderr
    return report["status"], report["details"]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    output = folder / "package.zip"
    model = models.find(KERNEL_MODEL)
    done = run("-m", "export.bioimageio", str(model), str(output), f"--keras={KERAS}", folder=folder)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def content(package):
    with zipfile.ZipFile(package) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def description(content):
    return yaml.safe_load(content["rdf.yaml"])


class TestPackage:
    def test_passes_offline(self, package, tmp_path):
        status, details = bioimageio_test(package, tmp_path)
        assert status == "passed"
        names = [detail["name"] for detail in details]
        assert "Reproduce test outputs from test inputs (onnx)" in names
        assert "Run onnx inference for inputs with batch_size: 2 and size parameter n: 2" in " ".join(
            " ".join(name.split()) for name in names
        )

    def test_a_wrong_result_is_found(self, content, tmp_path):
        """With a test tensor that is 1 % off, its hash left out."""
        patch = np.load(io.BytesIO(content["object_patch.npy"]))
        wrong = io.BytesIO()
        np.save(wrong, 1.01 * patch)
        description = yaml.safe_load(content["rdf.yaml"])
        del description["outputs"][0]["test_tensor"]["sha256"]
        spoiled = tmp_path / "spoiled.zip"
        with zipfile.ZipFile(spoiled, "w") as archive:
            for name, data in {
                **content,
                "object_patch.npy": wrong.getvalue(),
                "rdf.yaml": yaml.safe_dump(description),
            }.items():
                archive.writestr(name, data)
        status, details = bioimageio_test(spoiled, tmp_path)
        assert status != "passed"
        assert "object_patch" in json.dumps(details)

    def test_tensors(self, description, content):
        graph = onnx.load_from_string(content[description["weights"]["onnx"]["source"]])
        for kind, entries in (("inputs", graph.graph.input), ("outputs", graph.graph.output)):
            assert [entry["id"] for entry in description[kind]] == [entry.name for entry in entries]
            for entry in description[kind]:
                value = np.load(io.BytesIO(content[entry["test_tensor"]["source"]]))
                assert value.dtype == np.float32
                assert np.isfinite(value).all()
        patterns = description["inputs"][0]
        assert [axis["type"] for axis in patterns["axes"]] == ["batch"] + 4 * ["index"]
        assert patterns["description"].startswith("[electrons]")
        patch = description["outputs"][0]
        assert patch["axes"][-1]["channel_names"] == ["real", "imaginary"]
        assert description["weights"]["onnx"]["opset_version"] == graph.opset_import[0].version

    def test_tolerances(self, description, content):
        tolerances = description["config"]["bioimageio"]["reproducibility_tolerance"]
        assert [entry["output_ids"][0] for entry in tolerances] == [entry["id"] for entry in description["outputs"]]
        for entry in tolerances:
            largest = np.abs(np.load(io.BytesIO(content[f"{entry['output_ids'][0]}.npy"]))).max()
            assert entry["absolute_tolerance"] == pytest.approx(1e-3 * largest)

    def test_readme(self, content):
        text = content["README.md"].decode()
        assert "## Validation" in text
        assert models.find(KERNEL_MODEL).with_suffix(".md").read_text() in text
        assert "k_pixel [1/A]" in text
        assert "/tmp" not in text

    def test_cover(self, content):
        image = matplotlib.image.imread(io.BytesIO(content["cover.png"]))
        assert image.shape[1] == 2 * image.shape[0]
        assert len(content["cover.png"]) < 500_000
        assert image[..., :3].std() > 0.1

    def test_citation_and_licence(self, description):
        assert description["license"] == "GPL-3.0-or-later"
        assert description["cite"][0]["doi"] == "10.1093/micmic/ozac002"

    def test_keras_file_goes_along(self, description, content):
        assert [entry["source"] for entry in description["attachments"]] == [KERAS.name]
        assert content[KERAS.name] == KERAS.read_bytes()


def test_refused(tmp_path):
    path = write_oracle(tmp_path / "mine.onnx", np.ones((3, 3, 16, 16)), {"author": "somebody"})
    done = run("-m", "export.bioimageio", str(path), str(tmp_path / "out.zip"), folder=tmp_path)
    assert done.returncode == 1
    assert "no airpi metadata" in done.stderr
    assert not (tmp_path / "out.zip").exists()
