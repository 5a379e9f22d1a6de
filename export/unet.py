"""Exit-wave networks of `training.unet` to ONNX, with a parity check and the metadata that the engine reads.

    python -m export.unet RUN_FOLDER/model.keras MODEL_CONFIG DATA_FOLDER OUTPUT.onnx --name my-unet --version 1

The file computes in float32, whatever precision the network was trained in. Prints the largest difference between Keras
and ONNX Runtime on simulated inputs, and fails above the tolerance.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import keras
import numpy as np
import onnx
from numpy.typing import NDArray

from export.exit_wave import metadata, object_model
from export.to_onnx import TOLERANCE, convert, domain, parity
from training.batches import geometry
from training.config import read_config
from training.dataset import KERNELS, PARAMETERS, load_shards
from training.exit_wave_batches import DOSE_RANGE, ExitWaveBatches
from training.recipes import recipe
from training.supercell import PARAMETERS as DETECTOR_PARAMETERS


def contract_inputs(shards: dict[str, NDArray], count: int, label: str) -> dict[str, NDArray]:
    """Simulated `patterns` and `geometry` (n, 5) of `count` kernels at random doses."""
    batches = ExitWaveBatches(shards, count, label, seed=0, batches=1, augment=False)
    inputs, _ = batches[0]
    rows = shards["parameters"][np.resize(batches.order, count) // KERNELS]
    radius = rows[:, [DETECTOR_PARAMETERS.index("bright_field_radius")]]
    columns = [geometry(rows[:, : len(PARAMETERS)]), radius, inputs["scan_step"]]
    return {"patterns": inputs["patterns"], "geometry": np.concatenate(columns, 1).astype(np.float32)}


def trained_network(path: Path, config: dict) -> keras.Model:
    """The configuration's network in Keras' default precision, with the weights of a file."""
    weights = keras.saving.load_model(path, compile=False).get_weights()
    network = recipe(config).network()
    network.set_weights(weights)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "config", "data", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--version", required=True)
    arguments = parser.parse_args()
    config = read_config(arguments.config)
    numbers = sorted(int(path.stem.split("_")[1]) for path in arguments.data.glob("shard_*.npz"))
    training = load_shards(arguments.data, numbers[config["validation_shards"] :], ("parameters",))["parameters"]
    description = json.loads((arguments.data / "config.json").read_text())
    model = object_model(trained_network(arguments.model, config), "reciprocal")
    properties = metadata(
        arguments.name,
        arguments.version,
        domain(training[:, : len(PARAMETERS)]) | {"electrons_per_pattern": DOSE_RANGE},
        normalisation="inside the graph: counts to the power 0.1, weighted by position, standardised",
        label=f"{config['label']}: exit wave over incident wave",
        license="GPL-3.0-or-later",
        training=json.dumps(
            {
                "samples": len(training) * KERNELS,
                "data_configuration": description,
                "data_configuration_sha256": hashlib.sha256(
                    json.dumps(description, sort_keys=True).encode()
                ).hexdigest(),
                "configuration": config,
            }
        ),
    )
    graph = convert(model, properties)
    difference = parity(model, graph, contract_inputs(load_shards(arguments.data, numbers[:1]), 32, config["label"]))
    print(f"Keras - ONNX Runtime, simulated inputs: at most {difference:.2e}")
    if difference > TOLERANCE:
        raise SystemExit(f"difference above {TOLERANCE}: nothing written")
    onnx.save(graph, arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
