"""A network of your own: train it in PyTorch, export it with the metadata of the contract, reconstruct the demo.

    python -m training.dataset training/configs/second_data.toml data/second --shards 10
    python -m examples.train_with_pytorch data/second mine.onnx

In a clone, with ``pip install -e ".[train,demo]" torch onnxscript``. See docs/bring_your_own.md.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")  # of training.batches, which needs no TensorFlow

import numpy as np
import onnx
import py4DSTEM
import torch
from torch import nn

import airpi_py4d  # noqa: F401 (gives datacubes the method)
from airpi_py4d.demo import MARGIN, demo_path
from training.batches import DOSE_RANGE, Batches
from training.dataset import KERNELS, load_shards
from training.simulation import BRIGHT_FIELD_RADIUS, DETECTOR, OBJECT

LABEL, SEED = "exit_wave_midplane", 5
BATCH, RATE = 128, 1e-3
STRENGTH_FLOOR = 0.01


class Network(nn.Module):
    """Square roots of the counts -> convolutions -> perceptron -> object patch."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(9, 48, 4, stride=4)  # 64 -> 16
        self.condition = nn.Linear(4, 48)
        self.convolutions = nn.Sequential(
            nn.SiLU(), nn.Conv2d(48, 96, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(96, 96, 3, padding=1), nn.SiLU()
        )
        self.perceptron = nn.Sequential(
            nn.Conv2d(96, 24, 1), nn.Flatten(), nn.Linear(24 * 64, 384), nn.SiLU(), nn.Linear(384, OBJECT * OBJECT * 2)
        )
        nn.init.normal_(self.perceptron[-1].weight, std=1e-3)
        self.register_buffer("vacuum", torch.tensor([1.0, 0.0]))

    def forward(self, patterns: torch.Tensor, geometry: torch.Tensor) -> torch.Tensor:
        """patterns (n, 3, 3, 64, 64) [electrons] and geometry (n, 3) to object patches (n, 16, 16, 2)."""
        counts = patterns.flatten(1, 2).clamp(min=0)
        electrons = counts.sum((1, 2, 3), keepdim=True) / 9 + 1
        features = 12 * torch.sqrt(counts / electrons) - 0.25
        level = torch.log10(electrons[:, :, 0, 0]) / 7
        condition = self.condition(torch.cat([geometry, level], 1))
        x = self.convolutions(self.patches(features) + condition[:, :, None, None])
        return self.vacuum + self.perceptron(x).reshape(-1, OBJECT, OBJECT, 2)


def loss(patch: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error of the exit wave, over that of an empty specimen plus a floor."""
    weight, change = target[..., 2:3], target[..., :2]
    error = (weight * (patch - change - torch.tensor([1.0, 0.0])) ** 2).sum((1, 2, 3))
    return (error / ((weight * change**2).sum((1, 2, 3)) + STRENGTH_FLOOR)).mean()


def train(network: Network, shards: dict, count: int) -> None:
    """One pass over `count` random batches."""
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    batches = Batches(shards, BATCH, count, LABEL, SEED)
    mean = 1.0
    for number, (inputs, target) in enumerate(torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1)):
        error = loss(network(inputs["patterns"], inputs["geometry"]), target)
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean += 0.01 * (error.item() - mean)
        if (number + 1) % 100 == 0:
            print(f"{number + 1} batches, mean error {mean:.3f}", flush=True)


def metadata(name: str, shards: dict) -> dict[str, str]:
    """What the engine must know of the model; a full list is in docs/models.md."""
    batches = Batches(shards, BATCH, 1, LABEL, SEED)
    ranges = {
        "energy": shards["parameters"][:, 0],
        "semiangle": shards["parameters"][:, 1],
        "relative_scan_step": batches.geometry[:, 0],
        "defocus_phase": batches.geometry[:, 1],
        "spherical_phase": batches.geometry[:, 2],
    }
    domain = {key: (float(values.min()), float(values.max())) for key, values in ranges.items()}
    return {
        "airpi_schema": "1",
        "name": name,
        "version": "1",
        "grid": json.dumps({"kind": "aperture", "pixels": DETECTOR, "aperture_radius": BRIGHT_FIELD_RADIUS}),
        "output": json.dumps({"kind": "object_patch", "name": "object_patch", "pixels": OBJECT}),
        "label": LABEL,
        "domain": json.dumps({**domain, "electrons_per_pattern": DOSE_RANGE}),
        "training": json.dumps({"samples": len(shards["parameters"]) * KERNELS}),
    }


def export(network: Network, path: Path, properties: dict[str, str]) -> None:
    """ONNX file with a dynamic batch and the metadata."""
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        network.eval(),
        (torch.ones(2, 3, 3, DETECTOR, DETECTOR), torch.zeros(2, 3)),
        input_names=["patterns", "geometry"],
        output_names=["object_patch"],
        dynamic_shapes={"patterns": {0: batch}, "geometry": {0: batch}},
        opset_version=18,
    )
    model = program.model_proto
    onnx.helper.set_model_props(model, properties)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def demo(model: Path) -> float:
    """xc with the truth of the demo scan that the model reaches in py4DSTEM."""
    datacube = py4DSTEM.read(str(demo_path()))
    result = datacube.airpi_reconstruct(80e3, model=model, device="cpu")
    down, right = result.metadata["gen_params"]["oversample"]
    inner = (slice(MARGIN, -MARGIN),) * 2
    images = result.data[::down, ::right][inner], datacube.tree("phase_truth").data[inner]
    return float(np.corrcoef(*(image.ravel() for image in images))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of training.dataset")
    parser.add_argument("output", type=Path, help="ONNX file to write")
    parser.add_argument("--batches", type=int, default=800, help="of 128 predictions each, to train on")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    shards = load_shards(arguments.data, sorted(int(path.stem[6:]) for path in arguments.data.glob("shard_*.npz")))
    network = Network()
    started = time.perf_counter()
    train(network, shards, arguments.batches)
    print(f"trained in {(time.perf_counter() - started) / 60:.1f} minutes")
    export(network, arguments.output, metadata(arguments.output.stem, shards))
    print(f"demo: xc {demo(arguments.output):.3f}")


if __name__ == "__main__":
    main()
