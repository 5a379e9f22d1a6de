"""From two configuration files to a model that has been evaluated: data, training, export, curves, validation.

    python -m training.pipeline DATA_CONFIG MODEL_CONFIG FOLDER --shards 50 --name my-unet

Runs `training.dataset`, `training.fit`, the export of the network's kind, `training.curves` (of exit-wave networks) and
the validation part of `training.benchmark`, each in a process of its own, and prints every command, so that it can be
given again alone. Stop it at any time; the same command goes on. FOLDER receives `data`, `run`, `NAME.onnx`,
`curves.png`, and `validation` with tables of SSB, DPC and the model.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from training.benchmark.cases import POSITIONS
from training.config import read_config
from training.recipes import EXIT_WAVE_NETWORKS, STITCHED_KIND


def commands(arguments: argparse.Namespace) -> list[list[str]]:
    """The modules to run, in order, with their arguments."""
    folder, config = arguments.folder, str(arguments.model_config)
    data, run, model = (str(folder / name) for name in ("data", "run", f"{arguments.name}.onnx"))
    kind = read_config(arguments.model_config)["network"]["kind"]
    export = {STITCHED_KIND: "export.stitched"} | dict.fromkeys(EXIT_WAVE_NETWORKS, "export.unet")
    shards = ["--shards", str(arguments.shards), "--workers", str(arguments.workers), "--device", arguments.device]
    named = ["--name", arguments.name, "--version", arguments.version]
    validation = ["--validation", "--model", model, "--positions", str(arguments.positions)]
    steps = [
        ["training.dataset", str(arguments.data_config), data, *shards],
        ["training.fit", config, data, run],
        [export.get(kind, "export.to_onnx"), str(Path(run, "model.keras")), config, data, model, *named],
        ["training.benchmark", str(folder / "validation"), *validation, "--jobs", str(arguments.workers)],
    ]
    if kind in EXIT_WAVE_NETWORKS:
        steps.insert(3, ["training.curves", run, str(folder / "curves.png")])
    return steps


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_config", type=Path)
    parser.add_argument("model_config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, required=True, help="the data set's size, in shards")
    parser.add_argument("--name", default="mine", help="of the model")
    parser.add_argument("--version", default="1")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of simulation and validation")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="of the simulation")
    parser.add_argument("--positions", type=int, default=POSITIONS, help="of the validation scans, as there")
    for step in commands(parser.parse_args(arguments)):
        print("python -m", shlex.join(step), flush=True)
        subprocess.run([sys.executable, "-m", *step], check=True)


if __name__ == "__main__":
    main()
