"""One command: data, training, export, curves and validation."""

import csv

import pytest

from training import pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
MODEL = """
seed = 3
label = "exit_wave"
batch_size = 4
epochs = 1
learning_rate = 2e-3
patience = 2
validation_shards = 1
validate_every = 1
validation_samples = 4
validation_doses = [0.0]
shards_in_memory = 3
workers = 1

[network]
kind = "unet"
filters = 2
levels = 2
blocks = 1
"""


def test_two_configurations_become_a_model_that_is_evaluated(tmp_path, capfd):
    with open("training/configs/small_paper_data.toml") as file:
        text = file.read().replace("scans_per_shard = 64", "scans_per_shard = 2")
    (tmp_path / "data.toml").write_text(text.replace("phonon_configurations = 4", "phonon_configurations = 1"))
    (tmp_path / "model.toml").write_text(MODEL)
    folder = tmp_path / "all"
    given = [str(tmp_path / "data.toml"), str(tmp_path / "model.toml"), str(folder)]
    pipeline.main([*given, "--shards", "2", "--name", "tiny", "--positions", "8", "--workers", "2"])
    assert {path.name for path in folder.iterdir()} == {"data", "run", "tiny.onnx", "curves.png", "validation"}
    with open(folder / "validation" / "benchmark.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"AIRPI", "SSB", "DPC"} <= {row["method"] for row in rows}
    shown = [line for line in capfd.readouterr().out.splitlines() if line.startswith("python -m ")]
    modules = ["training.dataset", "training.fit", "export.unet", "training.curves", "training.benchmark"]
    assert [line.split()[2] for line in shown] == modules


@pytest.mark.parametrize(
    ("config", "export"),
    [("fast_model", "export.stitched"), ("second_model", "export.to_onnx"), ("paper_unet", "export.unet")],
)
def test_every_kind_of_network_has_its_export(config, export, tmp_path, monkeypatch):
    run = []
    monkeypatch.setattr(pipeline.subprocess, "run", lambda command, check: run.append(command[2:]))
    pipeline.main(["data.toml", f"training/configs/{config}.toml", str(tmp_path), "--shards", "9", "--version", "2"])
    assert [step[0] for step in run if step[0].startswith("export")] == [export]
    assert all(step[-3:] == ["mine", "--version", "2"] for step in run if step[0] == export)
