"""Figures of merit in a model's metadata."""

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from oracle import write_oracle

from airpi_py4d import models
from airpi_py4d.model import Model
from export import figures

BENCHMARK = Path(figures.__file__).parents[1] / "docs" / "paper_benchmark" / "benchmark.csv"


def test_written_and_described(tmp_path):
    path = write_oracle(tmp_path / "before.onnx", np.ones((3, 3, 16, 16)))
    model = onnx.load(path)
    for entry in model.metadata_props:
        entry.value = {"name": "airpi-2", "version": "1"}.get(entry.key, entry.value)
    onnx.save(model, path)
    output = tmp_path / "after.onnx"
    figures.main([str(path), str(BENCHMARK), str(output)])
    found = models.describe(output).metadata["figures"]["xc"]
    assert all(-1 <= xc <= 1 for doses in found.values() for xc in doses.values())
    line = next(row for row in BENCHMARK.read_text().splitlines() if ",AIRPI airpi-2 1," in row and ",inf," in row)
    specimen, _, _, xc = line.split(",")[:4]
    assert found[specimen]["no noise"] == round(float(xc), 3)
    text = " ".join(str(models.describe(output)).split())
    assert f"{specimen}: no noise {float(xc):.3f}, 1e+06 electrons / A^2" in text
    assert Model(output, "cpu").contract == Model(path, "cpu").contract
    before, after = onnx.load(path), onnx.load(output)
    assert before.graph == after.graph
    assert hashlib.sha256(path.read_bytes()).digest() != hashlib.sha256(output.read_bytes()).digest()


def test_other_table(tmp_path, capsys):
    path = write_oracle(tmp_path / "before.onnx", np.ones((3, 3, 16, 16)))
    table = tmp_path / "other.csv"
    table.write_text("specimen,dose,method,xc\nMoS2,inf,SSB,0.9\n")
    with pytest.raises(SystemExit):
        figures.main([str(path), str(table), str(tmp_path / "after.onnx")])
    assert "no rows of AIRPI or AIRPI oracle" in capsys.readouterr().err
