"""The registry of models: what is listed, what is described, and that shipped files are as they were shipped."""

import hashlib
import json
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from oracle import METADATA, write_oracle

from airpi_py4d import models

SHIPPED = Path(models.__file__).parent
PATCHES = np.ones((3, 3, 16, 16))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The user's folder, empty and not named."""
    monkeypatch.delenv("AIRPI_MODELS", raising=False)
    path = tmp_path / "models of mine"
    path.mkdir()
    return path


@pytest.fixture
def named(folder, monkeypatch):
    """The user's folder, named."""
    monkeypatch.setenv("AIRPI_MODELS", str(folder))
    return folder


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A copy of the shipped folder, to spoil."""
    path = tmp_path / "installed"
    shutil.copytree(SHIPPED, path, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(models, "_SHIPPED", path)
    monkeypatch.setattr(models, "_MANIFEST", path / "SHA256SUMS")
    return path


def changed(**entries):
    return {**METADATA, **entries}


class TestShipped:
    def test_manifest(self):
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in SHIPPED.glob("*.onnx")}
        assert models.manifest() == files, "in airpi_py4d/models run: sha256sum *.onnx > SHA256SUMS"

    def test_every_model_has_a_card(self):
        for path in SHIPPED.glob("*.onnx"):
            assert path.with_suffix(".md").is_file()

    def test_list(self):
        entries = models.list()
        assert {entry.path for entry in entries} == set(SHIPPED.glob("*.onnx"))
        assert not any(entry.problem for entry in entries)
        assert ("airpi-2", "1") in {(entry.name, entry.version) for entry in entries}

    def test_metadata_as_onnx_reads_them(self):
        for path in SHIPPED.glob("*.onnx"):
            expected = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
            assert models.read_metadata(path.read_bytes(), path.name) == expected

    def test_changed_file(self, installed):
        path = installed / "airpi-2.onnx"
        content = bytearray(path.read_bytes())
        before = hashlib.sha256(content).hexdigest()
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        after = hashlib.sha256(content).hexdigest()
        for spoiled in (lambda: models.read(path), lambda: models.describe("airpi-2")):
            with pytest.raises(ValueError, match=rf"was changed .* is {after}, expected {before}\. Install"):
                spoiled()
        assert after in models.list()[0].problem

    def test_file_that_was_not_shipped(self, installed):
        path = write_oracle(installed / "zzz.onnx", PATCHES)
        with pytest.raises(ValueError, match=r"was not shipped .* SHA256SUMS .* AIRPI_MODELS"):
            models.read(path)
        assert "was not shipped" in models.list()[-1].problem


class TestFolder:
    def test_found_by_name(self, named):
        path = write_oracle(named / "mine.onnx", PATCHES, changed(version="7"))
        assert models.list()[-1] == ("mine", "7", path, "")
        assert models.find("mine") == path
        assert models.find("airpi-2").parent == SHIPPED
        assert models.describe("mine").sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_not_named(self, folder):
        write_oracle(folder / "mine.onnx", PATCHES)
        assert "mine" not in {entry.name for entry in models.list()}
        with pytest.raises(ValueError, match=r"model is 'mine': neither a file nor a shipped model \(airpi-2.*\)\.$"):
            models.find("mine")

    def test_unknown_name(self, named):
        write_oracle(named / "mine.onnx", PATCHES)
        with pytest.raises(ValueError, match=r"shipped model \(airpi-2.*\), nor a model in .*models of mine \(mine\)"):
            models.find("yours")

    def test_same_name_twice(self, named):
        path = write_oracle(named / "airpi-2.onnx", PATCHES)
        with pytest.raises(ValueError, match=r"'airpi-2' is both shipped and in the folder .*models of mine"):
            models.find("airpi-2")
        assert models.find(path) == path

    def test_no_folder(self, monkeypatch, tmp_path):
        monkeypatch.setenv("AIRPI_MODELS", str(tmp_path / "nowhere"))
        for function in (models.list, lambda: models.find("airpi-2")):
            with pytest.raises(ValueError, match=r"variable AIRPI_MODELS is '.*nowhere', which is no folder"):
                function()

    @pytest.mark.parametrize(
        ("metadata", "problem"),
        [
            ({"author": "somebody"}, "no airpi metadata"),
            (changed(airpi_schema="2"), "metadata of schema '2', unknown"),
            (changed(grid=json.dumps({"kind": "detector"})), "patterns on a 'detector' grid: for other programs"),
        ],
    )
    def test_problems_are_listed(self, named, metadata, problem):
        write_oracle(named / "mine.onnx", PATCHES, metadata)
        entry = models.list()[-1]
        assert entry.name == "mine"
        assert problem in entry.problem

    @pytest.mark.parametrize("part", [0.0, 0.5, 0.999])
    def test_cut_off(self, named, part):
        path = write_oracle(named / "mine.onnx", PATCHES)
        content = path.read_bytes()
        path.write_bytes(content[: int(part * len(content))])
        assert "mine.onnx" in models.list()[-1].problem
        with pytest.raises(ValueError, match=r"mine\.onnx (is not an ONNX file, or cut off|has no airpi metadata)"):
            models.describe(path)

    @pytest.mark.parametrize("content", [b"not a model", b"\x89HDF\r\n\x1a\n" + bytes(100), b"\x72\x03\x0a\x01\xff"])
    def test_not_onnx(self, named, content):
        (named / "mine.onnx").write_bytes(content)
        assert "is not an ONNX file" in models.list()[-1].problem


class TestDescribe:
    def test_all_that_users_need(self):
        described = models.describe("airpi-2")
        metadata, text = described.metadata, " ".join(str(described).split())
        assert repr(described) == str(described)
        for entry in (*metadata["inputs"].values(), metadata["output"]):
            for needed in (f"[{entry['unit']}]", entry["axes"], " x ".join(map(str, entry["shape"]))):
                assert needed in text
        assert "energy 30000 to 3e+05 eV" in text
        assert "relative_scan_step 0.094 to 1.688 lambda / alpha" in text
        for needed in (
            "airpi-2, version 1",
            described.sha256,
            metadata["label"],
            metadata["training"]["data_configuration_sha256"],
            "GPL-3.0-or-later",
            metadata["citation"],
        ):
            assert needed in text
        assert max(map(len, str(described).splitlines())) < 120

    def test_metadata_that_say_little(self, folder):
        text = str(models.describe(write_oracle(folder / "mine.onnx", PATCHES)))
        assert text.startswith("oracle, version 1")
        assert text.count("not stated") >= 6

    def test_unknown_schema(self, folder):
        path = write_oracle(folder / "mine.onnx", PATCHES, changed(airpi_schema="2", novelty="so far unheard of"))
        text = str(models.describe(path))
        assert "metadata have schema '2'; this version of airpi_py4d knows schema '1': update airpi_py4d" in text
        assert "so far unheard of" in text

    def test_unreadable_entry(self, folder):
        path = write_oracle(folder / "mine.onnx", PATCHES, changed(airpi_schema="2", grid="{broken"))
        assert models.describe(path).metadata["grid"] == "{broken"

    def test_no_metadata(self, folder):
        path = write_oracle(folder / "mine.onnx", PATCHES, {})
        with pytest.raises(ValueError, match="no airpi metadata"):
            models.describe(path)


def test_offline_and_without_onnx_runtime(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert models.list()
    assert str(models.describe("airpi-2"))
    with pytest.raises(ValueError, match="neither a file nor a shipped model"):
        models.find("airpi-99")
