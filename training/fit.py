"""Train a network on a data set; stop it at any time, run the same command again to go on.

    python -m training.fit CONFIG DATA_FOLDER RUN_FOLDER

With `initial_model` in the configuration, training starts from the weights of that Keras file. RUN_FOLDER receives
`checkpoint.keras` (weights and optimiser, after every epoch), `history.csv` and `model.keras` (when the last epoch is
done). Batches depend on the seed and the epoch alone, so a resumed run goes on as if it had
never stopped.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path

import keras
import numpy as np
from tqdm import tqdm

from training.batches import Batches
from training.config import read_config
from training.dataset import load_shards
from training.losses import StitchedExitWaveError, exit_wave_error, phase_scores
from training.networks import NETWORKS

VALIDATION_DRAWS = 4


def learning_rate(epoch: int, config: dict) -> float:
    """Cosine decay from the configured rate to 0 over all epochs, a tenth of the rate in the first."""
    if epoch == 0:
        return float(config["learning_rate"] / 10)
    return float(config["learning_rate"] * 0.5 * (1 + np.cos(np.pi * epoch / config["epochs"])))


def validate(model: keras.Model, shards: dict, config: dict) -> dict[str, float]:
    """Exit wave error over an empty specimen's, phase correlation and slope, at every validation dose.

    Each is that of the mean of VALIDATION_DRAWS predictions from independent counts, about what an image averages.
    """
    scores = {}
    for dose in config["validation_doses"]:
        mean = np.zeros(0, np.float32)
        for draw in range(VALIDATION_DRAWS // 2):
            samples = 2 * config["validation_samples"]
            batches = Batches(shards, samples, 1, config["label"], config["seed"], draw, dose)
            inputs, target = batches[0]
            patches = model.predict(inputs, batch_size=config["batch_size"], verbose=0)
            halves = patches.reshape(2, -1, *patches.shape[1:]).sum(0) / VALIDATION_DRAWS
            mean = halves if draw == 0 else mean + halves
        target = target[: len(mean)]
        error, strength = (np.asarray(value) for value in exit_wave_error(target, mean))
        name = f"{dose:g}" if dose else "no noise"
        scores[f"error at {name}"] = float(error.sum() / strength.sum())
        scores[f"xc at {name}"], scores[f"slope at {name}"] = phase_scores(target, mean)
    return scores


def save_atomically(model: keras.Model, path: Path) -> None:
    """Write beside `path` first, so that a kill leaves the last whole file."""
    unfinished = path.with_name(f"unfinished_{path.name}")
    model.save(unfinished)
    os.replace(unfinished, path)


def fit(config: dict, data: Path, run: Path) -> None:
    """Train, or go on training, as the module's docstring says."""
    run.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(config["seed"])
    numbers = sorted(int(path.stem.split("_")[1]) for path in data.glob("shard_*.npz"))
    held_out = config["validation_shards"]
    training, validation = load_shards(data, numbers[held_out:]), load_shards(data, numbers[:held_out])
    checkpoint, history = run / "checkpoint.keras", run / "history.csv"
    if checkpoint.exists():
        model = keras.saving.load_model(checkpoint)
    else:
        if "initial_model" in config:
            model = keras.saving.load_model(config["initial_model"], compile=False)
        else:
            network = dict(config["network"])
            model = NETWORKS[network.pop("kind")](**network)
        optimizer = keras.optimizers.AdamW(weight_decay=config["weight_decay"], global_clipnorm=1.0)
        model.compile(optimizer, StitchedExitWaveError(config["strength_floor"]))
    first = int(model.optimizer.iterations) // config["batches_per_epoch"]
    print(f"{len(numbers)} shards, {model.count_params()} parameters, from epoch {first}", flush=True)
    for epoch in tqdm(range(first, config["epochs"]), initial=first, total=config["epochs"], unit="epoch"):
        batches = Batches(
            training,
            config["batch_size"],
            config["batches_per_epoch"],
            config["label"],
            config["seed"],
            epoch,
            stitched=config["stitched"],
            workers=2,
            max_queue_size=8,
        )
        model.optimizer.learning_rate.assign(learning_rate(epoch, config))
        loss = model.fit(batches, initial_epoch=epoch, epochs=epoch + 1, shuffle=False, verbose=0).history["loss"][0]
        row = {"epoch": epoch, "loss": loss}
        if (epoch + 1) % config["validate_every"] == 0 or epoch + 1 == config["epochs"]:
            row |= validate(model, validation, config)
            print({name: round(value, 4) for name, value in row.items()}, flush=True)
            new = not history.exists()
            with open(history, "a", newline="") as file:
                writer = csv.DictWriter(file, row)
                if new:
                    writer.writeheader()
                writer.writerow(row)
        save_atomically(model, checkpoint)
    save_atomically(model, run / "model.keras")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("config", "data", "run"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    fit(read_config(arguments.config), arguments.data, arguments.run)


if __name__ == "__main__":
    main()
